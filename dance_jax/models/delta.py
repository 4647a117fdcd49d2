"""Gated delta net: a mixer with a recurrent state per sequence in place of a KV cache.

Notation of a value head (arXiv 2412.06464, section 3): state S [dk, dv], decay g <= 0, strength b,

    S <- e^g S;  u = b (v - S^T k);  S <- S + k u^T;  o = S^T q.

The tokens of a row are computed at once (section 3.3, arXiv 2406.06484): with G_i = g_1 + ... + g_i
and the state S_0 before these tokens, the u_i solve (I + A) u = b (v - e^G K S_0), where
A_ij = b_i e^(G_i - G_j) k_i . k_j for j < i, and o_i and the new S are sums over u.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dance_jax.models.attention import Rows
from dance_jax.models.config import DeltaNet, ModelConfig
from dance_jax.models.layers import Linear, RMSNorm, contract, parameter

#: Epsilon of the normalisation of queries and keys to unit length.
LENGTH_EPS = 1e-6


class DeltaState(NamedTuple):
    """Recurrent states, one per sequence or per row; float32 arrays of JAX or numpy."""

    #: [s, conv_width - 1, channels], the last inputs of the convolution.
    inputs: Any
    #: [s, value heads, dk, dv], the state S.
    memory: Any


class _Tokens(NamedTuple):
    """Tokens of a row, per value head h; float32."""

    #: [..., h, c, dk] each.
    query: jax.Array
    key: jax.Array
    #: [..., h, c, dv]
    value: jax.Array
    #: [..., h, c] each.
    decay: jax.Array
    strength: jax.Array


class DeltaNetLayer(nnx.Module):
    """The mixer of a layer. Its cache is a `DeltaState` with slots for sequences."""

    def __init__(self, config: ModelConfig, shape: DeltaNet, dtype: jnp.dtype):
        d, heads = config.hidden_size, shape.num_value_heads
        inner, wide = heads * shape.value_dim, jnp.dtype("float32")
        self.shape = shape
        self.qkv = Linear(d, shape.channels, dtype)
        self.gate = Linear(d, inner, dtype)
        self.strength = Linear(d, heads, dtype)
        self.decay = Linear(d, heads, dtype)
        #: [positions, channels], the oldest position first.
        self.conv = parameter((shape.conv_width, shape.channels), wide)
        self.a_log = parameter((heads,), wide)
        self.dt_bias = parameter((heads,), wide)
        self.norm = RMSNorm(shape.value_dim, config.norm_eps, dtype)
        self.out = Linear(inner, d, dtype)

    def __call__(
        self, hidden_td: jax.Array, rotation_tk: None, batch: Sequence[Rows], cached: DeltaState
    ) -> tuple[jax.Array, DeltaState]:
        """Returns the output [t, d] and the states after the rows of the batch."""
        wide = jnp.float32
        inputs_tc = self.qkv(hidden_td).astype(wide)
        strength_th = jax.nn.sigmoid(self.strength(hidden_td).astype(wide))
        decay_th = -jnp.exp(self.a_log[...]) * jax.nn.softplus(
            self.decay(hidden_td).astype(wide) + self.dt_bias[...]
        )
        begin, outputs = 0, []
        for rows in batch:
            own = slice(begin, begin + rows.tokens)
            begin += rows.tokens
            output, state = self._run(rows, cached, inputs_tc[own], decay_th[own], strength_th[own])
            outputs.append(output)
            # Later elements of the batch belong to other sequences, so this write does not change
            # what they read.
            cached = _write(cached, state, rows)
        mixed_thv = jnp.concatenate(outputs).astype(hidden_td.dtype)
        gate = jax.nn.silu(self.gate(hidden_td).astype(wide)).reshape(mixed_thv.shape)
        mixed_thv = (self.norm(mixed_thv).astype(wide) * gate).astype(hidden_td.dtype)
        return self.out(mixed_thv.reshape(len(hidden_td), -1)), cached

    def _run(
        self,
        rows: Rows,
        cached: DeltaState,
        inputs_tc: jax.Array,
        decay_th: jax.Array,
        strength_th: jax.Array,
    ) -> tuple[jax.Array, DeltaState]:
        """Output of some rows, float32 [t, h, dv], and the state after each row."""
        count, chunk = rows.count, rows.chunk
        real_rc = jnp.arange(chunk) < rows.length_r[:, None]
        # With zero decay and strength, padding does not change the state.
        decay_rc, strength_rc = (
            jnp.where(real_rc[..., None], part.reshape(count, chunk, -1), 0.0)
            for part in (decay_th, strength_th)
        )
        before = self._before(rows, cached)
        inputs_rcx = inputs_tc.reshape(count, chunk, -1)
        past = self._past_inputs(rows, before.inputs, inputs_rcx)
        joined = jnp.concatenate([past, inputs_rcx], axis=1)
        width = self.shape.conv_width
        mixed = sum(joined[:, i : i + chunk] * self.conv[i] for i in range(width))
        # Keep the last conv_width - 1 inputs up to the row's last real token.
        last = rows.length_r[:, None] + jnp.arange(width - 1)
        inputs = jnp.take_along_axis(joined, last[..., None], axis=1)
        tokens = self._tokens(jax.nn.silu(mixed), decay_rc, strength_rc)
        if chunk == 1:  # each row is a different sequence
            output, memory = _advance(before.memory, tokens)
        else:
            follows = rows.first_r != jnp.arange(count)

            def next_row(memory: jax.Array, row):
                begins_with, follows, tokens = row
                output, memory = _advance(jnp.where(follows, memory, begins_with), tokens)
                return memory, (output, memory)

            _, (output, memory) = jax.lax.scan(
                next_row, jnp.zeros_like(before.memory[0]), (before.memory, follows, tokens)
            )
        output_rchv = jnp.moveaxis(output, 1, 2)
        return output_rchv.reshape(count * chunk, *output_rchv.shape[2:]), DeltaState(
            inputs, memory
        )

    def _before(self, rows: Rows, cached: DeltaState) -> DeltaState:
        """State of each row's sequence before this step; zeros for a new sequence."""
        began_r = rows.start_r[rows.first_r] > 0

        def pick(kept: jax.Array) -> jax.Array:
            state = jnp.take(kept, rows.state_r2[:, 0], axis=0, mode="clip")
            return jnp.where(began_r.reshape(-1, *[1] * (kept.ndim - 1)), state, 0.0)

        return DeltaState(*map(pick, cached))

    def _past_inputs(self, rows: Rows, kept: jax.Array, inputs_rcx: jax.Array) -> jax.Array:
        """Convolution inputs before each row, [r, conv_width - 1, channels].

        They come from the sequence's previous row, which has no padding, or from `kept` if the row
        is the sequence's first one in this step.
        """
        if rows.chunk == 1:
            return kept
        width = self.shape.conv_width - 1
        if rows.chunk < width:
            raise ValueError(
                f"rows have {rows.chunk} tokens, but the convolution needs at least {width}"
            )
        joined = jnp.concatenate([kept, inputs_rcx], axis=1)[:, -width:]
        previous = jnp.concatenate([joined[:1], joined[:-1]])
        follows = rows.first_r != jnp.arange(rows.count)
        return jnp.where(follows[:, None, None], previous, kept)

    def _tokens(
        self, mixed_rcx: jax.Array, decay_rch: jax.Array, strength_rch: jax.Array
    ) -> _Tokens:
        shape = self.shape
        keys = shape.num_key_heads * shape.key_dim
        query, key, value = jnp.split(mixed_rcx, [keys, 2 * keys], axis=-1)
        repeats = shape.num_value_heads // shape.num_key_heads

        def heads(part: jax.Array, width: int) -> jax.Array:
            """[r, c, heads * width] -> [r, heads, c, width]"""
            return jnp.moveaxis(part.reshape(*part.shape[:2], -1, width), 2, 1)

        def unit(part: jax.Array) -> jax.Array:
            part = heads(part, shape.key_dim)
            length = jnp.sqrt(jnp.sum(part * part, axis=-1, keepdims=True) + LENGTH_EPS)
            return jnp.repeat(part / length, repeats, axis=1)

        return _Tokens(
            unit(query) * shape.key_dim**-0.5,
            unit(key),
            heads(value, shape.value_dim),
            jnp.moveaxis(decay_rch, 2, 1),
            jnp.moveaxis(strength_rch, 2, 1),
        )


def _write(cached: DeltaState, fresh: DeltaState, rows: Rows) -> DeltaState:
    """Write the states after some rows to their slots, in place if the states are donated.

    Rows are written one after another, so that a sequence with several rows keeps the state after
    its last row. Unused rows write to slot 0.
    """
    slot_r = jnp.where(rows.length_r > 0, rows.state_r2[:, 1], 0)

    def put(r: jax.Array, cached: DeltaState) -> DeltaState:
        return jax.tree.map(
            lambda kept, new: jax.lax.dynamic_update_index_in_dim(kept, new[r], slot_r[r], 0),
            cached,
            fresh,
        )

    return jax.lax.fori_loop(0, rows.count, put, cached)


def _solve(lower_ij: jax.Array, right_iv: jax.Array) -> jax.Array:
    """Solve (I + A) u = r for u by forward substitution; A is strictly lower triangular.

    JAX's solver would crash: on CPUs it calls LAPACK, which is not initialised in a step that was
    read from the compile cache.
    """

    def next_row(i: jax.Array, found: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_index_in_dim(lower_ij, i, -2)
        old = jax.lax.dynamic_index_in_dim(found, i, -2)
        new = old - contract("...ij,...jv->...iv", row, found)
        return jax.lax.dynamic_update_index_in_dim(found, new, i, -2)

    # Row i reads only earlier rows, which are solved already.
    return jax.lax.fori_loop(1, lower_ij.shape[-1], next_row, right_iv)


def _advance(memory: jax.Array, tokens: _Tokens) -> tuple[jax.Array, jax.Array]:
    """Outputs [..., h, c, dv] of c tokens, and the state S [..., h, dk, dv] after them."""
    total = jnp.cumsum(tokens.decay, axis=-1)
    count = total.shape[-1]
    index = jnp.arange(count)
    seen_ij = index[:, None] >= index
    # For j after i the difference is positive, and its exponential could overflow.
    fade_ij = jnp.exp(jnp.where(seen_ij, total[..., :, None] - total[..., None, :], -jnp.inf))
    faded = jnp.exp(total)[..., None]
    missing = tokens.value - faded * contract("...ck,...kv->...cv", tokens.key, memory)
    update = tokens.strength[..., None] * missing
    if count > 1:
        alike_ij = contract("...ik,...jk->...ij", tokens.key, tokens.key) * fade_ij
        lower_ij = jnp.where(index[:, None] > index, alike_ij, 0.0) * tokens.strength[..., None]
        update = _solve(lower_ij, update)
    reads_ij = contract("...ik,...jk->...ij", tokens.query, tokens.key) * fade_ij
    output = faded * contract("...ck,...kv->...cv", tokens.query, memory)
    output += contract("...ij,...jv->...iv", reads_ij, update)
    left = jnp.exp(total[..., -1:] - total)[..., None]
    memory = jnp.exp(total[..., -1])[..., None, None] * memory
    return output, memory + contract("...ck,...cv->...kv", tokens.key * left, update)
