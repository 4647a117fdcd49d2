"""The base class of quantised weights that are stored in several tensors of a checkpoint."""

from __future__ import annotations

import abc
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import ClassVar, Self

import numpy as np

from dance_jax.models.formats import Matrix, WeightFormat
from dance_jax.models.safetensors_file import StoredTensor

#: Supported float types of scales: safetensors' names and ours.
SCALES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Pieces = dict[str, StoredTensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedTensor(abc.ABC):
    """One weight, or the weights of all experts of a layer, in place of the float tensor.

    Each format is a subclass: `open` finds the shape and the faults, `_outputs` decodes.
    """

    #: Name of the format, for messages.
    kind: str
    #: Names of `pieces` in the checkpoint, for messages.
    names: dict[str, str]
    #: The tensors by role. "weight", the codes, is first.
    pieces: Pieces
    #: Shape of the float tensor: [out, in], or [in, out] if `in_first`; of all experts [e, ...].
    shape: tuple[int, ...]
    #: The format that holds the weights without loss.
    format: WeightFormat
    #: Bytes on disk of all pieces.
    size: int
    #: Index of this weight's first output among the stored outputs.
    first: int = 0
    #: Why the weight cannot be read: missing pieces, shapes that do not fit.
    faults: tuple[str, ...] = ()
    #: Whether the float tensor is [in, out].
    in_first: ClassVar[bool] = False
    #: Whether the tensor can be read as floats.
    is_float: ClassVar[bool] = True

    @property
    def file(self) -> pathlib.Path:
        """The file that holds the codes."""
        return self.pieces["weight"].file

    @property
    def outputs(self) -> int:
        """Number of outputs of one matrix."""
        return self.shape[-1 if self.in_first else -2]

    @property
    def inputs(self) -> int:
        """Number of inputs of one matrix."""
        return self.shape[-2 if self.in_first else -1]

    def part(self, index: int, parts: int) -> Self:
        """The index-th of `parts` equal pieces along the first axis: experts, or outputs."""
        rows = self.shape[0] // parts
        part = dataclasses.replace(self, shape=(rows, *self.shape[1:]), size=self.size // parts)
        if self.faults:  # a faulty weight is never read
            return part
        if len(self.shape) == 3:
            cut = {role: piece.part(index, parts) for role, piece in self.pieces.items()}
            return dataclasses.replace(part, pieces=cut)
        if self.in_first:
            raise ValueError("a matrix cannot be cut along its inputs")
        return dataclasses.replace(part, first=self.first + index * rows)

    def without_first_axis(self) -> Self:
        """The same weight without the first axis, which must have length 1."""
        pieces = {role: piece.without_first_axis() for role, piece in self.pieces.items()}
        return dataclasses.replace(self, shape=self.shape[1:], pieces=pieces)

    def matrix(self, inputs_first: bool | None = None) -> Matrix:
        """The weight [in, out] in `format`. Only for a single matrix.

        If the checkpoint stores outputs before inputs, only this weight's bytes are read.

        Args:
            inputs_first: whether the caller expects a float tensor [in, out]. None to accept
                either.
        """
        if inputs_first not in (None, self.in_first):
            raise ValueError(f"{self.names['weight']}: inputs_first is {self.in_first}")
        if len(self.shape) != 2:
            raise ValueError(f"{list(self.shape)} is not a matrix")
        return self._outputs(self.first, self.first + self.outputs)

    def read(self) -> np.ndarray:
        """The weights as float32 with `shape`."""
        if len(self.shape) == 3:
            count = self.shape[0]
            each = [self.part(i, count).without_first_axis().read() for i in range(count)]
            return np.stack(each)
        values = self.matrix().values()
        return values if self.in_first else values.T

    def value_faults(self) -> Iterator[str]:
        """Faults in the values of scales and other small pieces. Reads all of these pieces."""
        scale = self.pieces["scale"]
        values = scale.read()
        wrong = values == 255 if values.dtype == np.uint8 else ~np.isfinite(values)
        if count := np.count_nonzero(wrong):
            yield self.says("scale", f"{count} of {values.size} scales are NaN or infinite")

    @abc.abstractmethod
    def _outputs(self, begin: int, end: int) -> Matrix:
        """Decodes the stored outputs begin..end of a matrix."""

    def says(self, role: str, fault: str) -> str:
        """A fault message that begins with the name, format and file of a piece."""
        piece = self.pieces.get(role, self.pieces["weight"])
        return f"{self.names[role]} ({self.kind}, {piece.file.name}): {fault}"

    def checked(
        self,
        shapes: dict[str, tuple[int, ...]],
        types: Mapping[str, tuple[str, ...]],
        optional: tuple[str, ...] = (),
    ) -> Self:
        """This weight with the faults that its pieces have: a piece is missing or has a wrong
        shape or type, or the four-bit codes of the inputs do not fill whole words.

        Args:
            shapes: expected shape by role.
            types: allowed types by role, by safetensors' names.
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
                break  # the other pieces' expected shapes depend on the codes
        if not faults and not self.format.fits(self.inputs):
            fault = f"{self.inputs} inputs are not a multiple of 8, which is not supported"
            faults.append(self.says("weight", fault))
        return dataclasses.replace(self, faults=tuple(faults))


def blocks(length: int, block: int) -> int:
    """Number of blocks that cover `length`. The last block may be shorter."""
    return -(-length // block)


def bytes_of(pieces: Pieces) -> int:
    """Bytes on disk of all pieces."""
    return sum(piece.size for piece in pieces.values())
