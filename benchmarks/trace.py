"""Time per part of a model, from a profiler's trace."""

from __future__ import annotations

import collections
from typing import Any


def self_times(
    events: list[dict[str, Any]], parts: dict[str, str], unnamed: str | None = None
) -> collections.Counter[str]:
    """Return the microseconds spent in each part, as the sum of its operations' self time.

    Self time is an operation's time without the operations that ran inside it.

    Args:
        events: the events of a trace.
        parts: the part of each operation, by the operation's name.
        unnamed: the part of all other operations. If None, they count for the part of the
            operation around them, or for "other" if there is none.
    """
    times: collections.Counter[str] = collections.Counter()
    threads = collections.defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", ()):
            threads[event["tid"]].append(event)
    for own in threads.values():
        running: list[tuple[float, str]] = []
        for event in sorted(own, key=lambda e: (e["ts"], -e["dur"])):
            while running and running[-1][0] <= event["ts"]:
                running.pop()
            around = running[-1][1] if running else "other"
            part = parts.get(event["args"]["hlo_op"], unnamed or around)
            times[part] += event["dur"]
            if running:
                times[around] -= event["dur"]
            running.append((event["ts"] + event["dur"], part))
    return times
