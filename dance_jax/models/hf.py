"""A model directory in Hugging Face format: its config, and its tensors checked against it."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from typing import Any

from dance_jax.config import UserError
from dance_jax.models.config import ModelConfig
from dance_jax.models.families import FAMILIES
from dance_jax.models.safetensors_file import StoredTensor, content_hash, read_header

INDEX = "model.safetensors.index.json"

#: Small files that define the model beside its weights; copied when it is converted.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

#: Tensors that older programs saved and that hold nothing of their own.
_DERIVED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")

#: Names listed of each kind in a report of wrong tensors.
_LISTED = 12


def model_directory(directory: str | pathlib.Path) -> pathlib.Path:
    """The path of a model, which must be a directory.

    Raises:
        UserError: it is none.
    """
    path = pathlib.Path(directory)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such directory; a model is a directory on this machine, download it first"
        )
    return path


def read_json(path: pathlib.Path, required: bool = True) -> dict[str, Any] | None:
    """A JSON object from a file; None where it is absent and not required.

    Raises:
        UserError: missing, or not a JSON object; the message names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if not required:
            return None
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_config(directory: str | pathlib.Path) -> ModelConfig:
    """The model of a directory with config.json and perhaps generation_config.json."""
    directory = pathlib.Path(directory)
    path = directory / "config.json"
    fields = read_json(path)
    assert fields is not None
    generation = read_json(directory / "generation_config.json", required=False)
    return ModelConfig.from_hf(fields, generation, str(path))


class HFDirectory:
    """An opened directory; every tensor the model needs is there in the right shape.

    Raises:
        UserError: anything is missing, torn, unknown or of the wrong shape. Tensors come in one
            report.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.path = model_directory(directory)
        self.config = read_config(self.path)
        self.files = _weight_files(self.path)
        self.tensors = self._headers()
        _rename(self.tensors, self.config)
        self._check()

    def fingerprint(self) -> str:
        """Hash (hex) of weights, config and tokenizer; the same wherever the files lie."""
        digest = hashlib.sha256()
        for name in SIDE_FILES:
            path = self.path / name
            digest.update(content_hash(path) if path.exists() else b"absent")
        for path in self.files:
            digest.update(path.name.encode() + content_hash(path))
        return digest.hexdigest()

    def _headers(self) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        for path in self.files:
            for name, tensor in read_header(path).items():
                if name in tensors:
                    raise UserError(f"{path}: {name} is also in {tensors[name].file.name}")
                tensors[name] = tensor
        index = read_json(self.path / INDEX, required=False)
        for name, file in (index or {}).get("weight_map", {}).items():
            if name not in tensors:
                raise UserError(f"{self.path / file}: lacks {name}, which {INDEX} says it has")
        return tensors

    def _check(self) -> None:
        family = FAMILIES[self.config.family]
        wanted = {rule.source: rule.shape for rule in family.tensor_rules(self.config)}
        for layer in self.config.moe_layers:
            for expert in range(self.config.num_experts):
                for rule in family.expert_tensors(self.config, layer, expert):
                    wanted[rule.source] = rule.shape
        harmless = {"lm_head.weight"} if self.config.tie_embeddings else set()
        missing = sorted(wanted.keys() - self.tensors.keys())
        extra = sorted(
            name
            for name in self.tensors.keys() - wanted.keys() - harmless
            if not _DERIVED.search(name)
        )
        shared = wanted.keys() & self.tensors.keys()
        wrong = [
            f"{name} is {list(self.tensors[name].shape)}, not {list(wanted[name])}"
            for name in sorted(shared)
            if self.tensors[name].shape != wanted[name]
        ]
        typed = [
            f"{name} is {self.tensors[name].kind}"
            for name in sorted(shared)
            if not self.tensors[name].is_float
        ]
        kinds = {
            "missing": missing,
            "not part of this model": extra,
            "of the wrong shape": wrong,
            "of an unsupported type": typed,
        }
        report = [
            f"{len(names)} {kind}: {', '.join(names[:_LISTED])}"
            + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
            for kind, names in kinds.items()
            if names
        ]
        if report:
            raise UserError(
                f"{self.path}: the tensors do not fit config.json:\n  " + "\n  ".join(report)
            )


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    index_path = directory / INDEX
    index = read_json(index_path, required=False)
    if index is not None:
        names = index.get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
            raise UserError(f"{index_path}: weight_map is missing or not a map of names to files")
        return [directory / name for name in sorted(set(names.values()))]
    files = sorted(directory.glob("*.safetensors"))
    if len(files) > 1:
        raise UserError(f"{directory}: {len(files)} safetensors files but no {INDEX}")
    if not files:
        raise UserError(f"{directory}: no safetensors files")
    return files


def _rename(tensors: dict[str, StoredTensor], config: ModelConfig) -> None:
    """Brings transformers 5's names of modules to those of published checkpoints, in place.

    Experts stored as one tensor (gate_up_proj [e, 2f, d], down_proj [e, d, f]) are cut by offset.
    """
    if config.family == "mixtral":
        for name in [name for name in tensors if re.match(r"model\.layers\.\d+\.mlp\.", name)]:
            tensors[name.replace(".mlp.", ".block_sparse_moe.", 1)] = tensors.pop(name)
    e, d, f = config.num_experts, config.hidden_size, config.expert_width
    family = FAMILIES[config.family]
    for layer in config.moe_layers:
        first = family.expert_tensors(config, layer, 0)[0].source
        prefix = first[: first.index(".experts.") + len(".experts.")]
        both, down = f"{prefix}gate_up_proj", f"{prefix}down_proj"
        if both not in tensors or down not in tensors:
            continue
        if tensors[both].shape != (e, 2 * f, d) or tensors[down].shape != (e, d, f):
            raise UserError(
                f"{tensors[both].file}: {both} is {list(tensors[both].shape)} and {down} is "
                f"{list(tensors[down].shape)}, not {[e, 2 * f, d]} and {[e, d, f]}"
            )
        joined, outputs = tensors.pop(both), tensors.pop(down)
        for expert in range(e):
            rules = family.expert_tensors(config, layer, expert)
            pair = joined.part(expert, e).without_first_axis()
            tensors[rules[0].source], tensors[rules[1].source] = pair.part(0, 2), pair.part(1, 2)
            tensors[rules[2].source] = outputs.part(expert, e).without_first_axis()
