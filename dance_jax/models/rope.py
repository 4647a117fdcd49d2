"""Rotary position embedding, plain, linearly scaled and YaRN."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from dance_jax.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> np.ndarray:
    """Radians per position of each pair of floats, float32 [dim / 2].

    YaRN (arXiv 2309.00071, section 3.2): pair i turns original_max_position * f_i / 2 pi times over
    the trained context; pairs above beta_fast turns keep f_i, those below beta_slow get
    f_i / factor, a linear ramp over i blends between.
    """
    # float32 throughout: the angle of a late position shows every bit of it
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    plain = np.float32(1.0) / np.power(np.float32(rope.theta), exponents)
    if rope.kind == "default":
        return plain
    stretched = (plain / np.float32(rope.factor)).astype(np.float32)
    if rope.kind == "linear":
        return stretched

    def pair_with(turns: float) -> float:
        wavelengths = rope.original_max_position / (turns * 2 * math.pi)
        return rope.dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / width, 0, 1)
    return (stretched * ramp + plain * (1 - ramp)).astype(np.float32)


def rotation(rope: RopeConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle, float32 [*positions.shape, dim / 2]."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope)
    factor = np.float32(rope.attention_factor)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    rope: RopeConfig, heads_thk: jax.Array, rotation_tk: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Rotates each head's pairs of floats: [t, heads, dim] in any dtype, returned in it."""
    cos, sin = (table[..., None, :] for table in rotation_tk)
    values = heads_thk.astype(jnp.float32)
    if rope.interleaved:
        first, second = values[..., 0::2], values[..., 1::2]
    else:
        first, second = jnp.split(values, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    if rope.interleaved:
        joined = jnp.stack(turned, axis=-1).reshape(values.shape)
    else:
        joined = jnp.concatenate(turned, axis=-1)
    return joined.astype(heads_thk.dtype)
