"""Shared readers of config.json: attention, rotation, router, layer patterns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from dance_jax.config import UserError
from dance_jax.models.config import (
    GroupedAttention,
    LatentAttention,
    LayerConfig,
    Mixer,
    RopeConfig,
    RouterConfig,
)
from dance_jax.models.families.fields import Fields

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


def outer(
    fields: Fields, eps: float, tied: bool = False, activation: str = "silu"
) -> dict[str, Any]:
    """The arguments of `ModelConfig` that every family has.

    Args:
        eps: default of rms_norm_eps.
        tied: default of tie_word_embeddings.
        activation: the required value of hidden_act, if hidden_act is given.
    """
    fields.constant("hidden_act", activation)
    return {
        "hidden_size": fields.integer("hidden_size"),
        "vocab_size": fields.integer("vocab_size"),
        "max_position": fields.integer("max_position_embeddings"),
        "norm_eps": fields.positive("rms_norm_eps", eps),
        "tie_embeddings": fields.boolean("tie_word_embeddings", tied),
    }


def num_experts(fields: Fields, *names: str) -> int:
    """The number of routed experts, a field that may have any of several names."""
    given = [name for name in names if fields.has(name)] or [names[0]]
    count = fields.integer(given[0])
    for name in names:
        fields.agrees(name, count)
    return count


def top_k(fields: Fields, experts: int, name: str = "num_experts_per_tok") -> int:
    """The number of experts per token, at most `experts`, the number a token can choose from."""
    count = fields.integer(name)
    if count > experts:
        raise UserError(
            f"{fields.where}: {name} {count} exceeds the {experts} experts a token can choose from"
        )
    return count


def sigmoid_router(
    fields: Fields, groups: tuple[int, int] = (1, 1), scale: float = 1.0
) -> RouterConfig:
    """DeepSeek-V3's router (arXiv 2412.19437, section 2.1.2), also used by GLM and Kimi.

    Args:
        groups: defaults of n_group and topk_group.
        scale: default of routed_scaling_factor.
    """
    fields.constant("topk_method", "noaux_tc")
    fields.constant("scoring_func", "sigmoid")
    experts = num_experts(fields, "n_routed_experts", "num_local_experts")
    number, kept = groups_of(fields, experts, groups)
    if number > 1 and experts // number < 2:
        raise UserError(
            f"{fields.where}: n_group {number} of {experts} experts: a group is ranked by its two "
            "best experts, so every group needs at least two"
        )
    return RouterConfig(
        num_experts=experts,
        top_k=top_k(fields, experts // number * kept),
        score="sigmoid",
        correction=True,
        num_groups=number,
        topk_group=kept,
        group_best=2,
        normalise=fields.boolean("norm_topk_prob", True),
        norm_epsilon=1e-20,
        scale=fields.number("routed_scaling_factor", scale),
    )


def groups_of(fields: Fields, experts: int, default: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """The number of expert groups, and the number of groups that a token chooses from."""
    groups, kept = fields.integer("n_group", default[0]), fields.integer("topk_group", default[1])
    if experts % groups:
        raise UserError(
            f"{fields.where}: n_routed_experts {experts} is not a multiple of n_group {groups}"
        )
    if kept > groups:
        raise UserError(f"{fields.where}: topk_group {kept} exceeds n_group {groups}")
    return groups, kept


def grouped_attention(
    fields: Fields, rope: RopeConfig, head_dim: int, **more: Any
) -> GroupedAttention:
    """Grouped-query attention from the usual fields.

    Args:
        head_dim: result of `head_dim_of`.
        more: further arguments of `GroupedAttention`.
    """
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(
            f"{fields.where}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    return GroupedAttention(heads, kv_heads, head_dim, rope, **more)


def head_dim_of(fields: Fields) -> int:
    """head_dim, or hidden_size / num_attention_heads if head_dim is absent."""
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if not fields.has("head_dim") and hidden % heads:
        raise UserError(
            f"{fields.where}: hidden_size {hidden} is not a multiple of num_attention_heads "
            f"{heads} and head_dim is missing"
        )
    return fields.integer("head_dim", hidden // heads)


def latent_attention(fields: Fields, theta: float = 10000.0) -> LatentAttention:
    """Multi-head latent attention from DeepSeek's fields.

    Args:
        theta: default of rope_theta.
    """
    heads = fields.integer("num_attention_heads")
    if "q_lora_rank" not in fields.values:
        raise UserError(
            f"{fields.where}: q_lora_rank is missing (null means that queries are not compressed)"
        )
    rope_width = fields.integer("qk_rope_head_dim")
    rotation = rope(fields, rope_width, theta, interleaved=True, scales_scores=True)
    if rotation.dim != rope_width:
        raise UserError(
            f"{fields.where}: partial_rotary_factor must be 1: qk_rope_head_dim is rotated "
            "as a whole"
        )
    attention = LatentAttention(
        num_heads=heads,
        q_lora_rank=fields.integer("q_lora_rank", None),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=rope_width,
        v_head_dim=fields.integer("v_head_dim"),
        rope=rotation,
        bias=fields.boolean("attention_bias", False),
    )
    fields.constant("rope_interleave", True)
    fields.constant("num_key_value_heads", heads)
    # transformers 5 repeats these two.
    fields.constant("head_dim", rope_width)
    fields.constant("qk_head_dim", attention.qk_nope_head_dim + rope_width)
    return attention


def first_dense(fields: Fields, mixer: Mixer, default: int = 0) -> tuple[LayerConfig, ...]:
    """All layers, of which the first `first_k_dense_replace` have no experts."""
    layers = fields.num_layers()
    first = fields.integer("first_k_dense_replace", default, minimum=0)
    if first >= layers:
        raise UserError(
            f"{fields.where}: first_k_dense_replace {first} leaves no layer with experts"
        )
    width = fields.integer("intermediate_size")
    return tuple(
        LayerConfig(mixer, routed=index >= first, dense_width=0 if index >= first else width)
        for index in range(layers)
    )


def sparse_step(fields: Fields, mixers: Sequence[Mixer]) -> tuple[LayerConfig, ...]:
    """Qwen's pattern: experts in every decoder_sparse_step-th layer not in mlp_only_layers."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.raw("mlp_only_layers") or []
    known = range(len(mixers))
    if not isinstance(dense, list) or any(type(i) is not int or i not in known for i in dense):
        raise UserError(
            f"{fields.where}: mlp_only_layers is {dense!r}; expected a list of layers, "
            f"0 to {len(mixers) - 1}"
        )
    routed = [(index + 1) % step == 0 and index not in dense for index in range(len(mixers))]
    if not any(routed):
        raise UserError(
            f"{fields.where}: decoder_sparse_step {step} and mlp_only_layers leave no layer with "
            "experts"
        )
    fields.ignore("intermediate_size")
    width = 0 if all(routed) else fields.integer("intermediate_size")
    return tuple(
        LayerConfig(mixer, has_experts, 0 if has_experts else width)
        for mixer, has_experts in zip(mixers, routed, strict=True)
    )


def more_predictions(fields: Fields) -> tuple[str, ...]:
    """Patterns of the multi-token prediction tensors: whole layers behind the last layer."""
    layers = fields.num_layers()
    counts = [fields.raw(name) for name in ("num_nextn_predict_layers", "num_mtp_layers")]
    more = max((count for count in counts if isinstance(count, int)), default=0)
    return tuple(rf"model\.layers\.{layers + number}\." for number in range(more))


def rope(
    fields: Fields,
    width: int,
    theta: float,
    *,
    interleaved: bool = False,
    partial: float = 1.0,
    scales_scores: bool = False,
    absent: dict[str, Any] | None = None,
) -> RopeConfig:
    """Reads the rotation: `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta`.

    Args:
        width: head width. The first `partial_rotary_factor` of it is rotated.
        theta: default of rope_theta.
        partial: default of partial_rotary_factor.
        scales_scores: whether YaRN's mscale_all_dim also scales the scores, as in DeepSeek.
        absent: the rotation if the config has neither field.
    """
    spellings = [name for name in ("rope_parameters", "rope_scaling") if fields.has(name)]
    fields.ignore("rope_parameters", "rope_scaling")
    described = [fields.inner(name) for name in spellings] or [Fields(absent or {}, fields.where)]
    readings = [
        rope_of(inner, fields, width, theta, partial, interleaved, scales_scores)
        for inner in described
    ]
    if len(readings) == 2 and readings[0] != readings[1]:
        raise UserError(f"{fields.where}: rope_parameters and rope_scaling contradict each other")
    return readings[0]


def rope_of(
    inner: Fields,
    fields: Fields,
    width: int,
    theta: float,
    partial: float = 1.0,
    interleaved: bool = False,
    scales_scores: bool = False,
) -> RopeConfig:
    """Reads one rotation.

    Args:
        inner: the object that describes the rotation.
        fields: the config around `inner`. Older spellings put some of the rotation's fields there.
    """
    where = inner.where
    kinds = [inner.raw(key) for key in ("rope_type", "type") if inner.has(key)] or ["default"]
    if kinds[0] != kinds[-1]:
        raise UserError(f"{where}: type and rope_type contradict each other: {kinds}")
    kind = kinds[0]
    if not isinstance(kind, str) or kind not in _KINDS:
        names = ", ".join(repr(name) for name in _KINDS)
        raise UserError(f"{where}: rope type is {kind!r}; supported: {names}")
    theta = _either(inner, fields, "rope_theta", theta)
    if theta <= 1:
        raise UserError(f"{where}: rope_theta is {theta:g}; expected a number above 1")
    partial = _either(inner, fields, "partial_rotary_factor", partial)
    # Which pairs rotate by which position of an image. For text all these positions are equal.
    inner.ignore("mrope_section", "mrope_interleaved", "finetuned")
    # Not int(): a factor that came from a division may be slightly too small.
    dim = width if kind == "proportional" else math.floor(width * partial + 1e-6)
    if dim % 2 or not 0 < dim <= width:
        raise UserError(
            f"{where}: rotary position embedding needs an even width of at most {width}, not {dim}"
        )
    made = RopeConfig(dim, theta, interleaved, kind, **_KINDS[kind](inner, fields, dim, partial))
    if kind == "yarn" and scales_scores and (all_dim := inner.number("mscale_all_dim", 0.0)):
        softmax = _magnitude(made.factor, all_dim) ** 2
        made = dataclasses.replace(made, softmax_factor=softmax)
    unknown = sorted(set(inner.values) - inner.seen)
    if unknown:
        raise UserError(f"{where}: not supported for rope type {kind!r}: {', '.join(unknown)}")
    return made


def _either(inner: Fields, fields: Fields, name: str, default: float) -> float:
    """A number inside the object that describes a rotation, or in the config around the object."""
    found = {source.positive(name) for source in (inner, fields) if source.has(name)}
    if len(found) > 1:
        raise UserError(f"{inner.where}: {name} differs from {name} of the config: {sorted(found)}")
    return found.pop() if found else default


def _default(inner: Fields, fields: Fields, dim: int, partial: float) -> dict[str, Any]:
    return {}


def _linear(inner: Fields, fields: Fields, dim: int, partial: float) -> dict[str, Any]:
    return {"factor": inner.positive("factor")}


def _proportional(inner: Fields, fields: Fields, dim: int, partial: float) -> dict[str, Any]:
    inner.constant("factor", 1.0)
    return {"turning_pairs": int(partial * dim // 2)}


def _llama3(inner: Fields, fields: Fields, dim: int, partial: float) -> dict[str, Any]:
    numbers = {name: inner.positive(name) for name in ("low_freq_factor", "high_freq_factor")}
    if numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise UserError(f"{inner.where}: high_freq_factor must exceed low_freq_factor")
    original = inner.integer("original_max_position_embeddings")
    factor = inner.positive("factor")
    return numbers | {"factor": factor, "original_max_position": original}


def _longrope(inner: Fields, fields: Fields, dim: int, partial: float) -> dict[str, Any]:
    """LongRoPE (arXiv 2402.13753), with transformers' default of attention_factor."""
    name = "original_max_position_embeddings"
    original = (fields if fields.has(name) else inner).integer(name, minimum=2)
    inner.agrees(name, original)
    factor = inner.positive("factor", fields.integer("max_position_embeddings") / original)
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    lists: dict[str, Any] = {}
    for key in ("short_factor", "long_factor"):
        values = inner.raw(key)
        long_enough = isinstance(values, list) and len(values) == dim // 2
        if not long_enough or not all(
            type(each) in (int, float) and 0 < each < math.inf for each in values
        ):
            raise UserError(f"{inner.where}: {key}: expected a list of {dim // 2} numbers above 0")
        lists[key] = tuple(float(each) for each in values)
    attention = inner.positive("attention_factor", magnitude)
    return {"original_max_position": original, "attention_factor": attention, **lists}


def _yarn(inner: Fields, fields: Fields, dim: int, partial: float) -> dict[str, Any]:
    """YaRN (arXiv 2309.00071) with DeepSeek's mscale and mscale_all_dim, as in transformers.

    If mscale and mscale_all_dim are both given, their ratio scales the rotation. Otherwise YaRN's
    default does.
    """
    longest = fields.integer("max_position_embeddings")
    original = inner.integer("original_max_position_embeddings", longest)
    fields.agrees("initial_context_length", original)
    factor = inner.positive("factor", longest / original)
    mscale, all_dim = inner.number("mscale", 0.0), inner.number("mscale_all_dim", 0.0)
    ratio = _magnitude(factor, 1.0)
    if mscale and all_dim:
        ratio = _magnitude(factor, mscale) / _magnitude(factor, all_dim)
    fast, slow = inner.number("beta_fast", 0.0) or 32.0, inner.number("beta_slow", 0.0) or 1.0
    if not 0 < slow <= fast:
        raise UserError(
            f"{inner.where}: beta_slow {slow:g} and beta_fast {fast:g}: 0 < slow <= fast"
        )
    return {
        "factor": factor,
        "original_max_position": original,
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": inner.boolean("truncate", True),
        "attention_factor": inner.positive("attention_factor", ratio),
    }


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


_KINDS = {
    "default": _default,
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
}
