"""config.json of published models, with the fields as each model spells them.

Common fields that do not describe the model are left out: architectures, dropout, use_cache and the
like. Such fields are included if only a few models have them, because a strict reader must know
them too.
"""

from __future__ import annotations

from typing import Any

#: Fields that are in SIZES for every model; None if a model does not have the field.
COLUMNS = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "moe_intermediate_size", "num_experts_per_tok"),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps"),
)
SIZES = {
    "Mixtral-8x7B": (32, 4096, 32, 8, 14336, None, 2, 32000, 32768, 1e-5),
    "DeepSeek-V2-Lite": (27, 2048, 16, 16, 10944, 1408, 6, 102400, 163840, 1e-6),
    "DeepSeek-V3": (61, 7168, 128, 128, 18432, 2048, 8, 129280, 163840, 1e-6),
    "Moonlight-16B-A3B": (27, 2048, 16, 16, 11264, 1408, 6, 163840, 8192, 1e-5),
    "Kimi-K2": (61, 7168, 64, 64, 18432, 2048, 8, 163840, 131072, 1e-6),
    "Kimi-K2.5": (61, 7168, 64, 64, 18432, 2048, 8, 163840, 262144, 1e-5),
    "GLM-4.5-Air": (46, 4096, 96, 8, 10944, 1408, 8, 151552, 131072, 1e-5),
    "GLM-4.5": (92, 5120, 96, 8, 12288, 1536, 8, 151552, 131072, 1e-5),
    "GLM-4.7-Flash": (47, 2048, 20, 20, 10240, 1536, 4, 154880, 202752, 1e-5),
    "MiniMax-M2": (62, 3072, 48, 8, 1536, None, 8, 200064, 196608, 1e-6),
    "gpt-oss-20b": (24, 2880, 64, 8, 2880, None, 4, 201088, 131072, 1e-5),
    "gpt-oss-120b": (36, 2880, 64, 8, 2880, None, 4, 201088, 131072, 1e-5),
    "Qwen1.5-MoE-A2.7B": (24, 2048, 16, 16, 5632, 1408, 4, 151936, 8192, 1e-6),
    "Qwen3-30B-A3B": (48, 2048, 32, 4, 6144, 768, 8, 151936, 40960, 1e-6),
    "Qwen3-235B-A22B": (94, 4096, 64, 4, 12288, 1536, 8, 151936, 40960, 1e-6),
    "Qwen3-Next-80B-A3B": (48, 2048, 16, 2, 5120, 512, 10, 151936, 262144, 1e-6),
    "Qwen3.5-35B-A3B": (40, 2048, 16, 2, None, 512, 8, 248320, 262144, 1e-6),
    "Gemma-4-26B-A4B": (30, 2816, 16, 8, 2112, 704, None, 262144, 262144, 1e-6),
    "OLMoE-1B-7B": (16, 2048, 16, 16, 1024, None, 8, 50304, 4096, 1e-5),
}


def kinds(layers: int, *period: str) -> list[str]:
    """layer_types with a repeating period."""
    return [f"{period[layer % len(period)]}_attention" for layer in range(layers)]


def yarn(factor: float, magnitude: float, fast: float = 32) -> dict[str, Any]:
    """DeepSeek's rope_scaling."""
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 4096,
        **{"beta_fast": fast, "beta_slow": 1},
        **{"mscale": magnitude, "mscale_all_dim": magnitude},
    }


def routed(experts: int, shared: int, scale: float, dense: int, groups: int = 1, kept: int = 1):
    """DeepSeek's routing fields; the first `dense` layers have no experts."""
    return {
        "first_k_dense_replace": dense,
        **{"n_routed_experts": experts, "n_shared_experts": shared},
        **{"n_group": groups, "topk_group": kept},
        **{"norm_topk_prob": True, "routed_scaling_factor": scale},
    }


PLAIN: dict[str, Any] = {"hidden_act": "silu", "tie_word_embeddings": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT4_G32 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            **{"input_activations": None, "output_activations": None},
            "weights": {
                **{"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32},
                **{"symmetric": True, "dynamic": False, "actorder": None, "block_structure": None},
                **{"observer": "minmax", "observer_kwargs": {}},
            },
        }
    },
}
MLA = PLAIN | {
    "attention_bias": False,
    "kv_lora_rank": 512,
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
}
#: DeepSeek-V3's routing.
SIGMOID = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
#: Fields that only training uses.
LOSSES = {"aux_loss_alpha": 0.001, "pretraining_tp": 1, "seq_aux": True}
KIMI_K2 = {
    **MLA,
    **routed(384, shared=1, scale=2.827, dense=1),
    **SIGMOID,
    **LOSSES,
    "model_type": "kimi_k2",
    **{"bos_token_id": 163584, "eos_token_id": 163585},
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536,
    "rope_theta": 50000.0,
}
#: Options that version 4 of transformers wrote into nested configs.
GENERATION: dict[str, Any] = {
    **dict.fromkeys(("bad_words_ids", "decoder_start_token_id", "prefix", "sep_token_id")),
    **dict.fromkeys(("add_cross_attention", "do_sample", "is_decoder", "torchscript"), False),
    **dict.fromkeys(("is_encoder_decoder", "tie_encoder_decoder", "tf_legacy_loss"), False),
    **dict.fromkeys(("chunk_size_feed_forward", "min_length", "no_repeat_ngram_size"), 0),
    **dict.fromkeys(("num_beam_groups", "num_beams", "num_return_sequences"), 1),
    **dict.fromkeys(("length_penalty", "repetition_penalty", "temperature", "top_p"), 1.0),
    **{"pruned_heads": {}, "top_k": 50},
}
GLM = PLAIN | {
    "model_type": "glm4_moe",
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    **{"rope_scaling": None, "rope_theta": 1000000},
}
GPT_OSS = PLAIN | {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "initial_context_length": 4096,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        **{"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
}
QWEN = {"model_type": "qwen2_moe", "decoder_sparse_step": 1, "router_aux_loss_coef": 0.001}
QWEN3 = {
    **PLAIN,
    **QWEN,
    "model_type": "qwen3_moe",
    "attention_bias": False,
    **{"bos_token_id": 151643, "eos_token_id": 151645},
    "head_dim": 128,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    **{"rope_scaling": None, "rope_theta": 1000000.0},
    **{"sliding_window": None, "use_sliding_window": False},
}
#: Gated delta nets in three of four layers.
QWEN_DELTA = {
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "linear_conv_kernel_dim": 4,
    **{"linear_key_head_dim": 128, "linear_num_key_heads": 16},
    **{"linear_value_head_dim": 128, "linear_num_value_heads": 32},
    "mlp_only_layers": [],
    "shared_expert_intermediate_size": 512,
}

#: Fields of each model (or of its text_config) in addition to SIZES.
FIELDS: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B": PLAIN
    | {
        "model_type": "mixtral",
        **{"bos_token_id": 1, "eos_token_id": 2},
        "num_local_experts": 8,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "DeepSeek-V2-Lite": {
        **MLA,
        **routed(64, shared=2, scale=1.0, dense=1),
        **LOSSES,
        "model_type": "deepseek_v2",
        **{"bos_token_id": 100000, "eos_token_id": 100001},
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "q_lora_rank": None,
        **{"rope_scaling": yarn(40, 0.707), "rope_theta": 10000},
        **{"scoring_func": "softmax", "topk_method": "greedy"},
    },
    "DeepSeek-V3": {
        **MLA,
        **routed(256, shared=1, scale=2.5, dense=3, groups=8, kept=4),
        **SIGMOID,
        "model_type": "deepseek_v3",
        **{"bos_token_id": 0, "eos_token_id": 1},
        "ep_size": 1,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "quantization_config": FP8 | {"fmt": "e4m3"},
        **{"rope_scaling": yarn(40, 1.0), "rope_theta": 10000},
    },
    "Moonlight-16B-A3B": {
        **MLA,
        **routed(64, shared=2, scale=2.446, dense=1),
        **SIGMOID,
        **LOSSES,
        "model_type": "deepseek_v3",
        **{"bos_token_id": 163584, "eos_token_id": 163585},
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "rope_theta": 50000.0,
    },
    "Kimi-K2": KIMI_K2
    | {"quantization_config": FP8 | {"fmt": "e4m3"}, "rope_scaling": yarn(32, 1.0, fast=1)},
    "Kimi-K2.5": KIMI_K2
    | GENERATION
    | {"quantization_config": INT4_G32, "rope_scaling": yarn(64, 1)},
    "GLM-4.5-Air": GLM | routed(128, shared=1, scale=1.0, dense=1) | {"use_qk_norm": False},
    "GLM-4.5": GLM | routed(160, shared=1, scale=2.5, dense=3) | {"use_qk_norm": True},
    "GLM-4.7-Flash": {
        **MLA,
        **routed(64, shared=1, scale=1.8, dense=1),
        "model_type": "glm4_moe_lite",
        "eos_token_id": [154820, 154827, 154829],
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 1.0,
        **{"q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256},
        **{"rope_scaling": None, "rope_theta": 1000000},
        "topk_method": "noaux_tc",
    },
    # Has fields of MiniMax-M1, which has linear attention and a shared expert.
    "MiniMax-M2": PLAIN
    | {
        "model_type": "minimax_m2",
        "attn_type_list": [1] * 62,
        **{"bos_token_id": None, "eos_token_id": None},
        "head_dim": 128,
        **{"layernorm_full_attention_beta": 1.0, "layernorm_linear_attention_beta": 1.0},
        **{"layernorm_mlp_beta": 1.0, "mlp_intermediate_size": 8192},
        **{"mtp_transformer_layers": 1, "num_mtp_modules": 3, "use_mtp": True},
        "num_local_experts": 256,
        "quantization_config": FP8 | {"fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate"]},
        **{"rope_theta": 5000000, "rotary_dim": 64},
        **{"router_jitter_noise": 0.0, "scoring_func": "sigmoid", "use_routing_bias": True},
        **{"shared_intermediate_size": 0, "shared_moe_mode": "sigmoid"},
        "sliding_window": None,
        **{"qk_norm_type": "per_layer", "use_qk_norm": True},
    },
    "gpt-oss-20b": GPT_OSS | {"layer_types": kinds(24, "sliding", "full"), "num_local_experts": 32},
    "gpt-oss-120b": GPT_OSS
    | {"layer_types": kinds(36, "sliding", "full"), "num_local_experts": 128},
    "Qwen1.5-MoE-A2.7B": {
        **PLAIN,
        **QWEN,
        **{"bos_token_id": 151643, "eos_token_id": 151643},
        **{"max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False},
        **{"norm_topk_prob": False, "num_experts": 60},
        "rope_theta": 1000000.0,
        "shared_expert_intermediate_size": 5632,
    },
    "Qwen3-30B-A3B": QWEN3 | {"max_window_layers": 48},
    "Qwen3-235B-A22B": QWEN3 | {"max_window_layers": 94},
    "Qwen3-Next-80B-A3B": {
        **QWEN,
        **QWEN_DELTA,
        "model_type": "qwen3_next",
        **{"bos_token_id": 151643, "eos_token_id": 151645},
        **{"norm_topk_prob": True, "num_experts": 512},
        **{"partial_rotary_factor": 0.25, "rope_scaling": None, "rope_theta": 10000000},
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    "Qwen3.5-35B-A3B": {
        **QWEN_DELTA,
        "model_type": "qwen3_5_moe_text",
        "attention_bias": False,
        "attn_output_gate": True,
        "eos_token_id": 248044,
        "layer_types": kinds(40, "linear", "linear", "linear", "full"),
        "mamba_ssm_dtype": "float32",
        **{"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False},
        "num_experts": 256,
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
            **{"mrope_interleaved": True, "mrope_section": [11, 11, 10]},
        },
    },
    "Gemma-4-26B-A4B": {
        "model_type": "gemma4_text",
        "attention_bias": False,
        "attention_k_eq_v": True,
        **{"bos_token_id": 2, "eos_token_id": 1},
        **{"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8},
        "final_logit_softcapping": 30.0,
        **{"global_head_dim": 512, "head_dim": 256, "num_global_key_value_heads": 2},
        "hidden_activation": "gelu_pytorch_tanh",
        **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 262144},
        "layer_types": kinds(30, *["sliding"] * 5, "full"),
        "num_kv_shared_layers": 0,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                **{"rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "sliding_window": 1024,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": "vision",
        "use_double_wide_mlp": False,
    },
    "OLMoE-1B-7B": PLAIN
    | {
        "model_type": "olmoe",
        **{"attention_bias": False, "clip_qkv": None},
        "eos_token_id": 50279,
        **{"norm_topk_prob": False, "num_experts": 64},
        **{"rope_scaling": None, "rope_theta": 10000.0},
    },
}
#: Fields of multimodal models outside their text_config.
AROUND: dict[str, dict[str, Any]] = {
    "Kimi-K2.5": {
        "model_type": "kimi_k25",
        **{"bos_token_id": 163584, "eos_token_id": 163585, "pad_token_id": 163839},
        **{"ignore_index": -100, "media_placeholder_token_id": 163605},
        **{"use_unified_vision_chunk": True, "video_placeholder": "<|kimi_k25_video_placeholder|>"},
        "tie_word_embeddings": False,
        "vision_config": {"patch_size": 14, "text_hidden_size": 7168},
    },
    "Qwen3.5-35B-A3B": {
        "model_type": "qwen3_5_moe",
        **{"image_token_id": 248056, "video_token_id": 248057},
        **{"vision_end_token_id": 248054, "vision_start_token_id": 248053},
        "tie_word_embeddings": False,
        "vision_config": {"depth": 27, "out_hidden_size": 2048},
    },
    "Gemma-4-26B-A4B": {
        "model_type": "gemma4",
        **{"audio_config": None, "audio_token_id": 258881, "boa_token_id": 256000},
        **{"eoa_token_id": 258883, "eoa_token_index": 258883, "boi_token_id": 255999},
        **{"eoi_token_id": 258882, "image_token_id": 258880, "video_token_id": 258884},
        "tie_word_embeddings": True,
        **{"vision_config": {"hidden_size": 1152}, "vision_soft_tokens_per_image": 280},
    },
}


def _published(name: str) -> dict[str, Any]:
    sizes = dict(zip(COLUMNS, SIZES[name], strict=True))
    fields = {key: size for key, size in sizes.items() if size is not None} | FIELDS[name]
    return AROUND[name] | {"text_config": fields} if name in AROUND else fields


PUBLISHED = {name: _published(name) for name in SIZES}
