"""MiniMax-M2: GQA with norms over whole projections, sigmoid router, experts in every layer."""

from typing import Any

from dance_jax.config import UserError
from dance_jax.models.config import ExpertConfig, LayerConfig, ModelConfig, Names, RouterConfig
from dance_jax.models.families import common
from dance_jax.models.families.fields import Fields

NAMES = Names(
    router="block_sparse_moe.gate",
    correction="block_sparse_moe.e_score_correction_bias",
    experts="block_sparse_moe.experts",
    projections=("w1", "w3", "w2"),
    spellings=((r"^(model\.layers\.\d+)\.mlp\.", r"\1.block_sparse_moe."),),
    ignored=(r"model\.mtp\.", r"mtp\."),
)


def read(fields: Fields, **given: Any) -> ModelConfig:
    """Reads config.json."""
    fields.constant("scoring_func", "sigmoid")
    fields.constant("qk_norm_type", "per_layer")
    for name in ("use_qk_norm", "use_routing_bias"):
        fields.constant(name, True)
    for name in ("layernorm_full_attention_beta", "layernorm_mlp_beta"):
        fields.constant(name, 1.0)
    fields.constant("shared_intermediate_size", 0)
    fields.reject("sliding_window", "not supported for this family")
    # For MiniMax-M1's linear attention, dense layers and shared experts; M2 has none of them.
    fields.ignore("layernorm_linear_attention_beta", "mlp_intermediate_size", "shared_moe_mode")
    layers, head = fields.num_layers(), common.head_dim_of(fields)
    if fields.raw("attn_type_list") not in (None, [1] * layers):
        raise UserError(
            f"{fields.where}: attn_type_list: expected {layers} entries of 1 (full attention); "
            "no other attention is supported"
        )
    rope = common.rope(fields, head, theta=5e6, partial=fields.integer("rotary_dim", head) / head)
    fields.agrees("rotary_dim", rope.dim)
    mixer = common.grouped_attention(fields, rope, head, qk_norm="flat")
    experts = common.num_experts(fields, "num_local_experts", "num_experts")
    router = RouterConfig(
        experts, common.top_k(fields, experts), score="sigmoid", correction=True, normalise=True
    )
    return ModelConfig(
        layers=(LayerConfig(mixer, routed=True),) * layers,
        router=router,
        expert=ExpertConfig(fields.integer("intermediate_size")),
        names=NAMES,
        **common.outer(fields, eps=1e-6),
        **given,
    )
