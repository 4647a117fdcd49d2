"""GLM-4.5 and 4.6 (arXiv 2508.06471): GQA with half of each head rotated, DeepSeek-V3's experts."""

from typing import Any

from dance_jax.models.config import ExpertConfig, ModelConfig, Names
from dance_jax.models.families import common
from dance_jax.models.families.deepseek_v2 import shared_experts
from dance_jax.models.families.fields import Fields


def read(fields: Fields, **given: Any) -> ModelConfig:
    """Reads config.json."""
    head = common.head_dim_of(fields)
    mixer = common.grouped_attention(
        fields,
        common.rope(fields, head, theta=1e4, partial=0.5),
        head,
        qk_norm="head" if fields.boolean("use_qk_norm", False) else "none",
        qkv_bias=fields.boolean("attention_bias", False),
    )
    width = fields.integer("moe_intermediate_size")
    return ModelConfig(
        layers=common.first_dense(fields, mixer, default=1),
        router=common.sigmoid_router(fields),
        expert=ExpertConfig(width),
        shared=shared_experts(fields, width),
        names=Names(ignored=common.more_predictions(fields)),
        **common.outer(fields, eps=1e-5),
        **given,
    )
