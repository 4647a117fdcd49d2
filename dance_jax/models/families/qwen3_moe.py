"""Qwen3-MoE (arXiv 2505.09388): GQA with a norm per head, dense layers in any pattern."""

from typing import Any

from dance_jax.models.config import ExpertConfig, ModelConfig
from dance_jax.models.families import common
from dance_jax.models.families.fields import Fields
from dance_jax.models.families.qwen2_moe import router


def read(fields: Fields, **given: Any) -> ModelConfig:
    """Reads config.json."""
    # Qwen3-Coder repeats constants of the family.
    fields.constant("qkv_bias", False)
    fields.constant("use_qk_norm", True)
    fields.constant("shared_expert_intermediate_size", 0)
    head, bias = common.head_dim_of(fields), fields.boolean("attention_bias", False)
    fields.ignore("sliding_window", "max_window_layers")
    sliding = fields.boolean("use_sliding_window", False)
    mixer = common.grouped_attention(
        fields,
        common.rope(fields, head, theta=1e4),
        head,
        window=fields.integer("sliding_window", None) if sliding else None,
        qk_norm="head",
        qkv_bias=bias,
        out_bias=bias,
    )
    return ModelConfig(
        layers=common.sparse_step(fields, [mixer] * fields.num_layers()),
        router=router(fields),
        expert=ExpertConfig(fields.integer("moe_intermediate_size")),
        **common.outer(fields, eps=1e-6),
        **given,
    )
