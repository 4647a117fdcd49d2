"""Formats of a model's weights under the user's choice of rounding."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable

from dance_jax.config import Rounding, UserError
from dance_jax.models.build import matrix_shapes
from dance_jax.models.config import ModelConfig
from dance_jax.models.formats import Formats, WeightFormat, common
from dance_jax.models.hf import HFDirectory
from dance_jax.models.tensors import expert_rules, matrix_form, trunk_rules

#: Formats to which float weights are rounded, by the names in the options.
ROUNDED = {
    "bf16": WeightFormat("bfloat16"),
    "int8": WeightFormat("int8", 32, "bfloat16"),
    "int4": WeightFormat("int4", 32, "bfloat16"),
    "mxfp4": WeightFormat("mxfp4", 32, "e8m0"),
}
#: The matrices of an expert.
_EXPERT = ("w_gate", "w_up", "w_down")


def _is_router(path: str) -> bool:
    return path.endswith("router.weight")


def _wanted(rounding: Rounding, name: str) -> WeightFormat | None:
    """Format that the user's choice means for a matrix; None if the matrix keeps its format.

    Routers always keep their format: their weights are few and decide where tokens go.

    Args:
        name: "w_gate", "w_up" or "w_down" of an expert; or a path in the trunk.
    """
    choice = rounding.experts if name in _EXPERT else rounding.trunk
    if choice == "int4-mixed":
        # With four bits, these matrices alone lose more than all others together (measured).
        delicate = name in ("w_down", "embedding", "head") or ".mixer." in name
        choice = "int8" if delicate else "int4"
    return None if _is_router(name) else ROUNDED.get(choice)


def rounded(rounding: Rounding, name: str, stored: WeightFormat, d_in: int) -> WeightFormat:
    """Format of a checkpoint's matrix under the user's choice.

    Quantised matrices keep their format, and so do matrices that the chosen format does not
    support.

    Args:
        name: "w_gate", "w_up" or "w_down" of an expert; or a path in the trunk.
        stored: format of the matrix in the checkpoint.
        d_in: number of inputs of the matrix.
    """
    wanted = _wanted(rounding, name)
    if wanted is None or stored.group or not wanted.fits(d_in):
        return stored
    return wanted


def unfit_report(rounding: Rounding, config: ModelConfig) -> list[str]:
    """Lines about matrices that keep their format because the chosen one does not support them."""
    d, f = config.hidden_size, config.expert.width
    experts = [("w_gate", d), ("w_up", d), ("w_down", f)]
    trunk = [(path, d_in) for path, (_, d_in, _) in matrix_shapes(config).items()]
    return [
        *_unfit(rounding, f"--experts {rounding.experts}", "all experts", experts),
        *_unfit(rounding, f"--trunk {rounding.trunk}", "the trunk", trunk),
    ]


def _unfit(
    rounding: Rounding, option: str, where: str, matrices: Iterable[tuple[str, int]]
) -> list[str]:
    found = {}
    for name, d_in in matrices:
        form = _wanted(rounding, name)
        if form is not None and not form.fits(d_in):
            found[f"{re.sub(r'^layers[.][0-9]+[.]', '', name)} ({d_in} inputs)"] = None
    if not found:
        return []
    return [
        f"{option} needs a multiple of 8 inputs; unchanged matrices of {where}: " + ", ".join(found)
    ]


def model_formats(model: HFDirectory, rounding: Rounding) -> Formats:
    """Formats of a model's weights when it is converted.

    For each of an expert's matrices, all experts of all layers have the same format: the smallest
    that holds the checkpoint's matrices without loss.

    Raises:
        UserError: the experts are quantised, and the user chose to round them.
    """
    config = model.config
    inputs = {path: d_in for path, (_, d_in, _) in matrix_shapes(config).items()}
    trunk = {}
    for rule in trunk_rules(config):
        for target in rule.targets:
            if target.matrix:
                stored = matrix_form(target, model.tensors[rule.source])
                trunk[target.path] = rounded(rounding, target.path, stored, inputs[target.path])
    found: dict[str, set[WeightFormat]] = collections.defaultdict(set)
    for layer in config.moe_layers:
        for expert in range(config.num_experts):
            for rule in expert_rules(config, layer, expert):
                for target in rule.targets:
                    if target.matrix:
                        found[target.path].add(matrix_form(target, model.tensors[rule.source]))
    d, f = config.hidden_size, config.expert.width
    experts = {}
    for name, forms in found.items():
        stored = common(sorted(forms, key=str))
        _check_floats(str(model.path), stored, rounding)
        experts[name] = rounded(rounding, name, stored, f if name == "w_down" else d)
    return Formats(experts, trunk)


def _check_floats(where: str, stored: WeightFormat, rounding: Rounding) -> None:
    """Raise UserError if the experts are quantised and the user chose to round them."""
    if stored.group and rounding.experts != "keep":
        raise UserError(
            f"{where}: the experts are stored as {stored.kind}; --experts {rounding.experts} "
            "rounds floats only: leave out this option"
        )


def expected_formats(config: ModelConfig, rounding: Rounding) -> Formats:
    """The result of `model_formats`, predicted from config.json.

    Raises:
        UserError: the experts are quantised, and the user chose to round them.
    """
    floats, codes = WeightFormat(config.dtype), _codes(config)
    _check_floats("config.json", codes or floats, rounding)
    d, f = config.hidden_size, config.expert.width
    trunk = {}
    for path, (heads, d_in, _) in matrix_shapes(config).items():
        # No known checkpoint quantises matrices per head, embedding, head or routers; gpt-oss
        # (mxfp4) quantises only the experts.
        coded = heads == 1 and path not in ("embedding", "head") and not _is_router(path)
        stored = codes if coded and codes and codes.kind != "mxfp4" else floats
        trunk[path] = rounded(rounding, path, stored, d_in)
    experts = {
        name: rounded(rounding, name, codes or floats, d_in)
        for name, d_in in (("w_gate", d), ("w_up", d), ("w_down", f))
    }
    return Formats(experts, trunk)


def _codes(config: ModelConfig) -> WeightFormat | None:
    """Format of quantised weights according to config.json; None if weights are not quantised."""
    quantization = config.quantization
    if quantization is None:
        return None
    if quantization.method == "mxfp4":
        return WeightFormat("mxfp4", 32, "e8m0")
    block = quantization.block
    group = block[1] if block else quantization.group or config.hidden_size
    if quantization.method == "fp8" or quantization.layout == "float-quantized":
        return WeightFormat("fp8", group, "float32")
    kind, offset = ("int4" if quantization.bits == 4 else "int8"), not quantization.symmetric
    return WeightFormat(kind, group, "float32" if offset else "float16", offset)
