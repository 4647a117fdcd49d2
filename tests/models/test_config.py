"""config.json in both spellings; nothing that changes the result passes unnoticed."""

import math

import pytest

from dance_jax.config import UserError
from dance_jax.models import ModelConfig


def test_deepseek_fields(deepseek_fields):
    config = ModelConfig.from_hf(deepseek_fields | {"n_shared_experts": 2})
    assert (config.family, config.num_experts, config.top_k) == ("deepseek_v2", 8, 2)
    assert (config.expert_width, config.shared_width, config.dense_width) == (16, 32, 48)
    assert config.moe_layers == (1, 2)
    assert config.cache_width == 16 + 8
    assert config.max_position == 512 and not config.tie_embeddings


def test_mixtral_fields(mixtral_fields):
    config = ModelConfig.from_hf(mixtral_fields | {"sliding_window": 7})
    assert (config.family, config.num_experts, config.top_k) == ("mixtral", 4, 2)
    assert config.moe_layers == (0, 1) and config.shared_width == 0
    assert config.cache_width == 2 * 2 * 8
    assert config.attention.sliding_window == 7
    assert config.rope.theta == 1e6 and not config.rope.interleaved


OLD = {
    "rope_theta": 500.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 128,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "torch_dtype": "bfloat16",
}
NEW = {
    "rope_parameters": {
        "rope_theta": 500.0,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "dtype": "bfloat16",
}


def test_both_spellings_of_rope_mean_the_same(deepseek_fields):
    old = ModelConfig.from_hf(deepseek_fields | OLD)
    assert old == ModelConfig.from_hf(deepseek_fields | NEW)
    assert old.rope.theta == 500.0 and old.rope.attention_factor == 1.0
    assert old.rope.softmax_factor == pytest.approx((0.0707 * math.log(4) + 1) ** 2)
    plain = ModelConfig.from_hf(deepseek_fields | {"rope_theta": 500.0, "rope_scaling": None})
    assert plain == ModelConfig.from_hf(
        deepseek_fields | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    )


@pytest.mark.parametrize("size", [1, 2])
def test_normalised_weights_are_not_scaled(deepseek_fields, size):
    # DeepSeek's MoEGate: either normalise (only for k > 1) or scale, never both
    router = ModelConfig.from_hf(
        deepseek_fields
        | {"norm_topk_prob": True, "routed_scaling_factor": 16.0, "num_experts_per_tok": size}
    ).router
    assert (router.normalise, router.scale) == ((True, 1.0) if size > 1 else (False, 16.0))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"topk_method": "noaux_tc"}, "topk_method"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"head_dim": 64}, "head_dim"),
        ({"logit_softcapping": 30.0}, "logit_softcapping"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": 999_999}, "below vocab_size"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "longrope"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "surprise": 1}}, "surprise"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, "contradict"),
        ({"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"rope_theta": 2.0, "rope_parameters": {"rope_theta": 3.0}}, "rope_theta"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"rope_type": "default"},
            },
            "contradict",
        ),
        ({"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1}, "n_group"),
        ({"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 5}, "topk_group"),
        ({"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 1}, "num_experts_per"),
        ({"topk_method": "group_limited_greedy"}, "n_group"),
    ],
)
def test_what_is_not_supported_is_an_error_that_names_it(deepseek_fields, change, named):
    with pytest.raises(UserError, match=named) as error:
        ModelConfig.from_hf(deepseek_fields | change, where="model/config.json")
    assert "model/config.json" in str(error.value)


@pytest.mark.parametrize("field", ["q_lora_rank", "n_shared_experts", "kv_lora_rank", "vocab_size"])
def test_missing_fields_are_named(deepseek_fields, field):
    del deepseek_fields[field]
    with pytest.raises(UserError, match=f"{field} is missing"):
        ModelConfig.from_hf(deepseek_fields)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "head_dim"),
        ({"num_experts_per_tok": 5}, "num_local_experts"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"head_dim": 7}, "even"),
    ],
)
def test_mixtral_errors(mixtral_fields, change, named):
    with pytest.raises(UserError, match=named):
        ModelConfig.from_hf(mixtral_fields | change)


def test_harmless_fields_are_ignored(deepseek_fields):
    more = {"use_cache": False, "transformers_version": "4.39.3", "aux_loss_alpha": 0.001}
    more |= {"architectures": ["DeepseekV2ForCausalLM"], "n_group": 8, "attention_dropout": 0.1}
    assert ModelConfig.from_hf(deepseek_fields | more) == ModelConfig.from_hf(deepseek_fields)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 5], {}, (2, 5)),
        (2, {"eos_token_id": [7, 8, 7]}, (7, 8)),
        (None, {"eos_token_id": 3}, (3,)),
        (None, None, ()),
    ],
)
def test_eos(deepseek_fields, config, generation, expected):
    fields = deepseek_fields | {"eos_token_id": config}
    assert ModelConfig.from_hf(fields, generation).eos_token_ids == expected
