"""GGUF files: blocks, whole models, tokenizers, split files, and invalid files."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil

import gguf
import numpy as np
import pytest
from gguf import quants

from dance_jax.config import UserError
from dance_jax.launch.preflight.model_state import model_state
from dance_jax.models import hub
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import check_readable, convert, ensure_converted, main, outline
from dance_jax.models.directory import SIDE_FILES, read_config, side_files
from dance_jax.models.formats import Matrix
from dance_jax.models.ggml.header import Place, read_header, read_parts
from dance_jax.models.ggml.kinds import KINDS, NOT_EXACT
from dance_jax.models.ggml.model import GGUFModel, open_source
from dance_jax.models.ggml.tensors import GgufTensor
from dance_jax.models.ggml.tokenizer import _PRE, tokenizer_files
from dance_jax.models.hf import HFDirectory
from dance_jax.models.random_weights import write_random_checkpoint
from dance_jax.models.tensors import expert_rules, parts_of, trunk_rules
from dance_jax.models.tokenizer import Tokenizer
from tests.models.gguf_writing import MODELS, write_gguf, write_tokenizer
from tests.stacks import stacked

TEXTS = (
    "hello world, it's 2024!\n\n  def f(x):\n\treturn x",
    "cafe\u0301 naïve 日本語 <think> ok <|user|>hi</s>",
    " </s> tail  \r\n",
)
#: Byte offsets of the float16 values in a block.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "MXFP4": (),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """directories(name): a random model of `MODELS` with a tokenizer, in Hugging Face format."""
    folder = tmp_path_factory.mktemp("hf")

    def made(name):
        if not (folder / name).exists():
            write_random_checkpoint(folder / name, MODELS[name][1], seed=1, tokenizer=False)
            write_tokenizer(folder / name)
        return folder / name

    return made


@pytest.fixture(scope="module")
def qwen(directories, tmp_path_factory):
    """A Qwen3-MoE in a GGUF file; tests must not change the file."""
    path = tmp_path_factory.mktemp("gguf") / "qwen.gguf"
    return write_gguf(path, directories("qwen3moe"), "qwen3moe")


def random_blocks(kind, rows, d_in):
    """Random blocks, uint8 [rows, bytes], whose float16 values are finite."""
    own, rng = KINDS[kind], np.random.default_rng(0)
    blocks = rng.integers(0, 256, (rows, d_in // own.weights, own.size), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = rng.standard_normal(blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = halves[..., None].view(np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = rng.integers(0, 250, blocks.shape[:2])
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_worth_what_ggml_says(kind, tmp_path):
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (
        KINDS[kind].weights,
        KINDS[kind].size,
    )
    data = random_blocks(kind, 6 * 24, 512)
    wanted = quants.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(6, 24, 512)
    (tmp_path / "blocks").write_bytes(bytes(7) + data.tobytes())
    stack = GgufTensor.at(Place(tmp_path / "blocks", kind, wanted.shape, 7, data.nbytes))
    one = stack.part(4, 6).without_first_axis()
    assert one.size == stack.size // 6, "an expert's bytes alone"
    matrix = one.matrix()
    assert matrix.format == one.format == KINDS[kind].format
    shapes = {name: (a.shape, a.dtype) for name, a in matrix.arrays.items()}
    assert shapes == {n: (a.shape, a.dtype) for n, a in one.format.arrays(512, 24).items()}
    np.testing.assert_array_equal(matrix.values().T, one.read())
    if kind in NOT_EXACT:
        np.testing.assert_allclose(stack.read(), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    else:
        np.testing.assert_array_equal(stack.read(), wanted)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_blocks_that_gguf_quantises(kind, tmp_path):
    values = np.random.default_rng(1).standard_normal((40, 96), np.float32)
    data = quants.quantize(values, gguf.GGMLQuantizationType[kind])
    (tmp_path / "blocks").write_bytes(data.tobytes())
    tensor = GgufTensor.at(Place(tmp_path / "blocks", kind, values.shape, 0, data.nbytes))
    wanted = quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    np.testing.assert_allclose(tensor.read(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")]
)
def test_floats_are_kept_as_they_are(kind, dtype, tmp_path):
    values = np.random.default_rng(2).standard_normal((3, 8, 16), np.float32)
    data = quants.quantize(values, gguf.GGMLQuantizationType[kind])
    (tmp_path / "floats").write_bytes(data.tobytes())
    tensor = GgufTensor.at(Place(tmp_path / "floats", kind, values.shape, 0, data.nbytes))
    assert str(tensor.format) == str(tensor.read().dtype) == dtype
    matrix = tensor.part(1, 3).without_first_axis().matrix()
    np.testing.assert_array_equal(matrix.values().T, values[1].astype(tensor.read().dtype))


def weights(model):
    """The weights that a conversion would store, by name."""
    rules = [("", rule) for rule in trunk_rules(model.config)]
    for layer, expert in itertools.product(
        model.config.moe_layers, range(model.config.num_experts)
    ):
        rules += [(f"{layer} {expert} ", r) for r in expert_rules(model.config, layer, expert)]
    found = {}
    for prefix, rule in rules:
        for path, part in parts_of(rule, model.tensors[rule.source]):
            if isinstance(part, list):
                part = np.stack([head.values() for head in part])
            found[prefix + path] = part.values() if isinstance(part, Matrix) else part
    return found


def assert_equal(found, source):
    """Check that a GGUF model has the config and weights of the directory it was made from."""
    assert found.config == dataclasses.replace(source.config, names=found.config.names)
    ours, theirs = weights(found), weights(source)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        # Some weights are stored as 1 + w, or as exponentials.
        rounding = 1e-6 if source.config.norm_plus_one and values.ndim == 1 else 0
        np.testing.assert_allclose(ours[name], values, rtol=0, atol=rounding, err_msg=name)


@pytest.mark.parametrize("model", MODELS)
def test_a_whole_model_comes_back(model, directories, tmp_path):
    directory = directories(model)
    path = write_gguf(tmp_path / "model.gguf", directory, model)
    assert_equal(open_source(path), HFDirectory(directory))
    ours, theirs = Tokenizer.load(path), Tokenizer.load(directory)
    for text in TEXTS:
        tokens = theirs.encode(text)
        assert ours.encode(text) == tokens
        assert ours.decode(tokens, False) == theirs.decode(tokens, False)
    messages = [{"role": "user", "content": "hello"}]
    assert ours.chat_text(messages) == theirs.chat_text(messages)
    assert ours.eos_token_ids == theirs.eos_token_ids == (1,)


@pytest.mark.parametrize("model", ["deepseek2", "deepseek3"])
def test_keys_and_values_of_latents_in_one_tensor(model, directories, tmp_path):
    directory = directories(model)
    path = write_gguf(tmp_path / "old.gguf", directory, model, old_heads=True)
    assert "blk.0.attn_kv_b.weight" in read_header(path).tensors
    assert_equal(open_source(path), HFDirectory(directory))


@pytest.mark.parametrize(
    ("keys", "values", "form"),
    [
        ("F16", "F16", "float16"),
        ("F16", "F32", "float32"),
        ("F16", "BF16", "float32"),
        ("Q8_0", "F32", "bfloat16"),
    ],
)
def test_halves_of_latents_of_two_types(keys, values, form, tmp_path):
    """Floats are kept without loss; quantised weights are rearranged as bfloat16."""
    fields = MODELS["deepseek2"][1] | {"qk_nope_head_dim": 32}
    write_random_checkpoint(tmp_path / "hf", fields, tokenizer=False)
    write_tokenizer(tmp_path / "hf")
    kinds = {"attn_k_b": keys, "attn_v_b": values}
    path = write_gguf(tmp_path / "model.gguf", tmp_path / "hf", "deepseek2", kinds=kinds)
    tensor = open_source(path).tensors["model.layers.1.self_attn.kv_b_proj.weight"]
    assert str(tensor.format) == form
    if form != "bfloat16":
        assert str(tensor.matrix().format) == form
        np.testing.assert_array_equal(tensor.matrix().values().T, tensor.read())


def test_quantised_rows_of_paired_heads(directories, tmp_path):
    """The original order of rows is restored for quantised rows too."""
    directory = directories("llama")
    path = write_gguf(tmp_path / "q.gguf", directory, "llama", kinds={"attn_q": "Q8_0"})
    name = "model.layers.1.self_attn.q_proj.weight"
    tensor, wanted = open_source(path).tensors[name], HFDirectory(directory).tensors[name].read()
    assert tensor.kind == "Q8_0" and tensor.format.kind == "int8"
    np.testing.assert_allclose(tensor.read(), wanted, atol=0.01)
    np.testing.assert_array_equal(tensor.matrix().values().T, tensor.read())


def test_inputs_in_another_order(tmp_path):
    """Whole groups keep their format when reordered; parts of groups become floats."""
    values = np.random.default_rng(3).standard_normal((6, 128), np.float32)
    for kind in ("Q8_0", "Q4_0", "MXFP4", "F32"):
        data = quants.quantize(values, gguf.GGMLQuantizationType[kind])
        (tmp_path / "blocks").write_bytes(data.tobytes())
        plain = GgufTensor.at(Place(tmp_path / "blocks", kind, values.shape, 0, data.nbytes))
        for width, kept in ((32, True), (16, kind == "F32")):
            inputs = np.arange(128).reshape(2, -1, width).swapaxes(0, 1).reshape(-1)
            tensor = dataclasses.replace(plain, inputs=inputs)
            assert (tensor.format == plain.format) == kept
            matrix = tensor.matrix()
            assert matrix.format == tensor.format
            np.testing.assert_array_equal(matrix.values().T, plain.read()[:, inputs])
            np.testing.assert_array_equal(matrix.values().T, tensor.read())


def test_experts_one_by_one_as_in_files_of_early_mixtrals(directories, tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", directories("llama"), "llama")
    wanted = weights(open_source(whole))
    model = GGUFModel(whole)
    stored = model._stored()
    for name in [name for name in stored if "_exps" in name]:
        stack = stored.pop(name)
        for expert in range(4):
            leaf = name.replace("_exps.weight", f".{expert}.weight")
            stored[leaf] = stack.part(expert, 4).without_first_axis()
    from dance_jax.models.ggml.names import renamed

    model.tensors = renamed(stored, model.config, "here")
    for name, values in weights(model).items():
        np.testing.assert_array_equal(values, wanted[name])


def test_a_conversion_of_either_is_the_same(directories, tmp_path):
    directory = directories("gpt-oss")
    path = write_gguf(tmp_path / "oss.gguf", directory, "gpt-oss")
    ours, theirs = (Checkpoint.open(convert(p, tmp_path / p.stem)) for p in (path, directory))
    assert dataclasses.replace(ours.config, names=theirs.config.names) == theirs.config
    for one, other in zip(stacked(ours, [(1, 3)]), stacked(theirs, [(1, 3)]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert Tokenizer.load(ours.path).encode(TEXTS[0]) == Tokenizer.load(path).encode(TEXTS[0])
    assert ours.source == open_source(path).fingerprint()


def test_a_file_is_named_like_a_directory(qwen, tmp_path, capsys):
    copy = shutil.copy(qwen, tmp_path / "name-00001-of-00001.gguf")
    assert hub.resolve(copy) == hub.fetch_config(copy) == hub.fetch_definition(copy) == copy
    assert hub.served_name(copy) == "name"
    assert hub.parse_name("models/qwen.gguf") is None
    check_readable(copy)
    assert (
        outline(copy).config
        == read_config(copy)
        == Checkpoint.open(ensure_converted(copy, tmp_path / "cache")).config
    )
    assert outline(copy).source == open_source(qwen).fingerprint()
    assert next((tmp_path / "cache").iterdir()).name.startswith("name-")
    assert set(side_files(copy)) <= set(SIDE_FILES)
    assert main([str(copy), str(tmp_path / "out")]) == 0
    assert "float32" in capsys.readouterr().err


def test_the_preflight_compares_files(qwen, directories, tmp_path):
    first, copy = model_state(qwen), model_state(shutil.copy(qwen, tmp_path / "copy.gguf"))
    assert (first.kind, first.problem) == ("gguf", "")
    assert (first.index, first.definition) == (copy.index, copy.definition)
    converted = model_state(convert(qwen, tmp_path / "converted"))
    assert converted.definition == first.definition
    other = write_gguf(tmp_path / "other.gguf", directories("llama"), "llama")
    assert model_state(other).index != first.index
    os.truncate(other, other.stat().st_size - 1)
    assert "truncated" in model_state(other).problem


def test_the_fingerprint_is_of_the_content(qwen, tmp_path):
    copy = pathlib.Path(shutil.copy(qwen, tmp_path / "renamed.gguf"))
    fingerprint = open_source(qwen).fingerprint()
    assert open_source(copy).fingerprint() == fingerprint
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    assert open_source(copy).fingerprint() != fingerprint


def test_the_report_says_what_types_become(directories, tmp_path):
    kinds = {"token_embd": "Q8_0", "attn_q.": "Q4_1"}
    path = write_gguf(tmp_path / "q.gguf", directories("qwen3moe"), "qwen3moe", kinds=kinds)
    report = open_source(path).report()
    assert re.search(
        r"Q8_0: [0-9.]+ [KM]iB of 8\.5 bits a weight, held as int8:32:float16 of 8\.5", report
    )
    assert re.search(r"Q4_1: .* held as int4:32:float32:offset of 6, offsets rounded", report)


def split(directory, path, parts=3):
    count = len(read_header(write_gguf(path, directory, "qwen3moe")).tensors)
    path.unlink()
    write_gguf(path, directory, "qwen3moe", split_max_tensors=-(-count // parts))
    return sorted(path.parent.glob(f"{path.stem}-*.gguf"))


def test_files_in_parts(directories, tmp_path):
    directory = directories("qwen3moe")
    parts = split(directory, tmp_path / "model.gguf")
    assert [part.name for part in parts] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts:
        model = open_source(part)
        assert model.files == parts and model.path == parts[0]
        assert hub.served_name(part) == "model"
    assert_equal(model, HFDirectory(directory))


def test_parts_that_are_not_whole(directories, tmp_path):
    parts = split(directories("qwen3moe"), tmp_path / "model.gguf")
    shutil.copy(parts[0], tmp_path / "one.gguf")
    with pytest.raises(UserError, match=r"one\.gguf: is one of 3 files, but its name does not end"):
        open_source(tmp_path / "one.gguf")
    kept = parts[1].read_bytes()
    shutil.copy(parts[2], parts[1])
    with pytest.raises(UserError, match=r"00002-of-00003\.gguf: split\.no and .* \(2, 3\), not"):
        open_source(parts[0])
    parts[1].unlink()
    with pytest.raises(UserError, match=r"of which model-00002-of-00003\.gguf is missing"):
        read_config(parts[0])
    parts[1].write_bytes(kept)
    os.truncate(parts[2], parts[2].stat().st_size - 8)
    with pytest.raises(UserError, match=r"00003-of-00003\.gguf: truncated: \S+ \(F32, "):
        check_readable(parts[0])


@pytest.mark.parametrize("keep", [0, 10, 60, 2000, -1])
def test_a_truncated_file_is_named(keep, qwen, tmp_path):
    path = tmp_path / "torn.gguf"
    path.write_bytes(qwen.read_bytes()[:keep])
    for read in (open_source, read_config, Tokenizer.load):
        with pytest.raises(UserError, match=r"torn\.gguf: truncated"):
            read(path)


def test_files_of_another_kind(qwen, tmp_path):
    path = tmp_path / "other.gguf"
    content = qwen.read_bytes()
    for start, message in (
        (b"GGML" + content[4:8], "not a GGUF file: the file begins with b'GGML'"),
        (b"GGUF" + (1).to_bytes(4, "little"), "version 1 of GGUF"),
        (b"GGUF" + (3).to_bytes(4, "big"), "version 50331648 of GGUF"),
    ):
        path.write_bytes(start + content[8:])
        with pytest.raises(UserError, match=re.escape(f"other.gguf: {message}")):
            open_source(path)
    with pytest.raises(UserError, match=r"no such directory; a model is a directory or a \.gguf"):
        hub.resolve(tmp_path / "nothing.gguf")
    with pytest.raises(UserError, match=r"config\.json: no such file; to use a GGUF file, name it"):
        read_config(tmp_path)


def change(key, value, kind=gguf.GGUFValueType.UINT32):
    """Set a value of the metadata."""

    def changed(writer):
        writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value, kind)

    return changed


TEXT, FLOAT = gguf.GGUFValueType.STRING, gguf.GGUFValueType.FLOAT32


@pytest.mark.parametrize(
    ("key", "value", "kind", "message"),
    [
        ("general.architecture", "mamba", TEXT, "general.architecture is 'mamba'; supported: deep"),
        ("qwen3moe.block_count", "two", TEXT, "block_count is 'two'; expected a whole number"),
        ("qwen3moe.block_count", 3, None, "missing: model.layers.2."),
        ("qwen3moe.expert_count", 0, None, "expert_count is 0 or missing"),
        ("qwen3moe.expert_count", 5, None, r"is \[4, \d+, \d+\], not \[5, \.\.\.\]"),
        ("qwen3moe.expert_gating_func", 2, None, "expert_gating_func is 2; supported: 1"),
        ("qwen3moe.logit_scale", 2.0, FLOAT, "unknown field logit_scale: may change"),
        ("qwen3moe.rope.scaling.type", "longrope", TEXT, "rope.scaling.type is 'longrope'"),
        (
            "qwen3moe.rope.dimension_count",
            8,
            None,
            "rope.dimension_count is 8, other fields say 16",
        ),
        (
            "qwen3moe.embedding_length",
            64,
            None,
            r"embed_tokens.weight is \[320, 32\], not \[320, 64",
        ),
    ],
)
def test_metadata_that_are_wrong(key, value, kind, message, directories, tmp_path):
    changed = change(key, value, kind or gguf.GGUFValueType.UINT32)
    path = write_gguf(tmp_path / "m.gguf", directories("qwen3moe"), "qwen3moe", change=changed)
    with pytest.raises(UserError, match=message) as error:
        open_source(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "kind", "message"),
    [
        ("model", "bert", TEXT, "ggml.model is 'bert'; supported: 'gpt2', 'llama'"),
        ("pre", "unheard-of", TEXT, "ggml.pre is 'unheard-of'; supported: "),
        ("bos_token_id", 5000, None, "bos_token_id is 5000; there are 320 tokens"),
        ("tokens", "text", TEXT, "ggml.tokens is 'text'; expected a list"),
    ],
)
def test_vocabularies_that_are_wrong(key, value, kind, message, directories, tmp_path):
    changed = change(f"tokenizer.ggml.{key}", value, kind or gguf.GGUFValueType.UINT32)
    path = write_gguf(tmp_path / "m.gguf", directories("qwen3moe"), "qwen3moe", change=changed)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value)


def test_types_and_tensors_that_are_unknown(directories, tmp_path):
    def iq4(writer):
        blocks = np.zeros((320, 18), np.uint8)
        writer.add_tensor("blk.0.x", blocks, raw_dtype=gguf.GGMLQuantizationType.IQ4_NL)

    def surprise(writer):
        writer.add_tensor("blk.0.surprise.weight", np.zeros(3, np.float32))

    def twice(writer):
        writer.add_tensor("blk.0.post_attention_norm.weight", np.zeros(32, np.float32))

    def half(writer):
        writer.add_tensor("blk.0.attn_k_b.weight", np.zeros((2, 4, 4), np.float32))

    directory, path = directories("qwen3moe"), tmp_path / "m.gguf"
    write_gguf(path, directory, "qwen3moe", change=twice)
    with pytest.raises(
        UserError, match=r"another tensor are both \S+\.0\.post_attention_layernorm"
    ):
        check_readable(path)
    write_gguf(path, directory, "qwen3moe", change=half)
    with pytest.raises(UserError, match=r"does not have \(1\): blk\.0\.attn_k_b\.weight"):
        check_readable(path)
    write_gguf(path, directory, "qwen3moe", change=iq4)
    with pytest.raises(
        UserError, match=r"m\.gguf: of an unsupported type: blk\.0\.x is IQ4_NL; sup"
    ):
        check_readable(path)
    write_gguf(path, directory, "qwen3moe", change=surprise)
    with pytest.raises(UserError, match=r"does not have \(1\): blk\.0\.surprise\.weight"):
        check_readable(path)


def test_numbers_have_the_digits_they_were_written_with(qwen):
    values = read_parts(qwen)[0].metadata
    assert values["qwen3moe.attention.layer_norm_rms_epsilon"] == 1e-6
    assert values["qwen3moe.rope.freq_base"] == 1e6


def vocabulary(tokens, **values):
    """Metadata for a vocabulary of (text, type, score) tokens."""
    texts, kinds, scores = zip(*tokens, strict=True)
    lists = {"tokens": list(texts), "token_type": list(kinds), "scores": list(scores)}
    return {f"tokenizer.ggml.{key}": value for key, value in (lists | values).items()}


def loaded(metadata):
    """tokenizer.json's tokenizer, and tokenizer_config.json."""
    import tokenizers

    files = tokenizer_files(metadata, pathlib.Path("m.gguf"))
    return (
        tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"])),
        files["tokenizer_config.json"],
    )


def test_sentence_pieces():
    """Worked out by hand: the pair whose token has the highest score is merged first."""
    normal, pieces = 1, ["▁", "h", "e", "l", "o", "▁h", "he", "el", "ll", "llo", "hello", "▁hello"]
    scores = {"▁": -9, "el": -1, "llo": -2, "ll": -3, "he": -4, "▁h": -5, "hello": -6, "▁hello": -7}
    tokens = [("<unk>", 2, 0.0), ("<s>", 3, 0.0), ("</s>", 3, 0.0)]
    tokens += [(f"<0x{byte:02X}>", 6, 0.0) for byte in range(256)]
    tokens += [(piece, normal, float(scores.get(piece, -20))) for piece in pieces]
    ids = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tokenizer, settings = loaded(vocabulary(tokens, model="llama", **ids))
    assert settings == {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }

    def pieces_of(text):
        return tokenizer.encode(text, add_special_tokens=False).tokens

    # "el" is merged first, so "he" and "ll" cannot be merged.
    assert pieces_of("hello") == ["▁h", "el", "l", "o"]
    assert pieces_of("llo") == ["▁", "llo"]
    assert pieces_of("é</s>h") == ["▁", "<0xC3>", "<0xA9>", "</s>", "▁h"]
    for text in ("hello é hello", "  two"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    bare, _ = loaded(vocabulary(tokens, model="llama", add_space_prefix=False, **ids))
    assert bare.encode("he").tokens == ["he"]
    with pytest.raises(UserError, match=r"m\.gguf: 271 tokenizer\.ggml\.tokens, but 3 .*scores"):
        loaded(vocabulary(tokens, model="llama", **ids) | {"tokenizer.ggml.scores": [0.0] * 3})


#: Words into which a text is split, by tokenizer.ggml.pre.
WORDS = {
    "gpt-2": ["it", "'s", "Ġ12345", "ĠHelloWorld", "!?", "Ċ"],
    "qwen2": ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "ĠHelloWorld", "!?Ċ"],
    "llama-bpe": ["it", "'s", "Ġ", "123", "45", "ĠHelloWorld", "!?Ċ"],
    "gpt-4o": ["it's", "Ġ", "123", "45", "ĠHello", "World", "!?Ċ"],
    "kimi-k2": ["it's", "Ġ", "123", "45", "ĠHello", "World", "!?Ċ"],
    "deepseek-v3": ["it", "'s", "Ġ", "123", "45", "ĠHelloWorld", "!?Ċ"],
    "deepseek-llm": ["it", "'", "s", "Ġ", "12345", "ĠHelloWorld", "!?", "Ċ"],
    "olmo": ["it", "'s", "Ġ12345", "ĠHelloWorld", "!?", "Ċ"],
}


@pytest.mark.parametrize("pre", _PRE)
def test_texts_are_cut_as_the_name_says(pre):
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    metadata = vocabulary([(text, 1, 0.0) for text in letters], model="gpt2", pre=pre)
    tokenizer, settings = loaded(metadata)
    words = tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345 HelloWorld!?\n")
    if pre in WORDS:
        assert [word for word, _ in words] == WORDS[pre]
    assert settings["add_bos_token"] == (pre in ("llama-bpe", "llama3", "llama-v3"))
    assert tokenizer.decode(tokenizer.encode("a b\n").ids) == "a b\n"


def test_tokens_that_end_an_answer(directories, tmp_path):
    changed = change("tokenizer.ggml.eot_token_id", 299)
    path = write_gguf(tmp_path / "m.gguf", directories("qwen3moe"), "qwen3moe", change=changed)
    assert read_config(path).eos_token_ids == (1, 299)
    ends = change("tokenizer.ggml.eom_token_id", 7000)
    write_gguf(path, directories("qwen3moe"), "qwen3moe", change=ends)
    with pytest.raises(UserError, match=r"tokens that end an answer are \[1, 7000\]"):
        read_config(path)
