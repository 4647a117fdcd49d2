"""DeepSeek-V3 (arXiv 2412.19437) and models of its block: R1, Kimi-K2, Moonlight, GLM-4.7-Flash."""

import dataclasses
from typing import Any

from dance_jax.config import UserError
from dance_jax.models.config import ExpertConfig, ModelConfig, Names
from dance_jax.models.families import common
from dance_jax.models.families.deepseek_v2 import shared_experts
from dance_jax.models.families.fields import Fields


def read(fields: Fields, **given: Any) -> ModelConfig:
    """config.json to the model."""
    fields.constant("moe_layer_freq", 1)
    lite = given["family"] == "glm4_moe_lite"
    layers = common.first_dense(fields, common.latent_attention(fields), default=int(lite))
    kinds = fields.strings("mlp_layer_types", len(layers), ("dense", "sparse"))
    if kinds is not None:
        if "sparse" not in kinds:
            raise UserError(f"{fields.where}: mlp_layer_types leaves no layer with experts")
        dense = fields.integer("intermediate_size")
        layers = tuple(
            dataclasses.replace(
                layer, routed=kind == "sparse", dense_width=0 if kind == "sparse" else dense
            )
            for layer, kind in zip(layers, kinds, strict=True)
        )
    width = fields.integer("moe_intermediate_size")
    return ModelConfig(
        layers=layers,
        router=common.sigmoid_router(fields),
        expert=ExpertConfig(width),
        shared=shared_experts(fields, width),
        names=Names(ignored=common.more_predictions(fields)),
        **common.outer(fields, eps=1e-5 if lite else 1e-6),
        **given,
    )
