"""How a routed expert is kept in a slot, and the grouped expert FFN over a pool of slots.

An `ExpertFormat` is all that the engine, its loaders and its peers know of an expert: arrays with
names, shapes and types. `ExpertFormat.ffn` is what a step calls. Its forms: C++ on CPUs
(kernels_cpu.py), a loop over blocks on CPUs without a compiler, the library's grouped product
elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.models import kernels_cpu
from dance_jax.models.config import Activation, ModelConfig
from dance_jax.models.layers import activate

#: Expert-sized slots of one device, an array [s, *shape] for each leaf of the format; any layer's
#: expert may sit in any slot.
Pool = tuple[Array, ...]
#: One expert, an array for each leaf of the format; or several, each with a leading axis.
Weights = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class ExpertFormat:
    """What a slot holds: w_gate, w_up [d, f] and w_down [f, d] in `dtype`.

    With `bias` also b_gate, b_up [f] and b_down [d], in float32.
    """

    d: int
    f: int
    #: "float32" or "bfloat16", of the matrices and of the rows that go through them.
    dtype: str
    activation: Activation
    bias: bool

    @functools.cached_property
    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of each array of an expert, by name, in the order of `Weights`."""
        d, f = self.d, self.f
        shapes: dict[str, tuple[int, ...]] = {"w_gate": (d, f), "w_up": (d, f), "w_down": (f, d)}
        leaves = {name: jax.ShapeDtypeStruct(shape, self.dtype) for name, shape in shapes.items()}
        if self.bias:
            biases = {"b_gate": (f,), "b_up": (f,), "b_down": (d,)}
            leaves |= {
                name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in biases.items()
            }
        return leaves

    @property
    def bytes(self) -> int:
        """Bytes of one expert."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self.leaves.values())

    def empty(self, *leading: int) -> Weights:
        """Arrays of zeros on the host, with leading axes."""
        return tuple(np.zeros((*leading, *leaf.shape), leaf.dtype) for leaf in self.leaves.values())

    def from_stored(self, stored: Mapping[str, np.ndarray]) -> Weights:
        """One expert from a checkpoint's arrays, floats of any type, by the leaves' names."""
        return tuple(
            stored[name].astype(leaf.dtype, copy=False) for name, leaf in self.leaves.items()
        )

    def ffn(
        self, pool: Pool, x_nd: Array, slot_nk: Array, weight_nk: Array, experts: float
    ) -> Array:
        """Weighted sum of each row's experts: sum over k of weight * FFN_slot(x), in float32.

        Args:
            x_nd: [n, d] rows in `dtype`.
            slot_nk: int32 [n, k], the slot of each assignment, -1 for none.
            weight_nk: float32 [n, k].
            experts: experts of one layer in the pool, on average.

        Returns:
            float32 [n, d].
        """
        if kernels_cpu.usable():
            return kernels_cpu.grouped_ffn(self.activation, pool, x_nd, slot_nk, weight_nk)
        if jax.default_backend() != "cpu":
            return ragged_ffn(self, pool, x_nd, slot_nk, weight_nk)
        block = block_rows(slot_nk.size, experts)
        return grouped_ffn(self, pool, x_nd, slot_nk, weight_nk, block)


def expert_format(config: ModelConfig, dtype: str) -> ExpertFormat:
    """The format of a model's experts in engines that compute in `dtype`."""
    expert = config.expert
    return ExpertFormat(config.hidden_size, expert.width, dtype, expert.activation, expert.bias)


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
def ragged_ffn(
    form: ExpertFormat, pool: Pool, x_nd: Array, slot_nk: Array, weight_nk: Array
) -> Array:
    """`ExpertFormat.ffn` with the library's grouped product: GPUs and TPUs have kernels for it."""
    (n, d), k, slots = x_nd.shape, slot_nk.shape[1], pool[0].shape[0]
    if slots == 0:
        return jnp.zeros((n, d), jnp.float32)
    leaves = dict(zip(form.leaves, pool, strict=True))
    assignments = _sort(slot_nk, slots)
    slot_a = jnp.clip(slot_nk.reshape(-1)[assignments.order], 0)

    def product(rows: Array, part: str) -> Array:
        product = lax.ragged_dot(
            rows, leaves[f"w_{part}"], assignments.run, preferred_element_type=jnp.float32
        )
        return product + leaves[f"b_{part}"][slot_a] if form.bias else product

    x_ad = x_nd[assignments.order // k]
    hidden_af = activate(form.activation, product(x_ad, "gate"), product(x_ad, "up"))
    out_ad = product(hidden_af.astype(x_nd.dtype), "down")
    out_nkd = out_ad[assignments.place].reshape(n, k, d)
    # What assignments without a slot give is not defined.
    out_nkd = jnp.where(slot_nk[..., None] < 0, 0.0, out_nkd)
    return jnp.einsum("nkd,nk->nd", out_nkd, weight_nk)


@jax.named_scope("experts")
def grouped_ffn(
    form: ExpertFormat, pool: Pool, x_nd: Array, slot_nk: Array, weight_nk: Array, block: int
) -> Array:
    """`ExpertFormat.ffn` as a loop over blocks of assignments.

    Assignments are sorted by slot and each slot's run is cut into blocks of `block` rows. The
    loop over blocks has a dynamic trip count, so absent assignments cost nothing.

    Args:
        block: rows a block takes; the others as in `ExpertFormat.ffn`.
    """
    n, d = x_nd.shape
    k = slot_nk.shape[1]
    slots = pool[0].shape[0]
    assignments = n * k
    if slots == 0:
        return jnp.zeros((n, d), jnp.float32)
    leaves = dict(zip(form.leaves, pool, strict=True))
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

        def product(rows: Array, part: str) -> Array:
            weight = lax.dynamic_index_in_dim(leaves[f"w_{part}"], slot, keepdims=False)
            product = jnp.dot(rows, weight, preferred_element_type=jnp.float32)
            if not form.bias:
                return product
            return product + lax.dynamic_index_in_dim(leaves[f"b_{part}"], slot, keepdims=False)

        x_bd = x_nd[lax.dynamic_slice(row_a, (start,), (block,))]
        hidden_bf = activate(form.activation, product(x_bd, "gate"), product(x_bd, "up"))
        out_bd = product(hidden_bf.astype(x_nd.dtype), "down")
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
