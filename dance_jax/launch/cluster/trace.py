"""The trace file of a launch: the events of all servers, on one clock.

Events are written as they arrive, so a killed launcher leaves an array without its end, which
viewers accept. `close` ends the array and aligns the clocks of servers on different machines by the
calls between them: a call's network time (its duration minus queue and computing) is split evenly.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import os
import pathlib
import time
from collections.abc import Iterator, Sequence

import msgspec

from dance_jax.config import UserError
from dance_jax.files import whole_file

log = logging.getLogger(__name__)

#: Largest size of a trace in bytes; later events are dropped.
MOST_BYTES = 256 << 20
#: Bytes at the start of a trace from whose calls the clocks are compared.
_CLOCK_BYTES = 32 << 20


class _Args(msgspec.Struct, frozen=True):
    id: str = ""
    caller: str = ""
    outcome: str = ""


class _Event(msgspec.Struct, frozen=True):
    """Fields of a call's event, by its caller (`cat` is "call") or its callee ("served")."""

    ts: float
    pid: int
    dur: float = 0.0
    cat: str = ""
    args: _Args = _Args()


class TraceFile:
    """A trace file of all servers, for https://ui.perfetto.dev.

    Args:
        path: an existing file is replaced.
        names: of the servers, by rank.
        one_clock: all servers are on one machine, so their clocks agree.
        most_bytes: see MOST_BYTES.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        names: Sequence[str],
        one_clock: bool = False,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._path, self._names, self._left = pathlib.Path(path), names, most_bytes
        self._one_clock = one_clock
        #: Unix time in ns that all servers count from.
        self.began_ns = time.time_ns()
        try:
            # Unbuffered, so that only whole lines are written.
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115
            self._file.write(
                b"[\n" + b"".join(self._name(n) for n, name in enumerate(names) if name)
            )
            self._file.tell()  # fails for a pipe
        except OSError as error:
            raise UserError(f"trace {path}: cannot be written: {error.strerror}") from error

    def _name(self, rank: int) -> bytes:
        event = {"ph": "M", "ts": 0, "pid": rank, "tid": 0, "name": "process_name"}
        return msgspec.json.encode(event | {"args": {"name": self._names[rank]}}) + b",\n"

    def add(self, lines: bytes) -> None:
        """Write events; once the file is full, all further events are dropped."""
        if self._left <= 0:
            return
        whole = lines
        if len(lines) > self._left:
            whole = lines[: lines.rfind(b"\n", 0, self._left) + 1]
        end = self._file.tell()
        try:
            view = memoryview(whole)
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
                self._file.seek(end)
            log.warning("trace %s: cannot be written further: %s", self._path, error.strerror)
            self._left = 0
            return
        self._left = self._left - len(whole) if whole == lines else 0

    def close(self) -> None:
        """End the file; may be called twice."""
        if self._file.closed:
            return
        # If this fails, viewers still accept the file.
        with contextlib.suppress(OSError):
            with self._file:
                # Overwrite the comma after the last event.
                self._file.seek(-2, os.SEEK_END)
                self._file.write(b"\n]\n")
            if not self._one_clock:
                ahead = _clocks(self._path, self._names)
                if any(ahead):
                    _set_clocks(self._path, ahead)


def _clocks(path: pathlib.Path, names: Sequence[str]) -> list[float]:
    """Microseconds by which each server's clock is ahead of the first server's.

    Two servers are compared by the fastest call between them. An offset that the network time could
    explain counts as 0.
    """
    unmatched: dict[tuple[int, str], _Event] = {}
    #: By (caller, callee): network time, and how far the callee's clock is ahead.
    quickest: dict[tuple[int, int], tuple[float, float]] = {}
    for line in _lines(path, _CLOCK_BYTES):
        if b'"cat":"call"' not in line and b'"cat":"served"' not in line:
            continue
        event = msgspec.json.decode(line, type=_Event)
        if event.args.outcome != "answered":
            continue
        caller = event.pid if event.cat == "call" else names.index(event.args.caller)
        other = unmatched.pop((caller, event.args.id), None)
        if other is None or other.cat == event.cat:
            unmatched[caller, event.args.id] = event
            continue
        call, served = (event, other) if event.cat == "call" else (other, event)
        wire = call.dur - served.dur
        found = wire, served.ts - call.ts - wire / 2
        pair = caller, served.pid
        quickest[pair] = min(found, quickest.get(pair, found))
    ahead = {0: 0.0}
    reached = collections.deque(ahead)
    while reached:
        one = reached.popleft()
        for (caller, callee), (wire, more) in quickest.items():
            more = more if abs(more) > wire / 2 else 0.0
            for here, there, by in ((caller, callee, more), (callee, caller, -more)):
                if here == one and there not in ahead:
                    ahead[there] = ahead[one] + by
                    reached.append(there)
    return [ahead.get(rank, 0.0) for rank in range(len(names))]


def _set_clocks(path: pathlib.Path, ahead: Sequence[float]) -> None:
    with whole_file(path) as file:
        file.write(b"[\n")
        separator = b""
        for line in _lines(path):
            event = msgspec.json.decode(line)
            if event["ph"] != "M":
                event["ts"] -= ahead[event["pid"]]
            file.write(separator + msgspec.json.encode(event))
            separator = b",\n"
        file.write(b"\n]\n")


def _lines(path: pathlib.Path, most_bytes: float = math.inf) -> Iterator[bytes]:
    """The events in the first `most_bytes` of a finished trace file."""
    with open(path, "rb") as file:
        for line in file:
            most_bytes -= len(line)
            if most_bytes < 0:
                return
            if line.startswith(b"{"):
                yield line.rstrip(b",\n")
