"""Attention over the paged KV cache on CPUs, in C++ (native/attention.cc).

A token's result is bit-identical regardless of other rows, of how prefill is split and of the
number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dance_jax.models import native

if TYPE_CHECKING:
    from dance_jax.models.attention import Heads, Rows


def write_and_attend(
    query_tgqk: Array,
    fresh_tw: Array,
    batch: Sequence[Rows],
    cached_bsw: Array,
    heads: Heads,
    scale: float,
    window: int | None,
    sinks_gq: Array | None,
) -> tuple[Array, Array]:
    """Compute `attention.write`, then `attention.attend`; the cache is written in place.

    Returns:
        float32 [t, key heads, queries per key head, value width], 0 for padding; and the cache.
    """
    symbol = f"Attend{cached_bsw.dtype.name.capitalize()}"
    found = jax.ShapeDtypeStruct((*query_tgqk.shape[:3], heads.value_width), jnp.float32)
    # Keep the leading axis of devices that the arrays of a step have: with another shape XLA would
    # copy the cache.
    kept = jax.ShapeDtypeStruct((1, *cached_bsw.shape), cached_bsw.dtype)
    call = jax.ffi.ffi_call(native.target(symbol), (found, kept), input_output_aliases={2: 1})
    rows = [
        jnp.concatenate([getattr(each, name) for each in batch])
        for name in ("start_r", "length_r", "table_rp")
    ]
    mixed, cache = call(
        query_tgqk.astype(jnp.float32),
        fresh_tw,
        cached_bsw[None],
        *rows,
        *([] if sinks_gq is None else [sinks_gq]),
        kinds=np.array([(each.count, each.chunk) for each in batch], np.int64).reshape(-1),
        scale=np.float32(scale),
        window=np.int64(window or 0),
        value_begin=np.int64(heads.value_begin),
    )
    return mixed, cache[0]
