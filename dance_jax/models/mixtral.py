"""Mixtral: GQA with an optional sliding window, experts in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dance_jax.models.attention import GroupedAttentionLayer, Rotation, Rows
from dance_jax.models.config import GroupedAttention, ModelConfig
from dance_jax.models.layers import RMSNorm, Routed, Trunk, matmul, parameter
from dance_jax.models.router import choose_experts
from dance_jax.models.tensors import TensorRule, expert_rules, outer_rules, same, transposed


class MixtralLayer(nnx.Module):
    """Attention, then routed experts."""

    def __init__(self, config: ModelConfig, index: int, dtype: jnp.dtype):
        d = config.hidden_size
        self.attention_norm = RMSNorm(d, config.norm_eps, dtype)
        self.attention = GroupedAttentionLayer(config, dtype)
        self.mlp_norm = RMSNorm(d, config.norm_eps, dtype)
        self.router_config = config.router
        self.router = parameter((d, config.num_experts), jnp.dtype("float32"))

    def __call__(
        self,
        hidden_td: jax.Array,
        rotation: Rotation,
        batch: Sequence[Rows],
        cached_bsw: jax.Array,
    ) -> tuple[jax.Array, Routed | None, jax.Array]:
        """See `layers.Layer`."""
        mixed, fresh = self.attention(self.attention_norm(hidden_td), rotation, batch, cached_bsw)
        hidden_td = hidden_td + mixed
        x_td = self.mlp_norm(hidden_td)
        logits = matmul(x_td.astype(jnp.float32), self.router[...])
        routed = Routed(x_td, *choose_experts(self.router_config, logits))
        return hidden_td.astype(jnp.float32), routed, fresh


class Mixtral(Trunk):
    """The trunk of Mixtral."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        layers = [MixtralLayer(config, i, dtype) for i in range(config.num_layers)]
        super().__init__(config, layers, dtype)


def tensor_rules(config: ModelConfig) -> list[TensorRule]:
    """The checkpoint's tensors of the trunk, layer by layer."""
    shape = config.attention
    assert isinstance(shape, GroupedAttention)
    d, q = config.hidden_size, shape.num_heads * shape.head_dim
    kv = shape.num_kv_heads * shape.head_dim
    rules = outer_rules(config)
    for index in range(config.num_layers):
        source, target = f"model.layers.{index}", f"layers.{index}"
        attention, ours = f"{source}.self_attn", f"{target}.attention"
        rules += [
            same(f"{source}.input_layernorm", (d,), f"{target}.attention_norm.weight"),
            transposed(f"{attention}.q_proj", (q, d), f"{ours}.q.weight"),
            transposed(f"{attention}.k_proj", (kv, d), f"{ours}.k.weight"),
            transposed(f"{attention}.v_proj", (kv, d), f"{ours}.v.weight"),
            transposed(f"{attention}.o_proj", (d, q), f"{ours}.out.weight"),
            same(f"{source}.post_attention_layernorm", (d,), f"{target}.mlp_norm.weight"),
            transposed(
                f"{source}.block_sparse_moe.gate", (config.num_experts, d), f"{target}.router"
            ),
        ]
    return rules


def expert_tensors(config: ModelConfig, layer: int, expert: int) -> list[TensorRule]:
    """The checkpoint's tensors of one routed expert; `layer` counts from 0 over all layers."""
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    return expert_rules(config, prefix, ("w1", "w3", "w2"))
