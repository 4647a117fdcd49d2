"""The compile cache in one process; for clusters of processes, see tests/launch."""

from __future__ import annotations

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dance_jax.engine import compile_cache
from dance_jax.engine.compile_cache import CompileCache


def step(pool: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return pool.at[0].set(x), pool.sum() + x


FUNCTION = jax.jit(step, donate_argnums=0)


def lowered():
    return FUNCTION.lower(jnp.ones(4), jnp.float32(2))


def unreachable():
    raise AssertionError("the function was traced again")


def check(compiled) -> None:
    pool = jnp.arange(4.0)
    new, total = compiled(pool, jnp.float32(2))
    assert np.array_equal(new, [2, 1, 2, 3]) and total == 8
    assert pool.is_deleted()


def test_a_second_process_neither_traces_nor_compiles(tmp_path: pathlib.Path) -> None:
    first, second = CompileCache(tmp_path / "c", "scope"), CompileCache(tmp_path / "c", "scope")
    check(first.compile("step", lowered))
    check(second.compile("step", unreachable))
    assert (first.hits, first.misses, second.hits, second.misses) == (0, 1, 1, 0)
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700


def test_key_scope_and_environment_count(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CompileCache(tmp_path / "c", "scope").compile("step", lowered)
    for scope, key in (("scope", "other"), ("other", "step")):
        cache = CompileCache(tmp_path / "c", scope)
        cache.compile(key, lowered)
        assert cache.misses == 1
    environment = compile_cache.environment()
    monkeypatch.setattr(compile_cache, "environment", lambda: (*environment, "changed"))
    cache = CompileCache(tmp_path / "c", "scope")
    cache.compile("step", lowered)
    assert cache.misses == 1


def test_all_code_that_decides_counts() -> None:
    names = set(map(str, compile_cache.source_files()))
    assert names >= {"config.py", "models/trunk.py", "models/families/gpt_oss.py", "engine/step.py"}
    assert not any(name.startswith(("launch", "serve")) for name in names)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_damaged_files_are_made_again(tmp_path: pathlib.Path, damage: str) -> None:
    CompileCache(tmp_path / "c").compile("step", lowered)
    (path,) = (tmp_path / "c").iterdir()
    content = path.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes({"cut": content[:-9], "flip": flipped, "empty": b"", "foreign": b"x"}[damage])
    cache = CompileCache(tmp_path / "c")
    check(cache.compile("step", lowered))
    assert cache.misses == 1
    check(CompileCache(tmp_path / "c").compile("step", unreachable))


def test_a_directory_that_others_can_write_is_left_alone(tmp_path: pathlib.Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chmod(shared, 0o777)
    check(CompileCache(shared).compile("step", lowered))
    assert list(shared.iterdir()) == []


def test_without_a_directory() -> None:
    cache = CompileCache(None)
    check(cache.compile("step", lowered))
    assert cache.misses == 1
