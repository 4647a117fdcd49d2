"""Tensors of GGUF files, with the shape and the order of rows that Hugging Face has."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable

import numpy as np

from dance_jax.config import UserError
from dance_jax.models.formats import Matrix, WeightFormat, common
from dance_jax.models.ggml.header import Place
from dance_jax.models.ggml.kinds import KINDS, PLAIN, decode, format_of, values


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor in blocks; only its own bytes are read."""

    file: pathlib.Path
    #: ggml's name of the type, e.g. "Q4_K".
    kind: str
    #: [..., out, in]
    shape: tuple[int, ...]
    #: Byte of the file at which the tensor begins.
    offset: int
    size: int
    #: In the file, where it is another one.
    stored: tuple[int, ...] = ()
    #: Where each row of a matrix, or each number of a vector, is stored; None: in order.
    rows: np.ndarray | None = None
    #: Where each input is stored.
    inputs: np.ndarray | None = None
    #: Applied to values without blocks.
    change: Callable[[np.ndarray], np.ndarray] | None = None

    @staticmethod
    def at(place: Place) -> GgufTensor:
        """The tensor that a header describes."""
        return GgufTensor(place.file, place.kind, place.shape, place.offset, place.size)

    @property
    def is_float(self) -> bool:
        """True if the type is one that weights can have here."""
        return self.kind in PLAIN or self.kind in KINDS

    @property
    def format(self) -> WeightFormat:
        """Of `matrix`; only where `is_float`."""
        form = format_of(self.kind)
        return form if self._whole(form.group or 1) else WeightFormat("float32")

    def _whole(self, unit: int) -> bool:
        """Whether groups of so many inputs stay together."""
        if self.inputs is None:
            return True
        if len(self.inputs) % unit:
            return False
        groups = self.inputs.reshape(-1, unit)
        first = groups[:, :1]
        return not (first % unit).any() and bool((groups == first + np.arange(unit)).all())

    def part(self, index: int, parts: int) -> GgufTensor:
        """The index-th of `parts` equal pieces along the first axis, which must divide."""
        size = self.size // parts
        shape = (self.shape[0] // parts, *self.shape[1:])
        return dataclasses.replace(self, shape=shape, offset=self.offset + index * size, size=size)

    def without_first_axis(self) -> GgufTensor:
        """The same bytes for a shape that begins with 1."""
        return dataclasses.replace(self, shape=self.shape[1:])

    def matrix(self, inputs_first: bool = False) -> Matrix:
        """The weights [in, out] of a tensor [out, in], in `format`; no file has [in, out]."""
        assert not inputs_first
        if self.change or not self._whole(format_of(self.kind).group or 1):
            return Matrix.of(self.read().T)
        rows, d_in = self.stored or self.shape
        found = decode(self.kind, self._bytes(), (rows, d_in))
        if self.inputs is not None:
            arrays = {name: self._moved(array) for name, array in found.arrays.items()}
            found = dataclasses.replace(found, arrays=arrays)
        return found if self.rows is None else found.outputs(self.rows)

    def _moved(self, array: np.ndarray) -> np.ndarray:
        """Rows of an array, each of some inputs, in the order of `inputs`."""
        assert self.inputs is not None
        unit = len(self.inputs) // len(array)
        return array[self.inputs[::unit] // unit]

    def read(self) -> np.ndarray:
        """The weights as float32, of types without blocks as they are stored."""
        stored = self.stored or self.shape
        found = values(self.kind, self._bytes(), (math.prod(stored[:-1]), stored[-1]))
        found = found.reshape(stored)
        if self.inputs is not None:
            found = found[..., self.inputs]
        if self.rows is not None:
            found = found[self.rows]
        found = found.reshape(self.shape)
        return found if self.change is None else self.change(found)

    def _bytes(self) -> np.ndarray:
        found = np.fromfile(self.file, np.uint8, self.size, offset=self.offset)
        if len(found) < self.size:
            raise UserError(f"{self.file}: truncated: it ends within a tensor; download it again")
        return found


@dataclasses.dataclass(frozen=True)
class LatentHeads:
    """DeepSeek's kv_b_proj [heads * (nope + value), rank] of a file that has its halves apart."""

    #: [heads, rank, nope]: the keys' half, transposed.
    keys: GgufTensor
    #: [heads, value, rank]
    values: GgufTensor

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
        kinds = (self.keys.kind, self.values.kind)
        if not all(kind in PLAIN for kind in kinds):
            return WeightFormat("bfloat16")
        return common(WeightFormat(PLAIN[kind]) for kind in kinds)

    def matrix(self, inputs_first: bool = False) -> Matrix:
        """The weights [rank, heads * (nope + value)]."""
        assert not inputs_first
        return Matrix.of(self.read().T)

    def read(self) -> np.ndarray:
        """The weights as floats."""
        halves = [self.keys.read().transpose(0, 2, 1), self.values.read()]
        if halves[0].dtype != halves[1].dtype:
            halves = [half.astype(np.float32) for half in halves]
        return np.concatenate(halves, axis=1).reshape(self.shape)


Tensor = GgufTensor | LatentHeads
