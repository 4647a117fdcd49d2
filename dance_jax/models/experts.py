"""How a routed expert is kept in a slot, and the grouped expert FFN over a pool of slots.

An `ExpertFormat` is all that the engine, its loaders and its peers know of an expert: arrays with
names, shapes and types. `ExpertFormat.ffn` is what a step calls. Its forms: C++ on CPUs
(kernels_cpu.py); JAX's grouped product on GPUs and TPUs; a loop over blocks of rows where weights
have codes or another type than activations, which it widens one expert at a time, or where a CPU
has no compiler.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dance_jax.models import kernels_cpu
from dance_jax.models.config import Activation, ModelConfig
from dance_jax.models.formats import FLOATS, WeightFormat
from dance_jax.models.layers import activate, contract

#: Expert-sized slots of one device, any layer's expert in any slot: an array [s, *shape] for each
#: leaf of the format; or int32 [], the number of a pool in the C++ library's memory.
Pool = tuple[Array, ...] | Array
#: One expert, an array for each leaf of the format; or several, each with a leading axis.
Weights = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class ExpertFormat:
    """What a slot holds: w_gate and w_up [d, f], w_down [f, d], each in a format of its own.

    With `bias` also b_gate, b_up [f] and b_down [d], in float32.
    """

    d: int
    f: int
    gate: WeightFormat
    up: WeightFormat
    down: WeightFormat
    activation: Activation
    bias: bool

    @functools.cached_property
    def matrices(self) -> dict[str, tuple[WeightFormat, int, int]]:
        """Format, inputs and outputs of each matrix by name."""
        d, f = self.d, self.f
        return {
            "w_gate": (self.gate, d, f),
            "w_up": (self.up, d, f),
            "w_down": (self.down, f, d),
        }

    @functools.cached_property
    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of each array of an expert, in the order of `Weights`.

        Names are those of the matrix and of its array, as "w_gate.codes"; or of a bias.
        """
        leaves = {
            f"{name}.{array}": like
            for name, (form, d_in, d_out) in self.matrices.items()
            for array, like in form.arrays(d_in, d_out).items()
        }
        if self.bias:
            widths = {"b_gate": self.f, "b_up": self.f, "b_down": self.d}
            leaves |= {
                name: jax.ShapeDtypeStruct((width,), np.dtype(np.float32))
                for name, width in widths.items()
            }
        return leaves

    @property
    def name(self) -> str:
        """Formats of the matrices in words: one, or those of w_gate, w_up and w_down."""
        names = [str(form) for form, _, _ in self.matrices.values()]
        return names[0] if len(set(names)) == 1 else ", ".join(names)

    @property
    def bytes(self) -> int:
        """Bytes of one expert."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self.leaves.values())

    def all_in(self, dtype: np.dtype) -> bool:
        """All matrices have values of this type."""
        return all(FLOATS.get(form.kind) == dtype for form, _, _ in self.matrices.values())

    def empty(self, *leading: int) -> Weights:
        """Arrays of zeros on the host, with leading axes."""
        return tuple(np.zeros((*leading, *leaf.shape), leaf.dtype) for leaf in self.leaves.values())

    def from_stored(self, stored: Mapping[str, np.ndarray]) -> Weights:
        """One expert from a checkpoint's arrays by the leaves' names, floats of any type."""
        return tuple(
            stored[name].astype(leaf.dtype, copy=False) for name, leaf in self.leaves.items()
        )

    def joined(self, weights: Weights) -> np.ndarray:
        """One expert's arrays as bytes, one after the other: uint8 [bytes]."""
        flat = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in weights]
        return np.concatenate(flat)

    def split(self, joined: np.ndarray) -> Weights:
        """Inverse of `joined`; the arrays are views."""
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in self.leaves.values()]
        parts = np.split(joined, np.cumsum(sizes)[:-1])
        return tuple(
            part.view(leaf.dtype).reshape(leaf.shape)
            for part, leaf in zip(parts, self.leaves.values(), strict=True)
        )

    def matrix_form(self, name: str) -> WeightFormat | None:
        """The format of a matrix; None: it is a bias."""
        return self.matrices[name][0] if name in self.matrices else None

    def stacked(self, count: int, experts: Iterable[tuple[int, Weights]]) -> Weights:
        """For each leaf an array [count, *shape] of experts that come with their places."""
        found = self.empty(count)
        for place, weights in experts:
            for array, leaf in zip(found, weights, strict=True):
                array[place] = leaf
        return found

    def ffn(self, pool: Pool, x_nd: Array, slot_nk: Array, weight_nk: Array, layers: int) -> Array:
        """Weighted sum of each row's experts: sum over k of weight * FFN_slot(x), in float32.

        Args:
            pool: the slots' arrays, or the number of a `kernels_cpu.NativePool`.
            x_nd: [n, d] rows.
            slot_nk: int32 [n, k], the slot of each assignment, -1 for none.
            weight_nk: float32 [n, k].
            layers: of the model that have routed experts.

        Returns:
            float32 [n, d].
        """
        if isinstance(pool, Array):
            return kernels_cpu.experts(pool, x_nd, slot_nk, weight_nk)
        # Weights of another type than the rows' it would widen first, the whole pool at once.
        if self.all_in(x_nd.dtype) and jax.default_backend() != "cpu":
            return ragged_ffn(self, pool, x_nd, slot_nk, weight_nk)
        block = block_rows(slot_nk.size, pool[0].shape[0] / layers)
        return grouped_ffn(self, pool, x_nd, slot_nk, weight_nk, block)


def expert_format(config: ModelConfig, kept: Mapping[str, WeightFormat] | str) -> ExpertFormat:
    """The format of a model's experts.

    Args:
        kept: the formats of w_gate, w_up and w_down; or a float type that all have.
    """
    if isinstance(kept, str):
        kept = dict.fromkeys(("w_gate", "w_up", "w_down"), WeightFormat(kept))
    expert = config.expert
    forms = kept["w_gate"], kept["w_up"], kept["w_down"]
    return ExpertFormat(config.hidden_size, expert.width, *forms, expert.activation, expert.bias)


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
    form: ExpertFormat, pool: tuple[Array, ...], x_nd: Array, slot_nk: Array, weight_nk: Array
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
            rows, leaves[f"w_{part}.values"], assignments.run, preferred_element_type=jnp.float32
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
    form: ExpertFormat,
    pool: tuple[Array, ...],
    x_nd: Array,
    slot_nk: Array,
    weight_nk: Array,
    block: int,
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

        def own(leaf: str) -> Array:
            return lax.dynamic_index_in_dim(leaves[leaf], slot, keepdims=False)

        def product(rows: Array, part: str) -> Array:
            kept, d_in, d_out = form.matrices[f"w_{part}"]
            arrays = {name: own(f"w_{part}.{name}") for name in kept.arrays(d_in, d_out)}
            weight = kept.dequantise(arrays, d_in) if kept.group else arrays["values"]
            product = contract("bi,io->bo", rows, weight.astype(x_nd.dtype))
            return product + own(f"b_{part}") if form.bias else product

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
