"""OLMoE (arXiv 2409.02060): GQA with norms over whole projections, experts in every layer."""

from typing import Any

from dance_jax.models.config import ExpertConfig, LayerConfig, ModelConfig, RouterConfig
from dance_jax.models.families import common
from dance_jax.models.families.fields import Fields


def read(fields: Fields, **given: Any) -> ModelConfig:
    """Reads config.json."""
    head = common.head_dim_of(fields)
    bias = fields.boolean("attention_bias", False)
    mixer = common.grouped_attention(
        fields,
        common.rope(fields, head, theta=1e4),
        head,
        qk_norm="flat",
        qkv_bias=bias,
        out_bias=bias,
        clip=fields.positive("clip_qkv") if fields.has("clip_qkv") else None,
    )
    fields.ignore("clip_qkv")
    experts = common.num_experts(fields, "num_experts", "num_local_experts")
    normalise = fields.boolean("norm_topk_prob", False)
    return ModelConfig(
        layers=(LayerConfig(mixer, routed=True),) * fields.num_layers(),
        router=RouterConfig(experts, common.top_k(fields, experts), normalise=normalise),
        expert=ExpertConfig(fields.integer("intermediate_size")),
        **common.outer(fields, eps=1e-5),
        **given,
    )
