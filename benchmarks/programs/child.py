"""Processes that are measured, and what /proc says of them."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Child:
    """A process that answers a line of JSON for each that it gets.

    Args:
        command: starts it, in the root of this repository.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._name = " ".join(command)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def read(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name}: ended with exit code {self._process.wait()}")
        return json.loads(line)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """Ends it: its input is at its end."""
        self._process.communicate()


def processor_seconds(pid: int) -> float:
    """User and system time of all threads of a process so far."""
    # The name, in parentheses, may have spaces.
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def memory(pid: int) -> dict[str, int]:
    """Bytes of a process by kind, as smaps_rollup names them: Rss, Pss, Pss_File ..."""
    lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
