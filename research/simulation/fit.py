"""Fits the `Speed` of a server to what its engine counted, by least squares.

Everything that a server computes, for its own steps or for calls of others, takes processor
seconds, and as many with a quota that stops the server as without. Over windows w of a run:

    processor_s[w] = sum over buckets b of bucket[b] x steps[w, b] + position x positions[w]
                     + call x calls[w] + message x messages[w] + row x rows[w]

The cost of a bucket is that of a whole step, including scheduling and text, without attention.
Attention costs by the positions that tokens attend to. Every device computes the whole bucket, so a
step without stops takes bucket[b] / devices. Windows have to differ: a server that only answers
calls, one with long prompts, one with many short requests. No speed is below 0: terms that would be
are left out. `Server.delay` comes from a ping, `Speed.request` from a request to an idle cluster.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from dance_jax.config import UserError
from research.simulator import Speed, Work


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A fitted speed.

    Attributes:
        speed: of a server.
        error: the absolute errors of all windows, as a share of all seconds.
    """

    speed: Speed
    error: float


def fit(windows: Sequence[Work], devices: int, block_size: int) -> Fitted:
    """Fits the speed of one server.

    Args:
        windows: the server's work in periods of different load.
        devices: number of its devices.
        block_size: tokens of a slice row, for `Speed.token`.

    Raises:
        UserError: there are no steps, or the windows do not tell two costs apart.
    """
    # The processor clock of a virtual machine may go back by milliseconds.
    windows = [window for window in windows if window.processor_s > 0]
    buckets = sorted({bucket for window in windows for bucket in window.buckets})
    if not buckets:
        raise UserError("fit: no steps were measured")
    amounts = {f"bucket {b}": [window.buckets[b] for window in windows] for b in buckets}
    others = ("positions", "calls", "messages", "rows")
    amounts |= {name: [getattr(window, name) for window in windows] for name in others}
    cost, error = solve([window.processor_s for window in windows], amounts)
    step_s = {bucket: cost[f"bucket {bucket}"] / devices for bucket in buckets}
    steps = {bucket: sum(window.buckets[bucket] for window in windows) for bucket in buckets}
    tokens = sum(n * (decode + rows * block_size) for (decode, rows), n in steps.items())
    speed = Speed(
        token=sum(n * step_s[bucket] for bucket, n in steps.items()) / tokens,
        buckets=step_s,
        position=cost["positions"],
        call=cost["calls"],
        message=cost["messages"],
        row=cost["rows"],
    )
    return Fitted(speed, error)


def solve(
    seconds: Sequence[float], amounts: Mapping[str, Sequence[float]]
) -> tuple[dict[str, float], float]:
    """Costs of at least 0 by least squares; 0 for amounts that are 0 everywhere.

    Args:
        seconds: of each window, above 0; a window weighs 1 / sqrt(seconds).
        amounts: by name, the amount of each window.

    Returns:
        Seconds per unit of each amount; the absolute errors as a share of all seconds.

    Raises:
        UserError: the windows do not tell two costs apart.
    """
    seconds_w, weight_w = np.array(seconds, float), 1 / np.sqrt(seconds)
    amount_wa = np.array(list(amounts.values()), float).T
    # Columns are scaled to one size, so that the rank does not depend on units.
    size_a = amount_wa.max(0)
    used = size_a > 0
    names = [name for name, is_used in zip(amounts, used, strict=True) if is_used]
    scaled_wa = amount_wa[:, used] / size_a[used] * weight_w[:, None]
    if np.linalg.matrix_rank(scaled_wa, tol=1e-6 * math.sqrt(len(seconds))) < len(names):
        raise UserError(
            f"fit: {len(seconds)} windows do not tell {', '.join(names)} apart; measure more "
            "windows with other loads"
        )
    scaled_a = np.zeros(len(used))
    scaled_a[used] = _not_negative(scaled_wa, seconds_w * weight_w)
    cost_a = np.divide(scaled_a, size_a, out=np.zeros(len(used)), where=used)
    error = float(np.abs(amount_wa @ cost_a - seconds_w).sum() / seconds_w.sum())
    return dict(zip(amounts, cost_a.tolist(), strict=True)), error


def _not_negative(amount_wa: np.ndarray, seconds_w: np.ndarray) -> np.ndarray:
    """Least squares, repeated without the most negative cost until no cost is negative."""
    left = np.arange(amount_wa.shape[1])
    out_a = np.zeros(amount_wa.shape[1])
    while left.size:
        cost_a = np.linalg.lstsq(amount_wa[:, left], seconds_w, rcond=None)[0]
        if cost_a.min() >= 0:
            out_a[left] = cost_a
            break
        left = np.delete(left, cost_a.argmin())
    return out_a
