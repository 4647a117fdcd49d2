"""Integer weights as compressed-tensors (llm-compressor, Kimi-K2-Thinking) stores them.

"pack-quantized": `weight_packed` is int32 [out, in * bits / 32]. A word holds the unsigned codes of
consecutive inputs, the first in the lowest bits. `weight_scale` is [out, in / group],
`weight_zero_point` is int32 [out * bits / 32, in / group], packed by outputs, and `weight_shape` is
[out, in].

"int-quantized": `weight` is int8 [out, in]. `weight_scale` and `weight_zero_point` (int8) are
[out, 1], or [1] for the whole tensor.

In both, the value of a weight is scale * (code - zero).
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
class PackQuantized(PackedTensor):
    """One weight with its codes packed in words."""

    bits: int

    @staticmethod
    def open(names: dict[str, str], pieces: Pieces, quantization: Quantization) -> PackQuantized:
        bits, stored = quantization.bits, pieces["weight"].shape
        each = 32 // bits
        d_out, words = stored if len(stored) == 2 else (1, 1)
        d_in = words * each
        group = quantization.group or max(d_in, 1)
        found = PackQuantized(
            kind=f"compressed-tensors int{bits}",
            names=names,
            pieces=pieces,
            shape=(d_out, d_in),
            format=integer_format(bits, group, pieces, not quantization.symmetric),
            size=bytes_of(pieces),
            bits=bits,
        )
        groups = blocks(d_in, group)
        whole = ("I64", "I32")
        return found.checked(
            {
                "weight": (d_out, words),
                "scale": (d_out, groups),
                "zeros": (blocks(d_out, each), groups),
                "shape": (2,),
                "order": (d_in,),
            },
            {
                "weight": ("I32",),
                "scale": (*SCALES,),
                "zeros": ("I32",),
                "shape": whole,
                "order": whole,
            },
            optional=("shape", "order", *(("zeros",) if quantization.symmetric else ())),
        )

    def value_faults(self) -> Iterator[str]:
        yield from super().value_faults()
        yield from order_faults(self, self.format.group)
        if "shape" in self.pieces:
            stated = self.pieces["shape"].read().tolist()
            if stated != [*self.shape]:
                yield self.says("shape", f"says {stated}, the codes are of {[*self.shape]}")
        if not self.format.offset and "zeros" in self.pieces:
            yield from zero_faults(self, self._zeros(), 1 << (self.bits - 1))

    def _zeros(self) -> np.ndarray:
        """Zero points as unsigned codes: uint8 [groups, out]."""
        return unpacked(self.pieces["zeros"].read().T, self.bits)[:, : self.outputs]

    def _outputs(self, begin: int, end: int) -> Matrix:
        words = self.pieces["weight"].rows(begin, end).read()
        codes = words.view(np.uint32).T if self.bits == 4 else signed(unpacked(words, 8)).T
        scale = self.pieces["scale"].rows(begin, end).read().T
        zeros = None
        if self.format.offset:
            zeros = unpacked(self.pieces["zeros"].read().T, self.bits)[:, begin:end]
        return integer_matrix(self.format, codes, scale, zeros)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntQuantized(PackedTensor):
    """One weight with one byte per code."""

    @staticmethod
    def open(names: dict[str, str], pieces: Pieces, quantization: Quantization) -> IntQuantized:
        stored, scale = pieces["weight"].shape, pieces.get("scale")
        d_out, d_in = stored if len(stored) == 2 else (1, 1)
        found = IntQuantized(
            kind="compressed-tensors int8",
            names=names,
            pieces=pieces,
            shape=(d_out, d_in),
            format=integer_format(8, max(d_in, 1), pieces, not quantization.symmetric),
            size=bytes_of(pieces),
        )
        of_tensor = scale and scale.shape in ((), (1,))
        groups = scale.shape if scale and of_tensor else (d_out, 1)
        return found.checked(
            {"weight": (d_out, d_in), "scale": groups, "zeros": groups},
            {"weight": ("I8",), "scale": (*SCALES,), "zeros": ("I8",)},
            optional=("zeros",) if quantization.symmetric else (),
        )

    def value_faults(self) -> Iterator[str]:
        yield from super().value_faults()
        if not self.format.offset and "zeros" in self.pieces:
            yield from zero_faults(self, self.pieces["zeros"].read(), 0)

    def _outputs(self, begin: int, end: int) -> Matrix:
        codes = self.pieces["weight"].rows(begin, end).read().T

        def of_outputs(role: str) -> np.ndarray:
            """The values of a piece for these outputs: [1, out]."""
            stored = self.pieces[role].read().reshape(-1)
            return stored[begin:end][None] if len(stored) > 1 else np.full((1, end - begin), stored)

        zeros = None
        if self.format.offset:
            zeros = of_outputs("zeros").astype(np.int16) + 128
        return integer_matrix(self.format, codes, of_outputs("scale"), zeros)
