"""Converts a GGUF file's metadata to the config.json it came from, by architecture."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Collection
from typing import Any

from dance_jax.config import UserError
from dance_jax.models.families.common import FULL, LINEAR
from dance_jax.models.families.fields import Fields
from dance_jax.models.ggml.header import Header

#: (n_group, topk_group) by number of experts, for files older than the keys for them: those of
#: DeepSeek-V2 and DeepSeek-V3.
_GROUPS = {160: (8, 3), 256: (8, 4)}
_SOFTMAX, _SIGMOID, _CHOSEN = 1, 2, 3


def config_fields(parts: list[Header]) -> dict[str, Any]:
    """The fields of config.json for a GGUF model.

    Args:
        parts: result of `header.read_parts`.

    Raises:
        UserError: the architecture is not supported, or a key is missing or unknown.
    """
    fields = _fields(parts)
    tensors = frozenset(name for part in parts for name in part.tensors)
    own = _ARCHITECTURES[parts[0].metadata["general.architecture"]]
    found = _common(fields, parts[0].metadata, tensors) | own(fields, tensors)
    fields.ignore("rope.scaling.finetuned")
    fields.constant("attention.causal", True)
    fields.finish()
    return found


def more_layers(parts: list[Header]) -> range:
    """Indices of the multi-token prediction layers, which follow the model's last layer."""
    fields = _fields(parts)
    return range(_layers(fields), fields.integer("block_count"))


def _fields(parts: list[Header]) -> Fields:
    """The metadata keys of the architecture, with the architecture's prefix removed."""
    metadata, path = parts[0].metadata, parts[0].path
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UserError(
            f"{path}: general.architecture is {architecture!r}; supported: "
            + ", ".join(sorted(_ARCHITECTURES))
        )
    prefix = f"{architecture}."
    own = {
        key.removeprefix(prefix): _single_value(value)
        for key, value in metadata.items()
        if key.startswith(prefix)
    }
    return Fields(own, f"{path}: {architecture}")


def _single_value(value: Any) -> Any:
    """One value for a list of equal values: a per-layer key that is the same in all layers."""
    if isinstance(value, list) and value and all(each == value[0] for each in value):
        return value[0]
    return value


def _common(fields: Fields, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
    """The config fields that all families have."""
    layers = _layers(fields)
    heads = fields.integer("attention.head_count")
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    found = {
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": fields.integer("block_count") - layers,
        "hidden_size": fields.integer("embedding_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.positive("attention.layer_norm_rms_epsilon"),
        "vocab_size": fields.integer("vocab_size", len(tokens)),
        "num_experts_per_tok": fields.integer("expert_used_count"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": fields.positive("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(fields),
    }
    for name in ("bos", "eos"):
        if (token := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            found[f"{name}_token_id"] = token
    return found


def _layers(fields: Fields) -> int:
    """Number of layers, without the multi-token prediction layers behind the last one."""
    count = fields.integer("block_count")
    layers = count - fields.integer("nextn_predict_layers", 0, minimum=0)
    if layers < 1:
        raise UserError(
            f"{fields.where}: nextn_predict_layers {count - layers} leaves none of the {count} "
            "layers of block_count"
        )
    return layers


def _rope_scaling(fields: Fields) -> dict[str, Any] | None:
    """The `rope_scaling` object of config.json. None if the context is not extended."""
    kind = fields.choice("rope.scaling.type", "none", ("none", "linear", "yarn"))
    names = {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
        "attn_factor": "attention_factor",
        "yarn_attn_factor": "attention_factor",
    }
    used = {"none": (), "linear": ("factor",), "yarn": tuple(names)}[kind]
    found: dict[str, Any] = {}
    for key, name in names.items():
        value = fields.raw(f"rope.scaling.{key}")
        if value is not None and key in used:
            found[name] = value
    fields.constant("rope.scaling.yarn_ext_factor", 1.0)
    return {"type": kind, **found} if used else None


def _experts(fields: Fields) -> int:
    count = fields.integer("expert_count", 0, minimum=0)
    if not count:
        raise UserError(
            f"{fields.where}: expert_count is 0 or missing: a model without experts is not "
            "supported"
        )
    return count


def _head_dim(fields: Fields) -> int:
    """Head width, which must be the same for queries, keys and values."""
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    rotated = fields.integer("rope.dimension_count", hidden // heads)
    width = fields.integer("attention.key_length", rotated)
    fields.agrees("attention.value_length", width)
    return width


def _rotated(fields: Fields, width: int) -> int:
    return fields.integer("rope.dimension_count", width)


def _fully_rotated_head(fields: Fields) -> int:
    width = _head_dim(fields)
    fields.agrees("rope.dimension_count", width)
    return width


def _require_score_function(fields: Fields, kind: int) -> None:
    """Raises UserError if the file gives a router score function other than `kind`."""
    fields.constant("expert_gating_func", kind)


def _has(tensors: Collection[str], leaf: str) -> bool:
    return any(name.endswith(f".{leaf}") for name in tensors)


def _qwen3moe(fields: Fields, tensors: Collection[str]) -> dict[str, Any]:
    _require_score_function(fields, _SOFTMAX)
    fields.constant("expert_weights_norm", True)
    return {
        "model_type": "qwen3_moe",
        "head_dim": _fully_rotated_head(fields),
        "attention_bias": _has(tensors, "attn_q.bias"),
        "num_experts": _experts(fields),
        "norm_topk_prob": True,
        "intermediate_size": fields.integer("feed_forward_length", None),
        "moe_intermediate_size": fields.integer("expert_feed_forward_length"),
    }


def _qwen2moe(fields: Fields, tensors: Collection[str]) -> dict[str, Any]:
    _require_score_function(fields, _SOFTMAX)
    fields.constant("expert_weights_norm", False)
    fields.ignore("expert_shared_count")
    return {
        "model_type": "qwen2_moe",
        "head_dim": _fully_rotated_head(fields),
        "qkv_bias": _has(tensors, "attn_q.bias"),
        "num_experts": _experts(fields),
        "norm_topk_prob": False,
        "intermediate_size": fields.integer("feed_forward_length", None),
        "moe_intermediate_size": fields.integer("expert_feed_forward_length"),
        "shared_expert_intermediate_size": fields.integer("expert_shared_feed_forward_length"),
    }


def _qwen3next(fields: Fields, tensors: Collection[str]) -> dict[str, Any]:
    """Qwen3-Next: gated delta nets in most layers."""
    _require_score_function(fields, _SOFTMAX)
    fields.constant("expert_weights_norm", True)
    # Position sections for images; a text token has the same position in all sections.
    fields.ignore("rope.dimension_sections", "expert_shared_count")
    width, heads = _head_dim(fields), fields.integer("ssm.time_step_rank")
    found = {
        "model_type": "qwen3_next",
        "head_dim": width,
        "partial_rotary_factor": _rotated(fields, width) / width,
        "num_experts": _experts(fields),
        "norm_topk_prob": True,
        "intermediate_size": fields.integer("feed_forward_length", None),
        "moe_intermediate_size": fields.integer("expert_feed_forward_length"),
        "shared_expert_intermediate_size": fields.integer("expert_shared_feed_forward_length"),
        "linear_conv_kernel_dim": fields.integer("ssm.conv_kernel"),
        "linear_key_head_dim": fields.integer("ssm.state_size"),
        "linear_num_key_heads": fields.integer("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": fields.integer("ssm.inner_size") // heads,
        "full_attention_interval": fields.integer("full_attention_interval", 4),
    }
    recurrent = fields.raw("attention.recurrent_layers")
    if isinstance(recurrent, list):
        layers = recurrent[: _layers(fields)]
        found["layer_types"] = [LINEAR if each else FULL for each in layers]
    return found


def _qwen35moe(fields: Fields, tensors: Collection[str]) -> dict[str, Any]:
    return _qwen3next(fields, tensors) | {"model_type": "qwen3_5_moe_text"}


def _olmoe(fields: Fields, tensors: Collection[str]) -> dict[str, Any]:
    _require_score_function(fields, _SOFTMAX)
    fields.constant("expert_weights_norm", False)
    width = fields.integer("feed_forward_length")
    fields.agrees("expert_feed_forward_length", width)
    return {
        "model_type": "olmoe",
        "head_dim": _fully_rotated_head(fields),
        "attention_bias": _has(tensors, "attn_q.bias"),
        "clip_qkv": fields.number("attention.clamp_kqv", None),
        "num_experts": _experts(fields),
        "norm_topk_prob": False,
        "intermediate_size": width,
    }


def _llama(fields: Fields, tensors: Collection[str]) -> dict[str, Any]:
    _require_score_function(fields, _SOFTMAX)
    experts = _experts(fields)
    width = fields.integer("feed_forward_length")
    fields.agrees("expert_feed_forward_length", width)
    return {
        "model_type": "mixtral",
        "head_dim": _fully_rotated_head(fields),
        "num_local_experts": experts,
        "intermediate_size": width,
        "sliding_window": fields.integer("attention.sliding_window", None),
    }


def _gpt_oss(fields: Fields, tensors: Collection[str]) -> dict[str, Any]:
    _require_score_function(fields, _CHOSEN)
    fields.constant("attention.sliding_window_pattern", 2)
    fields.ignore("feed_forward_length")
    scaling = _rope_scaling(fields)
    return {
        "model_type": "gpt_oss",
        # The value the model was trained with; GGUF has no key for it.
        "rope_scaling": scaling and scaling | {"truncate": False},
        "head_dim": _fully_rotated_head(fields),
        "num_local_experts": _experts(fields),
        "intermediate_size": fields.integer("expert_feed_forward_length"),
        "sliding_window": fields.integer("attention.sliding_window"),
    }


def _minimax_m2(fields: Fields, tensors: Collection[str]) -> dict[str, Any]:
    _require_score_function(fields, _SIGMOID)
    width = _head_dim(fields)
    fields.ignore("feed_forward_length")
    return {
        "model_type": "minimax_m2",
        "head_dim": width,
        "rotary_dim": _rotated(fields, width),
        "num_local_experts": _experts(fields),
        "intermediate_size": fields.integer("expert_feed_forward_length"),
    }


def _glm4moe(fields: Fields, tensors: Collection[str]) -> dict[str, Any]:
    _require_score_function(fields, _SIGMOID)
    width = _head_dim(fields)
    fields.ignore("rope.dimension_sections")
    return {
        "model_type": "glm4_moe",
        "head_dim": width,
        "partial_rotary_factor": _rotated(fields, width) / width,
        "use_qk_norm": _has(tensors, "attn_q_norm.weight"),
        "attention_bias": _has(tensors, "attn_q.bias"),
        **_deepseek_experts(fields, (1, 1)),
    }


def _deepseek2(fields: Fields, tensors: Collection[str]) -> dict[str, Any]:
    """DeepSeek-V2 and V3, which differ in the router. Keys and values of latents may be stored
    separately (see `names`)."""
    corrected = any(".exp_probs_b" in name for name in tensors)
    scored = fields.choice(
        "expert_gating_func", _SIGMOID if corrected else _SOFTMAX, (_SOFTMAX, _SIGMOID)
    )
    experts = _deepseek_experts(fields, _GROUPS.get(_experts(fields), (1, 1)))
    if scored == _SOFTMAX:
        limited = experts["n_group"] > 1
        experts["topk_method"] = "group_limited_greedy" if limited else "greedy"
    rope_width = fields.integer("rope.dimension_count")
    apart = fields.has("attention.key_length_mla")
    key, value = (
        fields.integer(f"attention.{part}_length" + ("_mla" if apart else ""))
        for part in ("key", "value")
    )
    if apart:  # key_length and value_length then describe the latents
        rank = fields.integer("attention.kv_lora_rank")
        fields.agrees("attention.key_length", rank + rope_width)
        fields.agrees("attention.value_length", rank)
    scaling = _rope_scaling(fields)
    multiplier = fields.number("rope.scaling.yarn_log_multiplier", 0.0)
    if scaling and multiplier:
        # The file stores mscale_all_dim / 10; mscale equals mscale_all_dim in all published models.
        all_dim = round(10 * multiplier, 6)
        scaling |= {"mscale": all_dim, "mscale_all_dim": all_dim}
    return {
        "model_type": "deepseek_v3" if scored == _SIGMOID else "deepseek_v2",
        "rope_scaling": scaling,
        "num_key_value_heads": fields.integer("attention.head_count"),
        "q_lora_rank": fields.integer("attention.q_lora_rank", None),
        "kv_lora_rank": fields.integer("attention.kv_lora_rank"),
        "qk_nope_head_dim": key - rope_width,
        "qk_rope_head_dim": rope_width,
        "v_head_dim": value,
        **experts,
    }


def _deepseek_experts(fields: Fields, groups: tuple[int, int]) -> dict[str, Any]:
    """Router and feed-forward fields of DeepSeek and GLM.

    Args:
        groups: (n_group, topk_group) to use if the file has no keys for them.
    """
    return {
        "n_routed_experts": _experts(fields),
        "n_shared_experts": fields.integer("expert_shared_count", 0, minimum=0),
        "intermediate_size": fields.integer("feed_forward_length"),
        "moe_intermediate_size": fields.integer("expert_feed_forward_length"),
        "first_k_dense_replace": fields.integer("leading_dense_block_count", 0, minimum=0),
        "n_group": fields.integer("expert_group_count", groups[0]),
        "topk_group": fields.integer("expert_group_used_count", groups[1]),
        "norm_topk_prob": fields.boolean("expert_weights_norm", False),
        "routed_scaling_factor": fields.number("expert_weights_scale", 0.0) or 1.0,
    }


_ARCHITECTURES: dict[str, Callable[[Fields, Collection[str]], dict[str, Any]]] = {
    "deepseek2": _deepseek2,
    "glm4moe": _glm4moe,
    "gpt-oss": _gpt_oss,
    "llama": _llama,
    "minimax-m2": _minimax_m2,
    "olmoe": _olmoe,
    "qwen2moe": _qwen2moe,
    "qwen35moe": _qwen35moe,
    "qwen3next": _qwen3next,
    "qwen3moe": _qwen3moe,
}


def token_fields(path: pathlib.Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """The fields of generation_config.json: all tokens that end an answer.

    A file names one or more of these tokens. Other end-of-turn tokens are recognised by their text,
    as llama.cpp does.
    """
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    control = 3
    known = [
        number
        for number, (text, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == control and text in _ENDS
    ]
    ends = list(dict.fromkeys([each for each in named if each is not None] + known))
    if any(end >= len(tokens) for end in ends):
        raise UserError(f"{path}: tokens that end an answer are {ends}; there are {len(tokens)}")
    return {"eos_token_id": ends} if ends else {}


#: Texts of special tokens that end an answer in any model.
_ENDS = frozenset(
    [
        "<|call|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|im_end|>",
        "<|return|>",
    ]
)
