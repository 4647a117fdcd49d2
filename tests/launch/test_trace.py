"""Trace files: readable however they end, and servers whose clocks differ."""

from __future__ import annotations

import json
import pathlib
import resource

import pytest

from dance_jax.config import UserError
from dance_jax.launch.cluster.trace import TraceFile
from tests.traces import read_trace, slices

NAMES = ("alpha", "beta", "gamma")


def lines(*events: dict) -> bytes:
    return b"".join(json.dumps(each, separators=(",", ":")).encode() + b",\n" for each in events)


def event(rank: int, ts: float, dur: float = 1.0, **more: object) -> dict:
    return {"ph": "X", "ts": ts, "pid": rank, "tid": 1, "name": "a", "dur": dur} | more


def test_it_is_json_after_every_end(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace.json"
    for added in (0, 3):
        trace = TraceFile(path, NAMES)
        for n in range(added):
            trace.add(lines(event(n, n), event(n, n + 5)))
        # As after a kill: an array without an end, which trace viewers accept.
        assert len(json.loads(path.read_bytes()[:-2] + b"]")) == 3 + 2 * added
        trace.close()
        trace.close()
        assert len(read_trace(path)) == 3 + 2 * added


def test_it_has_an_end_in_size(tmp_path: pathlib.Path) -> None:
    one = lines(event(0, 0))
    trace = TraceFile(tmp_path / "trace.json", NAMES, most_bytes=int(3.5 * len(one)))
    trace.add(one)
    trace.add(3 * one)
    trace.add(one)
    trace.close()
    assert len(read_trace(tmp_path / "trace.json")) == 3 + 3


def test_a_disk_that_is_full_ends_it(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "trace.json"
    trace = TraceFile(path, NAMES)
    trace.add(lines(event(0, 0)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, before[1]))
    try:
        trace.add(lines(*[event(0, 10 * n) for n in range(50)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    trace.add(lines(event(0, 1000)))
    trace.close()
    assert len(read_trace(path)) == 3 + 1
    assert f"trace {path}: cannot be written further" in caplog.text


@pytest.mark.parametrize("where", ["", "missing/trace.json"])
def test_what_cannot_be_written_is_said_at_once(where: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=f"trace {tmp_path / where}: cannot be written: "):
        TraceFile(tmp_path / where, NAMES)


def call(caller: int, callee: int, number: int, sent: float, wire: float, ahead: float) -> bytes:
    """Both ends of a call that took 40 us to compute; the callee's clock is `ahead` us ahead."""
    args = {"id": str(number), "outcome": "answered"}
    own = args | {"callee": NAMES[callee]}
    theirs = args | {"caller": NAMES[caller]}
    return lines(
        event(callee, sent + wire / 2 + ahead, 40, cat="served", args=theirs),
        event(caller, sent, wire + 40, cat="call", args=own),
    )


def test_clocks_are_set_by_the_quickest_calls(tmp_path: pathlib.Path) -> None:
    """Beta's clock is 5 s ahead. Gamma's is 3 s behind beta's, and only beta calls gamma."""
    path = tmp_path / "trace.json"
    trace = TraceFile(path, NAMES)
    trace.add(call(0, 1, 1, 100.0, 20.0, 5e6))
    trace.add(call(0, 1, 2, 900.0, 500.0, 5e6 + 200))  # the two directions differ
    trace.add(call(1, 2, 1, 5e6 + 2000.0, 10.0, -3e6))
    trace.close()
    events = read_trace(path)
    served = slices(events, "served")
    for key, ours in slices(events, "call").items():
        assert ours["ts"] <= served[key]["ts"]
        assert served[key]["ts"] + served[key]["dur"] <= ours["ts"] + ours["dur"]
    assert [round(event["ts"]) for event in events[3:]] == [100, 110, 900, 1350, 2000, 2005]


@pytest.mark.parametrize(("one_clock", "ahead"), [(False, 9.0), (True, 5e6)])
def test_clocks_that_may_agree_are_left_alone(
    one_clock: bool, ahead: float, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "trace.json"
    trace = TraceFile(path, NAMES, one_clock)
    trace.add(call(0, 1, 1, 100.0, 20.0, ahead))
    trace.close()
    assert [event["ts"] for event in read_trace(path)[3:]] == [100.0, 110.0 + ahead]
