"""Building blocks of every family: projection, norm, gated feed-forward, and the trunk's loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from dance_jax.models import kernels_cpu
from dance_jax.models.config import ModelConfig
from dance_jax.models.rope import rotation


class Routed(NamedTuple):
    """What a layer hands to the routed experts."""

    #: [t, d] in the engine's dtype.
    x: jax.Array
    #: int32 [t, k] and float32 [t, k].
    expert: jax.Array
    weight: jax.Array


#: moe(l, x_td, expert_tk, weight_tk) -> (float32 [t, d], record): the routed experts' weighted sum
#: in MoE layer l, a traced int32 0..len(moe_layers) - 1, and any pytree to stack over the layers.
#: Supplied by whoever holds the experts.
MoE = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def parameter(shape: tuple[int, ...], dtype: jnp.dtype) -> nnx.Param:
    """A weight that is filled later (under nnx.eval_shape it takes no memory)."""
    return nnx.Param(jnp.zeros(shape, dtype))


def contract(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """einsum with float32 sums and result, for operands of equal dtype."""
    if jax.default_backend() == "cpu":
        # XLA:CPU has no bfloat16 x bfloat16 -> float32 product
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def matmul(values: jax.Array, weight_io: jax.Array) -> jax.Array:
    """values [..., i] @ weight for operands of equal dtype, summed in float32: [..., o]."""
    if not kernels_cpu.usable():
        return contract("...i,io->...o", values, weight_io)
    rows = values.reshape(-1, values.shape[-1])
    return kernels_cpu.linear(rows, weight_io).reshape(*values.shape[:-1], -1)


class Linear(nnx.Module):
    """Projection without bias; weight [in, out]. The sum is float32, the result in `dtype`."""

    def __init__(self, d_in: int, d_out: int, dtype: jnp.dtype):
        self.weight = parameter((d_in, d_out), dtype)

    def __call__(self, values: jax.Array) -> jax.Array:
        return matmul(values, self.weight[...]).astype(values.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps), in float32, times a weight [d]."""

    def __init__(self, width: int, eps: float, dtype: jnp.dtype):
        self.weight = parameter((width,), dtype)
        self.eps = eps

    def __call__(self, values: jax.Array) -> jax.Array:
        wide = values.astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean + self.eps)).astype(values.dtype) * self.weight[...]


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x)); returns float32, as it is summed with the experts' output."""

    def __init__(self, d: int, width: int, dtype: jnp.dtype):
        self.gate = Linear(d, width, dtype)
        self.up = Linear(d, width, dtype)
        self.down = Linear(width, d, dtype)

    def __call__(self, values: jax.Array) -> jax.Array:
        if kernels_cpu.usable():
            rows = values.reshape(-1, values.shape[-1])
            gate, up, down = (part.weight[...] for part in (self.gate, self.up, self.down))
            return kernels_cpu.gated_mlp(gate, up, down, rows).reshape(values.shape)
        inner = jax.nn.silu(self.gate(values)) * self.up(values)
        return matmul(inner, self.down.weight[...])


class Layer(Protocol):
    """One decoder layer up to its routed experts.

    Returns the residual [t, d] (float32 when routed experts are still to be added to it), what goes
    to the routed experts (None in a dense layer), and the tokens' cache entries [t, w].
    """

    def __call__(
        self,
        hidden_td: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        batch: Any,
        cached_bsw: jax.Array,
    ) -> tuple[jax.Array, Routed | None, jax.Array]: ...


class Trunk(nnx.Module):
    """Everything but the routed experts: embedding, layers, final norm, output projection."""

    def __init__(self, config: ModelConfig, layers: Sequence[Layer], dtype: jnp.dtype):
        self.config = config
        self.embedding = parameter((config.vocab_size, config.hidden_size), dtype)
        self.layers = nnx.List(layers)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        if not config.tie_embeddings:
            self.head = parameter((config.vocab_size, config.hidden_size), dtype)

    def __call__(
        self,
        tokens_t: jax.Array,
        positions_t: jax.Array,
        batch: Any,
        cached: Sequence[jax.Array],
        moe: MoE,
    ) -> tuple[jax.Array, tuple[jax.Array, ...], Any]:
        """Runs the tokens of a step.

        The MoE layers are one loop: experts and exchange are compiled once, and each turn branches
        to its layer's own weights (stacked ones would be copied in every turn).

        Args:
            tokens_t: int32 [t]; positions_t: int32 [t], where they stand.
            batch: the rows they are, for the attention (`attention.Rows`).
            cached: per layer [blocks, positions, cache_width]. It is read, never written.
            moe: the routed experts.

        Returns:
            hidden [t, hidden_size] after the final norm; per layer the tokens' cache entries
            [t, cache_width] for the caller to write; the records of `moe`, stacked over the MoE
            layers.
        """
        angles = rotation(self.config.rope, positions_t)
        hidden = jnp.take(self.embedding[...], tokens_t, axis=0, mode="clip")
        moe_layers = self.config.moe_layers
        fresh = []
        for index in range(moe_layers[0]):
            with jax.named_scope("layer"):
                hidden, _, new = self.layers[index](hidden, angles, batch, cached[index])
            fresh.append(new)

        def up_to_experts(index: int, hidden: jax.Array):
            return self.layers[index](hidden, angles, batch, cached[index])

        branches = [functools.partial(up_to_experts, index) for index in moe_layers]

        def moe_layer(hidden: jax.Array, layer: jax.Array):
            with jax.named_scope("layer"):
                residual, routed, new = jax.lax.switch(layer, branches, hidden)
            sums, record = moe(layer, *routed)
            hidden = (residual + sums).astype(hidden.dtype)
            return hidden, (new, record)

        turns = jnp.arange(len(moe_layers), dtype=jnp.int32)
        hidden, (stacked, records) = jax.lax.scan(moe_layer, hidden, turns)
        return self.norm(hidden), (*fresh, *stacked), records

    @jax.named_scope("logits")
    def logits(self, hidden_nd: jax.Array) -> jax.Array:
        """Scores of every token of the vocabulary, float32 [n, vocab_size]."""
        weight = self.embedding if self.config.tie_embeddings else self.head
        return contract("nd,vd->nv", hidden_nd, weight[...])
