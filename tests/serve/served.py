"""A tiny cluster of three local servers that serves, started as a user would."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

import psutil

from tests.launch.cold_run import Tiny
from tests.launch.launched import Launch, free_ports, gone, only_child

#: Name of the model there.
MODEL = "tiny"
NAMES = ("alpha", "beta", "gamma")


class Served(Launch):
    """One launch of the tiny cluster; `urls[rank]` is where a server answers, without /v1.

    Args:
        tiny: its files.
        folder: for what it leaves, which is nothing.
        options: more of the command line.
    """

    def __init__(self, tiny: Tiny, folder: pathlib.Path, *options: str | os.PathLike[str]) -> None:
        self.port = free_ports(len(NAMES))
        self.urls = tuple(f"http://127.0.0.1:{self.port + rank}" for rank in range(len(NAMES)))
        words = ["--port", str(self.port), "--served-model-name", MODEL, "--policy", "uniform"]
        # Experts move when a test says so, and nobody waits long for where to.
        words += ["--rebalance-interval", "0", "--rebalance-policy", "dance"]
        super().__init__(tiny.command(*words, *options), folder)

    def front(self, rank: int) -> psutil.Process:
        """A server's front end."""
        return self.workers[rank]

    def engine(self, rank: int) -> psutil.Process:
        """The engine it has now, or next."""
        return only_child(self.front(rank))

    def kill_engine(self, rank: int) -> int:
        """Returns its process id once it is gone: from here on `engine` is the next one."""
        engine = self.engine(rank)
        engine.kill()
        assert gone([engine], 10)
        return engine.pid


@contextlib.contextmanager
def serving(tiny: Tiny, folder: pathlib.Path, *options: str | os.PathLike[str]) -> Iterator[Served]:
    """A cluster that is ready."""
    served = Served(tiny, folder, *options)
    try:
        served.wait_for("curl ")
        yield served
    finally:
        served.kill()
