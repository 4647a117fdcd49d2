"""A trace of a server's steps and expert calls, in Chrome's trace event format.

https://ui.perfetto.dev displays the trace. A process is a server; its tracks are its steps, each
device's layers and calls, the calls of other servers that it answers, and its requests. Each event
is one line of JSON; times are in microseconds since `began_ns`. A call has the number of its
caller's step, and the event of that step lists its requests.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from dance_jax.engine import sequence as sequences
from dance_jax.engine.scheduler import StepPlan
from dance_jax.engine.sequence import OutputDelta
from dance_jax.models.calls import TRACE_KINDS, TRACE_OUTCOMES, ExpertCalls, TraceEvent

_encode = msgspec.json.Encoder().encode


class Trace:
    """The events of one server, from its steps and from the calls it makes and answers.

    Args:
        rank: this server's rank.
        names: names of all servers, by rank.
        began_ns: origin of all times, unix time in ns, the same on all servers.
        calls: this server's calls, before it has connections; None if servers step together.
    """

    def __init__(
        self, rank: int, names: Sequence[str], began_ns: int, calls: ExpertCalls | None
    ) -> None:
        self._rank, self._names, self._calls = rank, names, calls
        #: Offset in ns to add to time.perf_counter() and to the C++ library's times, which share a
        #: clock.
        self._offset = time.time_ns() - time.perf_counter_ns() - began_ns
        self._lines: list[bytes] = []
        self._tracks: dict[str, int] = {}
        #: Track -> end of its last event.
        self._ends: dict[str, int] = {}
        #: Names of unfinished sequences.
        self._open: set[str] = set()
        #: Begin and end of the latest step's "computing" part.
        self._computing = 0, 0
        if calls is not None:
            calls.start_trace()

    def begin(self, begun: Iterable[sequences.Sequence]) -> None:
        """Record that sequences arrived."""
        for sequence in begun:
            name = f"{sequence.request_id}.{sequence.index}"
            self._open.add(name)
            tokens = {"prompt_tokens": len(sequence.prompt_token_ids)}
            self._request("b", name, name, time.perf_counter_ns(), tokens)

    def end(self, outputs: Iterable[OutputDelta]) -> None:
        """Record the sequences that ended with these outputs of a step."""
        for delta in outputs:
            name = f"{delta.request_id}.{delta.index}"
            # A refused sequence has no begin event.
            if delta.finish_reason is not None and name in self._open:
                self._open.remove(name)
                reason = {"finish_reason": delta.finish_reason}
                self._request("e", name, name, time.perf_counter_ns(), reason)

    def step(
        self, number: int, plan: StepPlan, spans: Mapping[str, tuple[float, float]], failed: int
    ) -> None:
        """Record a step that ended.

        Args:
            number: number of the step, which its calls carry.
            plan: the step's plan.
            spans: `StepClock.spans`.
            failed: number of sequences that failed in the step.
        """
        parts = {
            name: (int(1e9 * spans[name][0]), int(1e9 * spans[name][1]))
            for name in ("schedule", "computing", "output")
        }
        begin, end = parts["schedule"][0], parts["output"][1]
        self._computing = parts["computing"]
        tokens: dict[str, int] = {}
        for row in (row for rows in plan.entries for row in rows):
            name = f"{row.sequence.request_id}.{row.sequence.index}"
            tokens[name] = tokens.get(name, 0) + len(row.tokens)
        bucket = f"{plan.decode}+{plan.slice}"
        fields = {"step": number, "bucket": bucket, "failed": failed, "requests": tokens}
        self._slice("steps", f"step {number}", begin, end, fields)
        for name, part in parts.items():
            self._slice("steps", name, *part)
        for name, count in tokens.items():
            what = "token" if count == 1 else f"{count} tokens"
            self._request("b", name, what, begin, {"step": number})
            self._request("e", name, what, end)
        self._add_calls()
        for device in range(len(plan.entries) if self._calls else 0):
            track, (began, ended) = f"device {device}", self._computing
            self._slice(track, "logits, sampling", max(self._ends.get(track, 0), began), ended)

    def take(self) -> bytes:
        """The lines since the last call, each with a trailing comma and newline."""
        self._add_calls()
        lines, self._lines = self._lines, []
        return b"".join(lines)

    # Events of the C++ library.

    def _add_calls(self) -> None:
        if self._calls is None:
            return
        events, lost = self._calls.take_trace()
        draw = {"layer": self._layer, "call": self._call, "served": self._served}
        for event in events:
            draw[TRACE_KINDS[event.kind]](event)
        if lost:
            now = time.perf_counter_ns()
            self._event("i", "calls", f"{lost} events lost", now, {"s": "p"})

    def _layer(self, event: TraceEvent) -> None:
        track, begin, end = f"device {event.device}", event.begin, event.end
        came, until = event.compute_begin, event.compute_end
        fields = {"step": event.step, "layer": event.layer}
        # The time between the routed experts of two layers, or of two groups of a layer.
        before = max(self._ends.get(track, 0), self._computing[0])
        if before < begin:
            self._slice(track, "trunk", before, begin, fields)
        self._slice(track, f"layer {event.layer}", begin, end, fields | {"rows": event.rows})
        for name, part in (
            ("call", (begin, came)),
            ("local experts", (came, until)),
            ("wait", (until, end)),
        ):
            if part[0] < part[1]:
                self._slice(track, name, *part)

    def _call(self, event: TraceEvent) -> None:
        begin, end, peer = event.begin, event.end, self._names[event.peer]
        outcome = TRACE_OUTCOMES[event.outcome]
        fields = self._fields_of(event) | {"callee": peer, "bytes": event.bytes}
        track = self._lane(f"device {event.device}: calls of {peer}", begin, end)
        name = f"layer {event.layer}" + ("" if outcome == "answered" else f", {outcome}")
        self._slice(track, name, begin, end, fields, "call")
        self._event("s", track, "call", begin, {"cat": "flow", "id": f"{self._rank}-{event.id}"})
        if arrived := event.arrived:
            came, until = event.compute_begin, event.compute_end
            for name, part in (
                ("wire", (begin, arrived)),
                ("queue", (arrived, came)),
                ("compute", (came, until)),
                ("wire", (until, end)),
            ):
                self._slice(track, name, *part)

    def _served(self, event: TraceEvent) -> None:
        begin, end, caller = event.begin, event.end, self._names[event.peer]
        fields = self._fields_of(event) | {"caller": caller, "calls": event.calls}
        track = self._lane(f"answers for {caller}", begin, end)
        self._slice(track, f"layer {event.layer}", begin, end, fields, "served")
        flow = {"cat": "flow", "id": f"{event.peer}-{event.id}", "bp": "e"}
        self._event("f", track, "call", begin, flow)
        self._slice(track, "queue", begin, event.compute_begin)
        self._slice(track, "compute", event.compute_begin, end)

    def _fields_of(self, event: TraceEvent) -> dict[str, Any]:
        outcome = TRACE_OUTCOMES[event.outcome]
        fields = {"step": event.step, "layer": event.layer, "rows": event.rows}
        return fields | {"id": str(event.id), "outcome": outcome}

    # Events.

    def _lane(self, name: str, begin: int, end: int) -> str:
        """The first lane of a track in which nothing overlaps; events arrive in order of their end.

        Lanes are tracks named `name`, `name (2)`, and so on.
        """
        number = 2
        lane = name
        while self._ends.get(lane, 0) > begin:
            lane, number = f"{name} ({number})", number + 1
        return lane

    def _slice(
        self,
        track: str,
        name: str,
        begin: int,
        end: int,
        fields: Mapping[str, Any] | None = None,
        category: str = "part",
    ) -> None:
        self._ends[track] = max(self._ends.get(track, 0), end)
        more = {"dur": (end - begin) / 1000, "cat": category} | ({"args": fields} if fields else {})
        self._event("X", track, name, begin, more)

    def _request(
        self,
        phase: str,
        request: str,
        name: str,
        when: int,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        more = {"cat": "request", "id": f"{self._rank}-{request}"} | (
            {"args": fields} if fields else {}
        )
        self._event(phase, "steps", name, when, more)

    def _event(self, phase: str, track: str, name: str, when: int, more: dict[str, Any]) -> None:
        if track not in self._tracks:
            # Derived from the name, so that track ids are the same after an engine restart.
            self._tracks[track] = zlib.crc32(track.encode()) >> 1
            self._event("M", track, "thread_name", -self._offset, {"args": {"name": track}})
        event = {"ph": phase, "ts": (when + self._offset) / 1000, "pid": self._rank}
        event |= {"tid": self._tracks[track], "name": name} | more
        self._lines.append(_encode(event) + b",\n")
