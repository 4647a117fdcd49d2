"""How fast a server is, from what its engine counted: `Speed` by least squares.

An engine's clock (engine/step_clock) keeps the parts of a step apart, so each part is a small
problem of its own. Over windows w of some steps each, with the weight of 1 / sqrt(steps):

    step_s[w]     = schedule x steps[w]
    trunk_s[w]    = sum over buckets b of buckets[b] x steps[w, b]
    experts_s[w]  = call x calls[w] + expert x experts[w] + routing x steps[w]
    exchange_s[w] = round x rounds[w] + second_per_byte x bytes[w]

`Speed.step` is schedule + routing: what a step costs, whatever is in it. Windows have to differ: a
server that rests, one with long prompts, one with many short requests. No speed is below 0: a term
that would be is left out. Waiting for other servers is in none of the parts. `Server.delay` comes
from a ping, `Speed.request` from a request on an idle cluster; what a row costs besides its bytes
is in the seconds per byte.

Where servers share cores, fit them one by one while the others rest, and say `Scenario.cores`; or
fit them together under load and leave `cores` out. Doing both counts the sharing twice.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from dance_jax.config import UserError
from dance_jax.engine.report import EngineReport
from dance_jax.placement.simulate import Server, Speed, Work
from dance_jax.placement.simulate.scenario import Bucket


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What was found out about a server."""

    speed: Speed
    #: Bits per second of its link; infinite: its bytes cost nothing, or none were sent.
    bandwidth: float
    #: By part of the steps: share of its seconds, over all windows, by which the fit is off.
    errors: dict[str, float]

    def server(self, devices: int, slots: int, delay: float = 0.0) -> Server:
        """As `simulate` wants it."""
        return Server(devices, slots, self.speed, self.bandwidth, delay)


def measured(before: EngineReport, after: EngineReport, buckets: Mapping[Bucket, int]) -> Work:
    """What an engine did between two of its reports.

    Args:
        buckets: steps in each bucket meanwhile, of which a report says nothing; where there was
            no work, the smallest. Counted by who drives the engine, known from the load, or those
            of a simulation of the same requests (`Result.work`).
    """

    def part(*names: str) -> float:
        return sum(after.step_seconds[name] - before.step_seconds[name] for name in names)

    moved = after.sums.moved - before.sums.moved
    return Work(
        steps=after.steps - before.steps,
        buckets=collections.Counter(buckets),
        calls=after.calls_served - before.calls_served,
        rounds=round(moved.calls),
        bytes=round(moved.bytes),
        step_s=part("schedule", "output"),
        trunk_s=part("compute"),
        exchange_s=moved.seconds,
        experts_s=after.expert_seconds - before.expert_seconds,
    )


def fit(windows: Sequence[Work], block_size: int) -> Fitted:
    """The speeds of one server.

    Args:
        windows: what it did, in steps of different kinds.
        block_size: tokens of a row of a slice, for `Speed.token`.

    Raises:
        UserError: there are no steps, some are in no bucket, or the windows do not tell two costs
            apart.
    """
    windows = [window for window in windows if window.steps]
    if not windows:
        raise UserError("fit: no steps were measured")
    for number, window in enumerate(windows):
        if window.buckets.total() != window.steps:
            raise UserError(
                f"fit: window {number} has {window.steps} steps, and buckets of "
                f"{window.buckets.total()}; count a step without work in the smallest"
            )
    buckets = sorted({bucket for window in windows for bucket in window.buckets})
    padded = [
        sum(n * (decode + rows * block_size) for (decode, rows), n in window.buckets.items())
        for window in windows
    ]

    def of_part(part: str, amounts: Mapping[str, Sequence[float]]) -> Solved:
        seconds = [getattr(window, part) for window in windows]
        return solve(part, seconds, amounts, [window.steps for window in windows])

    step = of_part("step_s", {"steps": [w.steps for w in windows]})
    trunk = of_part("trunk_s", {f"bucket {b}": [w.buckets[b] for w in windows] for b in buckets})
    token = of_part("trunk_s", {"tokens": padded})
    experts = of_part(
        "experts_s",
        {
            "calls": [w.calls for w in windows],
            "experts": [w.experts for w in windows],
            "steps": [w.steps for w in windows],
        },
    )
    exchange = of_part(
        "exchange_s",
        {"rounds": [w.rounds for w in windows], "bytes": [w.bytes for w in windows]},
    )
    speed = Speed(
        step=step.cost["steps"] + experts.cost["steps"],
        token=token.cost["tokens"],
        buckets={bucket: trunk.cost[f"bucket {bucket}"] for bucket in buckets},
        call=experts.cost["calls"],
        expert=experts.cost["experts"],
        round=exchange.cost["rounds"],
    )
    byte_s = exchange.cost["bytes"]
    errors = {"step": step, "trunk": trunk, "experts": experts, "exchange": exchange}
    return Fitted(
        speed,
        8 / byte_s if byte_s > 0 else math.inf,
        {name: solved.error for name, solved in errors.items()},
    )


@dataclasses.dataclass(frozen=True)
class Solved:
    """Attributes:
    cost: seconds of each amount.
    error: share of all seconds by which it is off.
    """

    cost: dict[str, float]
    error: float


def solve(
    part: str,
    seconds: Sequence[float],
    amounts: Mapping[str, Sequence[float]],
    sizes: Sequence[float],
) -> Solved:
    """Costs of at least 0 by weighted least squares; 0 for amounts that are 0 everywhere.

    Args:
        part: of the time, for the message.
        seconds: in it, of each window.
        amounts: that cost something, of each window.
        sizes: of the windows; one counts with 1 / sqrt(its size).

    Raises:
        UserError: the windows do not tell two costs apart.
    """
    seconds_w, weight_w = np.array(seconds, float), 1 / np.sqrt(sizes)
    amount_wa = np.array(list(amounts.values()), float).T
    # Columns of one size, so that rank means something.
    size_a = amount_wa.max(0)
    used = size_a > 0
    names = [name for name, is_used in zip(amounts, used, strict=True) if is_used]
    scaled_wa = amount_wa[:, used] / size_a[used] * weight_w[:, None]
    if np.linalg.matrix_rank(scaled_wa, tol=1e-6 * math.sqrt(len(seconds))) < len(names):
        raise UserError(
            f"fit: {part}: {len(seconds)} windows do not tell {', '.join(names)} apart; measure "
            "more windows with other loads"
        )
    scaled_a = np.zeros(len(used))
    scaled_a[used] = _not_negative(scaled_wa, seconds_w * weight_w)
    cost_a = np.divide(scaled_a, size_a, out=np.zeros(len(used)), where=used)
    total = seconds_w.sum()
    error = float(np.abs(amount_wa @ cost_a - seconds_w).sum() / total) if total > 0 else 0.0
    return Solved(dict(zip(amounts, cost_a.tolist(), strict=True)), error)


def _not_negative(amount_wa: np.ndarray, seconds_w: np.ndarray) -> np.ndarray:
    """Least squares with the most negative cost left out, until none is."""
    left = np.arange(amount_wa.shape[1])
    out_a = np.zeros(amount_wa.shape[1])
    while left.size:
        cost_a = np.linalg.lstsq(amount_wa[:, left], seconds_w, rcond=None)[0]
        if cost_a.min() >= 0:
            out_a[left] = cost_a
            break
        left = np.delete(left, cost_a.argmin())
    return out_a
