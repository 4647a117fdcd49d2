"""DeepSeek-V3 (arXiv 2412.19437) and models like it: R1, Kimi-K2, Moonlight, GLM-4.7-Flash."""

import dataclasses
from typing import Any

from dance_jax.config import UserError
from dance_jax.models.config import ExpertConfig, ModelConfig, Names
from dance_jax.models.families import common
from dance_jax.models.families.deepseek_v2 import shared_experts
from dance_jax.models.families.fields import Fields


def read(fields: Fields, **given: Any) -> ModelConfig:
    """Reads config.json."""
    fields.constant("moe_layer_freq", 1)
    lite = given["family"] == "glm4_moe_lite"
    layers = common.first_dense(fields, common.latent_attention(fields), default=1 if lite else 3)
    kinds = fields.strings("mlp_layer_types", len(layers), ("dense", "sparse"))
    routed = [
        layer.routed if kinds is None else kinds[i] == "sparse" for i, layer in enumerate(layers)
    ]
    if not any(routed):
        raise UserError(f"{fields.where}: mlp_layer_types leaves no layer with experts")
    if fields.has("first_k_dense_replace") and routed != [layer.routed for layer in layers]:
        raise UserError(
            f"{fields.where}: mlp_layer_types and first_k_dense_replace contradict each other"
        )
    dense = fields.integer("intermediate_size")
    width = fields.integer("moe_intermediate_size")
    groups, scale = ((1, 1), 1.8) if lite else ((8, 4), 2.5)
    return ModelConfig(
        layers=tuple(
            dataclasses.replace(layer, routed=has_experts, dense_width=0 if has_experts else dense)
            for layer, has_experts in zip(layers, routed, strict=True)
        ),
        router=common.sigmoid_router(fields, groups, scale),
        expert=ExpertConfig(width),
        shared=shared_experts(fields, width),
        names=Names(ignored=common.more_predictions(fields)),
        **common.outer(fields, eps=1e-5 if lite else 1e-6),
        **given,
    )
