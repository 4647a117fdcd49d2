"""The log of this process: what it prints, and what `logging` records."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from typing import TextIO

#: Seconds for which an equal record is not logged again.
PAUSE_S = 1.0
#: Loggers of libraries with errors that users of a server cause as often as they like.
_FROM_OUTSIDE = ("asyncio", "uvicorn.error")


def begin() -> None:
    """Log to standard error."""
    write_what_fits()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s"
    )
    logging.getLogger("jax").setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.WARNING)
    for name in _FROM_OUTSIDE:
        logging.getLogger(name).addFilter(OnceASecond())


def write_what_fits() -> list[LossyFile]:
    """Lose the text that standard output or error cannot take, instead of raising an error.

    A log on a full disk, or one that is closed, must not end a process.

    Returns:
        The files behind both streams, without those that are closed.
    """
    files = []
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        try:
            file = LossyFile(descriptor, "wb", closefd=False)
        except OSError:  # the descriptor is closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
            continue
        setattr(sys, name, _text(file))
        files.append(file)
    return files


def _text(file: io.FileIO) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(file), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )


class LossyFile(io.FileIO):
    """A file whose writes never fail."""

    #: Whether a write has failed, so that content is lost.
    lost = False

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError:
            self.lost = True
            return len(data)


class OnceASecond(logging.Filter):
    """Drops a warning or error that follows an equal one within PAUSE_S; logs how many it dropped.

    Records are equal if their logger, level, type of exception and first line of text are. The text
    is compared before its arguments are put in.
    """

    def __init__(self) -> None:
        super().__init__()
        #: By record, when one was last logged (time.monotonic()), and how many were dropped since.
        self._logged: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        text = str(record.msg)
        failure = record.exc_info[0] if record.exc_info else None
        key = record.name, record.levelno, failure, text.partition("\n")[0]
        now = time.monotonic()
        logged, dropped = self._logged.get(key, (-PAUSE_S, 0))
        if now - logged < PAUSE_S:
            self._logged[key] = logged, dropped + 1
            return False
        self._logged = {each: of for each, of in self._logged.items() if now - of[0] < 60 or of[1]}
        self._logged[key] = now, 0
        if dropped:
            record.msg = f"{text} (and {dropped} more since the last such message)"
        return True
