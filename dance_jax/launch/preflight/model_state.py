"""Compare copies of a model in a fraction of a second, without JAX or numpy.

The fingerprint of a model reads large parts of its weights. This module compares names, shapes and
sizes, which detects another model, another version, and an incomplete download.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from typing import Any

from dance_jax.config import UserError
from dance_jax.launch.preflight.disk import read_rate
from dance_jax.launch.preflight.messages import ModelState
from dance_jax.models import hub
from dance_jax.models.directory import (
    INDEX,
    MANIFEST,
    SIDE_FILES,
    is_gguf,
    json_object,
    side_files,
)

#: Largest plausible header in bytes.
_LONGEST_HEADER = 1 << 28


class _Wrong(Exception):
    """A model is unusable; the message says why."""


def model_state(directory: str | os.PathLike[str] | None) -> ModelState:
    """Inspect a model's directory.

    A model of the hub is looked for in this machine's cache; nothing is downloaded.

    Args:
        directory: in Hugging Face format or converted, a GGUF file, or a model's name on the hub;
            None: the demo of this installation.
    """
    demo = pathlib.Path(__file__).resolve().parents[2] / "demo"
    path = demo if directory is None else pathlib.Path(directory)
    state = ModelState(path=str(path), kind="")
    try:
        if directory is not None and (name := hub.hub_name(directory)) is not None:
            found = _in_cache(name)
            if found is None:
                state.kind = "to download"
                return state
            path, state.path = found, f"{name} in {found}"
        if (path / MANIFEST).exists():
            state.kind = "converted"
            state.index, state.fingerprint = _converted(path)
        elif (path / "config.json").exists():
            state.kind = "hf"
            state.index = _hugging_face(path)
        elif is_gguf(path):
            state.kind = "gguf"
            state.index = _gguf(path)
        elif path.is_dir():
            raise _Wrong("the directory has no config.json")
        else:
            raise _Wrong("the directory does not exist")
        state.definition = _definition(path)
        state.read_rate = read_rate(path)
    except (_Wrong, UserError) as error:
        state.problem = str(error)
    except OSError as error:
        state.problem = f"{error.filename or path} cannot be read: {error.strerror}"
    return state


def _in_cache(name: hub.HubName) -> pathlib.Path | None:
    try:
        found, offline = hub.cached(name), hub.is_offline()
    except ImportError as error:
        raise _Wrong(f"huggingface_hub cannot be imported ({error})") from error
    except UserError as error:
        raise _Wrong(str(error)) from error
    if found is None and offline:
        raise _Wrong("HF_HUB_OFFLINE is set, and the model is not in the cache")
    return found


def _definition(path: pathlib.Path) -> str:
    digest, files = hashlib.sha256(), side_files(path)
    for name in SIDE_FILES:
        digest.update(hashlib.sha256(files[name]).digest() if name in files else b"absent")
    return digest.hexdigest()


def _converted(path: pathlib.Path) -> tuple[str, str]:
    """Hash of the manifest and the fingerprint in it; checks that all files are complete."""
    text = (path / MANIFEST).read_bytes()
    try:
        manifest = json_object(text, path / MANIFEST)
        fingerprint, sizes = str(manifest["fingerprint"]), dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise _Wrong(f"{MANIFEST} cannot be parsed ({error}); convert the model again") from error
    for name, size in sizes.items():
        _check_size(path / name, size)
    return hashlib.sha256(text).hexdigest(), fingerprint


def _check_size(file: pathlib.Path, size: int) -> None:
    if not file.exists():
        raise _Wrong(f"{file.name} is missing; copy or convert the model again")
    if (found := file.stat().st_size) != size:
        raise _Wrong(f"{file.name} has {found:,} bytes instead of {size:,}; it is incomplete")


def _hugging_face(path: pathlib.Path) -> str:
    """Hash of the shards' names, sizes and headers; checks that all shards are complete."""
    shards = _shards(path)
    if missing := [shard.name for shard in shards if not shard.exists()]:
        raise _Wrong(f"{len(missing)} of {len(shards)} weight files are missing: {missing[0]}")
    digest = hashlib.sha256()
    for shard in shards:
        header = _header(shard)
        digest.update(f"{shard.name}\0{shard.stat().st_size}\0{len(header)}\0".encode())
        digest.update(header)
    return digest.hexdigest()


def _gguf(path: pathlib.Path) -> str:
    """Hash of all parts' sizes and headers; checks that all parts are complete."""
    from dance_jax.models.ggml.header import read_parts

    digest = hashlib.sha256()
    for part in read_parts(path):
        with part.path.open("rb") as file:
            header = file.read(part.length)
        digest.update(f"{part.path.stat().st_size}\0{len(header)}\0".encode() + header)
    return digest.hexdigest()


def _shards(path: pathlib.Path) -> list[pathlib.Path]:
    index = path / INDEX
    if index.exists():
        try:
            names = set(json_object(index.read_bytes(), index)["weight_map"].values())
            return [path / name for name in sorted(names)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _Wrong(f"{INDEX} cannot be parsed ({error})") from error
    if (usual := path / "model.safetensors").exists():
        return [usual]
    if not (found := sorted(path.glob("*.safetensors"))):
        raise _Wrong("the directory has no safetensors files")
    return found


def _header(shard: pathlib.Path) -> bytes:
    """The header of a safetensors file; checks the file's size against the header."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise _Wrong(f"{shard.name} is truncated, or not a safetensors file")
        header = file.read(length)
    try:
        _check_size(shard, 8 + length + _data_bytes(json_object(header, shard)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Wrong(f"{shard.name} is truncated, or not a safetensors file") from error
    return header


def _data_bytes(header: dict[str, Any]) -> int:
    tensors = (entry for name, entry in header.items() if name != "__metadata__")
    return max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
