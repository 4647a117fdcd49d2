"""Damaged or hostile JSON of models: each is an error that names its file."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from dance_jax.config import UserError
from dance_jax.launch.preflight.model_state import model_state
from dance_jax.models import model_config
from dance_jax.models.directory import INDEX, MAX_DEPTH, json_object, read_config, weight_files
from dance_jax.models.families.fields import MAX_LAYERS
from dance_jax.models.random_weights import write_byte_tokenizer
from dance_jax.models.safetensors_file import MAX_HEADER, read_header
from dance_jax.models.tokenizer import Tokenizer
from tests.tiny_models import SERVED

BAD = {
    "deep": "[" * 100_000,
    "closed": '{"a":' * 900 + "1" + "}" * 900,
    "one level too deep": '{"a":' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}",
    "NaN": '{"a": NaN}',
    "infinite": '{"a": -Infinity}',
    "overflow": '{"a": 1e999}',
    "digits": '{"a": ' + "9" * 5000 + "}",
    "surrogate": r'{"a": "\ud800"}',
    "no object": "[1]",
    "torn": '{"a": 1',
    "no text": "\x00",
}
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    INDEX,
)


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "config.json").write_text(json.dumps(SERVED))
    write_byte_tokenizer(tmp_path, model_config(SERVED))
    return tmp_path


def readers(name: str) -> Callable[[pathlib.Path], object]:
    if name == INDEX:
        return weight_files
    return Tokenizer.load if "token" in name else read_config


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_the_file_is_named(directory: pathlib.Path, name: str, content: str) -> None:
    (directory / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        readers(name)(directory)


def header(path: pathlib.Path, text: str) -> pathlib.Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    return path


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_safetensors_header(directory: pathlib.Path, content: str) -> None:
    path = header(directory / "model.safetensors", content)
    with pytest.raises(UserError, match=r"model\.safetensors: not a safetensors file, or damaged"):
        read_header(path)
    assert (
        "model.safetensors is truncated, or not a safetensors file"
        in model_state(directory).problem
    )


def test_the_length_of_a_safetensors_header_is_limited(directory: pathlib.Path) -> None:
    path = directory / "model.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER + 100)  # a hole: it takes no room on the disk
    with pytest.raises(UserError, match=r"damaged: a header of 100000001 bytes, but at most"):
        read_header(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**30]},
        {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [10**100, 0], "data_offsets": [0, 0]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0, 1]},
        {"dtype": "F32", "shape": [1]},
        [],
    ],
)
def test_an_entry_of_a_safetensors_header(directory: pathlib.Path, entry: Any) -> None:
    path = header(directory / "model.safetensors", json.dumps({"a": entry}))
    with pytest.raises(UserError, match=r"model\.safetensors: "):
        read_header(path)


@pytest.mark.parametrize("number", [2**31, 10**18, 10**400, MAX_LAYERS + 1])
def test_the_number_of_layers_is_limited(directory: pathlib.Path, number: int) -> None:
    (directory / "config.json").write_text(json.dumps(SERVED | {"num_hidden_layers": number}))
    with pytest.raises(UserError, match=r"config\.json: num_hidden_layers is larger than 10000"):
        read_config(directory)


def test_a_size_is_limited(directory: pathlib.Path) -> None:
    (directory / "config.json").write_text(json.dumps(SERVED | {"hidden_size": 10**4000}))
    with pytest.raises(UserError, match=r"config\.json: hidden_size is larger than 2147483647"):
        read_config(directory)


def test_long_lists_of_templates_may_hold_anything(directory: pathlib.Path) -> None:
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for odd in (5, None, [], {"name": ["default"]}):
        named = [odd, {"name": "default", "template": "{{ messages[0].content }}"}]
        path.write_text(json.dumps(settings | {"chat_template": named}))
        assert Tokenizer.load(directory).chat_text([{"role": "user", "content": "a"}]) == "a"


def test_what_transformers_writes_is_read() -> None:
    """transformers writes 10**30 for "no limit", and nests a few levels."""
    content = {"model_max_length": int(1e30), "a": [{"b": [[{"c": "\U0001f600"}]]}]}
    path = pathlib.Path("tokenizer_config.json")
    assert json_object(json.dumps(content).encode(), path) == content
