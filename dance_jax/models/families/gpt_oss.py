"""gpt-oss (arXiv 2508.10925): GQA with sinks, a window in every other layer, clamped experts."""

import dataclasses
from typing import Any

from dance_jax.config import UserError
from dance_jax.models.config import (
    Activation,
    ExpertConfig,
    LayerConfig,
    ModelConfig,
    Names,
    RouterConfig,
)
from dance_jax.models.families import common
from dance_jax.models.families.fields import Fields

#: The rotation if config.json does not describe one.
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def read(fields: Fields, **given: Any) -> ModelConfig:
    """Reads config.json."""
    head, count = common.head_dim_of(fields), fields.num_layers()
    bias = fields.boolean("attention_bias", True)
    full = common.grouped_attention(
        fields,
        common.rope(fields, head, theta=150000.0, absent=YARN),
        head,
        sinks=True,
        qkv_bias=bias,
        out_bias=bias,
    )
    if "sliding_window" in fields.values and not fields.has("sliding_window"):
        raise UserError(f"{fields.where}: sliding_window is null; expected a number of tokens")
    sliding = dataclasses.replace(full, window=fields.integer("sliding_window", 128))
    kinds = fields.strings("layer_types", count, (common.FULL, common.SLIDING))
    kinds = kinds or [(common.SLIDING, common.FULL)[index % 2] for index in range(count)]
    experts = common.num_experts(fields, "num_local_experts", "num_experts")
    chosen = common.top_k(fields, experts)
    fields.agrees("experts_per_token", chosen)
    activation = Activation(
        "clamped", fields.positive("swiglu_alpha", 1.702), fields.positive("swiglu_limit", 7.0)
    )
    return ModelConfig(
        layers=tuple(
            LayerConfig(sliding if kind == common.SLIDING else full, routed=True) for kind in kinds
        ),
        router=RouterConfig(experts, chosen, score="logits", bias=True),
        expert=ExpertConfig(fields.integer("intermediate_size"), activation, bias=True),
        names=Names(router="mlp.router", experts_as="interleaved"),
        **common.outer(fields, eps=1e-5),
        **given,
    )
