"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): biased GQA, a gated shared expert."""

import dataclasses
from typing import Any

from dance_jax.models.config import (
    ExpertConfig,
    GroupedAttention,
    ModelConfig,
    Names,
    RouterConfig,
    SharedConfig,
)
from dance_jax.models.families import common
from dance_jax.models.families.fields import Fields

NAMES = Names(shared="mlp.shared_expert")


def read(fields: Fields, **given: Any) -> ModelConfig:
    """Reads config.json."""
    head = common.head_dim_of(fields)
    mixer = common.grouped_attention(
        fields,
        common.rope(fields, head, theta=1e4),
        head,
        qkv_bias=fields.boolean("qkv_bias", True),
    )
    return ModelConfig(
        layers=common.sparse_step(fields, _windows(fields, mixer)),
        router=router(fields),
        expert=ExpertConfig(fields.integer("moe_intermediate_size")),
        shared=SharedConfig(fields.integer("shared_expert_intermediate_size"), gated=True),
        names=NAMES,
        **common.outer(fields, eps=1e-6),
        **given,
    )


def router(fields: Fields, normalise: bool = False) -> RouterConfig:
    """Qwen's router: softmax over all experts.

    Args:
        normalise: default of norm_topk_prob.
    """
    experts = common.num_experts(fields, "num_experts", "num_local_experts")
    normalise = fields.boolean("norm_topk_prob", normalise)
    return RouterConfig(experts, common.top_k(fields, experts), normalise=normalise)


def _windows(fields: Fields, mixer: GroupedAttention) -> list[GroupedAttention]:
    """One mixer per layer: with windows, every other one of the first max_window_layers slides."""
    count = fields.num_layers()
    kinds = fields.strings("layer_types", count, (common.FULL, common.SLIDING))
    fields.ignore("sliding_window", "max_window_layers")
    used = fields.boolean("use_sliding_window", False)
    if kinds is None:
        last = fields.integer("max_window_layers", count, minimum=0) if used else 0
        kinds = [
            common.FULL if index % 2 or index >= last else common.SLIDING for index in range(count)
        ]
    if not used or common.SLIDING not in kinds:
        return [mixer] * count
    sliding = dataclasses.replace(mixer, window=fields.integer("sliding_window"))
    return [sliding if kind == common.SLIDING else mixer for kind in kinds]
