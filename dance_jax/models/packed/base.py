"""A quantised weight that lies in several tensors of a checkpoint."""

from __future__ import annotations

import abc
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import ClassVar, Self

import numpy as np

from dance_jax.models.formats import Matrix, WeightFormat
from dance_jax.models.safetensors_file import StoredTensor

#: Types of scales that are floats, by safetensors' names, and ours.
SCALES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Pieces = dict[str, StoredTensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedTensor(abc.ABC):
    """One weight, or the weights of all experts of a layer, in place of the float tensor.

    A format is a subclass: `open` finds the shape and what is wrong, `_outputs` decodes.
    """

    #: Text for messages.
    kind: str
    #: Names of `pieces` in the checkpoint, for messages.
    names: dict[str, str]
    #: The tensors by their roles: "weight", the codes, is first.
    pieces: Pieces
    #: Shape of the float tensor: [out, in] or as `in_first` says; [e, ...] of all experts.
    shape: tuple[int, ...]
    #: Holds the weights without loss.
    format: WeightFormat
    #: Bytes on disk, of all pieces.
    size: int
    #: The first of the stored outputs that is one of this weight's.
    first: int = 0
    #: What makes it unreadable: missing pieces, shapes that do not fit.
    faults: tuple[str, ...] = ()
    #: The float tensor is [in, out].
    in_first: ClassVar[bool] = False
    #: It can be read as floats.
    is_float: ClassVar[bool] = True

    @property
    def file(self) -> pathlib.Path:
        """Of the codes."""
        return self.pieces["weight"].file

    @property
    def outputs(self) -> int:
        """Outputs of one matrix."""
        return self.shape[-1 if self.in_first else -2]

    @property
    def inputs(self) -> int:
        """Inputs of one matrix."""
        return self.shape[-2 if self.in_first else -1]

    def part(self, index: int, parts: int) -> Self:
        """The index-th of `parts` equal pieces along the first axis: of experts, or of outputs."""
        rows = self.shape[0] // parts
        part = dataclasses.replace(self, shape=(rows, *self.shape[1:]), size=self.size // parts)
        if self.faults:  # nothing is read of it
            return part
        if len(self.shape) == 3:
            cut = {role: piece.part(index, parts) for role, piece in self.pieces.items()}
            return dataclasses.replace(part, pieces=cut)
        if self.in_first:
            raise ValueError("a matrix is not cut by its inputs")
        return dataclasses.replace(part, first=self.first + index * rows)

    def without_first_axis(self) -> Self:
        """The same weight for a shape that begins with 1."""
        pieces = {role: piece.without_first_axis() for role, piece in self.pieces.items()}
        return dataclasses.replace(self, shape=self.shape[1:], pieces=pieces)

    def matrix(self, inputs_first: bool | None = None) -> Matrix:
        """The weight [in, out], as `format` says. Not of several experts.

        Only its own bytes are read, if the checkpoint has outputs before inputs.

        Args:
            inputs_first: what the float tensor is; a packed one knows it.
        """
        if inputs_first not in (None, self.in_first):
            raise ValueError(f"{self.names['weight']}: inputs_first is {self.in_first}")
        if len(self.shape) != 2:
            raise ValueError(f"{list(self.shape)} is no matrix")
        return self._outputs(self.first, self.first + self.outputs)

    def read(self) -> np.ndarray:
        """float32 of `shape`."""
        if len(self.shape) == 3:
            count = self.shape[0]
            each = [self.part(i, count).without_first_axis().read() for i in range(count)]
            return np.stack(each)
        values = self.matrix().values()
        return values if self.in_first else values.T

    def value_faults(self) -> Iterator[str]:
        """What is wrong with the values of scales and other small pieces, which are all read."""
        scale = self.pieces["scale"]
        values = scale.read()
        wrong = values == 255 if values.dtype == np.uint8 else ~np.isfinite(values)
        if count := np.count_nonzero(wrong):
            yield self.says("scale", f"{count} of {values.size} scales are NaN or infinite")

    @abc.abstractmethod
    def _outputs(self, begin: int, end: int) -> Matrix:
        """Stored outputs begin..end of a matrix."""

    def says(self, role: str, fault: str) -> str:
        """A fault with the name, file and format of a piece."""
        piece = self.pieces.get(role, self.pieces["weight"])
        return f"{self.names[role]} ({self.kind}, {piece.file.name}): {fault}"

    def checked(
        self,
        shapes: dict[str, tuple[int, ...]],
        types: Mapping[str, tuple[str, ...]],
        optional: tuple[str, ...] = (),
    ) -> Self:
        """With faults: a piece is missing, or not of the shape or a type given, or inputs of four
        bits fill no words.

        Args:
            shapes: by role.
            types: safetensors' names, by role.
            optional: roles whose pieces may be missing.
        """
        faults = list(self.faults)
        for role, shape in shapes.items():
            piece = self.pieces.get(role)
            if piece is None:
                faults += [] if role in optional else [self.says(role, "is missing")]
            elif piece.kind not in types[role]:
                faults.append(self.says(role, f"is {piece.kind}, not {' or '.join(types[role])}"))
            elif len(piece.shape) != len(shape):
                fault = f"is {list(piece.shape)}; expected {len(shape)} axes"
                faults.append(self.says(role, fault))
            elif piece.shape != shape:
                codes = list(self.pieces["weight"].shape)
                fault = f"is {list(piece.shape)}, but codes {codes} need {list(shape)}"
                faults.append(self.says(role, fault))
            if role == "weight" and faults:
                break  # the others' shapes follow from it
        if not faults and not self.format.fits(self.inputs):
            fault = f"{self.inputs} inputs are not a multiple of 8, which is not supported"
            faults.append(self.says("weight", fault))
        return dataclasses.replace(self, faults=tuple(faults))


def blocks(length: int, block: int) -> int:
    """Blocks, the last of which may be shorter."""
    return -(-length // block)


def bytes_of(pieces: Pieces) -> int:
    """Bytes on disk."""
    return sum(piece.size for piece in pieces.values())
