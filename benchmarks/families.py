"""Shapes of the measured models, as fields of a config.json.

One model of about 200 M parameters per model family, and some larger or deeper ones.
"""

from __future__ import annotations

from typing import Any

_COMMON = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 1,
    "bos_token_id": 0,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2, "head_dim": 64}
_LATENT = _COMMON | {
    "num_key_value_heads": 8,
    "kv_lora_rank": 256,
    "q_lora_rank": None,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
_DEEPSEEK = {
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 256,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "intermediate_size": 1408,
    "routed_scaling_factor": 1.0,
}
_QWEN = {
    "num_experts": 64,
    "moe_intermediate_size": 256,
    "num_experts_per_tok": 6,
    "norm_topk_prob": True,
}
_DELTA = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "full_attention_interval": 4,
    "shared_expert_intermediate_size": 256,
}
_GEMMA = {
    "global_head_dim": 128,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 128,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 64,
    "top_k_experts": 6,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
}


def _local(experts: int, chosen: int, width: int) -> dict[str, Any]:
    """Return the numbers of experts under Mixtral's field names."""
    return {
        "num_local_experts": experts,
        "num_experts_per_tok": chosen,
        "intermediate_size": width,
    }


#: Fields of config.json by model_type.
SHAPES: dict[str, dict[str, Any]] = {
    model_type: {"model_type": model_type} | fields
    for model_type, fields in {
        "deepseek_v2": _LATENT | _DEEPSEEK | {"topk_method": "greedy"},
        "deepseek_v3": _LATENT | _DEEPSEEK | {"n_group": 8, "topk_group": 4},
        "gemma4_text": _GROUPED | _GEMMA,
        "glm4_moe": _GROUPED | _DEEPSEEK | {"attention_bias": True},
        "glm4_moe_lite": _LATENT | _DEEPSEEK,
        "gpt_oss": _GROUPED | _local(32, 4, 512) | {"sliding_window": 128},
        "minimax_m2": _GROUPED | _local(64, 6, 256) | {"rotary_dim": 32},
        "mixtral": _GROUPED | _local(8, 2, 1792),
        "olmoe": _GROUPED | {"num_experts": 64, "num_experts_per_tok": 6, "intermediate_size": 256},
        "qwen2_moe": _GROUPED | _QWEN | {"shared_expert_intermediate_size": 512},
        "qwen3_5_moe_text": _GROUPED | _QWEN | _DELTA,
        "qwen3_moe": _GROUPED | _QWEN,
        "qwen3_next": _GROUPED | _QWEN | _DELTA,
    }.items()
}

_LARGE = {
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
#: Fields of config.json by the name that --shape takes.
LARGE: dict[str, dict[str, Any]] = {
    "olmoe": _LARGE
    | {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "intermediate_size": 1024,
        "rms_norm_eps": 1e-5,
    },
    "48-layers": SHAPES["deepseek_v2"] | {"hidden_size": 256, "num_hidden_layers": 48},
    # Qwen3-30B-A3B with half its layers.
    "qwen3-24-layers": _LARGE
    | {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    },
}
