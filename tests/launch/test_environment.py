"""What a server's JAX finds in its environment."""

from __future__ import annotations

import os

import pytest

from dance_jax.launch.worker.environment import prepare


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
