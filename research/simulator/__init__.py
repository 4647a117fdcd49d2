"""What requests would wait on servers that are not here: an event-driven simulation, no model.

    result = simulate(Scenario(servers, model, config, placement, routes, requests))
    result.latency.mean, result.ttft.p99, result.sent_bytes

Ways to serve:

- `lock_step=False`, `messages="server"`: this engine with expert calls. Every server steps on its
  own. A layer sends one hidden state per token and visited server, by the rule of placement/visit,
  and computes its own experts meanwhile. A thread of each server answers calls, those that wait for
  the same layer in one go, beside its steps or in turn with them. A call that is late goes to other
  holders too. All that a server computes is within its quota of cores.
- `lock_step=False`, `messages="expert"`: the paper's system. A message for each remote expert call,
  to one of the expert's holders, whose devices compute it when its turn comes.
- `lock_step=True`: this engine's other exchange. All servers do every step together, and per MoE
  layer each waits for all (lock_step.py), with either kind of messages.

Requests become steps by the engine's own rule (batches.py). What is left out:

- Blocks of the KV cache never run out, no prompt begins like another, and a step's trunk costs as
  much in each layer as in the others.
- A link takes rows at its rate in each direction, nothing is lost, and TCP is at its full rate at
  once.
- A request's tokens are consecutive rows of its server's routes, from a random one on.
- Nothing varies but arrivals, lengths and routes: computation takes what `Speed` says.
- Out of lock step: connections share a link evenly, but a message that is under way is not slowed
  down by those that come after it; it uses both links from when it is sent. Shared experts are
  computed before calls go out, not meanwhile; an expert is computed on the device that holds it. No
  call is refused, lost or given up: one that nobody else could answer is waited for.
- In lock step message rounds do not overlap with computation (nor do they in the engine).
"""

from research.simulator import independent, lock_step
from research.simulator.result import Result, Spread, Work
from research.simulator.scenario import Model, Requests, Scenario, Server, Speed, cost_of

__all__ = [
    "Model",
    "Requests",
    "Result",
    "Scenario",
    "Server",
    "Speed",
    "Spread",
    "Work",
    "cost_of",
    "simulate",
]


def simulate(scenario: Scenario) -> Result:
    """Serves all requests of a scenario; equal scenarios give equal results."""
    return (lock_step if scenario.lock_step else independent).run(scenario)
