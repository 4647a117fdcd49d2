"""Gemma 4's text model with experts: two kinds of GQA, experts beside a dense feed-forward."""

from typing import Any

from dance_jax.config import UserError
from dance_jax.models.config import (
    Activation,
    ExpertConfig,
    GroupedAttention,
    LayerConfig,
    ModelConfig,
    Names,
    RouterConfig,
)
from dance_jax.models.families import common
from dance_jax.models.families.fields import Fields

GELU = Activation("gelu")
NAMES = Names(router="router.proj", experts="experts", experts_as="joined")


def read(fields: Fields, **given: Any) -> ModelConfig:
    """Reads config.json."""
    fields.constant("hidden_activation", "gelu_pytorch_tanh")
    fields.choice("enable_moe_block", False, (True,))
    for name in ("attention_bias", "use_double_wide_mlp"):
        fields.constant(name, False)
    fields.constant("num_kv_shared_layers", 0)
    fields.choice("hidden_size_per_layer_input", 256, (0,))
    fields.ignore("vocab_size_per_layer_input")
    # "vision": only among the tokens of an image, so text is not affected.
    fields.choice("use_bidirectional_attention", "vision", ("vision",))
    count = fields.num_layers()
    kinds = fields.strings("layer_types", count, (common.FULL, common.SLIDING))
    kinds = kinds or [
        common.SLIDING if (index + 1) % 6 and index + 1 < count else common.FULL
        for index in range(count)
    ]
    if kinds[-1] != common.FULL:
        raise UserError(f"{fields.where}: layer_types: the last layer must have full attention")
    fields.ignore("sliding_window")
    mixers = {kind: _attention(fields, kind, kinds) for kind in set(kinds)}
    dense = fields.integer("intermediate_size")
    experts = common.num_experts(fields, "num_experts", "num_local_experts")
    chosen = common.top_k(fields, experts, "top_k_experts")
    cap = fields.positive("final_logit_softcapping") if _capped(fields) else None
    outer = common.outer(fields, eps=1e-6, tied=True, activation="gelu_pytorch_tanh")
    return ModelConfig(
        layers=tuple(LayerConfig(mixers[kind], True, dense) for kind in kinds),
        router=RouterConfig(experts, chosen, normalise=True, scaled=True),
        expert=ExpertConfig(fields.integer("moe_intermediate_size"), GELU),
        sandwich=True,
        embedding_scale=outer["hidden_size"] ** 0.5,
        logit_cap=cap,
        names=NAMES,
        **outer,
        **given,
    )


def _capped(fields: Fields) -> bool:
    fields.ignore("final_logit_softcapping")
    return fields.has("final_logit_softcapping")


def _attention(fields: Fields, kind: str, kinds: list[str]) -> GroupedAttention:
    """GQA for all layers of a kind. Full-attention layers have their own heads and rotation."""
    width, keys = fields.integer("head_dim", 256), fields.integer("num_key_value_heads")
    full = kind == common.FULL
    equal = fields.boolean("attention_k_eq_v", False)
    own = _own_shape(fields, kinds)
    if full:
        width, own_keys = own
        keys = own_keys if equal and own_keys else keys
    ropes = fields.inner("rope_parameters") if fields.has("rope_parameters") else Fields({}, "")
    ropes.ignore(common.FULL, common.SLIDING)
    ropes.finish()
    theta = 1e6 if full else 1e4
    if ropes.has(kind):
        rope = common.rope_of(ropes.inner(kind), Fields({}, ropes.where), width, theta)
    else:
        default = {"rope_type": "proportional", "partial_rotary_factor": 0.25} if full else {}
        rope = common.rope_of(Fields(default, ""), Fields({}, ""), width, theta)
    return GroupedAttention(
        num_heads=fields.integer("num_attention_heads"),
        num_kv_heads=keys,
        head_dim=width,
        rope=rope,
        window=None if full else fields.integer("sliding_window", 512),
        qk_norm="head",
        value_norm=True,
        values_are_keys=full and equal,
        fixed_scale=1.0,
    )


def _own_shape(fields: Fields, kinds: list[str]) -> tuple[int, int | None]:
    """Width and number of the full layers' key heads, as published or as saved by transformers."""
    width = fields.integer("global_head_dim", 512)
    keys = fields.integer("num_global_key_value_heads", None)
    saved = fields.raw("per_layer_config")
    if not saved:
        return width, keys
    layers = {str(index) for index, kind in enumerate(kinds) if kind == common.FULL}
    shapes = list(saved.values()) if isinstance(saved, dict) else []
    same = all(isinstance(shape, dict) and shape == shapes[0] for shape in shapes)
    known = {"head_dim", "num_key_value_heads"}
    if not shapes or set(saved) != layers or not same or not set(shapes[0]) <= known:
        raise UserError(
            f"{fields.where}: per_layer_config: expected equal head_dim and num_key_value_heads "
            f"for the layers with full attention, {', '.join(sorted(layers, key=int))}"
        )
    inner = Fields(shapes[0], f"{fields.where}: per_layer_config")
    return inner.integer("head_dim", width), inner.integer("num_key_value_heads", keys)
