"""What the loss of each server would mean: who loads how much, and who waits how long."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from dance_jax.config import ServerSpec
from dance_jax.memory import format_bytes
from dance_jax.placement.core import Layout
from dance_jax.placement.migration import migration_seconds
from dance_jax.placement.recovery import recovery, uncovered

#: Loading speed assumed until a server has loaded something: fixed seconds per expert; and bytes
#: per second, unless the rate of its disk was measured.
READ_S, READ_RATE = 0.01, 200e6
#: Most bytes that a device loads in one batch while sequences wait for them.
RECOVERY_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of one server, while all others run."""

    #: Name of the lost server.
    server: str
    #: Experts that no other server holds.
    experts: int
    #: Names of the servers that load such experts, and how many each loads.
    loads: tuple[tuple[str, int], ...]
    #: Names of the servers whose users call such experts.
    waiting: tuple[str, ...]
    #: Seconds of loading.
    seconds: float
    #: Experts for which the others lack memory.
    short: int


def load_seconds(server: ServerSpec, expert_bytes: int) -> float:
    """Seconds in which a server is expected to load one expert while sequences wait."""
    return READ_S + expert_bytes / (server.read_rate or READ_RATE)


def most_urgent_loads(expert_bytes: int) -> int:
    """Most experts that a device loads in one batch while sequences wait for them."""
    return max(1, RECOVERY_BYTES // expert_bytes)


def losses(
    layout: Layout, servers: Sequence[ServerSpec], counts: np.ndarray, expert_bytes: int
) -> tuple[Loss, ...]:
    """The loss of each server, computed as the service recovers from it.

    Args:
        layout: the layout in force.
        servers: by rank.
        counts: [servers, layers, experts], expert calls of each server's requests. A server without
            any is taken to call all experts.
        expert_bytes: bytes of one expert.
    """
    counts = np.where(counts.any((1, 2), keepdims=True), counts, 1)
    names = [server.name for server in servers]
    rates = [expert_bytes / load_seconds(server, expert_bytes) for server in servers]
    found = []
    for lost, name in enumerate(names):
        present = [n for n in range(len(names)) if n != lost]
        lacking_le = uncovered(layout, present)
        batches = recovery(layout, layout, present, counts, most_urgent_loads(expert_bytes))
        loads = [len([load for each in batches for load in each.loads(n)]) for n in present]
        waiting = [n for n in present if counts[n][lacking_le].any()]
        found.append(
            Loss(
                name,
                int(lacking_le.sum()),
                tuple((names[n], count) for n, count in zip(present, loads, strict=True) if count),
                tuple(names[n] for n in waiting),
                migration_seconds(batches, expert_bytes, rates),
                int(lacking_le.sum()) - sum(loads),
            )
        )
    return tuple(found)


def loss_lines(
    found: Sequence[Loss], servers: Sequence[ServerSpec], holders: int, expert_bytes: int
) -> Iterator[str]:
    """Say what each loss means, in one line each, or in one for all if nobody waits.

    Args:
        found: the losses; none: nothing is said.
        servers: by rank.
        holders: servers that hold each expert at least.
        expert_bytes: bytes of one expert.
    """
    if found and not any(loss.experts for loss in found):
        most = max(holders - 1, 1)
        lost = "one server is" if most == 1 else f"{most} servers are"
        yield f"If any {lost} lost, nobody waits: every expert has another holder."
        return
    for loss in found:
        yield f"If {loss.server} is lost, {_consequence(loss, expert_bytes)}"
    if any(loss.loads for loss in found):
        measured = [
            f"{server.name} reads {format_bytes(round(server.read_rate))}"
            for server in servers
            if server.read_rate
        ]
        unknown = [server.name for server in servers if not server.read_rate]
        if unknown:
            measured.append(
                f"{', '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} assumed to read "
                f"{format_bytes(round(READ_RATE))}"
            )
        yield (
            f"Of their models, {', '.join(measured)} per second; each expert takes "
            f"{1000 * READ_S:g} ms more. A server that falls silent counts as lost after 3 s."
        )


def _consequence(loss: Loss, expert_bytes: int) -> str:
    if not loss.experts:
        return "nobody waits: every expert has another holder."
    text = f"{_experts(loss.experts, 'has', 'have')} no other holder"
    if loss.loads:
        who = ", ".join(f"{name} loads {count}" for name, count in loss.loads)
        size = format_bytes(expert_bytes * sum(count for _, count in loss.loads))
        text += f": {who} ({size})"
    if loss.short:
        return (
            f"{text}; the memory of the others does not suffice: "
            f"{_experts(loss.short, 'lacks', 'lack')} {format_bytes(expert_bytes * loss.short)}, "
            f"and requests wait until {loss.server} is back."
        )
    if not loss.waiting:
        return f"{text}; nobody is known to call them."
    return f"{text}; users of {', '.join(loss.waiting)} wait about {loss.seconds:.2g} s."


def _experts(count: int, one: str, many: str) -> str:
    return f"1 expert {one}" if count == 1 else f"{count:,} experts {many}"
