"""Rotary position embedding, in the variants that published models use."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from dance_jax.models.config import RopeConfig

#: Cosine and sine of every angle of some positions, float32 [t, dim / 2] each (`rotation`).
Rotation = tuple[jax.Array, jax.Array]


def inverse_frequencies(rope: RopeConfig, context: int) -> np.ndarray:
    """Radians per position of each pair of floats, float32 [dim / 2].

    Args:
        rope: the kind and its parameters.
        context: longest sequence served, in tokens. longrope has a set of frequencies for contexts
            up to the trained length, and another set for longer contexts. All cached keys must use
            the same set, so the longest sequence served decides, not the current length.
    """
    # float32 throughout: at late positions every bit of a frequency shows in the angle.
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    plain = np.float32(1.0) / np.power(np.float32(rope.theta), exponents)
    if rope.kind == "default":
        return plain
    if rope.kind == "proportional":
        return np.where(np.arange(rope.dim // 2) < rope.turning_pairs, plain, np.float32(0))
    if rope.kind == "longrope":
        longer = context > rope.original_max_position
        factors = rope.long_factor if longer else rope.short_factor
        return (plain / np.array(factors, np.float32)).astype(np.float32)
    stretched = (plain / np.float32(rope.factor)).astype(np.float32)
    if rope.kind == "linear":
        return stretched
    if rope.kind == "llama3":
        return _llama3(rope, plain, stretched)
    return _yarn(rope, plain, stretched)


def _yarn(rope: RopeConfig, plain: np.ndarray, stretched: np.ndarray) -> np.ndarray:
    """YaRN (arXiv 2309.00071, section 3.2).

    Pair i turns original_max_position * f_i / 2 pi times over the trained context. Pairs with more
    than beta_fast turns keep f_i, pairs with fewer than beta_slow get f_i / factor, and a linear
    ramp over i blends in between.
    """

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


def _llama3(rope: RopeConfig, plain: np.ndarray, stretched: np.ndarray) -> np.ndarray:
    """Llama 3.1's scaling: like YaRN, with a ramp over turns instead of pairs."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return (stretched * (1 - kept) + plain * kept).astype(np.float32)


def rotation(rope: RopeConfig, positions: jax.Array, context: int) -> Rotation:
    """Cosine and sine of every angle, float32 [*positions.shape, dim / 2].

    Args:
        context: see `inverse_frequencies`.
    """
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, context)
    factor = np.float32(rope.attention_factor)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(rope: RopeConfig, heads_thk: jax.Array, rotation_tk: Rotation) -> jax.Array:
    """Rotate the pairs of floats in the first `rope.dim` floats of each head; keep the rest.

    Args:
        heads_thk: [t, heads, head width] in any dtype; the result has the same dtype.
        rotation_tk: result of `rotation` for the tokens' positions.
    """
    cos, sin = (table[..., None, :] for table in rotation_tk)
    turning, still = jnp.split(heads_thk, [rope.dim], axis=-1)
    values = turning.astype(jnp.float32)
    if rope.interleaved:
        first, second = values[..., 0::2], values[..., 1::2]
    else:
        first, second = jnp.split(values, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    if rope.interleaved:
        joined = jnp.stack(turned, axis=-1).reshape(values.shape)
    else:
        joined = jnp.concatenate(turned, axis=-1)
    joined = joined.astype(heads_thk.dtype)
    return joined if not still.shape[-1] else jnp.concatenate([joined, still], axis=-1)
