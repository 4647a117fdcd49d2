"""Qwen3-Next and Qwen3.5: gated delta nets, and gated GQA in every fourth layer."""

import dataclasses
from typing import Any

from dance_jax.config import UserError
from dance_jax.models.config import DeltaNet, ExpertConfig, ModelConfig, Names, SharedConfig
from dance_jax.models.families import common
from dance_jax.models.families.fields import Fields
from dance_jax.models.families.qwen2_moe import router

#: Maximum width of the convolution: a prefill block of 32 tokens must hold all positions it reads.
MOST_POSITIONS = 32


def read(fields: Fields, **given: Any) -> ModelConfig:
    """Reads config.json."""
    fields.constant("attn_output_gate", True)
    fields.constant("mamba_ssm_dtype", "float32")
    fields.constant("use_sliding_window", False)
    fields.ignore("sliding_window", "max_window_layers")
    head, bias = common.head_dim_of(fields), fields.boolean("attention_bias", False)
    attention = common.grouped_attention(
        fields,
        common.rope(fields, head, theta=1e4, partial=0.25),
        head,
        qk_norm="head",
        qkv_bias=bias,
        out_bias=bias,
        gated=True,
    )
    delta = _delta(fields)
    mixers = [delta if kind == common.LINEAR else attention for kind in _kinds(fields)]
    # Qwen3.5 stores all experts in one tensor, and the delta net's projections separately.
    names = Names(shared="mlp.shared_expert", experts_as="joined", ignored=(r"mtp\.",))
    if given["family"] == "qwen3_next":
        names = dataclasses.replace(names, experts_as="single", joined_delta=True)
    return ModelConfig(
        layers=common.sparse_step(fields, mixers),
        router=router(fields, normalise=True),
        expert=ExpertConfig(fields.integer("moe_intermediate_size")),
        shared=SharedConfig(fields.integer("shared_expert_intermediate_size"), gated=True),
        norm_plus_one=True,
        names=names,
        **common.outer(fields, eps=1e-6),
        **given,
    )


def _kinds(fields: Fields) -> list[str]:
    """The kind of each layer's mixer."""
    count = fields.num_layers()
    interval = fields.integer("full_attention_interval", 4)
    kinds = fields.strings("layer_types", count, (common.FULL, common.LINEAR))
    return kinds or [
        common.LINEAR if (index + 1) % interval else common.FULL for index in range(count)
    ]


def _delta(fields: Fields) -> DeltaNet:
    keys, values = (fields.integer(f"linear_num_{part}_heads") for part in ("key", "value"))
    if values % keys:
        raise UserError(
            f"{fields.where}: linear_num_value_heads {values} is not a multiple of "
            f"linear_num_key_heads {keys}"
        )
    width = fields.integer("linear_conv_kernel_dim", 4, minimum=2)
    if width > MOST_POSITIONS:
        raise UserError(
            f"{fields.where}: linear_conv_kernel_dim {width}: at most {MOST_POSITIONS} is supported"
        )
    return DeltaNet(
        num_key_heads=keys,
        num_value_heads=values,
        key_dim=fields.integer("linear_key_head_dim"),
        value_dim=fields.integer("linear_value_head_dim"),
        conv_width=width,
    )
