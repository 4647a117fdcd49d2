"""GPTQ (arXiv 2210.17323) with 4 or 8 bits, as AutoGPTQ and GPTQModel store it.

`qweight` is int32 [in * bits / 32, out]: a word holds consecutive inputs, the first in the lowest
bits. `scales` is [in / group, out]. `qzeros` is int32 [in / group, out * bits / 32], packed the
same way by outputs. `g_idx` int32 [in] is the group of each input. The value of a weight is
scale * (code - zero).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from dance_jax.models.config import Quantization
from dance_jax.models.formats import Matrix
from dance_jax.models.packed.base import SCALES, PackedTensor, Pieces, blocks, bytes_of
from dance_jax.models.packed.integers import (
    integer_format,
    integer_matrix,
    order_faults,
    signed,
    unpacked,
    zero_faults,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gptq(PackedTensor):
    """One GPTQ weight."""

    bits: int
    #: Added to each whole word of zero points. Version 1 of the format subtracts 1 from every zero
    #: point, and a zero point of 0 borrows from the next.
    less: int

    @staticmethod
    def open(names: dict[str, str], pieces: Pieces, quantization: Quantization) -> Gptq:
        bits, stored = quantization.bits, pieces["weight"].shape
        each = 32 // bits
        words, d_out = stored if len(stored) == 2 else (1, 1)
        d_in = words * each
        group = quantization.group or max(d_in, 1)
        found = Gptq(
            kind=f"GPTQ int{bits}",
            names=names,
            pieces=pieces,
            shape=(d_out, d_in),
            format=integer_format(bits, group, pieces, not quantization.symmetric),
            size=bytes_of(pieces),
            bits=bits,
            less=0 if quantization.layout == "gptq_v2" else 0x11111111 if bits == 4 else 0x01010101,
        )
        groups = blocks(d_in, group)
        return found.checked(
            {
                "weight": (words, d_out),
                "scale": (groups, d_out),
                "zeros": (groups, blocks(d_out, each)),
                "order": (d_in,),
            },
            {"weight": ("I32",), "scale": (*SCALES,), "zeros": ("I32",), "order": ("I32", "I64")},
            optional=("order", "zeros") if quantization.symmetric else ("order",),
        )

    def value_faults(self) -> Iterator[str]:
        yield from super().value_faults()
        yield from order_faults(self, self.format.group)
        if not self.format.offset and "zeros" in self.pieces:
            yield from zero_faults(self, self._zeros(), 1 << (self.bits - 1))

    def _zeros(self) -> np.ndarray:
        """Zero points as unsigned codes: uint8 [groups, out]."""
        words = self.pieces["zeros"].read().view(np.uint32) + np.uint32(self.less)
        return unpacked(words, self.bits)[:, : self.pieces["scale"].shape[-1]]

    def _outputs(self, begin: int, end: int) -> Matrix:
        words = self.pieces["weight"].read()[:, begin:end]
        codes = words.view(np.uint32)
        if self.bits == 8:
            each = unpacked(words[..., None], 8)  # [in / 4, out, 4]
            codes = signed(each.transpose(0, 2, 1).reshape(-1, end - begin))
        scale = self.pieces["scale"].read()[:, begin:end]
        zeros = self._zeros()[:, begin:end] if self.format.offset else None
        return integer_matrix(self.format, codes, scale, zeros)
