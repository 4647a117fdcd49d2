"""Figures of other programs on the same traces, as published with them."""

from __future__ import annotations

from collections.abc import Mapping

#: Column -> figure.
Figures = Mapping[str, float]


def _routes(remote: float, transfers: float, busiest: float, load: float) -> Figures:
    return {"remote": remote, "transfers": transfers, "busiest": busiest, "load": load}


#: gpt-oss-20b on MMLU-Pro, `setups.reference`. `latency`: annealing on 0.3 transfers + busiest
#: + load.
REFERENCE: Mapping[str, Figures] = {
    "uniform": _routes(0.662, 1.641, 1.951, 0.277),
    "redundance": _routes(0.560, 1.313, 1.801, 0.287),
    "eplb": _routes(0.496, 1.117, 1.508, 0.285),
    "dance": _routes(0.367, 0.947, 1.499, 0.298),
    "optimal": _routes(0.350, 0.885, 1.416, 0.319),
    "latency": _routes(0.399, 0.811, 1.141, 0.313),
}
#: gpt-oss-20b, counts of law | math | health alone.
COUNTS: Mapping[str, Figures] = {
    "uniform": {"remote": 0.661},
    "redundance": {"remote": 0.561},
    "eplb": {"remote": 0.474},
    "dance": {"remote": 0.26},
    "optimal": {"remote": 0.236},
}
