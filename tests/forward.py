"""Runs a whole trunk at once, for tests; the engine runs a trunk part by part."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dance_jax.models.attention import Rows
from dance_jax.models.trunk import Trunk, rope_of


def forward(
    model: Trunk,
    tokens_t: jax.Array,
    batch: Sequence[Rows],
    cached: Sequence[Any],
    moe: Callable[..., jax.Array],
    context: int,
) -> tuple[jax.Array, list[Any]]:
    """Hidden states [t, d] behind the layers, and the resulting cache of each layer.

    Args:
        moe: computes an MoE layer: moe(index of the layer, x, expert, weight) -> float32 [t, d].
    """
    config, positions = model.config, jnp.concatenate([each.positions_t for each in batch])
    hidden, rotations = model.embed(tokens_t, positions, context)
    numbers, kept = itertools.count(), []
    for index, (layer, before) in enumerate(zip(model.layers, cached, strict=True)):
        rope = rope_of(config, index)
        hidden, after, _ = layer(
            hidden,
            None if rope is None else rotations[rope],
            batch,
            before,
            lambda routed: (moe(next(numbers), *routed), None),
        )
        kept.append(after)
    return hidden, kept
