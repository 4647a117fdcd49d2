"""Counts that fade with time."""

from __future__ import annotations

import numpy as np

from dance_jax.config import UserError


def decay_rate(half_life: float | None) -> float:
    """The decay rate, per second, of a half-life in seconds; 0 for None: counts never fade.

    Raises:
        UserError: the half-life is not a finite number above 0.
    """
    if half_life is None:
        return 0.0
    if not (np.isfinite(half_life) and half_life > 0):
        raise UserError(f"half-life: a number of seconds above 0 is needed; got {half_life}")
    return float(np.log(2.0) / half_life)


class DecayedCounts:
    """A sum of counts, each of which halves with every half-life since it was added.

    Args:
        half_life_s: seconds; None: counts accumulate forever, as in arXiv:2508.12851.
    """

    def __init__(self, half_life_s: float | None):
        self._rate = decay_rate(half_life_s)
        self._value = np.zeros((), np.float64)
        self._time: float | None = None

    def clear(self, index: int) -> None:
        """Set the counts of one index of the first dimension to 0."""
        self._value[index] = 0.0

    def add(self, delta: np.ndarray, now: float) -> None:
        """Adds what was counted since the last call.

        Args:
            delta: at least 0, always of one shape, e.g. [layers, experts]; may be what `value`
                returned in an earlier run.
            now: seconds of any clock; nothing fades while it goes back.

        Raises:
            ValueError: counts are of another shape, below 0 or not finite.
        """
        delta = np.asarray(delta, np.float64)
        if self._time is not None and delta.shape != self._value.shape:
            raise ValueError(f"counts {delta.shape} to add to {self._value.shape}")
        if not (np.isfinite(delta) & (delta >= 0)).all():
            raise ValueError("counts must be finite and at least 0")
        self._value = self.value(now) + delta
        self._time = now if self._time is None else max(now, self._time)

    def value(self, now: float) -> np.ndarray:
        """The faded sum at `now`, float64; 0 of shape [] before anything was added."""
        seconds = 0.0 if self._time is None else max(now - self._time, 0.0)
        return self._value * np.exp(-self._rate * seconds)
