"""Published configs are read as the models they describe; unsupported changes are rejected."""

import collections
import math
import re
from typing import Any

import numpy as np
import pytest

from dance_jax.config import UserError
from dance_jax.models import model_config
from dance_jax.models.build import weight_shapes
from dance_jax.models.config import (
    Activation,
    DeltaNet,
    ExpertConfig,
    GroupedAttention,
    LatentAttention,
    ModelConfig,
    Quantization,
    RopeConfig,
    RouterConfig,
    SharedConfig,
)
from dance_jax.models.experts import expert_format
from dance_jax.models.tensors import expert_rules, trunk_rules
from tests.models.published import PUBLISHED


def gqa(heads: int, keys: int, width: int, theta: float, turned: int = 0, **more: Any):
    """GQA that rotates the first `turned` floats of each head; all if `turned` is 0."""
    return GroupedAttention(heads, keys, width, RopeConfig(turned or width, theta), **more)


def mla(heads: int, queries: int | None, rope: RopeConfig, nope: int = 128, value: int = 128):
    return LatentAttention(heads, queries, 512, nope, 64, value, rope)


def pairs(theta: float, factor: float = 1.0, magnitude: float = 0.0, fast: float = 32.0):
    """DeepSeek's rotation of 64 floats: YaRN scales the scores, not the rotation."""
    if factor == 1:
        return RopeConfig(64, theta, interleaved=True)
    softmax = (0.1 * magnitude * math.log(factor) + 1) ** 2
    yarn = {"kind": "yarn", "factor": factor, "original_max_position": 4096, "beta_fast": fast}
    return RopeConfig(64, theta, interleaved=True, softmax_factor=softmax, **yarn)


def sigmoid(experts: int, chosen: int, scale: float, groups: int = 1, kept: int = 1):
    """DeepSeek-V3's router."""
    return RouterConfig(
        experts,
        chosen,
        score="sigmoid",
        correction=True,
        num_groups=groups,
        topk_group=kept,
        group_best=2,
        normalise=True,
        norm_epsilon=1e-20,
        scale=scale,
    )


def gpt_oss(window: int | None):
    rope = RopeConfig(
        64,
        150000.0,
        kind="yarn",
        factor=32.0,
        original_max_position=4096,
        truncate=False,
        attention_factor=0.1 * math.log(32) + 1,
    )
    biased = {"qkv_bias": True, "out_bias": True}
    return GroupedAttention(64, 8, 64, rope, window=window, sinks=True, **biased)


def clamped(experts: int) -> dict[str, Any]:
    """The fields of gpt-oss except for its layers."""
    return {
        "router": RouterConfig(experts, 4, score="logits", bias=True),
        "expert": ExpertConfig(2880, Activation("clamped", 1.702, 7.0), bias=True),
        "eos_token_ids": (200002,),
        "quantization": Quantization("mxfp4", 4, 32),
        "norm_eps": 1e-5,
    }


def gemma(keys: int, width: int, rope: RopeConfig, **more: Any):
    shape = {"qk_norm": "head", "value_norm": True, "fixed_scale": 1.0}
    return GroupedAttention(16, keys, width, rope, **shape, **more)


FP8 = Quantization("fp8", 8, block=(128, 128))
INT4_G32 = Quantization("compressed-tensors", 4, 32, layout="pack-quantized")
#: Mixers of Qwen3-Next and Qwen3.5.
DELTA = DeltaNet(16, 32, 128, 128, conv_width=4)
GATED = gqa(16, 2, 256, 1e7, turned=64, qk_norm="head", gated=True)
QWEN_DELTA = {"shared": SharedConfig(512, gated=True), "norm_plus_one": True}

#: Mixers with their numbers of layers; the number of layers without experts and their width; then
#: fields of `ModelConfig` that differ from DEFAULTS.
SPECS: dict[str, tuple[dict, tuple[int, int], dict[str, Any]]] = {
    "Mixtral-8x7B": (
        {gqa(32, 8, 128, 1e6): 32},
        (0, 0),
        {"router": RouterConfig(8, 2, normalise=True), "expert": ExpertConfig(14336)}
        | {"eos_token_ids": (2,), "bos_token_id": 1, "norm_eps": 1e-5},
    ),
    "DeepSeek-V2-Lite": (
        {mla(16, None, pairs(1e4, 40, 0.707)): 27},
        (1, 10944),
        {"router": RouterConfig(64, 6, norm_epsilon=1e-20), "expert": ExpertConfig(1408)}
        | {"shared": SharedConfig(2816), "eos_token_ids": (100001,), "bos_token_id": 100000},
    ),
    "DeepSeek-V3": (
        {mla(128, 1536, pairs(1e4, 40, 1.0)): 61},
        (3, 18432),
        {"router": sigmoid(256, 8, 2.5, groups=8, kept=4), "expert": ExpertConfig(2048)}
        | {"shared": SharedConfig(2048), "eos_token_ids": (1,), "bos_token_id": 0}
        | {"quantization": FP8},
    ),
    "Moonlight-16B-A3B": (
        {mla(16, None, pairs(5e4)): 27},
        (1, 11264),
        {"router": sigmoid(64, 6, 2.446), "expert": ExpertConfig(1408)}
        | {"shared": SharedConfig(2816), "eos_token_ids": (163585,), "bos_token_id": 163584}
        | {"norm_eps": 1e-5},
    ),
    "Kimi-K2": (
        {mla(64, 1536, pairs(5e4, 32, 1.0, fast=1.0)): 61},
        (1, 18432),
        {"router": sigmoid(384, 8, 2.827), "expert": ExpertConfig(2048)}
        | {"shared": SharedConfig(2048), "eos_token_ids": (163585,), "bos_token_id": 163584}
        | {"quantization": FP8},
    ),
    "Kimi-K2.5": (
        {mla(64, 1536, pairs(5e4, 64, 1.0)): 61},
        (1, 18432),
        {"router": sigmoid(384, 8, 2.827), "expert": ExpertConfig(2048)}
        | {"shared": SharedConfig(2048), "eos_token_ids": (163585,), "bos_token_id": 163584}
        | {"quantization": INT4_G32, "norm_eps": 1e-5},
    ),
    "GLM-4.5-Air": (
        {gqa(96, 8, 128, 1e6, turned=64, qkv_bias=True): 46},
        (1, 10944),
        {"router": sigmoid(128, 8, 1.0), "expert": ExpertConfig(1408)}
        | {"shared": SharedConfig(1408), "eos_token_ids": (151329, 151336, 151338)}
        | {"norm_eps": 1e-5},
    ),
    "GLM-4.5": (
        {gqa(96, 8, 128, 1e6, turned=64, qkv_bias=True, qk_norm="head"): 92},
        (3, 12288),
        {"router": sigmoid(160, 8, 2.5), "expert": ExpertConfig(1536)}
        | {"shared": SharedConfig(1536), "eos_token_ids": (151329, 151336, 151338)}
        | {"norm_eps": 1e-5},
    ),
    "GLM-4.7-Flash": (
        {mla(20, 768, pairs(1e6), nope=192, value=256): 47},
        (1, 10240),
        {"router": sigmoid(64, 4, 1.8), "expert": ExpertConfig(1536)}
        | {"shared": SharedConfig(1536), "eos_token_ids": (154820, 154827, 154829)}
        | {"norm_eps": 1e-5},
    ),
    "MiniMax-M2": (
        {gqa(48, 8, 128, 5e6, turned=64, qk_norm="flat"): 62},
        (0, 0),
        {
            "router": RouterConfig(256, 8, score="sigmoid", correction=True, normalise=True),
            "expert": ExpertConfig(1536),
            "quantization": FP8,
        },
    ),
    "gpt-oss-20b": ({gpt_oss(128): 12, gpt_oss(None): 12}, (0, 0), clamped(32)),
    "gpt-oss-120b": ({gpt_oss(128): 18, gpt_oss(None): 18}, (0, 0), clamped(128)),
    "Qwen1.5-MoE-A2.7B": (
        {gqa(16, 16, 128, 1e6, qkv_bias=True): 24},
        (0, 0),
        {"router": RouterConfig(60, 4), "expert": ExpertConfig(1408)}
        | {"shared": SharedConfig(5632, gated=True)}
        | {"eos_token_ids": (151643,), "bos_token_id": 151643},
    ),
    "Qwen3-30B-A3B": (
        {gqa(32, 4, 128, 1e6, qk_norm="head"): 48},
        (0, 0),
        {"router": RouterConfig(128, 8, normalise=True), "expert": ExpertConfig(768)}
        | {"eos_token_ids": (151645,), "bos_token_id": 151643},
    ),
    "Qwen3-235B-A22B": (
        {gqa(64, 4, 128, 1e6, qk_norm="head"): 94},
        (0, 0),
        {"router": RouterConfig(128, 8, normalise=True), "expert": ExpertConfig(1536)}
        | {"eos_token_ids": (151645,), "bos_token_id": 151643},
    ),
    "Qwen3-Next-80B-A3B": (
        {DELTA: 36, GATED: 12},
        (0, 0),
        {"router": RouterConfig(512, 10, normalise=True), "expert": ExpertConfig(512)}
        | {"eos_token_ids": (151645,), "bos_token_id": 151643, **QWEN_DELTA},
    ),
    "Qwen3.5-35B-A3B": (
        {DELTA: 30, GATED: 10},
        (0, 0),
        {"router": RouterConfig(256, 8, normalise=True), "expert": ExpertConfig(512)}
        | {"eos_token_ids": (248044,), **QWEN_DELTA},
    ),
    "Gemma-4-26B-A4B": (
        {
            gemma(8, 256, RopeConfig(256, 1e4), window=1024): 25,
            gemma(
                2,
                512,
                RopeConfig(512, 1e6, kind="proportional", turning_pairs=64),
                values_are_keys=True,
            ): 5,
        },
        (0, 2112),
        {"router": RouterConfig(128, 8, normalise=True, scaled=True)}
        | {"expert": ExpertConfig(704, Activation("gelu")), "tie_embeddings": True}
        | {"sandwich": True, "embedding_scale": 2816**0.5, "logit_cap": 30.0}
        | {"eos_token_ids": (1,), "bos_token_id": 2},
    ),
    "OLMoE-1B-7B": (
        {gqa(16, 16, 128, 1e4, qk_norm="flat"): 16},
        (0, 0),
        {"router": RouterConfig(64, 8), "expert": ExpertConfig(1024)}
        | {"eos_token_ids": (50279,), "norm_eps": 1e-5},
    ),
}
DEFAULTS = {
    "bos_token_id": None,
    "eos_token_ids": (),
    "norm_eps": 1e-6,
    "tie_embeddings": False,
    "shared": None,
    "norm_plus_one": False,
    "sandwich": False,
    "embedding_scale": 1.0,
    "logit_cap": None,
    "quantization": None,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_published_model_is(name: str) -> None:
    config = model_config(PUBLISHED[name])
    mixers, (dense, width), more = SPECS[name]
    assert collections.Counter(layer.mixer for layer in config.layers) == mixers
    assert config.moe_layers == tuple(range(dense, config.num_layers))
    # Gemma has a dense feed-forward in addition to its experts.
    assert {layer.dense_width for layer in config.layers[: dense or None]} == {width}
    assert {layer.dense_width for layer in config.layers[dense:]} == {0 if dense else width}
    expected = DEFAULTS | more
    assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("name", "mixer", "layers"),
    [
        ("gpt-oss-20b", gpt_oss(128), range(0, 24, 2)),
        ("Qwen3-Next-80B-A3B", GATED, range(3, 48, 4)),
        ("Qwen3.5-35B-A3B", GATED, range(3, 40, 4)),
        ("Gemma-4-26B-A4B", next(reversed(SPECS["Gemma-4-26B-A4B"][0])), range(5, 30, 6)),
    ],
)
def test_which_layers_have_which_mixer(name: str, mixer, layers: range) -> None:
    found = model_config(PUBLISHED[name]).layers
    assert [index for index, layer in enumerate(found) if layer.mixer == mixer] == list(layers)


#: Published numbers of parameters in billions, without multi-token prediction layers and without
#: vision. PARAMETERS are exact to a tenth; ROUNDED are rounded by their authors to about 1 %
#: (Kimi-K2's report says 1.04 T, but its tensors have 1.026 T).
PARAMETERS = {
    "Mixtral-8x7B": 46.7,
    "DeepSeek-V2-Lite": 15.7,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "Qwen1.5-MoE-A2.7B": 14.3,
    "Qwen3-30B-A3B": 30.5,
    "Gemma-4-26B-A4B": 25.2,
    "OLMoE-1B-7B": 6.9,
}
ROUNDED = {
    "DeepSeek-V3": 671,
    "Moonlight-16B-A3B": 16,
    "Kimi-K2": 1040,
    "Kimi-K2.5": 1040,
    "GLM-4.5-Air": 106,
    "GLM-4.5": 355,
    "GLM-4.7-Flash": 30,
    "MiniMax-M2": 230,
    "Qwen3-235B-A22B": 235,
    "Qwen3-Next-80B-A3B": 80,
    "Qwen3.5-35B-A3B": 35,
}


def trunk_size(config: ModelConfig) -> int:
    """Number of parameters of the trunk."""
    return sum(math.prod(rule.shape) for rule in trunk_rules(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name: str) -> None:
    config = model_config(PUBLISHED[name])
    layer = config.moe_layers[0]
    expert = sum(math.prod(rule.shape) for rule in expert_rules(config, layer, 0))
    experts = expert * config.num_experts * len(config.moe_layers)
    billions = (trunk_size(config) + experts) / 1e9
    if name in PARAMETERS:
        assert round(billions, 1) == PARAMETERS[name]
    else:
        assert billions == pytest.approx(ROUNDED[name], rel=0.015)


@pytest.mark.parametrize("name", ["DeepSeek-V2-Lite", "gpt-oss-20b", "Gemma-4-26B-A4B"])
def test_the_trunk_has_as_many_parameters(name: str) -> None:
    config = model_config(PUBLISHED[name])
    shapes = weight_shapes(config, "bfloat16").values()
    assert sum(int(np.prod(shape.shape)) for shape in shapes) == trunk_size(config)


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [
        ("Qwen3-30B-A3B", 9.4),
        ("Qwen3.5-35B-A3B", 6.3),
        ("gpt-oss-20b", 49.8),
        ("gpt-oss-120b", 49.8),
        ("GLM-4.7-Flash", 18.9),
        ("GLM-4.5-Air", 34.6),
        ("DeepSeek-V3", 88.1),
        ("Kimi-K2", 88.1),
        ("MiniMax-M2", 28.3),
        ("OLMoE-1B-7B", 12.6),
    ],
)
def test_bytes_of_an_expert(name: str, megabytes: float) -> None:
    form = expert_format(model_config(PUBLISHED[name]), "bfloat16")
    assert round(form.bytes / 1e6, 1) == megabytes


def test_bytes_of_a_state() -> None:
    # Per layer: 32 heads of 128 x 128 floats, and 3 positions of the convolution's 8192 channels.
    config = model_config(PUBLISHED["Qwen3.5-35B-A3B"])
    assert config.state_bytes == 30 * 4 * (32 * 128 * 128 + 3 * 8192)
    assert round(config.state_bytes / 2**20) == 63
    assert model_config(PUBLISHED["DeepSeek-V3"]).state_bytes == 0


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("DeepSeek-V3", "model.layers.61.eh_proj.weight"),
        ("GLM-4.5", "model.layers.92.mlp.experts.0.up_proj.weight"),
        ("GLM-4.7-Flash", "model.layers.47.enorm.weight"),
        ("Qwen3-Next-80B-A3B", "mtp.fc.weight"),
        ("Qwen3.5-35B-A3B", "model.visual.blocks.0.norm1.weight"),
        ("Kimi-K2.5", "vision_tower.patch_embed.proj.weight"),
        ("Gemma-4-26B-A4B", "model.embed_vision.embedding_projection.weight"),
    ],
)
def test_tensors_that_are_not_needed(name: str, tensor: str) -> None:
    names = model_config(PUBLISHED[name]).names
    assert any(re.match(pattern, tensor) for pattern in names.ignored)
    assert not any(re.match(pattern, "model.layers.6.mlp.x") for pattern in names.ignored)


def test_windows_only_where_they_are_used() -> None:
    fields = PUBLISHED["Qwen1.5-MoE-A2.7B"] | {"use_sliding_window": True}
    windows = [layer.mixer.window for layer in model_config(fields).layers]
    assert windows == [None if index % 2 or index >= 21 else 32768 for index in range(24)]


def test_fields_that_repeat_what_the_family_is() -> None:
    """Qwen3-Coder has such fields."""
    plain = PUBLISHED["Qwen3-30B-A3B"]
    more = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
    assert model_config(plain | more) == model_config(plain)


def test_routing_that_is_not_said_is_transformers_default() -> None:
    names = ("n_group", "topk_group", "routed_scaling_factor")
    for name, expected in (
        ("DeepSeek-V3", (8, 4, 2.5)),
        ("GLM-4.7-Flash", (1, 1, 1.8)),
        ("GLM-4.5", (1, 1, 1.0)),
    ):
        fields = {key: value for key, value in PUBLISHED[name].items() if key not in names}
        router = model_config(fields).router
        assert (router.num_groups, router.topk_group, router.scale) == expected


YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": False},
        {"model_max_length": 512},
        {"quantization": None},
        {"transformers.js_config": {}},
        {"mlp_bias": False},
        {"qkv_bias": False},
        {"embd_pdrop": 0.1},
        {"loss_type": "ForCausalLM"},
        {"trust_remote_code": True},
        {"gradient_checkpointing": False},
        {"layer_types": ["full_attention"] * 32},
        {"_moe_implementation": "eager"},
        {"attn_logit_softcapping": None},
        {"rope_scaling": YARN | {"finetuned": True}},
    ],
)
def test_what_changes_nothing_is_accepted(change: dict[str, Any]) -> None:
    fields = PUBLISHED["Mixtral-8x7B"]
    plain = fields | ({"rope_scaling": YARN} if "rope_scaling" in change else {})
    assert model_config(fields | change) == model_config(plain)


def text(name: str) -> dict[str, Any]:
    return PUBLISHED[name].get("text_config", PUBLISHED[name])


#: Changes of the text model's fields (... removes the field), and a part of the error message.
REFUSED = [
    ("Mixtral-8x7B", {"attention_bias": True}, "attention_bias is True"),
    ("Mixtral-8x7B", {"model_type": ["mixtral"]}, "model_type"),
    ("Mixtral-8x7B", {"rope_scaling": {"type": ["yarn"], "factor": 2}}, "rope type"),
    ("DeepSeek-V3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ("DeepSeek-V3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
    ("DeepSeek-V3", {"n_group": 7}, "multiple of n_group 7"),
    ("DeepSeek-V3", {"topk_group": 9}, "topk_group 9 exceeds n_group 8"),
    ("DeepSeek-V3", {"first_k_dense_replace": 61}, "first_k_dense_replace 61"),
    ("DeepSeek-V3", {"n_shared_experts": ...}, "n_shared_experts is missing"),
    ("DeepSeek-V3", {"rope_interleave": False}, "rope_interleave is False"),
    ("Moonlight-16B-A3B", {"q_lora_rank": ...}, "q_lora_rank is missing"),
    ("Kimi-K2.5", {"surprise": 1}, "text_config: unknown field surprise"),
    ("Kimi-K2.5", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ("Kimi-K2.5", {"is_encoder_decoder": True}, "is_encoder_decoder"),
    ("GLM-4.7-Flash", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
    ("GLM-4.7-Flash", {"mlp_layer_types": ["dense"] * 47}, "mlp_layer_types leaves no layer"),
    ("GLM-4.7-Flash", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types: expected a list of 47"),
    ("GLM-4.5", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("GLM-4.5", {"partial_rotary_factor": 1.5}, "even width of at most 128, not 192"),
    ("MiniMax-M2", {"attn_type_list": [1] * 61 + [0]}, "attn_type_list: expected 62 entries of 1"),
    ("MiniMax-M2", {"attn_type_list": [1] * 61}, "attn_type_list"),
    ("MiniMax-M2", {"attn_type_list": 1}, "attn_type_list"),
    ("MiniMax-M2", {"use_routing_bias": False}, "use_routing_bias is False"),
    ("MiniMax-M2", {"shared_intermediate_size": 1536}, "shared_intermediate_size is 1536"),
    ("MiniMax-M2", {"sliding_window": 4096}, "sliding_window is set"),
    ("MiniMax-M2", {"qk_norm_type": "per_head"}, "qk_norm_type is 'per_head'"),
    ("gpt-oss-20b", {"layer_types": ["local_attention"] * 24}, "layer_types has 'local_attention'"),
    ("gpt-oss-20b", {"num_hidden_layers": 23}, "layer_types: expected a list of 23"),
    ("gpt-oss-20b", {"experts_per_token": 2}, "experts_per_token is 2, other fields say 4"),
    ("gpt-oss-20b", {"initial_context_length": 8192}, "initial_context_length is 8192"),
    ("gpt-oss-20b", {"swiglu_limit": -7.0}, "swiglu_limit is -7"),
    ("Qwen1.5-MoE-A2.7B", {"shared_expert_intermediate_size": ...}, "shared_expert_intermediate"),
    ("Qwen3-30B-A3B", {"mlp_only_layers": [48]}, r"mlp_only_layers is \[48\].* 0 to 47"),
    ("Qwen3-30B-A3B", {"decoder_sparse_step": 49}, "decoder_sparse_step 49 .*no layer"),
    ("Qwen3-30B-A3B", {"mlp_only_layers": list(range(48))}, "mlp_only_layers leave no layer"),
    ("Qwen3-Next-80B-A3B", {"attn_output_gate": False}, "attn_output_gate is False"),
    ("Qwen3-Next-80B-A3B", {"linear_num_value_heads": 24}, "linear_num_value_heads 24"),
    ("Qwen3-Next-80B-A3B", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("Qwen3.5-35B-A3B", {"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype is 'bfloat16'"),
    ("Qwen3.5-35B-A3B", {"layer_types": ["x"] * 40}, "text_config: layer_types has 'x'"),
    (
        "Qwen3.5-35B-A3B",
        {"model_type": "qwen3_5_text"},
        "text_config: model_type is 'qwen3_5_text'",
    ),
    ("Gemma-4-26B-A4B", {"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input is 256"),
    ("Gemma-4-26B-A4B", {"hidden_size_per_layer_input": ...}, "hidden_size_per_layer_input is 256"),
    ("Gemma-4-26B-A4B", {"enable_moe_block": False}, "enable_moe_block is False"),
    ("Gemma-4-26B-A4B", {"enable_moe_block": ...}, "enable_moe_block is False"),
    ("Gemma-4-26B-A4B", {"num_kv_shared_layers": 10}, "num_kv_shared_layers is 10"),
    ("Gemma-4-26B-A4B", {"use_double_wide_mlp": True}, "use_double_wide_mlp is True"),
    ("Gemma-4-26B-A4B", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    ("Gemma-4-26B-A4B", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    (
        "Gemma-4-26B-A4B",
        {"rope_parameters": {"global": {"rope_theta": 1e4}}},
        "rope_parameters: unknown .*global",
    ),
    ("Gemma-4-26B-A4B", {"layer_types": ["sliding_attention"] * 30}, "last layer must have full"),
    ("OLMoE-1B-7B", {"clip_qkv": -8.0}, "clip_qkv is -8"),
    ("OLMoE-1B-7B", {"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
    ("OLMoE-1B-7B", {"rope_theta": 1.0}, "rope_theta is 1; expected a number above 1"),
    ("GLM-4.7-Flash", {"mlp_layer_types": ["sparse"] * 47}, "contradict each other"),
    ("MiniMax-M2", {"partial_rotary_factor": 0.25}, "rotary_dim is 64, other fields say 32"),
    ("DeepSeek-V3", {"n_group": 256, "topk_group": 256}, "group needs at least two"),
    ("DeepSeek-V3", {"rope_scaling": YARN | {"beta_slow": 40}}, "0 < slow <= fast"),
    ("gpt-oss-20b", {"sliding_window": None}, "sliding_window is null"),
    ("Qwen3-30B-A3B", {"mlp_only_layers": [True]}, "mlp_only_layers"),
    ("Qwen3-30B-A3B", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size"),
    ("Qwen3-Next-80B-A3B", {"linear_conv_kernel_dim": 40}, "at most 32"),
]


@pytest.mark.parametrize(("name", "change", "named"), REFUSED)
def test_a_change_that_is_not_supported_is_named(name: str, change: dict, named: str) -> None:
    changed = {key: value for key, value in (text(name) | change).items() if value is not ...}
    fields = PUBLISHED[name]
    fields = fields | {"text_config": changed} if "text_config" in fields else changed
    with pytest.raises(UserError, match=named):
        model_config(fields)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("Gemma-4-26B-A4B", {"surprise": 1}, "config.json: unknown field surprise"),
        ("Qwen3.5-35B-A3B", {"hidden_size": 2048}, "config.json: unknown field hidden_size"),
        ("Gemma-4-26B-A4B", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("Kimi-K2.5", {"text_config": [1]}, "text_config: expected an object"),
        ("Kimi-K2.5", {"text_config": None}, "model_type is 'kimi_k25'; supported"),
    ],
)
def test_what_stands_around_the_text_is_read_as_strictly(
    name: str, change: dict, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        model_config(PUBLISHED[name] | change)
