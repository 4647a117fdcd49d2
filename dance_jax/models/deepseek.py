"""DeepSeek-V2 (V2-Lite and V2): MLA, leading dense layers, shared experts."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dance_jax.models.attention import LatentAttentionLayer, Rotation, Rows
from dance_jax.models.config import LatentAttention, ModelConfig
from dance_jax.models.layers import GatedMLP, RMSNorm, Routed, Trunk, matmul, parameter
from dance_jax.models.router import choose_experts
from dance_jax.models.tensors import (
    Target,
    TensorRule,
    expert_rules,
    mlp_rules,
    outer_rules,
    same,
    transposed,
)


class DeepseekV2Layer(nnx.Module):
    """Attention, then either a dense feed-forward or shared and routed experts."""

    def __init__(self, config: ModelConfig, index: int, dtype: jnp.dtype):
        d = config.hidden_size
        self.attention_norm = RMSNorm(d, config.norm_eps, dtype)
        self.attention = LatentAttentionLayer(config, dtype)
        self.mlp_norm = RMSNorm(d, config.norm_eps, dtype)
        self.router_config = config.router
        self.routed = index in config.moe_layers
        if not self.routed:
            self.mlp = GatedMLP(d, config.dense_width, dtype)
        else:
            self.router = parameter((d, config.num_experts), jnp.dtype("float32"))
            self.shared = GatedMLP(d, config.shared_width, dtype) if config.shared_width else None

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
        residual_td = hidden_td.astype(jnp.float32)
        if not self.routed:
            return (residual_td + self.mlp(x_td)).astype(hidden_td.dtype), None, fresh
        logits = matmul(x_td.astype(jnp.float32), self.router[...])
        if self.shared is not None:
            residual_td += self.shared(x_td)
        return residual_td, Routed(x_td, *choose_experts(self.router_config, logits)), fresh


class DeepseekV2(Trunk):
    """The trunk of DeepSeek-V2."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        layers = [DeepseekV2Layer(config, i, dtype) for i in range(config.num_layers)]
        super().__init__(config, layers, dtype)


def tensor_rules(config: ModelConfig) -> list[TensorRule]:
    """The checkpoint's tensors of the trunk, layer by layer."""
    shape = config.attention
    assert isinstance(shape, LatentAttention)
    d, heads, rank = config.hidden_size, shape.num_heads, shape.kv_lora_rank
    nope, rope, value = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim
    rules = outer_rules(config)
    for index in range(config.num_layers):
        source, target = f"model.layers.{index}", f"layers.{index}"
        attention, ours = f"{source}.self_attn", f"{target}.attention"
        rules.append(same(f"{source}.input_layernorm", (d,), f"{target}.attention_norm.weight"))
        if shape.q_lora_rank is None:
            rules.append(
                transposed(f"{attention}.q_proj", (heads * (nope + rope), d), f"{ours}.q.weight")
            )
        else:
            low = shape.q_lora_rank
            rules += [
                transposed(f"{attention}.q_a_proj", (low, d), f"{ours}.q_a.weight"),
                same(f"{attention}.q_a_layernorm", (low,), f"{ours}.q_norm.weight"),
                transposed(
                    f"{attention}.q_b_proj", (heads * (nope + rope), low), f"{ours}.q_b.weight"
                ),
            ]
        rules += [
            transposed(f"{attention}.kv_a_proj_with_mqa", (rank + rope, d), f"{ours}.kv_a.weight"),
            same(f"{attention}.kv_a_layernorm", (rank,), f"{ours}.kv_norm.weight"),
            TensorRule(
                f"{attention}.kv_b_proj.weight",
                (heads * (nope + value), rank),
                (
                    Target(
                        f"{ours}.w_uk",
                        lambda w: w.reshape(heads, nope + value, rank)[:, :nope],
                    ),
                    Target(
                        f"{ours}.w_uv",
                        lambda w: w.reshape(heads, nope + value, rank)[:, nope:].transpose(0, 2, 1),
                    ),
                ),
            ),
            transposed(f"{attention}.o_proj", (d, heads * value), f"{ours}.out.weight"),
            same(f"{source}.post_attention_layernorm", (d,), f"{target}.mlp_norm.weight"),
        ]
        if index not in config.moe_layers:
            rules += mlp_rules(f"{source}.mlp", d, config.dense_width, f"{target}.mlp")
            continue
        rules.append(transposed(f"{source}.mlp.gate", (config.num_experts, d), f"{target}.router"))
        if config.shared_width:
            name = f"{source}.mlp.shared_experts"
            rules += mlp_rules(name, d, config.shared_width, f"{target}.shared")
    return rules


def expert_tensors(config: ModelConfig, layer: int, expert: int) -> list[TensorRule]:
    """The checkpoint's tensors of one routed expert; `layer` counts from 0 over all layers."""
    prefix = f"model.layers.{layer}.mlp.experts.{expert}"
    return expert_rules(config, prefix, ("gate_proj", "up_proj", "down_proj"))
