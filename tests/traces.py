"""Checks that hold for every trace: events in Chrome's format whose durations nest."""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

#: Tolerance in microseconds, for nanoseconds that were rounded.
EXACT = 1e-3

Event = dict[str, Any]


def read_trace(path: pathlib.Path) -> list[Event]:
    """Reads and checks the events, in order of time."""
    events = json.loads(path.read_bytes())
    slices, requests = collections.defaultdict(list), collections.defaultdict(list)
    for event in events:
        assert {"ph", "ts", "pid", "tid", "name"} <= event.keys(), event
        match event["ph"]:
            case "X":
                assert event["dur"] >= 0, event
                slices[event["pid"], event["tid"]].append(event)
            case "b" | "e":
                requests[event["pid"], event["cat"], event["id"]].append(event)
            case phase:
                assert phase in ("M", "s", "f", "i"), event
    for own in slices.values():
        _check_nested(sorted(own, key=lambda event: (event["ts"], -event["dur"])))
    for own in requests.values():
        _check_paired(own)
    return sorted(events, key=lambda event: event["ts"])


def _check_nested(slices: list[Event]) -> None:
    """Each slice is within another one or behind it."""
    ends: list[float] = []
    for event in slices:
        while ends and event["ts"] >= ends[-1] - EXACT:
            ends.pop()
        end = event["ts"] + event["dur"]
        assert not ends or end <= ends[-1] + EXACT, event
        ends.append(end)


def _check_paired(events: list[Event]) -> None:
    """A request's parts end before the request does; an aborted request has no end."""
    depth, latest = 0, 0.0
    for event in events:
        depth += 1 if event["ph"] == "b" else -1
        assert depth >= 0 and event["ts"] >= latest - EXACT, event
        latest = event["ts"]


def tracks(events: list[Event]) -> dict[tuple[int, int], str]:
    """Track names by (server, track)."""
    return {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["name"] == "thread_name"
    }


def slices(events: list[Event], category: str) -> dict[tuple[str, str], Event]:
    """Calls by (caller's name, number), as seen by the caller ("call") or the callee ("served")."""
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found = {}
    for event in events:
        if event.get("cat") == category:
            caller = names[event["pid"]] if category == "call" else event["args"]["caller"]
            found[caller, event["args"]["id"]] = event
    return found
