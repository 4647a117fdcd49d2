"""Show a service on the terminal and end it on a signal: the first drains, a second one stops."""

from __future__ import annotations

import os
import signal
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from dance_jax.engine.generation import in_words
from dance_jax.launch.cluster.service import Service
from dance_jax.signals import ignored


def attend(service: Service, console: Console) -> None:
    """Print where a started service is reached, and serve until a signal ends it.

    The first SIGTERM or Ctrl-C lets the servers finish running requests; a second Ctrl-C does not.
    SIGHUP has the hosts file read again, or counts as SIGTERM if the terminal was closed. A signal
    that this process ignores ends nothing.

    Raises:
        KeyboardInterrupt: on the second Ctrl-C.
        ClusterError: a server failed.
    """

    def say(name: str, text: str) -> None:
        console.print(Text(f"{name}: {text}" if name else text), soft_wrap=True)

    for line in greeting(service):
        say("", line)
    with _draining(service):
        service.serve(say)


def greeting(service: Service) -> list[str]:
    """Lines that tell the user where each server is reached, and how."""
    names, urls, options = service.spec.names, service.urls, service.options
    width = max(map(len, names))
    lines = [
        f"{names[rank]:<{width}}  {url}{_where(service, rank)}"
        for rank, url in zip(service.spec.seated, urls, strict=True)
    ]
    if service.sampling:
        lines.append(
            f"The model samples with {in_words(service.sampling)} unless a request says otherwise "
            "(--generation-config none: not)"
        )
    key = " -H 'Authorization: Bearer KEY'" if options.api_key or options.api_key_file else ""
    lines.append(
        f"curl {urls[0]}/v1/completions{key} -H 'Content-Type: application/json' "
        """-d '{"prompt": "Once upon a time", "max_tokens": 32}'"""
    )
    lines.append(
        "Ctrl-C finishes running requests, then stops all servers; a second Ctrl-C stops them at "
        "once"
    )
    return lines


def _where(service: Service, rank: int) -> str:
    """Name the machine of a server that listens on its loopback interface only."""
    server, bind = service.spec.servers[rank], service.options.bind
    alone = bind in ("localhost", "::1") or bind.startswith("127.")
    return f" (on {server.ssh or server.address})" if alone and server.ssh else ""


@contextmanager
def _draining(service: Service) -> Iterator[None]:
    """Drain the service on a signal within the block."""
    asked: list[int] = []

    def drain(number: int, frame: types.FrameType | None) -> None:
        if signal.SIGINT in asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        service.drain()

    # Under nohup, a closed terminal ends nothing; `dance-jax hosts` sends the signal all the same.
    minds_terminal = _has_terminal() and not ignored(signal.SIGHUP)

    def hang_up(number: int, frame: types.FrameType | None) -> None:
        if minds_terminal and not _has_terminal():
            service.drain()
        else:
            service.reload()

    with (
        _handlers((signal.SIGINT, signal.SIGTERM), drain),
        _handlers((signal.SIGHUP,), hang_up, even_if_ignored=True),
    ):
        yield


def _has_terminal() -> bool:
    """Whether this process has a terminal; one that was closed counts no more."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


@contextmanager
def _handlers(
    numbers: Sequence[signal.Signals], handler: object, even_if_ignored: bool = False
) -> Iterator[None]:
    heard = [number for number in numbers if even_if_ignored or not ignored(number)]
    before = {number: signal.signal(number, handler) for number in heard}  # type: ignore
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
