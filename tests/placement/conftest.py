"""Strict arithmetic for everything in dance_jax.placement."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def strict_arithmetic():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
