"""The reference models that make_reference.py makes, one entry of CASES each.

Each case covers a branch of its family's mathematics, or a spelling of its files, that no other
case covers; the case's comment says which. All models are tiny: width 32, a vocabulary of 128 and 8
experts (16 if a group must have more than two).
"""

from collections.abc import Callable
from dataclasses import dataclass

from published import (
    DEEPSEEK_V3,
    GEMMA_4_26B,
    GLM_4_5,
    GPT_OSS_20B,
    KIMI_K2_5,
    MINIMAX_M2,
    OLMOE,
    QWEN1_5_MOE,
    QWEN3_5,
    QWEN3_30B,
    QWEN3_NEXT,
    Spelling,
    Tensors,
    gemma_vision,
    kimi_wrapper,
    multimodal_prefix,
    next_token_layer,
    qwen_next_token,
    qwen_vision,
)


@dataclass(frozen=True)
class Family:
    """How transformers calls a model, and how the model's stored weights differ from the usual.

    model: class name without "Config" and "ForCausalLM".
    config: name of the config class, if it is not `model` with "Config".
    plus_one: norms use 1 + w, so their weights are drawn around 0.
    experts_in_out: fused experts are [experts, in, out], not [experts, out, in].
    """

    model: str
    config: str | None = None
    plus_one: bool = False
    experts_in_out: bool = False


@dataclass(frozen=True)
class Case:
    """A reference model.

    family: key of FAMILIES.
    fields: arguments of transformers' config class.
    prompt: length of the prompt in tokens.
    dtype: type of the stored weights.
    shard: maximum size of a file, as transformers spells sizes; None for a single file.
    older: config.json is written as transformers 4 wrote it.
    spelling: config.json is written as this published model's.
    fused: experts are stored as 5.23 holds them, one tensor for all experts of a layer.
    edits: functions that change the stored tensors to look like published ones.
    float32: pattern of the tensors that are stored in float32 whatever `dtype` is.
    embedding: standard deviation of the embeddings. If embeddings are tied to the head, a large
        value makes the model repeat its last token.
    """

    family: str
    fields: dict
    prompt: int = 24
    dtype: str = "bfloat16"
    shard: str | None = None
    older: bool = False
    spelling: Spelling | None = None
    fused: bool = False
    edits: tuple[Callable[[Tensors], None], ...] = ()
    float32: str = r"e_score_correction_bias$"
    embedding: float = 1.0


FAMILIES = {
    "deepseek_v2": Family("DeepseekV2"),
    "deepseek_v3": Family("DeepseekV3"),
    "gemma4": Family("Gemma4", config="Gemma4TextConfig"),
    "glm4_moe": Family("Glm4Moe"),
    "glm4_moe_lite": Family("Glm4MoeLite"),
    "gpt_oss": Family("GptOss", experts_in_out=True),
    "minimax_m2": Family("MiniMaxM2"),
    "mixtral": Family("Mixtral"),
    "olmoe": Family("Olmoe"),
    "qwen2_moe": Family("Qwen2Moe"),
    "qwen3_5_moe": Family("Qwen3_5Moe", config="Qwen3_5MoeTextConfig", plus_one=True),
    "qwen3_moe": Family("Qwen3Moe"),
    "qwen3_next": Family("Qwen3Next", plus_one=True),
}

#: Epsilon is large, so that using another norm's epsilon, or a fixed one, changes the logits.
COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-3,
    "eos_token_id": 1,
}
LATENT = COMMON | {
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
}
MIXTRAL = COMMON | {
    "rms_norm_eps": 1e-5,
    "intermediate_size": 16,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN = COMMON | {
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}
DELTA = COMMON | {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 8,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 12,
}


def plain(theta: float, **more) -> dict:
    return {"rope_type": "default", "rope_theta": theta, **more}


def yarn(**more) -> dict:
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        **more,
    }


def longrope(short: list[float], long: list[float]) -> dict:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": 64,
    }


CASES = {
    "deepseek_lite": Case(
        "deepseek_v2",
        LATENT
        | {
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "n_shared_experts": 2,
            "topk_method": "greedy",
            "rope_parameters": yarn(mscale=0.707, mscale_all_dim=0.707),
        },
        prompt=150,
        dtype="float32",
        older=True,
    ),
    "deepseek_full": Case(
        "deepseek_v2",
        LATENT
        | {
            "rms_norm_eps": 1e-6,
            "q_lora_rank": 24,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "rope_parameters": yarn(mscale=1.4, mscale_all_dim=0.6),
        },
        dtype="float32",
        shard="100KB",
    ),
    "deepseek_tied": Case(
        "deepseek_v2",
        LATENT
        | {
            "rms_norm_eps": 1e-6,
            "q_lora_rank": 24,
            "first_k_dense_replace": 0,
            "n_shared_experts": 1,
            "tie_word_embeddings": True,
            "rope_parameters": plain(500.0),
        },
        embedding=0.5,
    ),
    "deepseek_yarn_plain": Case(
        "deepseek_v2",
        LATENT
        | {
            "rms_norm_eps": 1e-6,
            "q_lora_rank": None,
            "first_k_dense_replace": 2,
            "n_shared_experts": 1,
            "num_experts_per_tok": 1,
            "routed_scaling_factor": 1.5,
            "rope_parameters": yarn(mscale_all_dim=0.5),
        },
        older=True,
    ),
    "mixtral": Case(
        "mixtral",
        MIXTRAL | {"rope_parameters": plain(1e6)},
        dtype="float32",
        older=True,
    ),
    "mixtral_window": Case(
        "mixtral",
        MIXTRAL
        | {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "sliding_window": 9,
            "tie_word_embeddings": True,
            "rope_parameters": yarn(),
        },
        shard="80KB",
        embedding=0.5,
    ),
    # q and k normalised per head; heads wider than hidden / heads; published keys
    "qwen3_moe": Case(
        "qwen3_moe",
        QWEN
        | {
            "head_dim": 16,
            "norm_topk_prob": True,
            "sliding_window": None,
            "use_sliding_window": False,
            "rope_parameters": plain(1e6),
        },
        spelling=QWEN3_30B,
    ),
    # q and k normalised over all heads at once, then clipped like v
    "olmoe": Case(
        "olmoe",
        COMMON
        | {
            "intermediate_size": 16,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "clip_qkv": 1.2,
            "rope_parameters": plain(10000.0),
        },
        spelling=OLMOE,
    ),
    # experts only in layers 1 and 5: step 2 would also give layer 3, which mlp_only_layers removes
    "qwen3_moe_sparse": Case(
        "qwen3_moe",
        QWEN
        | {
            "num_hidden_layers": 7,
            "head_dim": 8,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": yarn(factor=32.0, original_max_position_embeddings=16),
        },
        fused=True,
        embedding=0.06,
    ),
    # sinks, windows in every other layer, clamped gates, biases everywhere, YaRN without rounding
    "gpt_oss": Case(
        "gpt_oss",
        COMMON
        | {
            "num_hidden_layers": 4,
            "intermediate_size": 16,
            "head_dim": 16,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 9,
            "swiglu_limit": 1.5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": yarn(rope_theta=1000.0, beta_fast=8.0, truncate=False),
        },
        spelling=GPT_OSS_20B,
    ),
    # groups ranked by their two best experts with a correction bias; an MTP layer to ignore
    "deepseek_v3": Case(
        "deepseek_v3",
        LATENT
        | {
            "moe_intermediate_size": 8,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "q_lora_rank": 24,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 1,
            "rope_parameters": yarn(mscale=1.0, mscale_all_dim=0.7),
        },
        spelling=DEEPSEEK_V3,
        edits=(next_token_layer,),
    ),
    # delta net, gated attention, norms of 1 + w; the prompt is longer than two chunks of 32
    "qwen3_next": Case(
        "qwen3_next",
        DELTA
        | {
            "norm_topk_prob": True,
            "intermediate_size": 48,
            "full_attention_interval": 4,
            "partial_rotary_factor": 0.25,
            "rope_parameters": plain(10000.0),
        },
        prompt=70,
        spelling=QWEN3_NEXT,
        edits=(qwen_next_token,),
    ),
    # two kinds of attention and of rope, keys as values, a dense MLP beside the experts, softcap
    "gemma4": Case(
        "gemma4",
        COMMON
        | {
            "num_hidden_layers": 4,
            "intermediate_size": 24,
            "moe_intermediate_size": 16,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 3,
            "head_dim": 8,
            "num_key_value_heads": 2,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "final_logit_softcapping": 4.0,
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
            "vocab_size_per_layer_input": 128,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "sliding_attention": plain(10000.0),
                "full_attention": {
                    "rope_type": "proportional",
                    "rope_theta": 1e6,
                    "partial_rotary_factor": 0.25,
                },
            },
        },
        spelling=GEMMA_4_26B,
        edits=(multimodal_prefix, gemma_vision),
        embedding=0.2,
    ),
    # a gated shared expert; biases although their key is absent; a window only in layer 0
    "qwen2_moe": Case(
        "qwen2_moe",
        QWEN
        | {
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": False,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
            "rope_parameters": plain(1e6),
        },
        spelling=QWEN1_5_MOE,
    ),
    # deepseek_v3 without groups in a multimodal wrapper
    "kimi_k25": Case(
        "deepseek_v3",
        LATENT
        | {
            "q_lora_rank": 24,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.827,
            "num_nextn_predict_layers": 0,
            "max_position_embeddings": 2048,
            "rope_parameters": yarn(
                rope_theta=50000.0,
                original_max_position_embeddings=256,
                beta_fast=1.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        },
        spelling=KIMI_K2_5,
        edits=(kimi_wrapper,),
    ),
    # rope on half of each head; per-head norms; biases on q, k and v, none on o
    "glm4_moe": Case(
        "glm4_moe",
        COMMON
        | {
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "num_key_value_heads": 2,
            "use_qk_norm": True,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 1,
            "rope_parameters": plain(1e6),
        },
        spelling=GLM_4_5,
        edits=(next_token_layer,),
    ),
    # dense and sparse layers given as a list, as transformers 5.23 saves them
    "glm4_moe_lite": Case(
        "glm4_moe_lite",
        LATENT
        | {
            "num_hidden_layers": 4,
            "q_lora_rank": 24,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.8,
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
            "rope_parameters": plain(1e6),
        },
    ),
    # sigmoid router with a correction bias, Mixtral's names, norms over all heads, half rotated
    "minimax_m2": Case(
        "minimax_m2",
        COMMON
        | {
            "intermediate_size": 16,
            "head_dim": 16,
            "rotary_dim": 8,
            "bos_token_id": None,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "rope_parameters": plain(5e6),
        },
        spelling=MINIMAX_M2,
    ),
    # the delta net's projections stored separately, fused experts, a multimodal wrapper
    "qwen3_5_moe": Case(
        "qwen3_5_moe",
        DELTA
        | {
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "rope_parameters": plain(
                10000.0,
                partial_rotary_factor=0.25,
                mrope_section=[1, 1, 0],
                mrope_interleaved=True,
            ),
        },
        prompt=40,
        spelling=QWEN3_5,
        fused=True,
        edits=(multimodal_prefix, qwen_vision, qwen_next_token),
        float32=r"(A_log|linear_attn\.norm\.weight)$",
    ),
    # wavelengths of 6, 63, 628 and 6283: kept, blended and (two of them) divided
    "mixtral_llama3": Case(
        "mixtral",
        MIXTRAL
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    # 24 + 32 positions stay within the original 64
    "mixtral_longrope_short": Case(
        "mixtral",
        MIXTRAL
        | {"head_dim": 8, "rope_parameters": longrope([1.0, 1.2, 1.5, 2.0], [1.0, 2.5, 6.0, 8.0])},
    ),
    # the prompt is longer than the original 64
    "mixtral_longrope_long": Case(
        "mixtral",
        MIXTRAL
        | {"head_dim": 8, "rope_parameters": longrope([1.0, 1.2, 1.5, 2.0], [1.0, 2.5, 6.0, 8.0])},
        prompt=70,
        older=True,
    ),
}
