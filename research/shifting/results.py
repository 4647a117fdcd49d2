"""Results of all sections: their figures, targets, and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.live.watch import Watched
from benchmarks.serving.agreement import first_difference
from benchmarks.targets import Target
from dance_jax.bench.client import Answer

from .runs import Pause, Shift

#: Targets of `shift`. LATENCY: mean latency with migration over that without. REMOTE: remote share
#: after one migration, over that of servers placed for the second task. UNSAVED: share of the bytes
#: saved by servers placed for the second task that one migration does not save. MARGIN: the largest
#: margin at which greedy outputs may differ.
LATENCY, REMOTE, UNSAVED, MARGIN = 0.9, 1.05, 0.05, 1e-3
#: Targets of `pause`. The longest step may exceed the median step by STEP_S seconds or STEP_MEDIANS
#: medians, whichever is more. GAPS: p99 gap between tokens during a migration, over that before.
STEP_S, STEP_MEDIANS, GAPS = 0.05, 2.0, 1.5


@dataclasses.dataclass
class Results:
    """Results by section; None if not measured."""

    shift: Shift | None = None
    accumulate: Watched | None = None
    pause: Pause | None = None
    stable: Watched | None = None

    def targets(self) -> list[Target]:
        """Return the targets of the measured sections."""
        found: list[Target] = []
        if self.shift is not None:
            found += _shift(self.shift)
        if self.pause is not None:
            found += _pause(self.pause)
        if self.stable is not None:
            moves = len(self.stable.moves_s)
            found.append(Target("migrations under a stable workload", 0, moves))
        return found


def latencies_s(answers: Iterable[Answer], since_s: float = 0.0) -> list[float]:
    """Return the latencies of complete answers whose requests were due at `since_s` or later."""
    return [a.end_s - a.due_s for a in answers if a.complete and a.due_s >= since_s]


def mean_latency_s(run: Watched, since_s: float = 0.0) -> float:
    return float(np.mean(latencies_s(run.answers, since_s)))


def after_shift(found: Shift) -> list[float]:
    """Return the seconds at which migrations after the shift were complete."""
    return [moment for moment in found.move.moves_s if moment >= found.plan.shift_s]


def differences(ours: Watched, theirs: Watched) -> list[float]:
    """Return the margins of the first differences between answers to the same requests."""
    pairs = zip(ours.answers, theirs.answers, strict=True)
    found = (first_difference(a.tokens, b.tokens) for a, b in pairs if a.complete and b.complete)
    return [difference.margin for difference in found if difference is not None]


def failed(runs: Iterable[Watched]) -> int:
    """Count the answers that are not complete."""
    return sum(not answer.complete for run in runs for answer in run.answers)


def _shift(found: Shift) -> list[Target]:
    moves, margins = after_shift(found), differences(found.move, found.stay)
    ratio = mean_latency_s(found.move) / mean_latency_s(found.stay)
    targets = [
        Target("mean latency with migration / without", LATENCY, ratio),
        # No migration is as wrong as two.
        Target("migrations after the shift, difference from one", 0, abs(len(moves) - 1)),
        Target(
            "margin of outputs that differ from those without migration",
            MARGIN,
            max([0.0, *margins]),
        ),
        Target("incomplete answers", 0, failed([found.stay, found.move, found.placed])),
    ]
    if not moves:
        return targets
    remote = found.move.remote_share(moves[0]) / found.placed.remote_share(0.0)
    stays, after, placed = (
        sum(run.sent_per_call(since_s))
        for run, since_s in (
            (found.stay, found.plan.shift_s),
            (found.move, moves[0]),
            (found.placed, 0.0),
        )
    )
    of = "after one migration / placed for the second task"
    return [
        *targets,
        Target(f"remote share {of}", REMOTE, remote),
        Target(
            "bytes per expert call not saved by one migration / saved by servers placed for the "
            "second task",
            UNSAVED,
            (after - placed) / (stays - placed) if stays > placed else 0.0,
        ),
    ]


def _pause(found: Pause) -> list[Target]:
    limit = found.median_s + max(STEP_S, STEP_MEDIANS * found.median_s)
    longest = [(each.longest_step_s, f"round {n}") for n, each in enumerate(found.rounds, 1)]
    p99 = [float(np.quantile(found.gaps(when), 0.99)) for when in ("moving", "before")]
    still = [n for n, each in enumerate(found.rounds, 1) if not each.experts]
    return [
        Target.of_worst("seconds of the longest step during a migration", limit, longest),
        Target("p99 of gaps between tokens during a migration / before", GAPS, p99[0] / p99[1]),
        Target("rounds in which nothing moved", 0, len(still)),
    ]


def plain(results: Results) -> dict[str, Any]:
    """Return the results for JSON, without the answers' texts."""
    found: dict[str, Any] = {}
    if (shift := results.shift) is not None:
        runs = {name: _run(getattr(shift, name)) for name in ("stay", "move", "placed")}
        margins = differences(shift.move, shift.stay)
        found["shift"] = {"shift_s": shift.plan.shift_s, "margins": margins, **runs}
    for name in ("accumulate", "stable"):
        if (run := getattr(results, name)) is not None:
            found[name] = _run(run)
    if results.pause is not None:
        found["pause"] = dataclasses.asdict(results.pause)
    return found


def _run(run: Watched) -> dict[str, Any]:
    answers = [
        {"server": a.call.server, "asked_s": a.due_s, "end_s": a.end_s, "tokens": a.output_tokens}
        for a in run.answers
        if a.complete
    ]
    return {
        "mean_latency_s": mean_latency_s(run),
        "moves_s": run.moves_s,
        "decision": run.decision,
        "samples": [dataclasses.asdict(sample) for sample in run.samples],
        "answers": answers,
        "failed": failed([run]),
    }
