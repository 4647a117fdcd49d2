"""Defaults of sampling from generation_config.json."""

from __future__ import annotations

import json
import pathlib

import pytest

from dance_jax.config import UserError
from dance_jax.engine.generation import in_words, sampling_defaults


def written(folder: pathlib.Path, **fields: object) -> pathlib.Path:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def test_fields_of_sampling_are_taken(tmp_path: pathlib.Path) -> None:
    assert sampling_defaults(tmp_path) == {}
    others = {
        "eos_token_id": [1, 2],
        "do_sample": True,
        "transformers_version": "5.0",
        "top_p": None,
    }
    folder = written(tmp_path, temperature=0.001, top_k=1, max_new_tokens=2048, **others)
    defaults = sampling_defaults(folder)
    assert defaults == {"temperature": 0.001, "top_k": 1, "max_tokens": 2048}
    assert in_words(defaults) == "temperature=0.001, top_k=1, max_tokens=2048"
    assert sampling_defaults(folder, "none") == {}


@pytest.mark.parametrize("fields", [{"temperature": "hot"}, {"top_p": 1.5}, {"top_k": -7}])
def test_a_wrong_value_is_named(tmp_path: pathlib.Path, fields: dict[str, object]) -> None:
    (name,) = fields
    message = rf"generation_config\.json: {name}: .*--generation-config none"
    with pytest.raises(UserError, match=message):
        sampling_defaults(written(tmp_path, **fields))
