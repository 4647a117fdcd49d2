"""AWQ (arXiv 2306.00978) with 4 bits, as AutoAWQ stores it for its kernel "gemm".

`qweight` is int32 [in, out / 8]: a word holds eight outputs, in the order ORDER from the lowest
bits. `qzeros` is int32 [in / group, out / 8], packed the same way. `scales` is [in / group, out].
The value of a weight is scale * (code - zero).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from dance_jax.models.config import Quantization
from dance_jax.models.formats import Matrix, pack_words
from dance_jax.models.packed.base import SCALES, PackedTensor, Pieces, blocks, bytes_of
from dance_jax.models.packed.integers import integer_format, integer_matrix, unpacked, zero_faults

#: Of the eight outputs of a word, the output that each half-byte belongs to, lowest bits first.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Awq(PackedTensor):
    """One AWQ weight."""

    @staticmethod
    def open(names: dict[str, str], pieces: Pieces, quantization: Quantization) -> Awq:
        stored = pieces["weight"].shape
        d_in, words = stored if len(stored) == 2 else (1, 1)
        group = quantization.group or max(d_in, 1)
        found = Awq(
            kind="AWQ int4",
            names=names,
            pieces=pieces,
            shape=(words * 8, d_in),
            format=integer_format(4, group, pieces, not quantization.symmetric),
            size=bytes_of(pieces),
        )
        groups = blocks(d_in, group)
        return found.checked(
            {"weight": (d_in, words), "scale": (groups, words * 8), "zeros": (groups, words)},
            {"weight": ("I32",), "scale": (*SCALES,), "zeros": ("I32",)},
            optional=("zeros",) if quantization.symmetric else (),
        )

    def value_faults(self) -> Iterator[str]:
        yield from super().value_faults()
        if not self.format.offset and "zeros" in self.pieces:
            yield from zero_faults(self, self._read("zeros"), 8)

    def _read(self, role: str) -> np.ndarray:
        """The codes of a packed tensor: uint8 [..., out]."""
        codes = unpacked(self.pieces[role].read(), 4)
        return codes.reshape(len(codes), -1, 8)[..., np.argsort(ORDER)].reshape(codes.shape)

    def _outputs(self, begin: int, end: int) -> Matrix:
        codes = pack_words(self._read("weight")[:, begin:end])
        scale = self.pieces["scale"].read()[:, begin:end]
        zeros = self._read("zeros")[:, begin:end] if self.format.offset else None
        return integer_matrix(self.format, codes, scale, zeros)
