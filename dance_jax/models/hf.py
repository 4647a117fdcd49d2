"""A model directory in Hugging Face format: its config, and tensors checked against the config."""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Iterator

from dance_jax.config import UserError
from dance_jax.models.config import ModelConfig
from dance_jax.models.directory import (
    FIRST_SIDE_FILES,
    INDEX,
    SIDE_FILES,
    model_directory,
    read_config,
    side_files,
    weight_files,
    weight_map,
)
from dance_jax.models.packed import PackedTensor, assemble
from dance_jax.models.safetensors_file import StoredTensor, content_hash, read_header
from dance_jax.models.tensors import expert_rules, trunk_rules

#: Tensors that older programs saved although they follow from the config.
_DERIVED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")

#: A stored tensor, or several tensors that make up one quantised weight.
Tensor = StoredTensor | PackedTensor

#: Most names listed per kind of fault in a report of wrong tensors.
_LISTED = 12


class HFDirectory:
    """An opened directory with all tensors that the model needs, in the right shapes.

    Args:
        directory: a directory in Hugging Face format.
        scales: also read and check all scales of quantised weights, which may be an eighth of the
            weights' bytes.

    Raises:
        UserError: something is missing, damaged, unknown or of the wrong shape. All wrong tensors
            are listed in one report.
    """

    #: The file that determines which tensors there must be.
    described_by = "config.json"

    def __init__(self, directory: str | pathlib.Path, scales: bool = True):
        self.path = model_directory(directory)
        self.config = read_config(self.path)
        self.files = weight_files(self.path)
        self.tensors = _canonical_names(self._assembled(), self.config)
        #: Names of tensors that are known but not needed.
        self.left_out = self._leave_out()
        faults = list(_faults(self.tensors, scales))
        _cut_experts(self.tensors, self.config)
        self._check(faults)

    def left_out_report(self) -> str:
        """One line about the tensors that are skipped; "" if there are none."""
        if not self.left_out:
            return ""
        listed = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
        count = len(self.left_out)
        return f"skipped tensors that generating text does not need: {count} ({listed})"

    def _assembled(self) -> dict[str, Tensor]:
        tensors, quantization = self._headers(), self.config.quantization
        return assemble(tensors, quantization) if quantization else {**tensors}

    def report(self) -> str:
        """Text for the user after a conversion; "" if there is nothing to tell."""
        return self.left_out_report()

    def write_side_files(self, directory: pathlib.Path) -> None:
        """Write the small files that, with the weights, define the model."""
        for name, content in side_files(self.path).items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)

    def _leave_out(self) -> list[str]:
        patterns = re.compile("|".join(self.config.names.ignored or ("$^",)))
        names = sorted(name for name in self.tensors if patterns.match(name))
        for name in names:
            del self.tensors[name]
        return names

    def fingerprint(self) -> str:
        """Hash (hex) of weights, config and tokenizer; does not depend on the directory's path."""
        digest = hashlib.sha256()
        for name in SIDE_FILES:
            path = self.path / name
            if path.exists():
                digest.update(content_hash(path))
            elif name in FIRST_SIDE_FILES:
                digest.update(b"absent")
        for path in self.files:
            digest.update(path.name.encode() + content_hash(path))
        return digest.hexdigest()

    def _headers(self) -> dict[str, StoredTensor]:
        """The tensors; with an index, those that it lists, each of the file that it names."""
        listed = weight_map(self.path)
        if listed is None:
            (file,) = self.files
            return read_header(file)
        headers = {file: read_header(self.path / file) for file in {*listed.values()}}
        for name, file in listed.items():
            if name not in headers[file]:
                raise UserError(
                    f"{self.path / file}: {name} is missing, although {INDEX} lists it: download "
                    "the file again"
                )
        return {name: headers[file][name] for name, file in listed.items()}

    def _check(self, faults: list[str]) -> None:
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
            if not _DERIVED.search(name) and not self._is_no_bias(name)
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
            "faults of quantised weights": [f"\n    {fault}" for fault in faults],
        }
        report = [
            f"{len(names)} {kind}: {', '.join(names[:_LISTED])}"
            + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
            for kind, names in kinds.items()
            if names
        ]
        if report:
            raise UserError(
                f"{self.path}: the tensors do not match {self.described_by}:\n  "
                + "\n  ".join(report)
            )

    def _is_no_bias(self, name: str) -> bool:
        """Whether a tensor is a bias of zeros, which AutoGPTQ stores if the model has no bias."""
        bias = self.tensors[name]
        weight = self.tensors.get(f"{name.removesuffix('.bias')}.weight")
        quantised = name.endswith(".bias") and isinstance(weight, PackedTensor)
        return quantised and bias.is_float and not bias.read().any()


def _faults(tensors: dict[str, Tensor], scales: bool) -> Iterator[str]:
    """Faults of quantised weights and, if `scales` is set, of the values of their scales."""
    for tensor in tensors.values():
        if isinstance(tensor, PackedTensor):
            yield from tensor.faults or (tensor.value_faults() if scales else ())


def _canonical_names(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename tensors from any of their spellings to the names of `ModelConfig.names`.

    Raises:
        UserError: two tensors get the same name.
    """
    found: dict[str, Tensor] = {}
    for stored, tensor in tensors.items():
        name = stored
        for pattern, replacement in config.names.spellings:
            name = re.sub(pattern, replacement, name)
        if name in found:
            raise UserError(f"{tensor.file}: {stored} is stored twice, under two spellings")
        found[name] = tensor
    return found


def _cut_experts(tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """Split tensors with all experts of a layer into tensors of single experts, without reading.

    Modifies `tensors`. gate_up_proj is [e, 2f, d], with gate before up, or interleaved as in
    gpt-oss; the other tensors are [e, ...].
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
                    cut = {leaf: own}
                elif halves:
                    cut = {f"{gate}.weight": own.part(0, 2), f"{up}.weight": own.part(1, 2)}
                else:
                    cut = {f"{down}.weight": own}
                for part, tensor in cut.items():
                    if name + part in tensors:
                        raise UserError(
                            f"{joined.file}: {prefix}{leaf} and {name}{part} are the same weights, "
                            "stored twice"
                        )
                    tensors[name + part] = tensor
