"""Fixtures for the tests with three processes."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from dance_jax.engine.runner import Runner
from dance_jax.placement.core import Placement
from dance_jax.placement.devices import spread
from tests.cluster import tiny
from tests.cluster.tiny import EXPERTS, LAYERS


@pytest.fixture(scope="package")
def single(expert_library: pathlib.Path | None) -> Runner:
    """The same model on one device that holds every expert."""
    return alone("latent")


@pytest.fixture(scope="package")
def single_of(expert_library: pathlib.Path | None) -> Callable[..., Runner]:
    """single_of(model, wire_dtype) -> a runner like `single` for one of `tiny.MODELS`."""
    return alone


@functools.cache
def alone(model: str, wire_dtype: str = "float32") -> Runner:
    everything = Placement(np.ones((1, LAYERS, EXPERTS), bool))
    return tiny.runner(spread(everything, [1], [LAYERS * EXPERTS]), 0, None, wire_dtype, model)
