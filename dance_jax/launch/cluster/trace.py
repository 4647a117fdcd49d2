"""The file of a launch's trace: what all servers send of theirs, on one clock.

Events are written as they come, so a launcher that is killed leaves an array without its end, which
viewers take. `close` ends it, and sets the clocks of servers on different machines by the calls
between them: a call arrived in the middle of what its answer took longer than queue and computing.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import pathlib
import time
from collections.abc import Iterator, Sequence

import msgspec

from dance_jax.config import UserError
from dance_jax.files import whole_file

log = logging.getLogger(__name__)

#: Bytes of a trace; later events are left out.
MOST_BYTES = 256 << 20


class _Args(msgspec.Struct, frozen=True):
    id: str = ""
    caller: str = ""
    outcome: str = ""


class _Event(msgspec.Struct, frozen=True):
    """What is read of a call, by its caller (`cat` is "call") or its callee ("served")."""

    ts: float
    pid: int
    dur: float = 0.0
    cat: str = ""
    args: _Args = _Args()


class TraceFile:
    """A file of events of all servers, for https://ui.perfetto.dev.

    Args:
        path: what is there is replaced.
        names: of the servers, by rank.
        most_bytes: see MOST_BYTES.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], names: Sequence[str], most_bytes: int = MOST_BYTES
    ) -> None:
        self._path, self._names, self._left = pathlib.Path(path), names, most_bytes
        #: Unix time, in ns, from which all servers count.
        self.began_ns = time.time_ns()
        try:
            # Not buffered: what was written is whole lines.
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115
            self._file.write(b"[\n" + b"".join(map(self._name, range(len(names)))))
            self._file.tell()  # a pipe has no place
        except OSError as error:
            raise UserError(f"trace {path}: cannot be written: {error.strerror}") from error

    def _name(self, rank: int) -> bytes:
        event = {"ph": "M", "ts": 0, "pid": rank, "tid": 0, "name": "process_name"}
        return msgspec.json.encode(event | {"args": {"name": self._names[rank]}}) + b",\n"

    def add(self, lines: bytes) -> None:
        """Writes events; from where they find no more room on, they are left out."""
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
            log.warning("trace %s: ends here: %s", self._path, error.strerror)
            self._left = 0
            return
        self._left = self._left - len(whole) if whole == lines else 0

    def close(self) -> None:
        """Ends the file; may be called twice."""
        if self._file.closed:
            return
        # What cannot be done leaves a file that viewers take as well.
        with contextlib.suppress(OSError):
            with self._file:
                # In place of the comma behind the last event.
                self._file.seek(-2, os.SEEK_END)
                self._file.write(b"\n]\n")
            ahead = _clocks(self._path, self._names)
            if any(ahead):
                _set_clocks(self._path, ahead)


def _clocks(path: pathlib.Path, names: Sequence[str]) -> list[float]:
    """How far each server's clock is ahead of the first one's, in microseconds.

    Two servers are compared by the quickest call between them. What may be time on the wire is
    taken for none.
    """
    unmatched: dict[tuple[int, str], _Event] = {}
    #: By caller and callee: time on the wire, and how far the callee is ahead.
    quickest: dict[tuple[int, int], tuple[float, float]] = {}
    for line in _lines(path):
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


def _lines(path: pathlib.Path) -> Iterator[bytes]:
    """The events of a file that was ended."""
    with open(path, "rb") as file:
        for line in file:
            if line.startswith(b"{"):
                yield line.rstrip(b",\n")
