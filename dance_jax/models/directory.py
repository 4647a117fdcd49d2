"""A model's directory: its small files and its files of weights. Imports neither JAX nor numpy.

The preflight and the reader of the hosts file use this module. A GGUF file can take the place of a
directory: its metadata contain what the small files contain.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
from typing import Any

from dance_jax.config import UserError
from dance_jax.models.config import ModelConfig
from dance_jax.models.families import model_config

INDEX = "model.safetensors.index.json"

#: Small files that, with the weights, define a model; a conversion copies them.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/default.jinja",
)

#: Those that count in a fingerprint also if they are absent: activations are recorded with it.
FIRST_SIDE_FILES = SIDE_FILES[:6]

#: The small file of a converted model with the formats of its weights.
FORMATS = "formats.json"

#: The file that a conversion writes last; a directory without this file is not a converted model.
MANIFEST = "dance_jax.json"

#: Levels of objects and lists in a model's JSON.
MAX_DEPTH = 64


def is_gguf(model: str | os.PathLike[str]) -> bool:
    """Whether a path is a GGUF file (or one part of a split one)."""
    path = pathlib.Path(model)
    return path.suffix == ".gguf" and path.is_file()


def demo_dir() -> pathlib.Path:
    """Directory of the demo model in this package.

    Raises:
        UserError: this installation has no demo model.
    """
    path = pathlib.Path(__file__).resolve().parents[1] / "demo"
    if not (path / "config.json").exists():
        raise UserError(f"{path}: the demo model is missing; name another model's directory")
    return path


def model_directory(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Return the path of a model, which must be a directory or a GGUF file.

    Raises:
        UserError: the path is neither.
    """
    path = pathlib.Path(directory)
    if not path.is_dir() and not is_gguf(path):
        raise UserError(
            f"{os.fspath(directory)}: no such directory; a model is a directory or a .gguf file on "
            "this machine, or org/name or org/name@revision on the Hugging Face hub"
        )
    return path


def own_name(model: str | os.PathLike[str]) -> str:
    """Name of a directory, or of a GGUF file without its suffix and part number."""
    path = pathlib.Path(model).resolve()
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", path.name) if is_gguf(path) else path.name


def side_files(model: pathlib.Path) -> dict[str, bytes]:
    """Content of the files in SIDE_FILES that a model has, by name.

    Raises:
        UserError: a file cannot be read, or the metadata of a GGUF file are not supported.
    """
    if is_gguf(model):
        from dance_jax.models.ggml.side_files import gguf_side_files

        return gguf_side_files(model)
    found = {}
    for name in SIDE_FILES:
        try:
            found[name] = (model / name).read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"{model / name}: cannot be read: {error}") from error
    return found


def read_json(path: pathlib.Path, required: bool = True) -> dict[str, Any] | None:
    """Read a JSON object from a file; None if the file does not exist and is not required.

    Raises:
        UserError: the file is missing or not a JSON object; the message names file and line.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if not required:
            return None
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return json_object(content, path)


def json_object(content: bytes, path: pathlib.Path) -> dict[str, Any]:
    """Parse a file's content as a JSON object. All JSON of models is read here.

    Python's parser takes more than JSON has: NaN, Infinity and halves of surrogate pairs. Here
    numbers are finite and fit a float, text is valid Unicode, and nesting ends at MAX_DEPTH.

    Raises:
        UserError: the content is not a JSON object; the message names file and line.
    """
    check_no_pointer(content, path)
    try:
        text = content.decode("utf-8")
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        shallow = _depth_at_most(MAX_DEPTH, value)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: has half of a surrogate pair: {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: has a number that is not finite or too long: {error}") from error
    except RecursionError:
        shallow = False
    if not shallow:
        raise UserError(f"{path}: nested deeper than {MAX_DEPTH} levels: download the file again")
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text[:80])
    return value


def _depth_at_most(most: int, value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most + 1):
        if not level:
            return True
        level = [
            child
            for each in level
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, dict | list)
        ]
    return False


def read_config(directory: str | pathlib.Path) -> ModelConfig:
    """Read the config of a model.

    Args:
        directory: a GGUF file, or a directory with config.json and optionally
            generation_config.json.
    """
    directory = pathlib.Path(directory)
    if is_gguf(directory):
        from dance_jax.models.ggml.header import read_parts
        from dance_jax.models.ggml.side_files import gguf_config

        return gguf_config(read_parts(directory))
    path = directory / "config.json"
    if not path.exists() and (files := sorted(directory.glob("*.gguf"))):
        raise UserError(f"{path}: no such file; to use a GGUF file, name it: {files[0]}")
    fields = read_json(path)
    assert fields is not None
    generation = read_json(directory / "generation_config.json", required=False)
    config = model_config(fields, generation, str(path))
    end = _tokenizer_end(directory)
    if end is None or end >= config.vocab_size or end in config.eos_token_ids:
        return config
    return dataclasses.replace(config, eos_token_ids=(*config.eos_token_ids, end))


def _tokenizer_end(directory: pathlib.Path) -> int | None:
    """Id of the tokenizer's own end token, which chat models often have beside the config's."""
    names = "special_tokens_map.json", "tokenizer_config.json"
    older, settings = (read_json(directory / name, required=False) or {} for name in names)
    token = {**older, **settings}.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        return None
    listed = settings.get("added_tokens_decoder")
    for number, added in listed.items() if isinstance(listed, dict) else ():
        if isinstance(added, dict) and added.get("content") == text and len(number) < 10:
            return int(number) if number.isdecimal() else None
    tokenizer = read_json(directory / "tokenizer.json", required=False) or {}
    added = tokenizer.get("added_tokens")
    for each in added if isinstance(added, list) else ():
        if isinstance(each, dict) and each.get("content") == text:
            return _token_id(each.get("id"))
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    return _token_id(vocab.get(text)) if isinstance(vocab, dict) else None


def _token_id(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


#: What stands in a file instead of its content if git was used without git-lfs.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_no_pointer(content: bytes, path: pathlib.Path) -> None:
    """Check that a file, of which `content` is at least the begin, is not a pointer of git-lfs.

    Raises:
        UserError: it is one.
    """
    if content.startswith(_LFS_POINTER):
        raise UserError(
            f"{path}: is a pointer of git-lfs, not the file itself: install git-lfs and run "
            f"git lfs pull in {path.parent}, or download the model again"
        )


def weight_map(directory: pathlib.Path) -> dict[str, str] | None:
    """The file of each tensor according to the index; None if there is no index.

    Raises:
        UserError: the index does not map names to safetensors files.
    """
    path = directory / INDEX
    index = read_json(path, required=False)
    if index is None:
        return None
    names = index.get("weight_map")
    files = list(names.values()) if isinstance(names, dict) else []
    if not files or not all(isinstance(f, str) and _is_file_of_weights(f) for f in files):
        raise UserError(
            f"{path}: weight_map is missing, or does not map names to safetensors files: download "
            "the file again"
        )
    return names


def _is_file_of_weights(name: str) -> bool:
    """Whether an index may name this file, which must be in the model's directory."""
    path = pathlib.PurePosixPath(name)
    return path.suffix == ".safetensors" and not path.is_absolute() and ".." not in path.parts


def indexed_files(directory: pathlib.Path) -> list[str] | None:
    """Names of the files of weights according to the index; None if there is no index."""
    names = weight_map(directory)
    return None if names is None else sorted({*names.values()})


def weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """Files of a model's weights; other files may lie beside them, as in many repositories.

    Raises:
        UserError: there are no safetensors files, or several of which neither an index nor the
            usual name says which are the model's.
    """
    names = indexed_files(directory)
    if names is not None:
        return [directory / name for name in names]
    if (usual := directory / "model.safetensors").exists():
        return [usual]
    files = sorted(directory.glob("*.safetensors"))
    if len(files) > 1:
        raise UserError(
            f"{directory}: there are {len(files)} safetensors files but no {INDEX}: download this "
            "file too"
        )
    if not files:
        raise UserError(
            f"{directory}: the weights are missing, there are no safetensors files: download the "
            "weights too, or convert them to safetensors; only --dry-run needs just config.json"
        )
    return files
