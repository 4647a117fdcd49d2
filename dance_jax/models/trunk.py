"""The trunk: a model without its routed experts, as defined by its `ModelConfig`.

A step runs the trunk part by part: `Trunk.embed`, layer after layer, `Trunk.logits`
(engine/step.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dance_jax.models.attention import GroupedAttentionLayer, LatentAttentionLayer, Rows
from dance_jax.models.config import (
    DeltaNet,
    GroupedAttention,
    LatentAttention,
    Mixer,
    ModelConfig,
    RopeConfig,
)
from dance_jax.models.delta import DeltaNetLayer
from dance_jax.models.layers import GatedMLP, Linear, RMSNorm, Weight, parameter
from dance_jax.models.rope import Rotation, rotation
from dance_jax.models.router import Routed, Router

#: moe(routed) -> (float32 [t, d], record): the weighted sums of a layer's routed experts, and any
#: pytree. Supplied by the owner of the experts.
MoE = Callable[[Routed], tuple[jax.Array, Any]]

_MIXERS: dict[type[Mixer], Callable[..., nnx.Module]] = {
    GroupedAttention: GroupedAttentionLayer,
    LatentAttention: LatentAttentionLayer,
    DeltaNet: DeltaNetLayer,
}


class SharedExperts(nnx.Module):
    """The shared experts of a layer, combined into one feed-forward; returns float32 [t, d]."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        assert config.shared is not None
        d = config.hidden_size
        self.mlp = GatedMLP(d, config.shared.width, dtype, config.expert.activation)
        self.gate = Linear(d, 1, dtype) if config.shared.gated else None

    def __call__(self, x_td: jax.Array) -> jax.Array:
        output = self.mlp(x_td)
        if self.gate is None:
            return output
        return output * jax.nn.sigmoid(self.gate(x_td).astype(jnp.float32))


class Rest(NamedTuple):
    """Intermediate results of `Layer.start` for the rest of the layer."""

    #: [t, d], the residual stream, input of `Layer.finish`.
    hidden: jax.Array
    #: [t, d], input of `Layer.beside`.
    x: jax.Array


class Layer(nnx.Module):
    """One decoder layer: a mixer, then a dense feed-forward, or shared and routed experts.

    `start` computes the inputs of the routed experts, `beside` what is added to their sums, and
    `finish` combines both.
    """

    def __init__(self, config: ModelConfig, index: int, dtype: jnp.dtype):
        layer = config.layers[index]
        norm = functools.partial(
            RMSNorm, config.hidden_size, config.norm_eps, dtype, config.norm_plus_one
        )
        self.routed = layer.routed
        self.attention_norm = norm()
        self.mixer = _MIXERS[type(layer.mixer)](config, layer.mixer, dtype)
        self.mlp_norm = norm()
        if layer.dense_width:
            self.mlp = GatedMLP(
                config.hidden_size, layer.dense_width, dtype, config.expert.activation
            )
        if layer.routed:
            self.router = Router(config.router, config.hidden_size, config.norm_eps)
            self.shared = SharedExperts(config, dtype) if config.shared else None

    def __call__(
        self,
        hidden_td: jax.Array,
        rotation_tk: Rotation | None,
        batch: Sequence[Rows],
        cached: Any,
        moe: MoE,
    ) -> tuple[jax.Array, Any, Any]:
        """Run the layer for the tokens of a step.

        Args:
            moe: the routed experts of this layer; not called if the layer has none.

        Returns:
            hidden [t, d]; `cached` with this step's additions; and the record of `moe`, or None.
        """
        rest, routed, cached = self.start(hidden_td, rotation_tk, batch, cached)
        beside_td = self.beside(rest.x)
        if routed is None:
            return self.finish(rest.hidden, beside_td, None), cached, None
        experts_td, record = moe(routed)
        return self.finish(rest.hidden, beside_td, experts_td), cached, record

    def start(
        self, hidden_td: jax.Array, rotation_tk: Rotation | None, batch: Sequence[Rows], cached: Any
    ) -> tuple[Rest, Routed | None, Any]:
        """Run the layer up to its routed experts.

        Args:
            rotation_tk: the mixer's rotation at the tokens' positions.
            batch: the rows to which the tokens belong.
            cached: the cache after earlier steps, [blocks, positions, cache_width] or
                `delta.DeltaState`.

        Returns:
            Inputs of `beside` and `finish`; inputs of the routed experts, or None if the layer has
            none; and `cached` with this step's additions.
        """
        mixed, cached = self.mixer(self.attention_norm(hidden_td), rotation_tk, batch, cached)
        hidden_td = hidden_td + mixed
        x_td = self.mlp_norm(hidden_td)
        routed = Routed(x_td, *self.router(x_td)) if self.routed else None
        return Rest(hidden_td, x_td), routed, cached

    def beside(self, x_td: jax.Array) -> jax.Array | None:
        """What is added to the routed experts' sums, [t, d], from `Rest.x`; None for nothing."""
        if not self.routed:
            return self.mlp(x_td)
        return None if self.shared is None else self.shared(x_td)

    def finish(
        self, hidden_td: jax.Array, beside_td: jax.Array | None, experts_td: jax.Array | None
    ) -> jax.Array:
        """Compute the layer's output, hidden [t, d].

        Args:
            hidden_td: `Rest.hidden`.
            beside_td: result of `beside`.
            experts_td: sums of the routed experts, float32 [t, d].
        """
        sums_td = hidden_td.astype(jnp.float32)
        for part_td in (beside_td, experts_td):
            if part_td is not None:
                sums_td += part_td
        return sums_td.astype(hidden_td.dtype)


class SandwichLayer(Layer):
    """Gemma 4's layer: norms before and after each part; a dense feed-forward plus experts."""

    def __init__(self, config: ModelConfig, index: int, dtype: jnp.dtype):
        layer, d = config.layers[index], config.hidden_size
        norm = functools.partial(RMSNorm, d, config.norm_eps, dtype, config.norm_plus_one)
        self.attention_norm = norm()
        self.mixer = _MIXERS[type(layer.mixer)](config, layer.mixer, dtype)
        self.mixed_norm = norm()
        self.mlp_norm = norm()
        self.mlp = GatedMLP(d, layer.dense_width, dtype, config.expert.activation)
        self.mlp_out_norm = norm()
        self.router = Router(config.router, d, config.norm_eps)
        self.expert_norm = norm()
        self.expert_out_norm = norm()
        self.out_norm = norm()
        self.scale = parameter((1,), jnp.dtype("float32"))

    def start(
        self, hidden_td: jax.Array, rotation_tk: Rotation | None, batch: Sequence[Rows], cached: Any
    ) -> tuple[Rest, Routed | None, Any]:
        mixed, cached = self.mixer(self.attention_norm(hidden_td), rotation_tk, batch, cached)
        hidden_td = hidden_td + self.mixed_norm(mixed)
        routed = Routed(self.expert_norm(hidden_td), *self.router(hidden_td))
        return Rest(hidden_td, hidden_td), routed, cached

    def beside(self, x_td: jax.Array) -> jax.Array | None:
        return self.mlp_out_norm(self.mlp(self.mlp_norm(x_td)))

    def finish(
        self, hidden_td: jax.Array, beside_td: jax.Array | None, experts_td: jax.Array | None
    ) -> jax.Array:
        assert beside_td is not None and experts_td is not None
        behind = self.out_norm(beside_td + self.expert_out_norm(experts_td))
        sums_td = hidden_td.astype(jnp.float32) + behind.astype(jnp.float32)
        return (sums_td * self.scale[...]).astype(hidden_td.dtype)


class Trunk(nnx.Module):
    """A model without routed experts: embedding, layers, final norm, output projection."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        layer = SandwichLayer if config.sandwich else Layer
        self.config, self.dtype = config, dtype
        self.embedding = Weight(config.hidden_size, config.vocab_size, dtype)
        self.layers = nnx.List([layer(config, index, dtype) for index in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype, config.norm_plus_one)
        if not config.tie_embeddings:
            self.head = Weight(config.hidden_size, config.vocab_size, dtype)

    def embed(
        self, tokens_t: jax.Array, positions_t: jax.Array, context: int
    ) -> tuple[jax.Array, tuple[Rotation, ...]]:
        """Inputs of the first layer, [t, hidden_size], and the rotations of `ropes(config)`.

        Args:
            tokens_t: int32 [t]; positions_t: int32 [t], positions of the tokens.
            context: longest sequence served, in tokens.
        """
        hidden = self.embedding.columns(tokens_t).astype(self.dtype)
        if self.config.embedding_scale != 1.0:
            hidden = (hidden * np.float32(self.config.embedding_scale)).astype(hidden.dtype)
        return hidden, tuple(rotation(rope, positions_t, context) for rope in ropes(self.config))

    @jax.named_scope("logits")
    def logits(self, hidden_nd: jax.Array) -> jax.Array:
        """Logits, float32 [n, vocab_size], from the output of the last layer."""
        weight = self.embedding if self.config.tie_embeddings else self.head
        logits = weight(self.norm(hidden_nd))
        cap = self.config.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def ropes(config: ModelConfig) -> tuple[RopeConfig, ...]:
    """The distinct rotations of a model's layers, in the order of the layers."""
    mixers = [layer.mixer for layer in config.layers]
    return tuple(dict.fromkeys(m.rope for m in mixers if not isinstance(m, DeltaNet)))


def rope_of(config: ModelConfig, layer: int) -> int | None:
    """Index in `ropes(config)` of a layer's rotation; None if the layer has none."""
    mixer = config.layers[layer].mixer
    return None if isinstance(mixer, DeltaNet) else ropes(config).index(mixer.rope)


def split_trunk(trunk: Trunk) -> tuple[Trunk, Sequence[nnx.Module]]:
    """Split off the layers: returns the trunk without layers, and the layers.

    A step runs these parts separately; they share nothing. The trunk is modified.
    """
    layers, trunk.layers = list(trunk.layers), nnx.List([])
    return trunk, layers
