"""MXFP4 (OCP Microscaling Formats 1.0): e2m1 in groups of 32 inputs.

gpt-oss: `_blocks` is uint8 [e, out, in / 32, 16]; the low half of a byte is the earlier input.
`_scales` is uint8 [e, out, in / 32]: exponents of bias 127. The float tensor is [e, in, out].
compressed-tensors' "mxfp4-pack-quantized" stores one weight the same way, as `weight_packed`
[out, in / 2] and `weight_scale` [out, in / 32]; the float tensor is [out, in].
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from dance_jax.models.config import Quantization
from dance_jax.models.formats import Matrix, WeightFormat
from dance_jax.models.packed.base import PackedTensor, Pieces, blocks, bytes_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mxfp4(PackedTensor):
    """gpt-oss's layout: the weights of all experts of a layer, or of one expert."""

    in_first: ClassVar[bool] = True

    @staticmethod
    def open(names: dict[str, str], pieces: Pieces, quantization: Quantization) -> Mxfp4:
        stored = pieces["weight"].shape
        fits = len(stored) == 4 and stored[3] == 16
        found = Mxfp4(
            kind="MXFP4",
            names=names,
            pieces=pieces,
            shape=(stored[0], stored[2] * 32, stored[1]) if fits else stored,
            format=WeightFormat("mxfp4", quantization.group, "e8m0"),
            size=bytes_of(pieces),
        )
        if not fits:
            wrong = f"is {list(stored)}; expected [experts, out, in / 32, 16]"
            return dataclasses.replace(found, faults=(found.says("weight", wrong),))
        return found.checked(
            {"weight": stored, "scale": stored[:3]},
            {"weight": ("U8",), "scale": ("U8", "F8_E8M0")},
        )

    def _outputs(self, begin: int, end: int) -> Matrix:
        bytes_ogb = self.pieces["weight"].rows(begin, end).read()
        words = bytes_ogb.reshape(end - begin, -1).view(np.uint32)
        scale = self.pieces["scale"].rows(begin, end).read()
        arrays = {"codes": words.T, "scale": scale.T}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return Matrix(self.format, arrays, self.inputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mxfp4Linear(Mxfp4):
    """compressed-tensors' layout: one weight."""

    in_first: ClassVar[bool] = False

    @staticmethod
    def open(names: dict[str, str], pieces: Pieces, quantization: Quantization) -> Mxfp4Linear:
        stored = pieces["weight"].shape
        d_out, octets = stored if len(stored) == 2 else (1, 1)
        found = Mxfp4Linear(
            kind="compressed-tensors MXFP4",
            names=names,
            pieces=pieces,
            shape=(d_out, 2 * octets),
            format=WeightFormat("mxfp4", quantization.group, "e8m0"),
            size=bytes_of(pieces),
        )
        return found.checked(
            {"weight": (d_out, octets), "scale": (d_out, blocks(2 * octets, quantization.group))},
            {"weight": ("U8",), "scale": ("U8", "F8_E8M0")},
        )
