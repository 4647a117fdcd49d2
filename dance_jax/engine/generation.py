"""What generation_config.json says about sampling: defaults for requests that say nothing else."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from dance_jax.config import UserError
from dance_jax.engine.sequence import SamplingParams
from dance_jax.models.directory import json_object, model_directory, side_files

FILE = "generation_config.json"
#: Fields of the file that vLLM takes as well, and the parameters that they are the defaults of.
FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def sampling_defaults(directory: str | os.PathLike[str], use: str = "auto") -> dict[str, Any]:
    """The defaults that a model's files give for fields of `SamplingParams`.

    Args:
        directory: of the model, in Hugging Face format or converted, or a GGUF file.
        use: "auto", or "none" for no defaults.

    Raises:
        UserError: the file is damaged, or a value is not one of a sampling parameter.
    """
    if use == "none":
        return {}
    path = model_directory(directory)
    content = side_files(path).get(FILE)
    if content is None:
        return {}
    fields = json_object(content, path / FILE)
    found = {to: fields[name] for name, to in FIELDS.items() if fields.get(name) is not None}
    try:
        SamplingParams(**found)
    except UserError as error:
        message = str(error).removeprefix("SamplingParams.")
        raise UserError(
            f"{pathlib.Path(path) / FILE}: {message}; correct the file, or start with "
            "--generation-config none"
        ) from error
    return found


def in_words(defaults: dict[str, Any]) -> str:
    """The defaults as "name=value, ..."."""
    return ", ".join(f"{name}={value}" for name, value in defaults.items())
