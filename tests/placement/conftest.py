"""Strict arithmetic for everything in dance_jax.placement, and short annealings where they do."""

import sys

import jax
import pytest

from dance_jax.placement.policies.latency import Search
from tests.placement.cases import shorten_annealing

#: Annealing of fewer residents than this takes less time than optimising it.
SMALL = 100


@pytest.fixture(autouse=True, scope="module")
def strict_arithmetic():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="package")
def optimised_annealing():
    """Annealing runs for many rounds, so optimising it pays, but little where it is small."""
    module = sys.modules[Search.__module__]
    plain = module._anneal
    options = {"xla_backend_optimization_level": 1}
    optimised = jax.jit(plain.__wrapped__, compiler_options=options)

    def anneal(goal, resident, *numbers):
        return (plain if resident.size < SMALL else optimised)(goal, resident, *numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_anneal", anneal)
        yield


@pytest.fixture
def short(monkeypatch):
    """A quarter of the rounds, where the last percent does not matter."""
    shorten_annealing(monkeypatch, 4)
