"""Reading Hugging Face directories: spellings of names, reports, damaged files."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dance_jax.config import UserError
from dance_jax.models import convert
from dance_jax.models.directory import INDEX
from dance_jax.models.hf import HFDirectory
from dance_jax.models.random_weights import write_random_checkpoint
from dance_jax.models.tokenizer import Tokenizer

REFERENCE = pathlib.Path(__file__).parent.parent / "reference"


@pytest.fixture
def source(tmp_path, deepseek_fields):
    return write_random_checkpoint(tmp_path / "source", deepseek_fields)


@pytest.fixture
def sharded(tmp_path, mixtral_fields):
    return write_random_checkpoint(
        tmp_path / "sharded", mixtral_fields, dtype="bfloat16", shard_bytes=20_000
    )


def rewrite(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_one_file(source):
    model = HFDirectory(source)
    stored = load_file(source / "model.safetensors")
    assert set(model.tensors) == set(stored)
    for name in ("model.norm.weight", "model.layers.2.mlp.experts.7.down_proj.weight"):
        np.testing.assert_array_equal(model.tensors[name].read(), stored[name])


def test_shards_in_bfloat16(sharded):
    model = HFDirectory(sharded)
    assert len(model.files) == 3
    stored = load_file(model.files[1])
    for name, values in stored.items():
        read = model.tensors[name].read()
        assert read.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(read.view(np.uint16), values.view(np.uint16))


def test_all_wrong_tensors_come_in_one_report(source):
    def change(tensors):
        del tensors["model.norm.weight"]
        for expert in range(8):
            del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(3, np.float32)
        tensors["model.layers.1.mlp.gate.weight"] = np.zeros((9, 32), np.float32)
        tensors["lm_head.weight"] = np.zeros((264, 32), np.int8)

    rewrite(source, change)
    with pytest.raises(UserError) as error:
        HFDirectory(source)
    report = str(error.value)
    assert str(source) in report
    assert "9 missing" in report and "model.norm.weight" in report
    assert "1 not part of this model: model.layers.0.self_attn.q_proj.bias" in report
    assert "model.layers.1.mlp.gate.weight is [9, 32], not [8, 32]" in report
    assert "lm_head.weight is I8" in report


def test_tied_models_may_repeat_the_embedding_and_old_ones_store_frequencies(source):
    fields = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(fields))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(source, lambda tensors: tensors.update({name: np.zeros(4, np.float32)}))
    HFDirectory(source)


def test_experts_in_one_tensor_and_modules_named_mlp(tmp_path, mixtral_fields):
    source = write_random_checkpoint(tmp_path / "m", mixtral_fields)
    plain = HFDirectory(source).tensors
    plain = {name: tensor.read() for name, tensor in plain.items()}

    def fuse(tensors):
        for layer in range(2):
            prefix = f"model.layers.{layer}.block_sparse_moe"
            new = f"model.layers.{layer}.mlp"
            tensors[f"{new}.gate.weight"] = tensors.pop(f"{prefix}.gate.weight")
            part = {
                w: np.stack([tensors.pop(f"{prefix}.experts.{e}.{w}.weight") for e in range(4)])
                for w in ("w1", "w2", "w3")
            }
            joined = np.concatenate([part["w1"], part["w3"]], axis=1)
            tensors[f"{new}.experts.gate_up_proj"] = joined
            tensors[f"{new}.experts.down_proj"] = part["w2"]

    rewrite(source, fuse)
    fused = HFDirectory(source).tensors
    assert fused.keys() == plain.keys()
    for name, values in plain.items():
        np.testing.assert_array_equal(fused[name].read(), values)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("deepseek_v3", ["model.layers.3."]),
        ("kimi_k25", ["mm_projector.", "vision_tower."]),
        ("qwen3_5_moe", ["model.visual.", "mtp."]),
        ("qwen3_next", ["mtp."]),
        ("mixtral", []),
    ],
)
def test_tensors_that_text_does_not_need_are_left_out_and_named(name, left_out, tmp_path, capsys):
    model = HFDirectory(REFERENCE / name)
    assert all(tensor.startswith(tuple(left_out)) for tensor in model.left_out)
    assert all(any(t.startswith(start) for t in model.left_out) for start in left_out)
    assert convert.main([str(REFERENCE / name), str(tmp_path / "converted")]) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    report = f"skipped tensors that generating text does not need: {len(model.left_out)}"
    assert (report in said) == bool(left_out)


def test_a_tensor_under_two_spellings(tmp_path, mixtral_fields):
    source = write_random_checkpoint(tmp_path / "m", mixtral_fields)
    name = "model.layers.0.{}.gate.weight"
    rewrite(
        source,
        lambda tensors: tensors.update(
            {name.format("mlp"): tensors[name.format("block_sparse_moe")]}
        ),
    )
    with pytest.raises(UserError, match=r"stored twice"):
        HFDirectory(source)


def test_experts_both_joined_and_one_by_one(tmp_path):
    source = shutil.copytree(REFERENCE / "qwen3_moe_sparse", tmp_path / "qwen")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    rewrite(source, lambda tensors: tensors.update({name: np.zeros((16, 32), np.float32)}))
    with pytest.raises(UserError, match=rf"gate_up_proj and {name} are the same weights"):
        HFDirectory(source)


def test_joined_experts_of_a_wrong_shape(tmp_path):
    source = shutil.copytree(REFERENCE / "gpt_oss", tmp_path / "oss")
    for leaf, shape in (("gate_up_proj_bias", (7, 32)), ("down_proj", (8, 15, 32))):
        rewrite(
            source,
            lambda tensors, leaf=leaf, shape=shape: tensors.update(
                {f"model.layers.1.mlp.experts.{leaf}": np.zeros(shape, np.float32)}
            ),
        )
    with pytest.raises(UserError, match=r"gate_up_proj_bias is \[7, 32\], not \[8, \.\.\.\]"):
        HFDirectory(source)


def test_a_way_of_quantising_that_is_unknown(source):
    fields = json.loads((source / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (source / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"config\.json: .* quant_method is 'bitsandbytes'"):
        HFDirectory(source)


def test_floats_that_were_quantised_once(source):
    fields = json.loads((source / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(fields))
    assert all(tensor.kind == "F32" for tensor in HFDirectory(source).tensors.values())


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_torn_weights_name_the_file(source, keep):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors.*(truncated|damaged)"):
        HFDirectory(source)


def test_tensors_that_overlap(source):
    path = source / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first, second = sorted(
        (name for name in header if name.endswith("layernorm.weight")),
        key=lambda name: header[name]["data_offsets"],
    )[:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(UserError, match=r"model\.safetensors: .* overlaps"):
        HFDirectory(source)


def test_files_that_are_no_safetensors(source):
    path = source / "model.safetensors"
    path.write_bytes((20).to_bytes(8, "little") + b"x" * 100)
    with pytest.raises(UserError, match=r"model\.safetensors: not a safetensors file"):
        HFDirectory(source)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_torn_json_names_file_and_line(source, name):
    (source / name).write_text('{"hidden_size": 3,\n "voc')
    with pytest.raises(UserError, match=rf"{name}, line 2"):
        HFDirectory(source)
    (source / name).write_text("[]")
    with pytest.raises(UserError, match=rf"{name}.*object"):
        HFDirectory(source)


def test_missing_files(source, sharded, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        HFDirectory(tmp_path / "nowhere")
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors"):
        HFDirectory(source)
    (source / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        HFDirectory(source)
    HFDirectory(sharded).files[1].unlink()
    with pytest.raises(UserError, match="model-00002-of"):
        HFDirectory(sharded)


def test_index_that_lies(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.surprise.weight"] = "model-00001-of-00002.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError):
        HFDirectory(sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(UserError, match="safetensors files but no"):
        HFDirectory(sharded)


def test_the_index_decides(sharded):
    """A shard may have tensors that are not the model's, and older copies of some that are."""
    before = HFDirectory(sharded)
    name = next(n for n, tensor in before.tensors.items() if tensor.file == before.files[1])
    stale = load_file(before.files[0]) | {
        name: np.zeros((3, 3), np.float32),
        "model.stale.weight": np.zeros(5, np.float32),
    }
    save_file(stale, before.files[0])
    after = HFDirectory(sharded)
    assert after.tensors.keys() == before.tensors.keys()
    assert after.tensors[name].file == before.files[1]


def test_other_files_of_weights_lie_beside(source):
    tensors = HFDirectory(source).tensors.keys()
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        save_file({"a": np.zeros(2, np.float32)}, source / name)
    assert HFDirectory(source).tensors.keys() == tensors


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointers_of_git_lfs(source, name):
    (source / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 4000000\n"
    )
    with pytest.raises(UserError, match=rf"{name}: is a pointer of git-lfs.* git lfs pull in"):
        HFDirectory(source)
        Tokenizer.load(source)


def test_a_tokenizer_in_another_format(source):
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"make it from tokenizer\.model.*save_pretrained"):
        Tokenizer.load(source)


def test_fingerprint_is_of_the_content(source, tmp_path):
    first = HFDirectory(source).fingerprint()
    assert HFDirectory(shutil.copytree(source, tmp_path / "copy")).fingerprint() == first
    # Change one weight in the middle of a tensor, with the same header.
    path = source / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    changed = HFDirectory(source).fingerprint()
    assert changed != first
    (source / "tokenizer_config.json").write_text("{}")
    assert HFDirectory(source).fingerprint() not in (first, changed)
