"""Tensors of GGUF files, with the shape and the order of rows that Hugging Face has."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import numpy as np

from dance_jax.config import UserError
from dance_jax.models.formats import Matrix, WeightFormat
from dance_jax.models.ggml.header import Place
from dance_jax.models.ggml.kinds import KINDS, PLAIN, decode, format_of, values


@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A tensor in blocks; only its own bytes are read."""

    file: pathlib.Path
    #: ggml's name of the type, e.g. "Q4_K".
    kind: str
    #: [..., out, in]
    shape: tuple[int, ...]
    #: Byte of the file at which the tensor begins.
    offset: int
    size: int
    #: Rows of so many heads are stored with the two of each rotated pair side by side, as the
    #: architecture "llama" has them; 0: in Hugging Face's order.
    paired_heads: int = 0

    @staticmethod
    def at(place: Place) -> PackedTensor:
        """The tensor that a header describes."""
        return PackedTensor(place.file, place.kind, place.shape, place.offset, place.size)

    @property
    def is_float(self) -> bool:
        """True if the type is one that weights can have here."""
        return self.kind in PLAIN or self.kind in KINDS

    @property
    def format(self) -> WeightFormat:
        """Of `matrix`; only where `is_float`."""
        return format_of(self.kind)

    def part(self, index: int, parts: int) -> PackedTensor:
        """The index-th of `parts` equal pieces along the first axis, which must divide."""
        size = self.size // parts
        shape = (self.shape[0] // parts, *self.shape[1:])
        return dataclasses.replace(self, shape=shape, offset=self.offset + index * size, size=size)

    def without_first_axis(self) -> PackedTensor:
        """The same bytes for a shape that begins with 1."""
        return dataclasses.replace(self, shape=self.shape[1:])

    def matrix(self) -> Matrix:
        """The weights [in, out] of a tensor [out, in], in `format`."""
        rows, d_in = self.shape
        found = decode(self.kind, self._bytes(), (rows, d_in))
        return found.outputs(self._order()) if self.paired_heads else found

    def read(self) -> np.ndarray:
        """The weights as float32, of types without blocks as they are stored."""
        rows = math.prod(self.shape[:-1])
        found = values(self.kind, self._bytes(), (rows, self.shape[-1])).reshape(self.shape)
        return found[self._order()] if self.paired_heads else found

    def _order(self) -> np.ndarray:
        """Where each row is stored: first the first ones of all pairs of a head."""
        rows = np.arange(self.shape[0]).reshape(self.paired_heads, -1, 2)
        return rows.swapaxes(1, 2).reshape(-1)

    def _bytes(self) -> np.ndarray:
        found = np.fromfile(self.file, np.uint8, self.size, offset=self.offset)
        if len(found) < self.size:
            raise UserError(f"{self.file}: truncated: it ends within a tensor; download it again")
        return found


@dataclasses.dataclass(frozen=True)
class LatentHeads:
    """DeepSeek's kv_b_proj [heads * (nope + value), rank] of a file that has its halves apart."""

    #: [heads, rank, nope]: the keys' half, transposed.
    keys: PackedTensor
    #: [heads, value, rank]
    values: PackedTensor

    @property
    def file(self) -> pathlib.Path:
        return self.keys.file

    @property
    def kind(self) -> str:
        kinds = dict.fromkeys((self.keys.kind, self.values.kind))
        return " and ".join(kinds)

    @property
    def shape(self) -> tuple[int, ...]:
        heads, rank, nope = self.keys.shape
        return heads * (nope + self.values.shape[1]), rank

    @property
    def size(self) -> int:
        return self.keys.size + self.values.size

    @property
    def is_float(self) -> bool:
        return self.keys.is_float and self.values.is_float

    @property
    def format(self) -> WeightFormat:
        """Floats: groups of the keys' half run along another axis."""
        return WeightFormat(PLAIN.get(self.kind, "float32"))

    def matrix(self) -> Matrix:
        """The weights [rank, heads * (nope + value)]."""
        return Matrix.of(self.read().T)

    def read(self) -> np.ndarray:
        """The weights as floats."""
        halves = [self.keys.read().transpose(0, 2, 1), self.values.read()]
        if halves[0].dtype != halves[1].dtype:
            halves = [half.astype(np.float32) for half in halves]
        return np.concatenate(halves, axis=1).reshape(self.shape)


Tensor = PackedTensor | LatentHeads
