"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434): MLA, leading dense layers, shared experts."""

from typing import Any

from dance_jax.config import UserError
from dance_jax.models.config import ExpertConfig, ModelConfig, RouterConfig, SharedConfig
from dance_jax.models.families import common
from dance_jax.models.families.fields import Fields


def read(fields: Fields, **given: Any) -> ModelConfig:
    """Reads config.json."""
    fields.constant("mlp_bias", False)
    fields.constant("moe_layer_freq", 1)
    fields.constant("scoring_func", "softmax")
    layers = common.first_dense(fields, common.latent_attention(fields))
    width = fields.integer("moe_intermediate_size")
    return ModelConfig(
        layers=layers,
        router=_router(fields),
        expert=ExpertConfig(width),
        shared=shared_experts(fields, width),
        **common.outer(fields, eps=1e-6),
        **given,
    )


def shared_experts(fields: Fields, width: int) -> SharedConfig | None:
    """The shared experts: n_shared_experts, each `width` wide."""
    if "n_shared_experts" not in fields.values:
        raise UserError(
            f"{fields.where}: n_shared_experts is missing (0 or null means no shared experts)"
        )
    count = fields.integer("n_shared_experts", 0, minimum=0)
    return SharedConfig(count * width) if count else None


def _router(fields: Fields) -> RouterConfig:
    experts = common.num_experts(fields, "n_routed_experts", "num_local_experts")
    # "gready" is how DeepSeek's own configuration class spells its default.
    method = fields.choice("topk_method", "greedy", ("greedy", "group_limited_greedy", "gready"))
    groups, kept = 1, 1
    if method == "group_limited_greedy":
        for name in ("n_group", "topk_group"):
            fields.integer(name)
        groups, kept = common.groups_of(fields, experts)
    fields.ignore("n_group", "topk_group")  # the other methods do not read them
    chosen = common.top_k(fields, experts // groups * kept)
    # DeepSeek's definition: normalised weights are not scaled; all others are.
    normalise = fields.boolean("norm_topk_prob", False) and chosen > 1
    scaling = fields.number("routed_scaling_factor", 1.0)
    return RouterConfig(
        experts,
        chosen,
        num_groups=groups,
        topk_group=kept,
        normalise=normalise,
        norm_epsilon=1e-20,
        scale=1.0 if normalise else scaling,
    )
