"""config.json in both spellings; every field that changes the result is read or rejected."""

import math

import numpy as np
import pytest

from dance_jax.config import EngineConfig, UserError
from dance_jax.launch.planning.plan import model_notes
from dance_jax.models import model_config
from dance_jax.models.rope import inverse_frequencies


def test_deepseek_fields(deepseek_fields):
    config = model_config(deepseek_fields | {"n_shared_experts": 2})
    assert (config.family, config.num_experts, config.top_k) == ("deepseek_v2", 8, 2)
    assert (config.expert.width, config.shared.width) == (16, 32)
    assert [layer.dense_width for layer in config.layers] == [48, 0, 0]
    assert config.moe_layers == (1, 2)
    assert config.cache_width == 3 * (16 + 8)
    assert config.max_position == 512 and not config.tie_embeddings


def test_mixtral_fields(mixtral_fields):
    config = model_config(mixtral_fields | {"sliding_window": 7})
    assert (config.family, config.num_experts, config.top_k) == ("mixtral", 4, 2)
    assert config.moe_layers == (0, 1) and config.shared is None
    assert config.cache_width == 2 * 2 * 2 * 8
    mixer = config.layers[1].mixer
    assert mixer.window == 7 and mixer.rope.theta == 1e6 and not mixer.rope.interleaved


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
    old = model_config(deepseek_fields | OLD)
    assert old == model_config(deepseek_fields | NEW)
    rope = old.layers[0].mixer.rope
    assert rope.theta == 500.0 and rope.attention_factor == 1.0
    assert rope.softmax_factor == pytest.approx((0.0707 * math.log(4) + 1) ** 2)
    plain = model_config(deepseek_fields | {"rope_theta": 500.0, "rope_scaling": None})
    assert plain == model_config(
        deepseek_fields | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    )


@pytest.mark.parametrize("size", [1, 2])
def test_normalised_weights_are_not_scaled(deepseek_fields, size):
    # DeepSeek's MoEGate either normalises (only for k > 1) or scales, never both.
    router = model_config(
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
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
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
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
        (
            {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 64}},
            "short_factor",
        ),
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
        model_config(deepseek_fields | change, where="model/config.json")
    assert "model/config.json" in str(error.value)


@pytest.mark.parametrize("field", ["q_lora_rank", "n_shared_experts", "kv_lora_rank", "vocab_size"])
def test_missing_fields_are_named(deepseek_fields, field):
    del deepseek_fields[field]
    with pytest.raises(UserError, match=f"{field} is missing"):
        model_config(deepseek_fields)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "head_dim"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 exceeds the 4 experts"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"head_dim": 7}, "even"),
    ],
)
def test_mixtral_errors(mixtral_fields, change, named):
    with pytest.raises(UserError, match=named):
        model_config(mixtral_fields | change)


def test_harmless_fields_are_ignored(deepseek_fields):
    more = {"use_cache": False, "transformers_version": "4.39.3", "aux_loss_alpha": 0.001}
    more |= {"architectures": ["DeepseekV2ForCausalLM"], "n_group": 8, "attention_dropout": 0.1}
    assert model_config(deepseek_fields | more) == model_config(deepseek_fields)


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
    assert model_config(fields, generation).eos_token_ids == expected


def test_frequencies_of_linear_and_long_contexts(mixtral_fields):
    linear = {"type": "linear", "factor": 4.0}
    plain = model_config(mixtral_fields).layers[0].mixer.rope
    rope = model_config(mixtral_fields | {"rope_scaling": linear}).layers[0].mixer.rope
    np.testing.assert_allclose(inverse_frequencies(rope, 64), inverse_frequencies(plain, 64) / 4)
    long = {
        "type": "longrope",
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    config = model_config(mixtral_fields | {"rope_scaling": long})
    rope = config.layers[0].mixer.rope
    for context, divisor, said in ((64, 1, "shorter contexts"), (65, 2, "longer contexts")):
        expected = inverse_frequencies(plain, 64) / divisor
        np.testing.assert_allclose(inverse_frequencies(rope, context), expected)
        (note,) = model_notes(config, EngineConfig(max_model_len=context))
        assert "up to 64 tokens" in note and said in note
