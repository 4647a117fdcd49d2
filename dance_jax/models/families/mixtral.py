"""Mixtral (arXiv 2401.04088): GQA with an optional sliding window, experts in every layer."""

from typing import Any

from dance_jax.models.config import ExpertConfig, LayerConfig, ModelConfig, Names, RouterConfig
from dance_jax.models.families import common
from dance_jax.models.families.fields import Fields

NAMES = Names(
    router="block_sparse_moe.gate",
    experts="block_sparse_moe.experts",
    projections=("w1", "w3", "w2"),
    spellings=((r"^(model\.layers\.\d+)\.mlp\.", r"\1.block_sparse_moe."),),
)


def read(fields: Fields, **given: Any) -> ModelConfig:
    """Reads config.json."""
    fields.constant("attention_bias", False)
    width = common.head_dim_of(fields)
    mixer = common.grouped_attention(
        fields,
        common.rope(fields, width, theta=1e6),
        width,
        window=fields.integer("sliding_window", None),
    )
    experts = common.num_experts(fields, "num_local_experts", "num_experts")
    return ModelConfig(
        layers=(LayerConfig(mixer, routed=True),) * fields.num_layers(),
        router=RouterConfig(experts, common.top_k(fields, experts), normalise=True),
        expert=ExpertConfig(fields.integer("intermediate_size")),
        names=NAMES,
        **common.outer(fields, eps=1e-5),
        **given,
    )
