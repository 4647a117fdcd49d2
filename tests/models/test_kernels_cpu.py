"""The library of C++ kernels: built once where several want it, and its counters."""

from __future__ import annotations

import pathlib
import threading
import time

import jax.numpy as jnp
import pytest

from dance_jax.models import kernels_cpu
from dance_jax.models.layers import SILU


def test_of_several_at_once_one_compiles(
    compiled: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    made = []

    def compile_slowly(compiler: list[str], library: pathlib.Path) -> None:
        time.sleep(0.2)
        library.write_bytes(b"")
        made.append(library)

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(kernels_cpu, "_compile", compile_slowly)
    built = []
    threads = [
        threading.Thread(target=lambda: built.append(kernels_cpu.build(tmp_path))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert built == made * 3


def test_time_for_routed_experts_is_counted(compiled: pathlib.Path):
    calls, seconds, assignments = before = kernels_cpu.routed_seconds()
    w_gate, w_down, x_nd = jnp.ones((2, 8, 4)), jnp.ones((2, 4, 8)), jnp.ones((1, 8))
    kernels_cpu.gated_mlp(SILU, w_gate[0], w_gate[0], w_down[0], x_nd).block_until_ready()
    assert kernels_cpu.routed_seconds() == before, "the trunk's are not"
    slot, weight = jnp.array([[1, -1, 0]], jnp.int32), jnp.ones((1, 3))
    leaves = (w_gate, w_gate, w_down)
    kernels_cpu.grouped_ffn(SILU, leaves, x_nd, slot, weight).block_until_ready()
    now = kernels_cpu.routed_seconds()
    assert (now[0], now[2]) == (calls + 1, assignments + 2) and now[1] > seconds
