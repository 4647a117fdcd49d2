"""Figures of other programs on the same traces, as published with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

#: Figures by column.
Figures = Mapping[str, float]


def _columns(*names: str) -> Callable[..., Figures]:
    return lambda *figures: dict(zip(names, figures, strict=True))


_lock_step = _columns("remote", "transfers", "busiest", "load")
_calls = _columns("any_miss", "device")

#: gpt-oss-20b on MMLU-Pro, `setups.reference`. Of equal servers, tokens visit the one with the
#: lowest number. `latency` is an annealing on the share of tokens that miss any expert.
REFERENCE: Mapping[str, Figures] = {
    "uniform": {**_lock_step(0.662, 1.641, 1.951, 0.277), **_calls(0.989, 0.254)},
    "redundance": _lock_step(0.560, 1.313, 1.801, 0.287),
    "layers": {"transfers": 0.574, **_calls(0.574, 0.255)},
    "eplb": {**_lock_step(0.496, 1.117, 1.508, 0.285), **_calls(0.895, 0.263)},
    "dance": {**_lock_step(0.367, 0.947, 1.499, 0.298), **_calls(0.798, 0.269)},
    "optimal": {**_lock_step(0.350, 0.885, 1.416, 0.319), **_calls(0.742, 0.286)},
    "latency": {"any_miss": 0.532, "transfers": 0.551},
}
#: gpt-oss-20b, counts of law | math | health alone.
COUNTS: Mapping[str, Figures] = {
    "uniform": {"remote": 0.661},
    "redundance": {"remote": 0.561},
    "eplb": {"remote": 0.474},
    "dance": {"remote": 0.26},
    "optimal": {"remote": 0.236},
}
