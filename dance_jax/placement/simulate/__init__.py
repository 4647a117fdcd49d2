"""What requests would wait on servers that are not here: an event-driven simulation, no model.

    result = simulate(Scenario(servers, model, config, placement, routes, requests))
    result.latency.mean, result.ttft.p99, result.sent_bytes

Two ways to serve, and two to send, in any combination:

- `lock_step` (as this project's engine): all servers do every step together, and per MoE layer each
  waits for all (lock_step.py). Otherwise (as the paper's system) every server steps on its own, and
  its calls queue at the links and devices of those that hold the experts (independent.py).
- `messages`: one hidden state per token and visited server, by the rule of placement/visit, or one
  per remote expert call, to one of the expert's holders (flows.py).

Requests become steps by the engine's own rule (batches.py). What is left out:

- Blocks of the KV cache never run out, no prompt begins like another, and a step's trunk costs the
  same however long the contexts are.
- A step's message rounds do not overlap with its computation (nor do they in the engine). A link
  takes rows at its rate in each direction, nothing is lost, and TCP is at its full rate at once.
- A request's tokens are consecutive rows of its server's routes, from a random one on.
- Nothing varies but arrivals, lengths and routes: computation takes what `Speed` says.
- Out of lock step a job joins a queue when the layer that causes it begins, not when its message
  arrives, a difference of one message's time.
"""

from dance_jax.placement.simulate import independent, lock_step
from dance_jax.placement.simulate.result import Result, Spread, Work
from dance_jax.placement.simulate.scenario import Model, Requests, Scenario, Server, Speed, cost_of

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
