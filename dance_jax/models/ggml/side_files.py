"""Converts a GGUF file's metadata to the small files of a Hugging Face directory."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from dance_jax.config import UserError
from dance_jax.models.config import ModelConfig
from dance_jax.models.families import model_config
from dance_jax.models.ggml.config import config_fields, token_fields
from dance_jax.models.ggml.header import Header, read_parts
from dance_jax.models.ggml.tokenizer import tokenizer_files


def gguf_config(parts: list[Header]) -> ModelConfig:
    """The model configuration that the metadata describe.

    Args:
        parts: result of `header.read_parts`.

    Raises:
        UserError: the model is not supported.
    """
    path = parts[0].path
    generation = token_fields(path, parts[0].metadata)
    return model_config(config_fields(parts), generation, f"{path}, its metadata as config.json")


def gguf_side_files(path: pathlib.Path) -> dict[str, bytes]:
    """The content of config.json, the tokenizer files and the chat template, by file name.

    Raises:
        UserError: the model is not supported, or the file is truncated.
    """
    parts = read_parts(path)
    metadata = parts[0].metadata
    files: dict[str, Any] = {
        "config.json": config_fields(parts),
        "generation_config.json": token_fields(path, metadata),
        **tokenizer_files(metadata, path),
    }
    found = {
        name: (json.dumps(content, ensure_ascii=False) + "\n").encode()
        for name, content in files.items()
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise UserError(f"{path}: tokenizer.chat_template is {template!r}; expected text")
        found["chat_template.jinja"] = template.encode()
    return found
