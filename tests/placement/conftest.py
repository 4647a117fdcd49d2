"""Strict arithmetic for everything in dance_jax.placement, and short annealings where they do."""

import sys

import jax
import pytest

from dance_jax.placement.policies.latency import Search


@pytest.fixture(autouse=True, scope="module")
def strict_arithmetic():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def short(monkeypatch):
    """A quarter of the rounds, where the last percent does not matter."""
    module = sys.modules[Search.__module__]
    for name in ("SEARCH", "REFINE", "SETTLE"):
        schedule = getattr(module, name)
        monkeypatch.setattr(module, name, schedule._replace(rounds=schedule.rounds // 4))
