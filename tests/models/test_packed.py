"""Quantised checkpoints: bit-exact values, and rejected checkpoints."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dance_jax.config import UserError
from dance_jax.models.config import Quantization
from dance_jax.models.families.fields import Fields
from dance_jax.models.families.quantization import quantization
from dance_jax.models.hf import HFDirectory
from dance_jax.models.packed import assemble
from dance_jax.models.packed.awq import ORDER
from dance_jax.models.packed.integers import unpacked
from dance_jax.models.random_weights import write_random_checkpoint
from dance_jax.models.safetensors_file import read_header
from tests.models.published import FP8, INT4_G32
from tests.tiny_models import OSS

#: OCP Microscaling Formats 1.0, table of e2m1.
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
INT8 = {"format": "int-quantized", "num_bits": 8, "strategy": "channel", "group_size": None}


def compressed(**weights):
    """compressed-tensors with other settings of weights; `format` is that of the checkpoint."""
    form = weights.pop("format", "pack-quantized")
    group = INT4_G32["config_groups"]["group_0"]
    group = group | {"weights": group["weights"] | weights}
    return INT4_G32 | {"format": form, "config_groups": {"group_0": group}}


def words(codes, bits):
    """Pack codes [..., n] into int32 [..., n * bits / 32], the first code in the lowest bits."""
    each = 32 // bits
    out = np.zeros((*codes.shape[:-1], codes.shape[-1] // each), np.uint32)
    for i in range(codes.shape[-1]):
        out[..., i // each] |= codes[..., i].astype(np.uint32) << np.uint32(bits * (i % each))
    return out.view(np.int32)


# Encoders: from the name of the float tensor, its shape [out, in], a generator of random numbers
# and the quantization config, to the tensors on disk and their values, floats [out, in].


def fp8(name, shape, rng, config, scale_type=np.float32):
    d_out, d_in = shape
    block = config.get("weight_block_size") or (1, d_in)
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[codes & 127 == 127] = 0  # NaN
    codes = codes.view(ml_dtypes.float8_e4m3fn)
    grid = (-(-d_out // block[0]), -(-d_in // block[1]))
    scale = np.exp2(rng.integers(-9, -2, grid)).astype(scale_type)
    if scale_type is not ml_dtypes.float8_e8m0fnu:
        scale = (scale.astype(np.float32) * rng.uniform(0.5, 1, grid)).astype(scale_type)
    values = np.zeros(shape, np.float32)
    for o in range(d_out):
        for i in range(d_in):
            factor = np.float32(scale[o // block[0], i // block[1]])
            values[o, i] = np.float32(codes[o, i]) * factor
    return {name: codes, f"{name}_scale_inv": scale}, values


def integers(shape, rng, group, bits, zeros):
    """Codes [out, in], scales and zero points [out, groups], and values."""
    d_out, d_in = shape
    groups = 1 if group < 0 else d_in // group
    codes = rng.integers(0, 1 << bits, shape)
    scale = rng.uniform(0.001, 0.02, (d_out, groups)).astype(np.float16)
    zero = np.full((d_out, groups), 1 << (bits - 1))
    if zeros:
        zero = rng.integers(0, 1 << bits, zero.shape)
    values = np.zeros(shape, np.float32)
    for i in range(d_in):
        g = i * groups // d_in
        values[:, i] = scale[:, g].astype(np.float32) * (codes[:, i] - zero[:, g])
    return codes, scale, zero, values


def gptq(name, shape, rng, config):
    bits, stem = config["bits"], name.removesuffix(".weight")
    group = config["group_size"]
    codes, scale, zero, values = integers(shape, rng, group, bits, not config["sym"])
    packed = words(zero.T, bits).view(np.uint32)
    if config.get("checkpoint_format") != "gptq_v2":
        packed = packed - np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    size = shape[1] if group < 0 else group
    return {
        f"{stem}.qweight": np.ascontiguousarray(words(codes, bits).T),
        f"{stem}.scales": np.ascontiguousarray(scale.T),
        f"{stem}.qzeros": packed.view(np.int32),
        f"{stem}.g_idx": np.arange(shape[1], dtype=np.int32) // size,
    }, values


def awq(name, shape, rng, config):
    stem = name.removesuffix(".weight")
    codes, scale, zero, values = integers(shape, rng, config["group_size"], 4, config["zero_point"])

    def shuffled(codes_io):
        out = np.zeros_like(codes_io)
        for o in range(codes_io.shape[1]):
            out[:, o] = codes_io[:, o // 8 * 8 + (0, 2, 4, 6, 1, 3, 5, 7)[o % 8]]
        return words(out, 4)

    return {
        f"{stem}.qweight": shuffled(codes.T),
        f"{stem}.qzeros": shuffled(zero.T),
        f"{stem}.scales": np.ascontiguousarray(scale.T),
    }, values


def pack_quantized(name, shape, rng, config):
    weights = config["config_groups"]["group_0"]["weights"]
    bits, group = weights["num_bits"], weights["group_size"] or -1
    symmetric = weights["symmetric"]
    codes, scale, zero, values = integers(shape, rng, group, bits, not symmetric)
    stored = {
        f"{name}_packed": words(codes, bits),
        f"{name}_scale": scale,
        f"{name}_shape": np.array(shape, np.int64),
    }
    if not symmetric:
        stored[f"{name}_zero_point"] = np.ascontiguousarray(words(zero.T, bits).T)
    return stored, values


def int_quantized(name, shape, rng, config):
    codes, scale, zero, values = integers(
        shape, rng, -1, 8, not config["config_groups"]["group_0"]["weights"]["symmetric"]
    )
    stored = {name: (codes - 128).astype(np.int8), f"{name}_scale": scale}
    if (zero != 128).any():
        stored[f"{name}_zero_point"] = (zero - 128).astype(np.int8)
    return stored, values


def float_quantized(name, shape, rng, config):
    stored, values = fp8(name, shape, rng, {})
    stored[f"{name}_scale"] = stored.pop(f"{name}_scale_inv")
    return stored, values


def mxfp4_linear(name, shape, rng, config):
    blocks, scales, values = mxfp4((1, *shape[::-1]), rng)
    return {
        f"{name}_packed": blocks[0].reshape(shape[0], -1),
        f"{name}_scale": scales[0],
    }, np.ascontiguousarray(values[0].T)


def mxfp4(shape, rng):
    """Blocks, scales and values of [e, in, out]."""
    experts, d_in, d_out = shape
    blocks = rng.integers(0, 256, (experts, d_out, d_in // 32, 16)).astype(np.uint8)
    scales = rng.integers(118, 125, blocks.shape[:3]).astype(np.uint8)
    values = np.zeros(shape, np.float32)
    for e, o, g, b in np.ndindex(blocks.shape):
        factor = 2.0 ** (int(scales[e, o, g]) - 127)
        values[e, 32 * g + 2 * b, o] = E2M1[blocks[e, o, g, b] & 15] * factor
        values[e, 32 * g + 2 * b + 1, o] = E2M1[blocks[e, o, g, b] >> 4] * factor
    return blocks, scales, values


def parsed(config):
    return quantization(Fields({"quantization_config": config}, "config.json"))


@pytest.fixture
def opened(tmp_path):
    """opened(tensors, quantization_config) -> the assembled tensors."""

    def open_(tensors, config):
        save_file(tensors, tmp_path / "x.safetensors")
        return assemble(read_header(tmp_path / "x.safetensors"), parsed(config))

    return open_


def same(tensor, values):
    """Check that a tensor decodes exactly, in both orientations and in parts of the first axis."""
    np.testing.assert_array_equal(tensor.read(), values)
    assert tensor.read().dtype == np.float32 and tensor.shape == values.shape
    values_io = values if tensor.in_first else values.T
    matrix = tensor.matrix()
    assert matrix.format == tensor.format
    shapes = {name: (array.shape, array.dtype) for name, array in matrix.arrays.items()}
    wanted = tensor.format.arrays(*values_io.shape)
    assert shapes == {name: (each.shape, each.dtype) for name, each in wanted.items()}
    assert all(array.flags.c_contiguous for array in matrix.arrays.values())
    np.testing.assert_array_equal(matrix.values(), values_io)
    if not tensor.in_first:
        rows = len(values) // 4
        part = tensor.part(1, 2).part(1, 2)
        np.testing.assert_array_equal(part.read(), values[3 * rows :])
        assert part.size == tensor.size // 4


CASES = {
    "fp8": (fp8, FP8, (160, 264), "fp8:128:float32"),
    "fp8 32 x 64": (fp8, FP8 | {"weight_block_size": [32, 64]}, (48, 80), "fp8:64:float32"),
    "fp8 by output": (fp8, {"quant_method": "fp8"}, (8, 24), "fp8:24:float32"),
    "gptq": (gptq, GPTQ, (24, 96), "int4:32:float16"),
    "gptq all inputs": (gptq, GPTQ | {"group_size": -1}, (8, 40), "int4:40:float16"),
    "gptq v1 zeros": (gptq, GPTQ | {"sym": False}, (24, 96), "int4:32:float32:offset"),
    "gptq v2 zeros": (
        *(gptq, GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}),
        *((24, 96), "int4:32:float32:offset"),
    ),
    "gptq 8 bits": (gptq, GPTQ | {"bits": 8}, (24, 96), "int8:32:float16"),
    "gptq 8 bits v1 zeros": (
        *(gptq, GPTQ | {"bits": 8, "sym": False}),
        *((24, 96), "int8:32:float32:offset"),
    ),
    "awq": (awq, AWQ, (24, 96), "int4:32:float32:offset"),
    "awq sym": (
        *(awq, AWQ | {"zero_point": False, "group_size": 64}),
        *((24, 128), "int4:64:float16"),
    ),
    "pack": (pack_quantized, INT4_G32, (24, 96), "int4:32:float16"),
    "pack zeros": (
        *(pack_quantized, compressed(symmetric=False)),
        *((24, 96), "int4:32:float32:offset"),
    ),
    "pack channel": (
        *(pack_quantized, compressed(strategy="channel", group_size=None)),
        *((24, 96), "int4:96:float16"),
    ),
    "pack 8 bits": (pack_quantized, compressed(num_bits=8), (24, 96), "int8:32:float16"),
    "pack 8 bits zeros": (
        *(pack_quantized, compressed(num_bits=8, symmetric=False)),
        *((24, 96), "int8:32:float32:offset"),
    ),
    "int": (
        int_quantized,
        compressed(**INT8),
        *((24, 20), "int8:20:float16"),
    ),
    "int zeros": (
        int_quantized,
        compressed(**INT8, symmetric=False),
        *((24, 20), "int8:20:float32:offset"),
    ),
    "mxfp4": (
        mxfp4_linear,
        compressed(format="mxfp4-pack-quantized", type="float"),
        *((24, 96), "mxfp4:32:e8m0"),
    ),
    "float": (
        float_quantized,
        compressed(
            format="float-quantized",
            **{"type": "float", "num_bits": 8, "strategy": "channel", "group_size": None},
        ),
        *((24, 20), "fp8:20:float32"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_weight_is_worth_what_its_format_says(case, opened):
    encode, config, shape, form = CASES[case]
    rng = np.random.default_rng(7)
    stored, values = encode("a.b.weight", shape, rng, config)
    stored["a.norm.weight"] = np.ones(3, np.float32)
    tensors = opened(stored, config)
    assert tensors.keys() == {"a.b.weight", "a.norm.weight"}
    tensor = tensors["a.b.weight"]
    assert not tensor.faults and list(tensor.value_faults()) == []
    assert tensor.is_float and tensor.shape == shape and str(tensor.format) == form
    assert tensor.size == sum(array.nbytes for array in stored.values()) - 12
    same(tensor, values)


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e8m0fnu"])
def test_scales_of_other_types(kind, opened):
    stored, values = fp8(
        "x.weight", (132, 140), np.random.default_rng(0), FP8, getattr(ml_dtypes, kind)
    )
    tensor = opened(stored, FP8 | {"scale_fmt": "ue8m0"})["x.weight"]
    assert tensor.format.scale == {"bfloat16": "bfloat16", "float8_e8m0fnu": "e8m0"}[kind]
    same(tensor, values)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_of_a_whole_tensor_and_how_activations_are_rounded(shape, opened):
    stored, _ = fp8("x.weight", (16, 24), np.random.default_rng(0), {})
    scale = np.float32(0.37)
    stored = {
        "x.weight": stored["x.weight"],
        "x.weight_scale": np.full(shape, scale),
        "x.input_scale": np.ones((), np.float32),
    }
    tensors = opened(stored, {"quant_method": "fp8", "activation_scheme": "static"})
    assert tensors.keys() == {"x.weight"}
    same(tensors["x.weight"], stored["x.weight"].astype(np.float32) * scale)


def test_one_scale_of_a_whole_tensor_of_integers(opened):
    codes = np.arange(-128, 128, dtype=np.int8).reshape(8, 32)
    stored = {"x.weight": codes, "x.weight_scale": np.full(1, 0.25, np.float16)}
    config = compressed(**INT8 | {"strategy": "tensor"})
    same(opened(stored, config)["x.weight"], codes.astype(np.float32) * np.float32(0.25))


def test_experts_in_one_tensor(opened):
    rng = np.random.default_rng(1)
    blocks, scales, values = mxfp4((3, 64, 20), rng)
    stored = {"mlp.experts.up_blocks": blocks, "mlp.experts.up_scales": scales}
    tensor = opened(stored, {"quant_method": "mxfp4"})["mlp.experts.up"]
    assert str(tensor.format) == "mxfp4:32:e8m0" and tensor.shape == values.shape
    np.testing.assert_array_equal(tensor.read(), values)
    for expert in range(3):
        own = tensor.part(expert, 3).without_first_axis()
        same(own, values[expert])
        halves = own.matrix().outputs(slice(1, None, 2))
        np.testing.assert_array_equal(halves.values(), values[expert][:, 1::2])

    # transformers' fp8: gate before up, with the boundary within a block.
    each = [fp8("x", (192, 140), rng, FP8) for _ in range(2)]
    stored = {name: np.stack([one[0][name] for one in each]) for name in each[0][0]}
    tensor = opened(stored, FP8)["x"]
    np.testing.assert_array_equal(tensor.read(), np.stack([values for _, values in each]))
    for expert, (_, values) in enumerate(each):
        own = tensor.part(expert, 2).without_first_axis()
        same(own, values)
        np.testing.assert_array_equal(own.part(1, 2).read(), values[96:])


@given(codes=st.lists(st.integers(0, 15), min_size=8, max_size=8), bits=st.sampled_from([4, 8]))
@settings(max_examples=50, deadline=None)
def test_words_and_their_parts(codes, bits):
    codes = np.array([codes, codes[::-1]])
    np.testing.assert_array_equal(unpacked(words(codes, bits), bits), codes)


def test_awqs_order_is_a_permutation():
    assert sorted(ORDER) == list(range(8))


def test_only_the_bytes_of_a_part_are_read(opened, monkeypatch):
    stored, _ = fp8("x.weight", (256, 128), np.random.default_rng(0), FP8)
    tensor = opened(stored, FP8)["x.weight"]
    read = []
    original = type(tensor.pieces["weight"]).read
    monkeypatch.setattr(
        type(tensor.pieces["weight"]),
        "read",
        lambda self: (read.append(self.size), original(self))[1],
    )
    tensor.part(0, 2).matrix()
    assert read == [128 * 128, 8]


# Whole directories

QWEN = {
    "model_type": "qwen3_moe",
    **{"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 264},
    **{"max_position_embeddings": 256, "eos_token_id": 1, "norm_topk_prob": True},
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    **{"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
    **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    **{"v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "vocab_size": 264},
    **{"routed_scaling_factor": 2.5, "norm_topk_prob": True, "scoring_func": "sigmoid"},
    **{"topk_method": "noaux_tc", "max_position_embeddings": 256, "eos_token_id": 1},
    **{"num_nextn_predict_layers": 1, "rope_theta": 10000.0},
}
GPT_OSS = OSS | {"hidden_size": 64, "intermediate_size": 32}


def quantised(directory, fields, config, encode):
    """Write a model with quantised linear layers; returns the values of all tensors as floats."""
    write_random_checkpoint(directory, fields, tokenizer=False)
    path = directory / "model.safetensors"
    rng, stored, values = np.random.default_rng(3), {}, {}
    for name, tensor in load_file(path).items():
        values[name] = tensor
        if re.search(r"(_proj|kv_a_proj_with_mqa|q_[ab]_proj)\.weight$", name):
            packed, values[name] = encode(name, tensor.shape, rng, config)
            stored |= packed
        elif re.search(r"experts\.(gate_up|down)_proj$", name):
            blocks, scales, values[name] = mxfp4(tensor.shape, rng)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            stored[name] = tensor
    save_file(stored, path)
    fields = fields | {"quantization_config": config}
    (directory / "config.json").write_text(json.dumps(fields))
    return values


MODELS = {
    "fp8": (DEEPSEEK_V3, FP8 | {"fmt": "e4m3", "modules_to_not_convert": ["lm_head"]}, fp8),
    "mxfp4": (GPT_OSS, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, None),
    "gptq": (QWEN, GPTQ | {"sym": False, "meta": {"quantizer": "gptqmodel"}}, gptq),
    "awq": (QWEN, AWQ | {"modules_to_not_convert": None}, awq),
    "compressed-tensors": (QWEN, INT4_G32, pack_quantized),
}


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    fields, config, encode = MODELS[request.param]
    if request.param == "mxfp4":
        return tmp_path, _oss(tmp_path, fields, config)
    return tmp_path, quantised(tmp_path, fields, config, encode)


def _oss(directory, fields, config):
    return quantised(
        directory, fields, config, lambda name, shape, rng, _: _plain(name, shape, rng)
    )


def _plain(name, shape, rng):
    values = rng.standard_normal(shape).astype(np.float32)
    return {name: values}, values


def test_a_whole_directory(model):
    directory, values = model
    tensors = HFDirectory(directory).tensors
    for name, expected in values.items():
        if name in tensors:
            np.testing.assert_array_equal(tensors[name].read(), expected)
            continue
        for expert in range(len(expected)):  # tensors with all experts of a layer
            stem, leaf = name.rsplit(".", 1)
            own = tensors[f"{stem}.{expert}.{leaf}"]
            np.testing.assert_array_equal(own.read(), expected[expert])
    assert len(tensors) >= len(values)
    float_tensor = tensors["lm_head.weight"]
    np.testing.assert_array_equal(float_tensor.matrix().values(), float_tensor.read().T)


def test_fp8_under_minimaxs_names(tmp_path):
    fields = QWEN | {
        "model_type": "minimax_m2",
        **{"num_local_experts": 4, "intermediate_size": 32, "rotary_dim": 16},
    }
    for name in ("num_experts", "moe_intermediate_size", "norm_topk_prob"):
        del fields[name]
    config = FP8 | {"ignored_layers": ["lm_head", "block_sparse_moe.gate"]}
    values = quantised(tmp_path, fields, config, fp8)
    tensors = HFDirectory(tmp_path).tensors
    assert tensors.keys() == values.keys()
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(tensors[name].read(), values[name])


# Rejected checkpoints


def change(directory, edit):
    path = directory / "model.safetensors"
    # The numpy reader of safetensors does not support fp8.
    tensors = {name: tensor.read() for name, tensor in read_header(path).items()}
    edit(tensors)
    save_file(tensors, path)


def refusal(directory, **options):
    with pytest.raises(UserError) as error:
        HFDirectory(directory, **options)
    return str(error.value)


def test_missing_and_wrong_scales_come_in_one_report(tmp_path):
    quantised(tmp_path, DEEPSEEK_V3, FP8, fp8)
    expert = "model.layers.1.mlp.experts.{}_proj.weight"

    def edit(tensors):
        del tensors[expert.format("0.gate") + "_scale_inv"]
        tensors[expert.format("1.up") + "_scale_inv"] = np.ones((3, 2), np.float32)
        tensors[expert.format("2.up") + "_scale_inv"][0, 0] = np.nan
        tensors[expert.format("3.up") + "_scale_inv"] = np.ones((1, 1), np.int8)
        del tensors["model.norm.weight"]

    change(tmp_path, edit)
    report = refusal(tmp_path)
    assert "1 missing: model.norm.weight" in report
    assert "4 faults of quantised weights" in report
    where = "(fp8, model.safetensors)"
    assert f"{expert.format('0.gate')}_scale_inv {where}: is missing" in report
    assert (
        f"{expert.format('1.up')}_scale_inv {where}: is [3, 2], but codes [32, 64] need [1, 1]"
        in report
    )
    assert f"{expert.format('2.up')}_scale_inv {where}: 1 of 1 scales are NaN or infinite" in report
    assert f"{expert.format('3.up')}_scale_inv {where}: is I8, not F32 or" in report
    assert "NaN" not in refusal(tmp_path, scales=False)


def test_nan_among_powers_and_wrong_blocks(tmp_path):
    _oss(tmp_path, GPT_OSS, {"quant_method": "mxfp4"})
    name = "model.layers.0.mlp.experts.down_proj"

    def edit(tensors):
        tensors[f"{name}_scales"][1, 2, 0] = 255
        tensors["model.layers.1.mlp.experts.down_proj_scales"] = np.ones((4, 64, 2), np.uint8)

    change(tmp_path, edit)
    report = refusal(tmp_path)
    assert f"{name}_scales (MXFP4, model.safetensors): 1 of " in report
    assert re.search(r"1\.mlp\.experts\.down_proj_scales .*: is \[4, 64, 2\], but codes", report)


def test_desc_act_is_refused_where_it_shows(tmp_path):
    quantised(tmp_path, QWEN, GPTQ | {"desc_act": True}, gptq)
    HFDirectory(tmp_path)  # desc_act with groups in their usual order
    stem = "model.layers.0.mlp.experts.1.up_proj"

    def edit(tensors):
        tensors[f"{stem}.g_idx"] = tensors[f"{stem}.g_idx"][::-1].copy()

    change(tmp_path, edit)
    assert re.search(
        rf"{stem}\.g_idx \(GPTQ int4, model.safetensors\): .*desc_act", refusal(tmp_path)
    )


def test_zero_points_that_contradict_the_config(tmp_path):
    quantised(tmp_path, QWEN, GPTQ, gptq)
    stem = "model.layers.0.mlp.experts.1.up_proj"
    change(tmp_path, lambda tensors: tensors.update({f"{stem}.bias": np.zeros(32, np.float16)}))
    HFDirectory(tmp_path)

    def edit(tensors):
        tensors[f"{stem}.qzeros"][0, 0] += 1
        tensors[f"{stem}.bias"][3] = 1

    change(tmp_path, edit)
    report = refusal(tmp_path)
    assert f"{stem}.qzeros (GPTQ int4, model.safetensors): 1 of 64 are not 8" in report
    assert f"1 not part of this model: {stem}.bias" in report


@pytest.mark.parametrize(
    ("encode", "config", "symmetric"),
    [
        (awq, AWQ, AWQ | {"zero_point": False}),
        (pack_quantized, compressed(symmetric=False), INT4_G32),
        (int_quantized, compressed(**INT8, symmetric=False), compressed(**INT8)),
    ],
)
def test_zero_points_of_symmetric_weights(encode, config, symmetric, opened):
    stored, _ = encode("x.weight", (8, 64), np.random.default_rng(0), config)
    tensor = opened(stored, symmetric)["x.weight"]
    assert not tensor.faults
    (fault,) = tensor.value_faults()
    assert "x." in fault and "says that the weights are symmetric" in fault


@pytest.mark.parametrize(
    ("encode", "config", "name", "codes", "message"),
    [
        (gptq, GPTQ, "x.qweight", np.zeros(5, np.int32), r"is \[5\]; expected 2 axes"),
        (gptq, GPTQ, "x.scales", np.zeros((3, 8), np.float16), r"is \[3, 8\], but codes \[8, 8\]"),
        (awq, AWQ, "x.qweight", np.zeros((63, 1), np.int32), "63 inputs are not a multiple of 8"),
        (fp8, FP8, "x.weight", np.zeros(5, ml_dtypes.float8_e4m3fn), r"is \[5\]; expected"),
        (fp8, FP8, "x.weight_scale_inv", np.zeros((), np.float32), r"is \[\]; expected 2 axes"),
        (pack_quantized, INT4_G32, "x.weight_packed", np.zeros(5, np.int32), "expected 2 axes"),
        (
            *(mxfp4_linear, compressed(format="mxfp4-pack-quantized", type="float")),
            *("x.weight_scale", np.zeros((8, 2), np.float32), "is F32, not U8 or"),
        ),
    ],
)
def test_shapes_that_do_not_fit(encode, config, name, codes, message, opened):
    stored, _ = encode("x.weight", (8, 64), np.random.default_rng(0), config)
    tensor = opened(stored | {name: codes}, config)["x.weight"]
    assert len(tensor.faults) == 1 and re.search(message, tensor.faults[0])
    tensor.part(0, 1)


def test_experts_whose_codes_have_too_few_axes(opened):
    stored = {"x_blocks": np.zeros((2, 3, 16), np.uint8), "x_scales": np.zeros((2, 3), np.uint8)}
    (fault,) = opened(stored, {"quant_method": "mxfp4"})["x"].faults
    assert "x_blocks (MXFP4, x.safetensors): is [2, 3, 16]; expected [experts, out" in fault


def test_codes_of_an_unsupported_type(tmp_path):
    quantised(tmp_path, QWEN, INT4_G32, pack_quantized)
    stem = "model.layers.0.mlp.experts.1.up_proj.weight"

    def edit(tensors):
        tensors[f"{stem}_packed"] = tensors[f"{stem}_packed"].view(np.uint8)
        tensors["model.layers.0.mlp.experts.1.down_proj.weight_shape"][0] = 63
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.ones((64, 64), np.float32)

    change(tmp_path, edit)
    report = refusal(tmp_path)
    kind = r"\(compressed-tensors int4, model\.safetensors\)"
    assert re.search(rf"up_proj\.weight_packed {kind}: is U8, not I32", report)
    assert re.search(rf"down_proj\.weight_shape {kind}: says \[63, 32\]", report)
    assert "q_proj.weight is the same weight, stored twice" in report


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'; supported: 'fp8'"),
        ({"bits": 4}, "quant_method is None"),
        (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size is \[128\]; expected"),
        (FP8 | {"modules_to_not_convert": "gate"}, "expected a list of modules"),
        (FP8 | {"surprise": 1}, "unknown field surprise"),
        (GPTQ | {"bits": 3}, "bits is 3; supported: 4, 8"),
        (GPTQ | {"group_size": 12}, "group_size is 12; expected -1 or a multiple of 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic is"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'; supported: 'gemm'"),
        (AWQ | {"bits": 8}, "bits is 8"),
        (AWQ | {"backend": "llm-awq"}, "backend is 'llm-awq'"),
        (GPTQ | {"format": "gptq", "checkpoint_format": "gptq_v2"}, "other fields say 'gptq'"),
        (GPTQ | {"adapter": {"name": "lora"}}, "adapter is set"),
        (GPTQ | {"pack_dtype": "int64"}, "pack_dtype is 'int64'"),
        (compressed(format="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'; supported"),
        (compressed(num_bits=2), "config_groups: group_0: weights: num_bits is 2"),
        (compressed(strategy="tensor_group"), "strategy is 'tensor_group'"),
        (INT4_G32 | {"config_groups": {}}, "config_groups: has nothing"),
        (INT4_G32 | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is set"),
        (INT4_G32 | {"sparsity_config": {"format": "2:4"}}, "sparsity_config: format is '2:4'"),
    ],
)
def test_settings_that_are_not_supported(config, message):
    with pytest.raises(UserError, match=f"config.json: quantization_config: .*{message}"):
        parsed(config)


def test_settings_by_other_names():
    assert parsed(
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM"}
    ) == Quantization("awq", 4, 128, symmetric=False)
    of_gptqmodel = {"format": "gemm", "sym": True, "desc_act": False, "pack_dtype": "int32"}
    del (plain := dict(AWQ))["zero_point"]
    assert parsed(plain | of_gptqmodel) == parsed(AWQ | {"zero_point": False})
    older = {key: value for key, value in INT4_G32.items() if key != "quant_method"}
    found = quantization(Fields({"compression_config": older}, "config.json"))
    assert found == parsed(INT4_G32) and str(found) == (
        "compressed-tensors pack-quantized, 4 bits, groups of 32"
    )
    assert str(parsed(FP8)) == "fp8, blocks of 128 x 128"
    assert parsed(None) is None
