"""A tiny serving cluster of three local servers, started as a user would start it."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

import psutil

from tests.launch.cold_run import Tiny
from tests.launch.launched import Launch, free_ports, gone, only_child

#: Name of the served model.
MODEL = "tiny"
NAMES = ("alpha", "beta", "gamma")


class Served(Launch):
    """One launch of the tiny cluster; `urls[rank]` is a server's URL, without /v1.

    Args:
        tiny: the cluster's files.
        folder: folder for output and temporary files; the cluster must leave nothing behind.
        options: more command-line options.
        port: of the first server; None: a free one.
    """

    def __init__(
        self,
        tiny: Tiny,
        folder: pathlib.Path,
        *options: str | os.PathLike[str],
        port: int | None = None,
    ) -> None:
        self.port = port or free_ports(len(NAMES))
        self.urls = tuple(f"http://127.0.0.1:{self.port + rank}" for rank in range(len(NAMES)))
        words = ["--port", str(self.port), "--served-model-name", MODEL, "--policy", "uniform"]
        words += ["--watchdog", "4"]
        # Experts move only when a test asks for it, and the policy decides fast.
        words += ["--rebalance-interval", "0", "--rebalance-policy", "dance"]
        super().__init__(tiny.command(*words, *options), folder)

    def front(self, rank: int) -> psutil.Process:
        """A server's front end."""
        return self.workers[rank]

    def engine(self, rank: int) -> psutil.Process:
        """A server's engine, the current one or the next."""
        return only_child(self.front(rank))

    def kill_engine(self, rank: int) -> int:
        """Kill a server's engine and wait until it is gone; return its process id.

        From then on, `engine` gives the next engine.
        """
        engine = self.engine(rank)
        engine.kill()
        assert gone([engine], 10)
        return engine.pid


@contextlib.contextmanager
def serving(tiny: Tiny, folder: pathlib.Path, *options: str | os.PathLike[str]) -> Iterator[Served]:
    """A context with a cluster that is ready."""
    served = Served(tiny, folder, *options)
    try:
        served.wait_for("curl ")
        yield served
    finally:
        served.kill()
