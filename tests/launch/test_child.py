"""A child process ends with its parent, and reports its failure whatever its log can take."""

from __future__ import annotations

import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import msgspec
import pytest

from dance_jax.config import EngineConfig, ServeOptions, ServerSpec
from dance_jax.launch.agent.process import ChildProcess
from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import ControlListener, new_key, server_identity
from dance_jax.launch.planning.hosts import parse_hosts
from tests.launch.tiny import HOSTS

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


def setup_of(listener: ControlListener, key: bytes) -> protocol.Setup:
    """The setup of a server whose model does not exist."""
    return protocol.Setup(
        spec=parse_hosts(HOSTS),
        rank=0,
        config=EngineConfig(64),
        model="/no/such/model",
        fingerprint="f00d",
        experts="float32",
        layout=b"",
        control=listener.private,
        control_key=key,
        key=key,
        first_gpu=0,
        coordinator_port=0,
        machine_devices=(1, 1, 2),
        machine_index=0,
        cache_dir=None,
        beats=False,
    )


@pytest.mark.parametrize("module", ["dance_jax.launch.worker.main", "dance_jax.serve.frontend"])
def test_a_failure_is_reported_though_its_log_is_full(module: str) -> None:
    key = new_key()
    listener = ControlListener(key, [server_identity(0)])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        setup: Any = setup_of(listener, key)
        if module.endswith("frontend"):
            options = ServeOptions("tiny", port=taken.getsockname()[1])
            setup = protocol.FrontSetup(engine=setup, options=options)
        log = pathlib.Path("/dev/full")
        process = ChildProcess(ServerSpec("alpha", ""), module, log_path=log)
        try:
            process.write(msgspec.json.encode(setup))
            failed = first_failure(listener)
            assert process.wait(20)
        finally:
            process.kill(signal.SIGKILL)
            listener.close()
    assert failed.user
    assert ("cannot listen on" if "frontend" in module else "no such directory") in failed.message
    assert process.status == 1
    assert len(process.last_lines()) <= 1, "a device without an end is not read to its end"


def first_failure(listener: ControlListener) -> protocol.Failed:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for _, content in listener.receive(0.2):
            event = protocol.decode_event(content)
            if isinstance(event, protocol.Failed):
                return event
    raise AssertionError("no failure was reported")
