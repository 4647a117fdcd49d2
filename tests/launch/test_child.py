"""A child process ends with its parent."""

from __future__ import annotations

import subprocess
import sys
import time

#: Watches its parent as a server across a network does, and gives up after a second of silence.
CHILD = """
import types
from dance_jax.launch.agent import child
child.ALIVE_TIMEOUT_S = 1.0
child.end_with_parent(types.SimpleNamespace(beats=True), lambda: print("gone", flush=True))
print("ready", flush=True)
import time
time.sleep(60)
"""


def test_a_silent_parent_across_a_network_is_gone() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for _ in range(8):
            time.sleep(0.25)
            process.stdin.write(b"\n")
            process.stdin.flush()
        assert process.poll() is None
        assert process.stdout.readline() == b"gone\n"
        assert process.wait(10) == -9
