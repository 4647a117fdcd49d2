"""Makes trunks: the module's structure first, without memory, then the weights one by one."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dance_jax.models.config import ModelConfig
from dance_jax.models.random_weights import random_trunk_tensors
from dance_jax.models.tensors import trunk_rules
from dance_jax.models.trunk import Trunk


def weight_shapes(config: ModelConfig, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Every weight of the trunk by dotted path, with the dtype it has in a trunk of `dtype`."""
    return {path: variable.get_value() for path, (_, variable) in _abstract(config, dtype).items()}


def fill(config: ModelConfig, dtype: str, weights: Iterable[tuple[str, np.ndarray]]) -> Trunk:
    """A trunk with the given weights, on the default device of this process.

    Args:
        config: the model.
        dtype: "float32" or "bfloat16", of weights and activations (routers stay float32).
        weights: (dotted path, array of any float dtype); each path once, all of them.

    Raises:
        ValueError: a path is unknown, missing, or its shape is wrong.
    """
    slots = _abstract(config, dtype)
    filled = {}
    for path, array in weights:
        key, variable = slots.pop(path, (None, None))
        if key is None or variable is None:
            raise ValueError(f"weight {path} is unknown or given twice")
        wanted = variable.get_value()
        if array.shape != wanted.shape:
            raise ValueError(f"weight {path} has shape {array.shape}, not {wanted.shape}")
        value = jax.device_put(np.ascontiguousarray(array.astype(wanted.dtype, copy=False)))
        filled[key] = variable.replace(value)
    if slots:
        raise ValueError(f"weights are missing: {', '.join(sorted(slots))}")
    graph, _ = nnx.split(_skeleton(config, dtype))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def init_random(config: ModelConfig, seed: int, dtype: str = "float32") -> Trunk:
    """A trunk with random weights whose activations stay near unit size."""
    rules = {rule.source: rule for rule in trunk_rules(config)}

    def weights() -> Iterable[tuple[str, np.ndarray]]:
        for name, tensor in random_trunk_tensors(config, seed):
            for target in rules[name].targets:
                yield target.path, target.cut(tensor)

    return fill(config, dtype, weights())


def _skeleton(config: ModelConfig, dtype: str) -> Trunk:
    return nnx.eval_shape(lambda: Trunk(config, jnp.dtype(dtype)))


def _abstract(config: ModelConfig, dtype: str) -> dict[str, tuple[tuple, nnx.Variable]]:
    _, state = nnx.split(_skeleton(config, dtype))
    return {".".join(map(str, key)): (key, variable) for key, variable in nnx.to_flat_state(state)}
