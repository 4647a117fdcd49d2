"""What a server's JAX finds in its environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dance_jax.launch.worker.environment import bypass_proxy, prepare

#: This process's environment.
REAL = dict(os.environ)
#: Joins a job of one server, and says which proxy downloads still use.
JOIN = """
import os, socket, types
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.launch.worker import join
join.JOIN_TIMEOUT_S = 30
with socket.create_server(("127.0.0.1", 0)) as probe:
    port = probe.getsockname()[1]
spec = parse_hosts("alpha address=127.0.0.1 experts=1")
join._initialize(types.SimpleNamespace(spec=spec, rank=0), f"127.0.0.1:{port}", range(1))
print(os.environ["https_proxy"], flush=True)
os._exit(0)
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the environment by one with variables that a user may have set."""
    found = {
        "JAX_COORDINATOR_ADDRESS": "elsewhere:1",
        "JAX_NUM_PROCESSES": "9",
        "JAX_ENABLE_X64": "0",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_dump_to=/d",
    }
    monkeypatch.setattr(os, "environ", dict(found))


def test_nothing_steers_jax_elsewhere() -> None:
    prepare("cpu", ())
    assert "JAX_COORDINATOR_ADDRESS" not in os.environ
    assert "JAX_NUM_PROCESSES" not in os.environ
    assert os.environ["JAX_ENABLE_X64"] == "0"
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert "device_count" not in os.environ["XLA_FLAGS"]
    assert "--xla_dump_to=/d" in os.environ["XLA_FLAGS"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_server_sees_its_gpus_alone() -> None:
    prepare("cuda", (0, 2))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "--xla_gpu_shard_autotuning=false" in os.environ["XLA_FLAGS"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "10.0.0.1"),
        ({"no_proxy": "example.org"}, "example.org,10.0.0.1"),
        ({"no_proxy": "example.org", "no_grpc_proxy": "a,b"}, "a,b,10.0.0.1"),
    ],
)
def test_what_has_no_proxy_keeps_none(before: dict[str, str], after: str) -> None:
    os.environ.update(before)
    bypass_proxy("10.0.0.1")
    found = dict(os.environ)
    assert found["no_grpc_proxy"] == after
    assert found.get("no_proxy") == before.get("no_proxy"), "downloads use the proxy as before"


def test_servers_find_each_other_behind_a_proxy() -> None:
    nowhere = "http://127.0.0.1:9"
    names = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
    set_by_user = REAL | dict.fromkeys(names, nowhere) | {"JAX_PLATFORMS": "cpu"}
    for name in ("no_proxy", "no_grpc_proxy"):
        set_by_user.pop(name, None)
    command = [sys.executable, "-c", JOIN]
    said = subprocess.check_output(command, env=set_by_user, stderr=subprocess.DEVNULL, timeout=120)
    assert said == f"{nowhere}\n".encode()
