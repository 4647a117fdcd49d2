"""Builds trunks: first the module structure, which takes no memory, then weight after weight."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dance_jax.models import native
from dance_jax.models.config import ModelConfig
from dance_jax.models.formats import WeightFormat
from dance_jax.models.layers import Weight
from dance_jax.models.trunk import Trunk

#: Formats of matrices by dotted path; matrices not listed are floats of the trunk's dtype.
Forms = Mapping[str, WeightFormat]


def weight_shapes(
    config: ModelConfig, dtype: str, forms: Forms | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of a trunk of `dtype`, by dotted path."""
    variables = _abstract(_skeleton(config, dtype, forms or {}))
    return {path: variable.get_value() for path, (_, variable) in variables.items()}


@functools.lru_cache(maxsize=4)  # takes seconds for a model with many layers
def matrix_shapes(config: ModelConfig) -> Mapping[str, tuple[int, int, int]]:
    """Heads (1 if the matrix is not per head), inputs and outputs of every matrix, by path."""
    return {
        path: (weight.heads or 1, weight.d_in, weight.d_out)
        for path, weight in _matrices(_skeleton(config, "float32", {}))
    }


def fill(
    config: ModelConfig,
    dtype: str,
    weights: Iterable[tuple[str, np.ndarray]],
    forms: Forms | None = None,
) -> Trunk:
    """Build a trunk with the given weights on the default device of this process.

    Args:
        config: the model.
        dtype: "float32" or "bfloat16", of activations and of weights not listed in `forms`.
        weights: (dotted path, array) for every path, each exactly once. Floats may have any type.
        forms: formats of matrices.

    Raises:
        ValueError: a path is unknown, missing or given twice, or an array has the wrong shape.
    """
    skeleton = _skeleton(config, dtype, forms or {})
    slots = _abstract(skeleton)
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
    graph, _ = nnx.split(skeleton)
    trunk = nnx.merge(graph, nnx.from_flat_state(filled))
    filled.clear()
    if native.usable():
        for _, weight in _matrices(trunk):
            weight.pack()
    return trunk


def _skeleton(config: ModelConfig, dtype: str, forms: Forms) -> Trunk:
    def make() -> Trunk:
        trunk = Trunk(config, jnp.dtype(dtype))
        for path, weight in _matrices(trunk):
            if path in forms:
                weight.keep_as(forms[path])
        return trunk

    return nnx.eval_shape(make)


def _matrices(trunk: Trunk) -> list[tuple[str, Weight]]:
    """All matrices of a trunk with their dotted paths."""
    return [
        (".".join(map(str, path)), node)
        for path, node in nnx.iter_graph(trunk)
        if isinstance(node, Weight)
    ]


def _abstract(skeleton: Trunk) -> dict[str, tuple[tuple, nnx.Variable]]:
    _, state = nnx.split(skeleton)
    return {".".join(map(str, key)): (key, variable) for key, variable in nnx.to_flat_state(state)}
