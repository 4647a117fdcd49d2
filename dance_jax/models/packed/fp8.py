"""fp8 (e4m3) with one scale per block of weights, per output or per tensor.

DeepSeek-V3 (arXiv 2412.19437, section 3.3.2) and transformers' finegrained_fp8 use this format. The
value of a weight is its code times its block's `weight_scale_inv`, [out / 128, in / 128], despite
the name.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dance_jax.models.config import Quantization
from dance_jax.models.formats import Matrix, WeightFormat
from dance_jax.models.packed.base import (
    SCALES,
    PackedTensor,
    Pieces,
    blocks,
    bytes_of,
)

_SCALES = SCALES | {"F8_E8M0": "e8m0"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8(PackedTensor):
    """Codes F8_E4M3 [out, in] or [e, out, in]. Scales have as many axes as the codes."""

    #: Number of outputs that share a scale.
    block_out: int = 1

    @staticmethod
    def open(names: dict[str, str], pieces: Pieces, quantization: Quantization) -> Fp8:
        shape = pieces["weight"].shape
        scale = pieces.get("scale")
        d_out, d_in = (max(length, 1) for length in (1, 1, *shape)[-2:])
        block = quantization.block or (1, d_in)
        wanted = (*shape[:-2], blocks(d_out, block[0]), blocks(d_in, block[1]))
        if not quantization.block and scale:
            of_tensor = ((*shape[:-2], 1, 1), *(((), (1,)) if len(shape) == 2 else ()))
            if scale.shape in of_tensor:
                block, wanted = (d_out, d_in), scale.shape
            elif scale.shape == shape[:-1]:
                wanted = scale.shape
        found = Fp8(
            kind="fp8",
            names=names,
            pieces=pieces,
            shape=shape,
            format=WeightFormat(
                "fp8", block[1], _SCALES.get(scale.kind if scale else "", "float32")
            ),
            size=bytes_of(pieces),
            block_out=block[0],
        )
        if len(shape) not in (2, 3):
            return dataclasses.replace(
                found, faults=(found.says("weight", f"is {list(shape)}; expected [out, in]"),)
            )
        return found.checked({"scale": wanted}, {"scale": (*_SCALES,)})

    def _outputs(self, begin: int, end: int) -> Matrix:
        codes = self.pieces["weight"].rows(begin, end).read()
        groups = blocks(self.inputs, self.format.group)
        scale = self.pieces["scale"].read().reshape(-1, groups)
        rows = np.arange(begin, end) // self.block_out
        arrays = {"codes": codes.T, "scale": scale[rows].T}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return Matrix(self.format, arrays, self.inputs)
