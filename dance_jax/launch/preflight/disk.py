"""How fast a machine reads a model's files from its disk."""

from __future__ import annotations

import os
import pathlib
import time

#: Bytes of one read, which is about an expert of a large model; most bytes and seconds of all; and
#: the least bytes that give a rate.
_BLOCK, _MOST, _MOST_S, _LEAST = 4 << 20, 128 << 20, 0.3, 16 << 20


def read_rate(model: str | os.PathLike[str]) -> float | None:
    """Measure the rate, in at most a third of a second.

    Blocks all over the largest file are read. Those in the page cache are dropped from it first,
    where the system can do so.

    Args:
        model: a directory with weights, or a file of weights.

    Returns:
        Bytes per second; None if there is too little to read.
    """
    path = pathlib.Path(model)
    try:
        files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
        largest = max(files, key=lambda each: each.stat().st_size, default=None)
        return None if largest is None else _rate(largest)
    except OSError:
        return None


def _rate(file: pathlib.Path) -> float | None:
    with file.open("rb", buffering=0) as opened:
        descriptor, size = opened.fileno(), file.stat().st_size
        step = max(_BLOCK, size * _BLOCK // _MOST)
        done, seconds = 0, 0.0
        for offset in range(0, size, step):
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, offset, _BLOCK, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            done += len(os.pread(descriptor, _BLOCK, offset))
            seconds += time.perf_counter() - began
            if seconds > _MOST_S:
                break
    return done / seconds if done >= _LEAST and seconds > 0 else None
