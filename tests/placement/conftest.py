"""Strict arithmetic for everything in dance_jax.placement, and short annealings where they do."""

import sys

import jax
import pytest

from dance_jax.placement.policies.latency import Search
from tests.quick import OPTIMISED


@pytest.fixture(autouse=True, scope="module")
def strict_arithmetic():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="package")
def optimised_annealing():
    """Annealing runs for many rounds, so optimising it pays."""
    module = sys.modules[Search.__module__]
    with pytest.MonkeyPatch.context() as patch:
        anneal = jax.jit(module._anneal.__wrapped__, compiler_options=OPTIMISED)
        patch.setattr(module, "_anneal", anneal)
        yield


@pytest.fixture
def short(monkeypatch):
    """A quarter of the rounds, where the last percent does not matter."""
    module = sys.modules[Search.__module__]
    for name in ("SEARCH", "REFINE", "SETTLE"):
        schedule = getattr(module, name)
        monkeypatch.setattr(module, name, schedule._replace(rounds=schedule.rounds // 4))
