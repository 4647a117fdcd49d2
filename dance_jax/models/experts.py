"""Storage of routed experts in slots, and the grouped expert FFN over a pool of slots.

An `ExpertFormat` is all that the engine, its loaders and its peers know of an expert: arrays with
names, shapes and types. Steps call `ExpertFormat.ffn`, which has three implementations: C++ on
CPUs (kernels_cpu.py); JAX's grouped product on GPUs and TPUs; and a loop over blocks of rows. The
loop is used if weights are quantised or have another type than the activations, because the loop
dequantises one expert at a time, and on CPUs without a C++ compiler.
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

#: Slots of one device; a slot holds one expert of any layer. Either an array [s, *shape] for each
#: leaf of the format, or int32 [], the number of a pool in the C++ library's memory.
Pool = tuple[Array, ...] | Array
#: One expert: an array for each leaf of the format; or several experts, with a leading axis.
Weights = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class ExpertFormat:
    """Format of an expert in a slot: w_gate and w_up [d, f], w_down [f, d], with a format each.

    With `bias`, an expert also has b_gate and b_up [f], and b_down [d], in float32.
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
        """Format, inputs and outputs of each matrix, by name."""
        d, f = self.d, self.f
        return {
            "w_gate": (self.gate, d, f),
            "w_up": (self.up, d, f),
            "w_down": (self.down, f, d),
        }

    @functools.cached_property
    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of each array of an expert, by name, in the order of `Weights`.

        A name is that of a matrix and an array of it, for example "w_gate.codes", or of a bias.
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
        """Formats as text: one if all matrices have the same, else of w_gate, w_up and w_down."""
        names = [str(form) for form, _, _ in self.matrices.values()]
        return names[0] if len(set(names)) == 1 else ", ".join(names)

    @property
    def bytes(self) -> int:
        """Bytes of one expert."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self.leaves.values())

    def all_in(self, dtype: np.dtype) -> bool:
        """Whether all matrices are unquantised values of this type."""
        return all(FLOATS.get(form.kind) == dtype for form, _, _ in self.matrices.values())

    def empty(self, *leading: int) -> Weights:
        """Arrays of zeros on the host, with the given leading axes."""
        return tuple(np.zeros((*leading, *leaf.shape), leaf.dtype) for leaf in self.leaves.values())

    def from_stored(self, stored: Mapping[str, np.ndarray]) -> Weights:
        """One expert from a checkpoint's arrays by leaf name; floats may have any type."""
        return tuple(
            stored[name].astype(leaf.dtype, copy=False) for name, leaf in self.leaves.items()
        )

    def joined(self, weights: Weights) -> np.ndarray:
        """Concatenate the arrays of one expert as bytes: uint8 [bytes]."""
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
        """Format of a matrix; None if the name is that of a bias."""
        return self.matrices[name][0] if name in self.matrices else None

    def stacked(self, count: int, experts: Iterable[tuple[int, Weights]]) -> Weights:
        """Stack experts, given with their indices, into an array [count, *shape] for each leaf."""
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
            slot_nk: int32 [n, k], slot of each assignment; -1 for none.
            weight_nk: float32 [n, k].
            layers: number of the model's layers with routed experts.

        Returns:
            float32 [n, d].
        """
        if isinstance(pool, Array):
            return kernels_cpu.experts(pool, x_nd, slot_nk, weight_nk)
        # ragged_ffn would convert weights of another type than the rows', the whole pool at once.
        if self.all_in(x_nd.dtype) and jax.default_backend() != "cpu":
            return ragged_ffn(self, pool, x_nd, slot_nk, weight_nk)
        block = block_rows(slot_nk.size, pool[0].shape[0] / layers)
        return grouped_ffn(self, pool, x_nd, slot_nk, weight_nk, block)


def expert_format(config: ModelConfig, kept: Mapping[str, WeightFormat] | str) -> ExpertFormat:
    """Format of a model's experts.

    Args:
        kept: formats of w_gate, w_up and w_down; or one float type for all three.
    """
    if isinstance(kept, str):
        kept = dict.fromkeys(("w_gate", "w_up", "w_down"), WeightFormat(kept))
    expert = config.expert
    forms = kept["w_gate"], kept["w_up"], kept["w_down"]
    return ExpertFormat(config.hidden_size, expert.width, *forms, expert.activation, expert.bias)


def block_rows(assignments: int, experts: float) -> int:
    """Number of rows in a block of `grouped_ffn`.

    Small blocks waste little arithmetic if an expert gets few rows, as in decode. Large blocks
    read an expert's weights once for many rows, as in prefill.

    Args:
        assignments: most (row, expert) pairs of one layer in this step.
        experts: number of experts of one layer in the pool.
    """
    mean = assignments / max(experts, 1)
    ladder = ((1 / 8, 1), (1, 2), (4, 4), (8, 8), (24, 16), (48, 32))
    return next((rows for limit, rows in ladder if mean <= limit), 64)


class _Sorted(NamedTuple):
    """Assignments sorted by slot, those without a slot last; there are a = n * k assignments."""

    #: int32 [a], the assignment (row * k + index) at each sorted position.
    order: Array
    #: int32 [a], the sorted position of each assignment.
    place: Array
    #: int32 [s], number of assignments of each slot.
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
    """`ExpertFormat.ffn` by JAX's grouped product, for which GPUs and TPUs have kernels."""
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
    # The product is undefined for assignments without a slot.
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
    """`ExpertFormat.ffn` by a loop over blocks of assignments.

    Assignments are sorted by slot, and each slot's run is split into blocks of `block` rows. The
    loop has a dynamic trip count, so assignments without a slot cost nothing.

    Args:
        block: rows of a block; see `ExpertFormat.ffn` for the others.
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
    # Compute slot and first assignment of every block here: within the loop this would cost more
    # than the product of a small block.
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
        # Rows past the end of the run belong to the next slot, whose block comes later and
        # overwrites them.
        return lax.dynamic_update_slice(out_ad, out_bd, (start, jnp.int32(0)))

    out_ad = lax.fori_loop(
        0, blocks_end_s[-1], run_block, jnp.zeros((assignments + block, d), jnp.float32)
    )
    weight_nk = jnp.where(slot_nk < 0, 0.0, weight_nk)
    picked_nkd = out_ad[place_a].reshape(n, k, d)
    # A row past the last run may have any finite value; its weight is zero.
    return jnp.einsum("nkd,nk->nd", picked_nkd, weight_nk)
