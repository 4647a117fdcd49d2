"""The expert pool of one device, and the grouped expert FFN over it.

`expert_ffn` is what the engine calls. Its forms: C++ on CPUs (kernels_cpu.py), a loop over blocks
on CPUs without a compiler, the library's grouped product elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dance_jax.models import kernels_cpu


class Pool(NamedTuple):
    """Expert-sized slots of one device; any layer's expert may sit in any slot.

    w_gate, w_up: [s, d, f]; w_down: [s, f, d]; all in the engine's dtype.
    """

    w_gate: Array
    w_up: Array
    w_down: Array


def expert_ffn(pool: Pool, x_nd: Array, slot_nk: Array, weight_nk: Array, experts: float) -> Array:
    """Weighted sum of each row's experts: sum over k of weight * FFN_slot(x), in float32.

    Args:
        x_nd: [n, d] rows in the pool's dtype.
        slot_nk: int32 [n, k], the slot of each assignment, -1 for none.
        weight_nk: float32 [n, k].
        experts: experts of one layer in the pool, on average.

    Returns:
        float32 [n, d].
    """
    if kernels_cpu.usable():
        return kernels_cpu.grouped_ffn(*pool, x_nd, slot_nk, weight_nk)
    if jax.default_backend() != "cpu":
        return ragged_ffn(pool, x_nd, slot_nk, weight_nk)
    return grouped_ffn(pool, x_nd, slot_nk, weight_nk, block_rows(slot_nk.size, experts))


def block_rows(assignments: int, experts: float) -> int:
    """Rows one block of `grouped_ffn` takes.

    Small blocks waste no arithmetic on the few rows an expert gets in decode; large ones read
    an expert's weights once for many rows in prefill.

    Args:
        assignments: most (row, expert) pairs of one layer in this step.
        experts: experts of one layer in the pool.
    """
    mean = assignments / max(experts, 1)
    ladder = ((1 / 8, 1), (1, 2), (4, 4), (8, 8), (24, 16), (48, 32))
    return next((rows for limit, rows in ladder if mean <= limit), 64)


class _Sorted(NamedTuple):
    """Assignments in the order of their slots, those without one last; a = n * k of them."""

    #: int32 [a], assignment (row * k + which) at each place; int32 [a], place of each assignment.
    order: Array
    place: Array
    #: int32 [s], assignments of each slot.
    run: Array


def _sort(slot_nk: Array, slots: int) -> _Sorted:
    slot_a = jnp.where(slot_nk < 0, slots, slot_nk).reshape(-1)
    order_a = jnp.argsort(slot_a).astype(jnp.int32)
    place_a = (
        jnp.zeros(slot_a.size, jnp.int32)
        .at[order_a]
        .set(jnp.arange(slot_a.size, dtype=jnp.int32), unique_indices=True)
    )
    return _Sorted(order_a, place_a, jnp.zeros(slots + 1, jnp.int32).at[slot_a].add(1)[:slots])


@jax.named_scope("experts")
def ragged_ffn(pool: Pool, x_nd: Array, slot_nk: Array, weight_nk: Array) -> Array:
    """`expert_ffn` with the library's grouped product, which GPUs and TPUs have kernels for."""
    (n, d), k, slots = x_nd.shape, slot_nk.shape[1], pool.w_gate.shape[0]
    if slots == 0:
        return jnp.zeros((n, d), jnp.float32)
    assignments = _sort(slot_nk, slots)

    def product(rows: Array, w: Array) -> Array:
        return lax.ragged_dot(rows, w, assignments.run, preferred_element_type=jnp.float32)

    x_ad = x_nd[assignments.order // k]
    hidden_af = (jax.nn.silu(product(x_ad, pool.w_gate)) * product(x_ad, pool.w_up)).astype(
        x_nd.dtype
    )
    out_nkd = product(hidden_af, pool.w_down)[assignments.place].reshape(n, k, d)
    # What assignments without a slot give is not defined.
    out_nkd = jnp.where(slot_nk[..., None] < 0, 0.0, out_nkd)
    return jnp.einsum("nkd,nk->nd", out_nkd, weight_nk)


@jax.named_scope("experts")
def grouped_ffn(pool: Pool, x_nd: Array, slot_nk: Array, weight_nk: Array, block: int) -> Array:
    """`expert_ffn` as a loop over blocks of assignments.

    Assignments are sorted by slot and each slot's run is cut into blocks of `block` rows. The
    loop over blocks has a dynamic trip count, so absent assignments cost nothing.

    Args:
        block: rows a block takes; the others as in `expert_ffn`.
    """
    n, d = x_nd.shape
    k = slot_nk.shape[1]
    slots = pool.w_gate.shape[0]
    assignments = n * k
    if slots == 0:
        return jnp.zeros((n, d), jnp.float32)
    order_a, place_a, run_s = _sort(slot_nk, slots)
    run_end_s = jnp.cumsum(run_s)
    blocks_end_s = jnp.cumsum((run_s + block - 1) // block)
    row_a = jnp.pad(order_a // k, (0, block))
    # Slot and first assignment of every block, once: in the loop they cost more than small blocks.
    block_b = jnp.arange(min(assignments, slots + assignments // block), dtype=jnp.int32)
    passed_bs = blocks_end_s <= block_b[:, None]
    slot_b = jnp.minimum(jnp.sum(passed_bs, axis=1, dtype=jnp.int32), slots - 1)
    first_b = blocks_end_s[slot_b] - (run_s[slot_b] + block - 1) // block
    start_b = run_end_s[slot_b] - run_s[slot_b] + (block_b - first_b) * block

    def run_block(i: Array, out_ad: Array) -> Array:
        slot, start = slot_b[i], start_b[i]
        x_bd = x_nd[lax.dynamic_slice(row_a, (start,), (block,))]
        gate_bf = _matmul(x_bd, lax.dynamic_index_in_dim(pool.w_gate, slot, keepdims=False))
        up_bf = _matmul(x_bd, lax.dynamic_index_in_dim(pool.w_up, slot, keepdims=False))
        hidden_bf = (jax.nn.silu(gate_bf) * up_bf).astype(x_nd.dtype)
        out_bd = _matmul(hidden_bf, lax.dynamic_index_in_dim(pool.w_down, slot, keepdims=False))
        # Rows past the run's end belong to the next slot, whose own block, coming later,
        # overwrites them.
        return lax.dynamic_update_slice(out_ad, out_bd, (start, jnp.int32(0)))

    out_ad = lax.fori_loop(
        0, blocks_end_s[-1], run_block, jnp.zeros((assignments + block, d), jnp.float32)
    )
    weight_nk = jnp.where(slot_nk < 0, 0.0, weight_nk)
    picked_nkd = out_ad[place_a].reshape(n, k, d)
    # A row past the last run may hold anything finite, and weighs zero.
    return jnp.einsum("nkd,nk->nd", picked_nkd, weight_nk)


def _matmul(x: Array, w: Array) -> Array:
    return jnp.dot(x, w, preferred_element_type=jnp.float32)
