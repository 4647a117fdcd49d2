"""A few steps in detail: which layer waited for which server, and where the time of each call went.

The dashboard draws them. A whole run is recorded by trace.py instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dance_jax.engine.scheduler import StepPlan
from dance_jax.models.calls import TRACE_KINDS, TRACE_OUTCOMES, ExpertCalls, TraceEvent

#: Events that are kept for the next waterfall: those of a few steps.
EVENTS = 1 << 12


class Waterfall:
    """Records the next steps that decode.

    Args:
        calls: this server's calls, which record events (`ExpertCalls.start_trace`).
        names: names of all servers, by rank.
        count: number of steps.
    """

    def __init__(self, calls: ExpertCalls, names: Sequence[str], count: int) -> None:
        self._calls, self._names, self._count = calls, names, count
        self._origin: float | None = None
        #: What was recorded, in plain types; times are seconds since the first step began.
        self.steps: list[dict[str, Any]] = []
        calls.take_trace()  # those of earlier steps

    @property
    def done(self) -> bool:
        """Whether all steps are recorded."""
        return len(self.steps) >= self._count

    def step(self, number: int, plan: StepPlan, spans: Mapping[str, tuple[float, float]]) -> None:
        """Record a step that ended; arguments as for `Trace.step`."""
        events, _ = self._calls.take_trace()
        if self.done or not plan.decoding:
            return
        parts = [
            {"name": name, "begin": self._since(begin), "end": self._since(end)}
            for name, (begin, end) in spans.items()
            if name in ("schedule", "computing", "output")
        ]
        tokens: dict[str, int] = {}
        for row in (row for rows in plan.entries for row in rows):
            name = f"{row.sequence.request_id}.{row.sequence.index}"
            tokens[name] = tokens.get(name, 0) + len(row.tokens)
        own = [event for event in events if event.step == number]
        kinds = {kind: [e for e in own if TRACE_KINDS[e.kind] == kind] for kind in TRACE_KINDS}
        self.steps.append(
            {
                "step": number,
                "begin": min(part["begin"] for part in parts),
                "end": max(part["end"] for part in parts),
                "requests": tokens,
                "parts": parts,
                "layers": [self._layer(event) for event in kinds["layer"]],
                "calls": [self._call(event) for event in kinds["call"]],
            }
        )

    def _layer(self, event: TraceEvent) -> dict[str, Any]:
        begin, end = event.begin, event.end
        came, until = event.compute_begin, event.compute_end
        return {
            "layer": event.layer,
            "rows": event.rows,
            "begin": self._at(begin),
            "end": self._at(end),
            "call": self._part(begin, came),
            "local": self._part(came, until),
            "wait": self._part(until, end),
        }

    def _call(self, event: TraceEvent) -> dict[str, Any]:
        times = event.arrived, event.compute_begin, event.compute_end
        arrived, came, until = (self._at(when) if event.arrived else None for when in times)
        return {
            "layer": event.layer,
            "peer": self._names[event.peer],
            "rows": event.rows,
            "bytes": event.bytes,
            "outcome": TRACE_OUTCOMES[event.outcome],
            "begin": self._at(event.begin),
            "end": self._at(event.end),
            "arrived": arrived,
            "compute_begin": came,
            "compute_end": until,
        }

    def _part(self, begin: int, end: int) -> list[float] | None:
        return [self._at(begin), self._at(end)] if begin < end else None

    def _at(self, when_ns: int) -> float:
        return self._since(when_ns / 1e9)

    def _since(self, seconds: float) -> float:
        """Seconds since the first step began; the calls' times are of the same clock."""
        if self._origin is None:
            self._origin = seconds
        return round(seconds - self._origin, 7)
