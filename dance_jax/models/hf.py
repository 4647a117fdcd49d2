"""A model directory in Hugging Face format: its config, and its tensors checked against it."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from typing import Any

from dance_jax.config import UserError
from dance_jax.models.config import ModelConfig
from dance_jax.models.families import model_config
from dance_jax.models.safetensors_file import StoredTensor, content_hash, read_header
from dance_jax.models.tensors import expert_rules, trunk_rules

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

_WEIGHTS = re.compile(r"\.safetensors$")
#: Tensors that older programs saved and that hold nothing of their own.
_DERIVED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")

#: Names listed of each kind in a report of wrong tensors.
_LISTED = 12


def model_directory(directory: str | os.PathLike[str]) -> pathlib.Path:
    """The path of a model, which must be a directory.

    Raises:
        UserError: it is none.
    """
    path = pathlib.Path(directory)
    if not path.is_dir():
        raise UserError(
            f"{os.fspath(directory)}: no such directory; a model is a directory on this machine, "
            "or org/name or org/name@revision on the Hugging Face hub"
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
    return model_config(fields, generation, str(path))


def check_loadable(config: ModelConfig, directory: pathlib.Path) -> None:
    """Raises UserError if the weights are of a kind that cannot be read."""
    if config.quantization:
        raise UserError(
            f"{directory}: the weights are quantised ({config.quantization}, by config.json's "
            "quantization_config); only float32, float16 and bfloat16 can be read: use a copy of "
            "the model in one of them"
        )


class HFDirectory:
    """An opened directory; every tensor the model needs is there in the right shape.

    Raises:
        UserError: anything is missing, torn, unknown or of the wrong shape. Tensors come in one
            report.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.path = model_directory(directory)
        self.config = read_config(self.path)
        check_loadable(self.config, self.path)
        self.files = weight_files(self.path)
        self.tensors = _spelled(self._headers(), self.config)
        #: Names of tensors that are known and not needed.
        self.left_out = self._leave_out()
        _cut_experts(self.tensors, self.config)
        self._check()

    def left_out_report(self) -> str:
        """One line on the tensors that are left out; "" where there are none."""
        if not self.left_out:
            return ""
        listed = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
        count = len(self.left_out)
        return f"left out, as generating text does not need them: {count} tensors ({listed})"

    def _leave_out(self) -> list[str]:
        patterns = re.compile("|".join(self.config.names.ignored or ("$^",)))
        names = sorted(name for name in self.tensors if patterns.match(name))
        for name in names:
            del self.tensors[name]
        return names

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
        wanted = {rule.source: rule.shape for rule in trunk_rules(self.config)}
        for layer in self.config.moe_layers:
            for expert in range(self.config.num_experts):
                for rule in expert_rules(self.config, layer, expert):
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


def indexed_files(directory: pathlib.Path) -> list[str] | None:
    """Names of the files of weights by the index; None where there is none.

    Raises:
        UserError: the index is no map of names to safetensors files.
    """
    path = directory / INDEX
    index = read_json(path, required=False)
    if index is None:
        return None
    names = index.get("weight_map")
    files = set(names.values()) if isinstance(names, dict) else set()
    if not files or not all(isinstance(file, str) and _WEIGHTS.search(file) for file in files):
        raise UserError(f"{path}: weight_map is missing or no map of names to safetensors files")
    return sorted(files)


def weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files of a model's weights.

    Raises:
        UserError: there are none, or nobody says which they are.
    """
    names = indexed_files(directory)
    if names is not None:
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if len(files) > 1:
        raise UserError(f"{directory}: {len(files)} safetensors files but no {INDEX}")
    if not files:
        raise UserError(
            f"{directory}: the weights are missing, there are no safetensors files: download them "
            "too, or convert them to safetensors; --dry-run needs config.json alone"
        )
    return files


def _spelled(tensors: dict[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors under the names of `ModelConfig.names`, whichever spelling they are stored in.

    Raises:
        UserError: two tensors are one by their names.
    """
    found: dict[str, StoredTensor] = {}
    for stored, tensor in tensors.items():
        name = stored
        for pattern, replacement in config.names.spellings:
            name = re.sub(pattern, replacement, name)
        if name in found:
            raise UserError(f"{tensor.file}: {stored} is stored twice, under two spellings")
        found[name] = tensor
    return found


def _cut_experts(tensors: dict[str, StoredTensor], config: ModelConfig) -> None:
    """Cuts tensors of all experts of a layer into one expert's each, by offset and in place.

    gate_up_proj is [e, 2f, d], gate before up, or as gpt-oss has it; others are [e, ...].
    """
    experts, width = config.num_experts, config.expert.width
    interleaved = config.names.experts_as == "interleaved"
    for layer in config.moe_layers:
        prefix = f"model.layers.{layer}.{config.names.experts}."
        for leaf in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
            joined = tensors.get(prefix + leaf)
            if joined is None:
                continue
            gate, up, down = config.names.projections
            halves = leaf == "gate_up_proj" and not interleaved
            rows = joined.shape[1:2] if joined.shape[:1] == (experts,) else ()
            if not rows or (halves and rows != (2 * width,)):
                wanted = f"[{experts}, {2 * width}, ...]" if halves else f"[{experts}, ...]"
                raise UserError(
                    f"{joined.file}: {prefix}{leaf} is {list(joined.shape)}, not {wanted}"
                )
            del tensors[prefix + leaf]
            for expert in range(experts):
                own = joined.part(expert, experts).without_first_axis()
                name = f"{prefix}{expert}."
                if interleaved:
                    tensors[name + leaf] = own
                elif halves:
                    tensors[f"{name}{gate}.weight"] = own.part(0, 2)
                    tensors[f"{name}{up}.weight"] = own.part(1, 2)
                else:
                    tensors[f"{name}{down}.weight"] = own
