"""What a process that a launcher or a front end starts does first: it reads its setup, watches its
parent, and calls back."""

from __future__ import annotations

import faulthandler
import logging
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

from dance_jax.config import UserError
from dance_jax.launch.control.channel import ALIVE_TIMEOUT_S, bracketed
from dance_jax.launch.control.protocol import SSH_CLIENT, Failed, Setup

_Setup = TypeVar("_Setup", bound=msgspec.Struct)


def prepare() -> None:
    """Logs go to standard error, and Ctrl-C is for the launcher alone."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s"
    )
    logging.getLogger("jax").setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.WARNING)


def read_setup(kind: type[_Setup]) -> _Setup | None:
    """The setup on standard input; None: the parent has changed its mind."""
    line = _read_line(0)
    return msgspec.json.decode(line, type=kind) if line else None


def _read_line(descriptor: int) -> bytes:
    """The first line that is not empty, b"" if there is none; of the signs of life that follow it
    some are lost."""
    line = bytearray()
    while content := os.read(descriptor, 1 << 16):
        part, end, _ = (content if line else content.lstrip(b"\n")).partition(b"\n")
        line += part
        if end:
            return bytes(line)
    return b""


def parent_endpoint(setup: Setup) -> str:
    """ZeroMQ endpoint of the parent; over ssh it may be where the connection comes from."""
    client = (os.environ.get("SSH_CONNECTION", "").split() or [""])[0]
    return setup.control.replace(SSH_CLIENT, bracketed(client))


def end_with_parent(setup: Setup, before: Callable[[], None] = lambda: None) -> None:
    """Kills this process and what it started when the parent is gone.

    It is when standard input ends, when this process's parent is another one, or, for a parent on
    another machine, when it has been silent for ALIVE_TIMEOUT_S: a broken network ends nothing.

    Args:
        setup: names the parent's private directory, which is removed then.
        before: called before that, in a thread.
    """
    parent = os.getppid()

    def watch() -> None:
        heard = time.monotonic()
        while True:
            readable, _, _ = select.select([0], [], [], 0.5)
            ended = bool(readable) and not os.read(0, 4096)
            heard = time.monotonic() if readable else heard
            silent = setup.beats and time.monotonic() - heard > ALIVE_TIMEOUT_S
            if ended or silent or os.getppid() != parent:
                break
        try:
            before()
            if setup.private_dir:
                shutil.rmtree(setup.private_dir, ignore_errors=True)
        finally:
            os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def failure(error: BaseException) -> Failed:
    """What the parent is told of an exception that ends the process."""
    if isinstance(error, UserError):
        return Failed(str(error), user=True)
    return Failed(f"{type(error).__name__}: {error}", user=False)


def end(status: int) -> NoReturn:
    """Ends the process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: jax.distributed would wait at its exit for processes that may be gone.
    os._exit(status)
