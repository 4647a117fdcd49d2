"""Rewrites what transformers 5.23 saves into the form of published checkpoints.

Published checkpoints have other config keys than 5.23 writes, prefixes of multimodal models, and
tensors that serving text does not need.
"""

from dataclasses import dataclass, field

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Spelling:
    """How a family's published config.json differs from what transformers 5.23 saves.

    older: rope and dtype are spelled as in transformers 4.
    rope_type: key of the rope type if `older`.
    renames: maps keys of 5.23 to published keys.
    drops: keys that published files lack.
    adds: keys (with values) that only published files have.
    wrapper: the multimodal config around ours; ours becomes its text_config.
    """

    older: bool = True
    rope_type: str = "type"
    renames: dict[str, str] = field(default_factory=dict)
    drops: tuple[str, ...] = ()
    adds: dict = field(default_factory=dict)
    wrapper: dict | None = None


#: Left in nested configs by transformers 4, which wrote all generation options there.
GENERATION = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}
DEEPSEEK_DROPS = ("head_dim", "output_router_logits", "qk_head_dim", "rope_interleave")
DEEPSEEK_ADDS = {
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    "ep_size": 1,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}

QWEN3_30B = Spelling(
    renames={"num_local_experts": "num_experts"},
    drops=("pad_token_id",),
    adds={"max_window_layers": 48},
)
OLMOE = Spelling(drops=("bos_token_id",))
GPT_OSS_20B = Spelling(
    rope_type="rope_type",
    drops=("bos_token_id", "torch_dtype", "swiglu_alpha"),
    adds={"experts_per_token": 3, "initial_context_length": 64},
)
DEEPSEEK_V3 = Spelling(
    drops=(*DEEPSEEK_DROPS, "pad_token_id", "pretraining_tp"), adds=DEEPSEEK_ADDS
)
QWEN3_NEXT = Spelling(
    drops=("attention_bias", "layer_types", "pad_token_id"),
    adds={"full_attention_interval": 4, "use_sliding_window": False},
)
QWEN1_5_MOE = Spelling(
    drops=("layer_types", "mlp_only_layers", "pad_token_id", "qkv_bias", "rope_scaling")
)
GLM_4_5 = Spelling(drops=("bos_token_id", "output_router_logits"))
MINIMAX_M2 = Spelling(
    drops=("torch_dtype", "pad_token_id", "partial_rotary_factor", "rope_scaling"),
    adds={
        "attn_type_list": [1, 1, 1],
        "auto_map": {"AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM"},
        "layernorm_full_attention_beta": 1.0,
        "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_beta": 1.0,
        "mlp_intermediate_size": 8192,
        "mtp_transformer_layers": 1,
        "num_mtp_modules": 3,
        "qk_norm_type": "per_layer",
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "use_mtp": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
    },
)
KIMI_K2_5 = Spelling(
    drops=DEEPSEEK_DROPS,
    adds=DEEPSEEK_ADDS
    | GENERATION
    | {"model_type": "kimi_k2", "aux_loss_alpha": 0.001, "seq_aux": True},
    wrapper={
        "architectures": ["KimiK25ForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_kimi_k25.KimiK25Config"},
        "bos_token_id": 0,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "ignore_index": -100,
        "media_placeholder_token_id": 127,
        "model_type": "kimi_k25",
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "use_unified_vision_chunk": True,
        "video_placeholder": "<|kimi_k25_video_placeholder|>",
        "vision_config": {"merge_kernel_size": [2, 2], "patch_size": 14, "vt_hidden_size": 8},
    },
)
QWEN3_5 = Spelling(
    older=False,
    drops=(
        "architectures",
        "bos_token_id",
        "output_router_logits",
        "pad_token_id",
        "tie_word_embeddings",
        "transformers_version",
    ),
    adds={
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "mamba_ssm_dtype": "float32",
        "mlp_only_layers": [],
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
    },
    wrapper={
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": 124,
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 125,
        "vision_config": {"depth": 1, "hidden_size": 8, "model_type": "qwen3_5_moe"},
        "vision_end_token_id": 126,
        "vision_start_token_id": 127,
    },
)
GEMMA_4_26B = Spelling(
    older=False,
    drops=("architectures", "per_layer_config", "transformers_version"),
    adds={"global_head_dim": 16, "num_global_key_value_heads": 1},
    wrapper={
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        "audio_token_id": 121,
        "boa_token_id": 122,
        "boi_token_id": 123,
        "dtype": "bfloat16",
        "eoa_token_id": 124,
        "eoa_token_index": 124,
        "eoi_token_id": 125,
        "image_token_id": 126,
        "initializer_range": 0.02,
        "model_type": "gemma4",
        "tie_word_embeddings": True,
        "transformers_version": "5.5.0.dev0",
        "video_token_id": 127,
        "vision_config": {"hidden_size": 8, "model_type": "gemma4_vision"},
        "vision_soft_tokens_per_image": 280,
    },
)


def older_spelling(config: dict, rope_type: str = "type") -> None:
    """Rewrites the fields of a config.json as transformers 4 wrote them."""
    rope = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    rope[rope_type] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope[rope_type] == "default" else rope
    config["transformers_version"] = "4.39.3"


def as_published(config: dict, spelling: Spelling) -> dict:
    """A config.json of transformers 5.23, respelled as its family's published ones."""
    if spelling.older:
        older_spelling(config, spelling.rope_type)
    config = {
        spelling.renames.get(key, key): value
        for key, value in config.items()
        if key not in spelling.drops
    } | spelling.adds
    return config if spelling.wrapper is None else spelling.wrapper | {"text_config": config}


def next_token_layer(tensors: Tensors) -> None:
    """Adds the layer behind the last with which DeepSeek-V3 and GLM predict one more token."""
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    source, target = f"model.layers.{last}.", f"model.layers.{last + 1}."
    for name in list(tensors):
        few = not any(f".experts.{expert}." in name for expert in range(2, 64))
        if name.startswith(source) and few:
            _add(tensors, target + name.removeprefix(source), tensors[name].shape)
    vocab, width = tensors["model.embed_tokens.weight"].shape
    _add(tensors, f"{target}embed_tokens.weight", (vocab, width))
    _add(tensors, f"{target}enorm.weight", (width,))
    _add(tensors, f"{target}hnorm.weight", (width,))
    _add(tensors, f"{target}eh_proj.weight", (width, 2 * width))
    _add(tensors, f"{target}shared_head.norm.weight", (width,))
    _add(tensors, f"{target}shared_head.head.weight", (vocab, width))


def qwen_next_token(tensors: Tensors) -> None:
    """Adds some of the tensors with which Qwen3-Next and 3.5 predict one more token."""
    width = tensors["lm_head.weight"].shape[1]
    _add(tensors, "mtp.fc.weight", (width, 2 * width))
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        _add(tensors, f"mtp.{norm}.weight", (width,))
    _add(tensors, "mtp.layers.0.input_layernorm.weight", (width,))
    _add(tensors, "mtp.layers.0.self_attn.q_proj.weight", (width, width))
    _add(tensors, "mtp.layers.0.mlp.gate.weight", (8, width))


def multimodal_prefix(tensors: Tensors) -> None:
    """Renames model.* to model.language_model.*; lm_head stays outside, as published."""
    for name in list(tensors):
        if name.startswith("model."):
            renamed = "model.language_model." + name.removeprefix("model.")
            tensors[renamed] = tensors.pop(name)


def qwen_vision(tensors: Tensors) -> None:
    """Adds some tensors of Qwen's vision tower."""
    _add(tensors, "model.visual.patch_embed.proj.weight", (8, 3, 2, 2, 2))
    _add(tensors, "model.visual.blocks.0.attn.qkv.weight", (24, 8))
    _add(tensors, "model.visual.merger.linear_fc2.weight", (32, 8))


def gemma_vision(tensors: Tensors) -> None:
    """Adds some tensors of Gemma's vision tower and of the projection to the text model."""
    _add(tensors, "model.vision_tower.patch_embedder.input_proj.weight", (8, 12))
    _add(tensors, "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight", (8, 8))
    _add(tensors, "model.embed_vision.embedding_projection.weight", (32, 8))


def kimi_wrapper(tensors: Tensors) -> None:
    """Renames all tensors to language_model.*, as in Kimi-K2.5, and adds some vision tensors."""
    for name in list(tensors):
        tensors[f"language_model.{name}"] = tensors.pop(name)
    _add(tensors, "vision_tower.patch_embed.proj.weight", (8, 3, 2, 2))
    _add(tensors, "vision_tower.encoder.blocks.0.wqkv.weight", (24, 8))
    _add(tensors, "mm_projector.proj.0.weight", (8, 8))


def _add(tensors: Tensors, name: str, shape: tuple[int, ...]) -> None:
    """Adds a random tensor of the usual scale, so that using it by mistake changes the output."""
    generator = torch.Generator().manual_seed(len(tensors))
    dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
    tensors[name] = torch.randn(shape, generator=generator).to(dtype)
