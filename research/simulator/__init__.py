"""How long requests would wait on servers that do not exist: an event-driven simulation, no model.

    result = simulate(Scenario(servers, model, config, placement, routes, requests))
    result.latency.mean, result.ttft.p99, result.sent_bytes

Ways of serving:

- `lock_step=False`, `messages="server"`: this engine with expert calls. Every server steps on its
  own. A layer sends one hidden state per token and visited server, by the rule of placement/visit,
  and computes its own experts meanwhile. A thread of each server answers calls, all that wait for
  the same layer at once, beside the server's steps or between their parts. A late call is repeated
  to other holders. Everything that a server computes draws on its quota of cores.
- `lock_step=False`, `messages="expert"`: the paper's system. Each remote expert call is a message
  to one of the expert's holders, whose devices compute calls one after another.
- `lock_step=True`: this engine with collectives. All servers do every step together, and in each
  MoE layer every server waits for all others (lock_step.py), with either kind of messages.

Requests become steps by the engine's own rule (batches.py). Simplifications:

- KV blocks never run out, no two prompts share a prefix, and a step's trunk costs the same in every
  layer.
- A link moves rows at its rate in each direction, nothing is lost, and TCP reaches its full rate at
  once.
- A request's tokens are consecutive rows of its server's routes, from a random row on.
- Only arrivals, lengths and routes vary: computation takes the seconds that `Speed` gives.
- Without lock step: connections share a link evenly, but a message under way is not slowed down by
  later ones, and it occupies both links from the moment when it is sent. Shared experts are
  computed before calls go out instead of meanwhile. An expert is computed on the device that holds
  it. No call is refused, lost or given up: a server waits for a call that nobody else can answer.
- In lock step messages do not overlap with computation (nor do they in the engine).
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
