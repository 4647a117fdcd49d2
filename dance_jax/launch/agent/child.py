"""First steps of a child process: read the setup, find the parent, and watch it.

The parent is a launcher or a front end.
"""

from __future__ import annotations

import faulthandler
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

import msgspec

from dance_jax import descriptors, logs
from dance_jax.config import UserError
from dance_jax.launch.agent.command import PRIVATE_VARIABLE
from dance_jax.launch.control.channel import ALIVE_TIMEOUT_S, bracketed
from dance_jax.launch.control.protocol import SSH_CLIENT, Failed, Setup

#: Has a child write the stacks of its threads to its log.
STACKS_SIGNAL = signal.SIGUSR1
#: A line on a child's input that tells the child to end; empty lines are signs of life.
END = b"end"
#: Exit status of a front end whose predecessor still runs.
STILL_THERE = 75
_Setup = TypeVar("_Setup", bound=msgspec.Struct)


def prepare() -> None:
    """Log to standard error, and ignore Ctrl-C, which is for the launcher only."""
    logs.begin()
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptors.raise_limit()


def read_setup(kind: type[_Setup]) -> _Setup | None:
    """Read the setup from standard input; None if the parent ends this process without one."""
    line = _read_line(0)
    return None if line in (b"", END) else msgspec.json.decode(line, type=kind)


def _read_line(descriptor: int) -> bytes:
    """The first non-empty line, or b"" if there is none or END follows it at once.

    May drop signs of life after that line.
    """
    line = bytearray()
    while content := os.read(descriptor, 1 << 16):
        part, end, rest = (content if line else content.lstrip(b"\n")).partition(b"\n")
        line += part
        if end:
            return b"" if rest.strip() else bytes(line)
    return b""


def parent_endpoint(setup: Setup) -> str:
    """ZeroMQ endpoint of the parent; over ssh, it may be the ssh client's address."""
    client = (os.environ.get("SSH_CONNECTION", "").split() or [""])[0]
    return setup.control.replace(SSH_CLIENT, bracketed(client))


def private_dir() -> str:
    """The parent's private directory on this machine; "" if the parent is on another one."""
    return os.environ.get(PRIVATE_VARIABLE, "")


def end_with_parent(
    setup: Setup, on_parent_gone: Callable[[], None] = lambda: None, outlives: bool = False
) -> None:
    """Kill this process and its children when the parent says so or is gone.

    The parent is gone when standard input ends, when this process was re-parented, or, for a parent
    on another machine, after ALIVE_TIMEOUT_S of silence (a broken network ends no input).

    The parent's private directory is then removed.

    Args:
        setup: of this process.
        on_parent_gone: called in the watching thread before anything is killed.
        outlives: a parent that is gone ends nothing, because another one takes over; the parent's
            private directory is left to that one.
    """
    parent = os.getppid()

    def watch() -> None:
        last_sign = time.monotonic()
        while True:
            readable, _, _ = select.select([0], [], [], 0.5)
            content = os.read(0, 4096) if readable else None
            last_sign = time.monotonic() if readable else last_sign
            silent = setup.beats and time.monotonic() - last_sign > ALIVE_TIMEOUT_S
            if content and content.strip():  # END
                break
            if content == b"" or silent or os.getppid() != parent:
                if outlives:
                    return
                break
        try:
            on_parent_gone()
            if private_dir() and not outlives:
                shutil.rmtree(private_dir(), ignore_errors=True)
        finally:
            os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def failure(error: BaseException) -> Failed:
    """The message that tells the parent about an exception that ends this process.

    Send it before you print the exception: the log may be unable to take it.
    """
    if isinstance(error, UserError):
        return Failed(str(error), user=True)
    return Failed(f"{type(error).__name__}: {error}", user=False)


def end(status: int) -> NoReturn:
    """End this process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: at exit, jax.distributed would wait for processes that may be gone.
    os._exit(status)
