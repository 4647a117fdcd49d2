"""Assembles the quantised weights of a checkpoint, one tensor in place of each float tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from dance_jax.models.config import Quantization
from dance_jax.models.packed.awq import Awq
from dance_jax.models.packed.base import PackedTensor, Pieces
from dance_jax.models.packed.compressed_tensors import IntQuantized, PackQuantized
from dance_jax.models.packed.fp8 import Fp8
from dance_jax.models.packed.gptq import Gptq
from dance_jax.models.packed.mxfp4 import Mxfp4, Mxfp4Linear
from dance_jax.models.safetensors_file import StoredTensor

__all__ = ["PackedTensor", "assemble"]


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """The names of the tensors that hold one quantised weight, as suffixes."""

    #: Suffix of the codes.
    codes: str
    #: Suffix of the float tensor that the weight replaces.
    float: str
    open: Callable[[dict[str, str], Pieces, Quantization], PackedTensor]
    #: Suffixes of the other tensors by role, each in one or more spellings.
    others: Mapping[str, tuple[str, ...]]
    #: Suffixes of tensors that are not needed: they say how activations would be rounded.
    unused: tuple[str, ...] = ()
    #: Type of the codes, if floats may have the same name. "" if they cannot.
    type: str = ""


_ACTIVATIONS = (".input_scale", ".input_zero_point", ".activation_scale")
_FP8 = (
    TensorNames(
        *(".weight", ".weight", Fp8.open),
        {"scale": (".weight_scale_inv", ".weight_scale")},
        _ACTIVATIONS,
        type="F8_E4M3",
    ),
    # The weights of all experts in one tensor.
    TensorNames("", "", Fp8.open, {"scale": ("_scale_inv", "_scale")}, type="F8_E4M3"),
)
_INTEGERS = {"scale": (".weight_scale",), "zeros": (".weight_zero_point",)}
_WORDS = {"scale": (".scales",), "zeros": (".qzeros",)}
#: By `Quantization.method`; for compressed-tensors by its format.
LAYOUTS: dict[str, tuple[TensorNames, ...]] = {
    "fp8": _FP8,
    "mxfp4": (TensorNames("_blocks", "", Mxfp4.open, {"scale": ("_scales",)}),),
    "gptq": (TensorNames(".qweight", ".weight", Gptq.open, _WORDS | {"order": (".g_idx",)}),),
    "awq": (TensorNames(".qweight", ".weight", Awq.open, _WORDS),),
    "pack-quantized": (
        TensorNames(
            *(".weight_packed", ".weight", PackQuantized.open),
            _INTEGERS | {"shape": (".weight_shape",), "order": (".weight_g_idx",)},
            _ACTIVATIONS,
        ),
    ),
    "int-quantized": (
        TensorNames(".weight", ".weight", IntQuantized.open, _INTEGERS, _ACTIVATIONS, type="I8"),
    ),
    "float-quantized": _FP8,
    "mxfp4-pack-quantized": (
        TensorNames(
            *(".weight_packed", ".weight", Mxfp4Linear.open),
            {"scale": (".weight_scale",)},
            _ACTIVATIONS,
        ),
    ),
}


def assemble(
    tensors: Mapping[str, StoredTensor], quantization: Quantization
) -> dict[str, StoredTensor | PackedTensor]:
    """A checkpoint's tensors, with one `PackedTensor` for the tensors of each quantised weight.

    Float tensors, and tensors that belong to no weight, stay as they are. A weight lists its
    defects in `faults`.
    """
    method = quantization.method
    layouts = LAYOUTS[quantization.layout if method == "compressed-tensors" else method]
    found: dict[str, StoredTensor | PackedTensor] = dict(tensors)
    for name, codes in tensors.items():
        layout = next((each for each in layouts if _has_codes(each, name, codes)), None)
        if layout is None:
            continue
        stem = name.removesuffix(layout.codes)
        names, pieces = {"weight": name}, {"weight": codes}
        for role, ends in layout.others.items():
            stored = [stem + end for end in ends if stem + end in tensors]
            names[role] = stored[0] if stored else stem + ends[0]
            if stored:
                pieces[role] = tensors[stored[0]]
        for used in [*names.values(), *(stem + end for end in layout.unused)]:
            found.pop(used, None)
        packed = layout.open(names, pieces, quantization)
        float_name = stem + layout.float
        if float_name in found:
            twice = packed.says("weight", f"{float_name} is the same weight, stored twice")
            packed = dataclasses.replace(packed, faults=(*packed.faults, twice))
        found[float_name] = packed
    return found


def _has_codes(layout: TensorNames, name: str, tensor: StoredTensor) -> bool:
    return name.endswith(layout.codes) and layout.type in ("", tensor.kind)
