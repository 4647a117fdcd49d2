"""Tensors of GGUF files, with Hugging Face's shapes and row order."""

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
    """A stored tensor. Reading it reads only its own bytes."""

    file: pathlib.Path
    #: ggml's name of the type, e.g. "Q4_K".
    kind: str
    #: [..., out, in]
    shape: tuple[int, ...]
    #: Offset of the tensor's first byte in the file.
    offset: int
    size: int
    #: Shape in the file, if it differs from `shape`.
    stored: tuple[int, ...] = ()
    #: Where each row of a matrix, or each number of a vector, is stored. None if in order.
    rows: np.ndarray | None = None
    #: Where each input is stored. None if in order.
    inputs: np.ndarray | None = None
    #: Applied to the values after reading; only for types without blocks.
    change: Callable[[np.ndarray], np.ndarray] | None = None

    @staticmethod
    def at(place: Place) -> GgufTensor:
        """The tensor that a header describes."""
        return GgufTensor(place.file, place.kind, place.shape, place.offset, place.size)

    @property
    def is_float(self) -> bool:
        """True if weights of this type are supported."""
        return self.kind in PLAIN or self.kind in KINDS

    @property
    def format(self) -> WeightFormat:
        """Format of `matrix`; only valid if `is_float`."""
        form = format_of(self.kind)
        return form if self._whole(form.group or 1) else WeightFormat("float32")

    def _whole(self, unit: int) -> bool:
        """Whether `inputs` keeps every group of `unit` inputs together."""
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
        """The same bytes without the first axis, which must have length 1."""
        return dataclasses.replace(self, shape=self.shape[1:])

    def matrix(self, inputs_first: bool = False) -> Matrix:
        """The weights of a tensor [out, in] as [in, out], in `format`; no file has [in, out]."""
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
        """The rows of an array in the order of `inputs`; each row covers several inputs."""
        assert self.inputs is not None
        unit = len(self.inputs) // len(array)
        return array[self.inputs[::unit] // unit]

    def read(self) -> np.ndarray:
        """The weights: the stored type for types without blocks, float32 for all others."""
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
            raise UserError(
                f"{self.file}: truncated: the file ends within a tensor; download it again"
            )
        return found


@dataclasses.dataclass(frozen=True)
class LatentHeads:
    """DeepSeek's kv_b_proj [heads * (nope + value), rank], stored in two halves."""

    #: The keys' half, transposed: [heads, rank, nope].
    keys: GgufTensor
    #: The values' half: [heads, value, rank].
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
        """A float format, because the groups of the keys' half run along another axis."""
        kinds = (self.keys.kind, self.values.kind)
        if not all(kind in PLAIN for kind in kinds):
            return WeightFormat("bfloat16")
        return common(WeightFormat(PLAIN[kind]) for kind in kinds)

    def matrix(self, inputs_first: bool = False) -> Matrix:
        """The weights [rank, heads * (nope + value)]."""
        assert not inputs_first
        return Matrix.of(self.read().T)

    def read(self) -> np.ndarray:
        """The weights as floats of `shape`."""
        halves = [self.keys.read().transpose(0, 2, 1), self.values.read()]
        if halves[0].dtype != halves[1].dtype:
            halves = [half.astype(np.float32) for half in halves]
        return np.concatenate(halves, axis=1).reshape(self.shape)


Tensor = GgufTensor | LatentHeads
