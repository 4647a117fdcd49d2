"""Reads safetensors files tensor by tensor, without mapping them and without a framework.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the data. numpy knows bfloat16 through ml_dtypes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import pathlib

import ml_dtypes
import numpy as np

from dance_jax.config import UserError
from dance_jax.models.directory import check_no_pointer, json_object
from dance_jax.models.formats import Matrix, WeightFormat

#: Types of unquantised weights.
FLOATS: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

#: Kinds of `WeightFormat` for matrices of these types.
KINDS = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: Types of tensors of quantised weights. F8_E8M0 is read as a byte, its exponent.
RAW: dict[str, np.dtype] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(np.uint8),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
_TYPES = FLOATS | RAW

#: Bytes of the longest header, as in the safetensors library.
MAX_HEADER = 100_000_000
_SAMPLE = 256


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor in a file."""

    file: pathlib.Path
    #: The type's name in safetensors, for example "BF16".
    kind: str
    shape: tuple[int, ...]
    #: Byte offset in the file at which the tensor begins.
    offset: int
    #: Bytes of the tensor.
    size: int

    @property
    def is_float(self) -> bool:
        """True if the values are weights themselves, not codes."""
        return self.kind in FLOATS

    @property
    def dtype(self) -> np.dtype:
        """The numpy type; only for types in FLOATS and RAW."""
        return _TYPES[self.kind]

    @property
    def format(self) -> WeightFormat:
        """Format of a matrix with these values; only if `is_float`."""
        return WeightFormat(KINDS[self.kind])

    def matrix(self, inputs_first: bool = False) -> Matrix:
        """Read a tensor of two axes as a matrix [in, out].

        Args:
            inputs_first: the tensor is stored as [in, out], not as [out, in].
        """
        return Matrix.of(self.read() if inputs_first else self.read().T)

    def part(self, index: int, parts: int) -> StoredTensor:
        """The index-th of `parts` equal pieces along the first axis, which must be divisible."""
        rows = self.shape[0] // parts
        return self.rows(index * rows, (index + 1) * rows)

    def rows(self, begin: int, end: int) -> StoredTensor:
        """The part `begin` to `end` along the first axis."""
        row = self.size // self.shape[0] if self.shape[0] else 0
        return dataclasses.replace(
            self,
            shape=(end - begin, *self.shape[1:]),
            offset=self.offset + begin * row,
            size=(end - begin) * row,
        )

    def without_first_axis(self) -> StoredTensor:
        """The same tensor without its first axis, which must have length 1."""
        return dataclasses.replace(self, shape=self.shape[1:])

    def read(self) -> np.ndarray:
        """Read the tensor's values and no other bytes."""
        values = np.empty(self.shape, self.dtype)
        view = values.reshape(-1).view(np.uint8).data
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            done = 0
            while done < self.size:
                count = file.readinto(view[done:])
                if not count:
                    raise UserError(
                        f"{self.file}: truncated: ends within a tensor; download the file again"
                    )
                done += count
        return values


def read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Tensors of a file, by name.

    Raises:
        UserError: the file is missing, damaged or not in this format; the message names the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(64)
            check_no_pointer(begin, path)
            file.seek(8)
            length = int.from_bytes(begin[:8], "little")
            if size < 8 or length > size - 8:
                raise UserError(
                    f"{path}: truncated: {size} bytes end within the header; download the file "
                    "again"
                )
            if length > MAX_HEADER:
                raise UserError(
                    f"{path}: not a safetensors file, or damaged: a header of {length} bytes, but "
                    f"at most {MAX_HEADER} are allowed; download the file again"
                )
            text = file.read(length)
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing: download the model's weights again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        entries = json_object(text, path)
        entries.pop("__metadata__", None)
        tensors = {name: _entry(path, 8 + length, item) for name, item in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a safetensors file, or damaged: {error}; download the file again"
        ) from error
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise UserError(
                f"{path}: damaged: {name} overlaps the previous tensor; download the file again"
            )
        end = tensor.offset + tensor.size
    if end != size:
        raise UserError(
            f"{path}: damaged or truncated: the file has {size} bytes, but its header describes "
            f"{end}; download the file again"
        )
    return tensors


def _entry(path: pathlib.Path, base: int, item: dict) -> StoredTensor:
    shape, (begin, end), kind = tuple(item["shape"]), item["data_offsets"], item["dtype"]
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)) or end < begin:
        raise ValueError("a tensor has a size that is not a whole number, or negative")
    if kind in _TYPES and end - begin != math.prod(shape) * _TYPES[kind].itemsize:
        raise ValueError(f"a tensor of {kind} {list(shape)} has {end - begin} bytes")
    return StoredTensor(path, kind, shape, base + begin, end - begin)


def content_hash(path: pathlib.Path, whole_below: int = 1 << 27) -> bytes:
    """SHA-256 that distinguishes checkpoints.

    Files of less than `whole_below` bytes are hashed completely. For larger files, only the header
    and the first and last bytes of every tensor are hashed.
    """
    digest = hashlib.sha256()
    if path.stat().st_size < whole_below:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    tensors = read_header(path)
    with path.open("rb") as file:
        digest.update(file.read(8 + int.from_bytes(os.pread(file.fileno(), 8, 0), "little")))
        for tensor in tensors.values():
            digest.update(os.pread(file.fileno(), min(_SAMPLE, tensor.size), tensor.offset))
            tail = max(tensor.offset, tensor.offset + tensor.size - _SAMPLE)
            digest.update(os.pread(file.fileno(), min(_SAMPLE, tensor.size), tail))
    return digest.digest()
