"""Three real processes with 1, 1 and 2 devices that run during the whole test session."""

from __future__ import annotations

import os
import pathlib
import pickle
import subprocess
import sys
from typing import Any

from dance_jax.placement.core import Layout
from tests.launch.launched import free_ports

DEVICES = (1, 1, 2)
ROOT = pathlib.Path(__file__).parents[2]


class TestCluster:
    """Sends every command to all servers and collects their replies."""

    __test__ = False

    def __init__(self, expert_library: pathlib.Path | None) -> None:
        port = str(free_ports(1))
        devices = ",".join(map(str, DEVICES))
        library = "" if expert_library is None else str(expert_library)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.worker", str(rank), port, devices, library],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                env=environment,
            )
            for rank in range(len(DEVICES))
        ]
        self._tell(self._replies())  # the endpoints of all servers

    def send(self, *command: Any) -> list[Any]:
        """Send a command to all servers; returns one reply per server."""
        self._tell(command)
        return self._replies()

    def _tell(self, content: Any) -> None:
        for process in self.processes:
            assert process.stdin is not None
            pickle.dump(content, process.stdin)
            process.stdin.flush()

    def _replies(self) -> list[Any]:
        return [pickle.load(process.stdout) for process in self.processes]  # type: ignore[arg-type]

    def use(self, transport: str, wire_dtype: str = "float32", model: str = "latent") -> None:
        """Choose the variant for later commands; the first `place` of a variant compiles it."""
        self.send("use", transport, wire_dtype, model)

    def place(self, layout: Layout) -> list[Any]:
        return self.send("place", layout)

    def stage(self, number: int, layout: Layout, *ranks: int) -> None:
        """Tell these servers that they have loaded a batch."""
        self.send("stage", number, layout, ranks)

    def commit(self, number: int, *ranks: int) -> None:
        """Tell these servers that all servers have loaded a batch."""
        self.send("commit", number, ranks)

    def step(self, commands: list[Any]) -> list[Any]:
        return self.send("step", commands)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
