"""Reads the headers of GGUF files: metadata and the position of each tensor's bytes. Without JAX.

The `gguf` package's own reader makes several arrays for each string of the vocabulary, which takes
seconds and half a gigabyte in every process that reads a tokenizer. This module uses only the
package's tables of types.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import mmap
import os
import pathlib
import re
import struct
from collections.abc import Callable
from typing import Any

from dance_jax.config import UserError
from dance_jax.models.directory import check_no_pointer

SUFFIX = ".gguf"
#: Names of the files of a split model: the file's number, from 1, and the number of files.
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)

#: `struct` format character by number of the value type.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_VERSIONS = (2, 3)
_ALIGNMENT = 32
#: Bytes hashed at either end of each tensor by `content_hash`.
_SAMPLE = 256
_WHOLE_BELOW = 1 << 27


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are in a file."""

    file: pathlib.Path
    #: ggml's name of the type, e.g. "Q4_K".
    kind: str
    #: In numpy's order: the input axis is last.
    shape: tuple[int, ...]
    #: Offset of the tensor's first byte in the file.
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The content of a GGUF file's header."""

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, Place]
    #: Bytes before the tensors' data.
    length: int


def read_parts(path: pathlib.Path) -> list[Header]:
    """The headers of a model's file. For a split model, the headers of all its files in order.

    Raises:
        UserError: a file is missing, truncated or not a GGUF file.
    """
    header = read_header(path)
    count = header.metadata.get("split.count", 1)
    if count <= 1:
        return [header]
    name = _SPLIT.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise UserError(
            f"{path}: is one of {count} files, but its name does not end in "
            f"-00001-of-{count:05d}{SUFFIX}: give all files the names they were published under"
        )
    paths = [
        path.with_name(f"{name['stem']}-{number:05d}-of-{count:05d}{SUFFIX}")
        for number in range(1, count + 1)
    ]
    if missing := [each.name for each in paths if not each.exists()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{path}: is one of {count} files, of which {missing[0]}{more} "
            f"{'are' if more else 'is'} missing in {path.parent}: download the whole model"
        )
    headers = [header if each == path else read_header(each) for each in paths]
    for number, each in enumerate(headers):
        found = each.metadata.get("split.no"), each.metadata.get("split.count")
        if found != (number, count):
            raise UserError(
                f"{each.path}: split.no and split.count are {found}, not {(number, count)}: the "
                "files are not of one model"
            )
    tensors = sum(len(each.tensors) for each in headers)
    wanted = headers[0].metadata.get("split.tensors.count", tensors)
    if tensors != wanted:
        raise UserError(
            f"{headers[0].path}: the {count} files have {tensors} tensors, split.tensors.count is "
            f"{wanted}: the files are not of one model"
        )
    return headers


def read_header(path: pathlib.Path) -> Header:
    """The header of one file.

    Raises:
        UserError: the file is missing, truncated or not in this format; the message names it.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise UserError(f"{path}: truncated: {size} bytes are too few for a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(path, _Cursor(data))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except struct.error as error:
        raise UserError(
            f"{path}: truncated: {size} bytes end within the header; download it again"
        ) from error
    except (UnicodeDecodeError, KeyError) as error:
        raise UserError(f"{path}: damaged header: {error}; download it again") from error


def _header(path: pathlib.Path, cursor: _Cursor) -> Header:
    check_no_pointer(bytes(cursor.data[:64]), path)
    if cursor.data[:4] != b"GGUF":
        raise UserError(f"{path}: not a GGUF file: the file begins with {cursor.data[:4]!r}")
    cursor.at = 4
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise UserError(f"{path}: version {version} of GGUF; supported: {_VERSIONS}, little-endian")
    tensors, values = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(values):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    described = [cursor.tensor() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    start = -(-cursor.at // alignment) * alignment
    places: dict[str, Place] = {}
    for name, shape, number, offset in described:
        if name in places:
            raise UserError(f"{path}: has tensor {name} twice")
        kind, size = _type(path, name, shape, number)
        places[name] = Place(path, kind, shape, start + offset, size)
        if start + offset + size > len(cursor.data):
            raise UserError(
                f"{path}: truncated: {name} ({kind}, {list(shape)}) ends at byte "
                f"{start + offset + size}, the file has {len(cursor.data)}; download it again"
            )
    return Header(path, metadata, places, start)


def _type(path: pathlib.Path, name: str, shape: tuple[int, ...], number: int) -> tuple[str, int]:
    """Name of a tensor's type, and the tensor's size in bytes."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise UserError(f"{path}: {name} has unknown type number {number}") from None
    weights, size = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % weights:
        raise UserError(
            f"{path}: {name} is {list(shape)}, but {kind.name} has {weights} weights a block"
        )
    return kind.name, math.prod(shape) // weights * size


class _Cursor:
    """Reads values one after the other. Raises struct.error beyond the end of the data."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 0

    def number(self, code: str) -> Any:
        form = _form(code)
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return _shortest(value) if code == "f" else value

    def text(self) -> str:
        (length,) = _LENGTH.unpack_from(self.data, self.at)
        begin = self.at + 8
        end = begin + length
        if end > len(self.data):
            raise struct.error("a string extends beyond the end of the file")
        self.at = end
        return self.data[begin:end].decode()

    def value(self, kind: int) -> Any:
        """A value of metadata."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind in (_STRING, _ARRAY):
            read: Callable[[], Any] = self.text if kind == _STRING else lambda: self.value(_ARRAY)
            return [read() for _ in range(count)]
        form = struct.Struct(f"<{min(count, len(self.data))}{_SCALARS[kind]}")
        values = form.unpack_from(self.data, self.at)
        self.at += form.size
        return list(values)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type number, and offset in the data section of the next tensor."""
        name, axes = self.text(), self.number("I")
        shape = tuple(self.number("Q") for _ in range(axes))
        return name, shape[::-1], self.number("I"), self.number("Q")


@functools.cache
def _form(code: str) -> struct.Struct:
    return struct.Struct(f"<{code}")


def _shortest(value: float) -> float:
    """The number with the fewest digits that equals `value` in float32: 1e-6, not 9.99999997e-7."""
    if math.isfinite(value):
        for digits in range(1, 10):
            short = float(f"{value:.{digits}g}")
            if struct.pack("<f", short) == struct.pack("<f", value):
                return short
    return value


def content_hash(header: Header) -> bytes:
    """SHA-256 that identifies a file; of large files, only the header and each tensor's ends."""
    digest = hashlib.sha256()
    with header.path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < _WHOLE_BELOW:
            return hashlib.file_digest(file, "sha256").digest()
        digest.update(file.read(header.length))
        for place in header.tensors.values():
            sample = min(_SAMPLE, place.size)
            digest.update(os.pread(file.fileno(), sample, place.offset))
            digest.update(os.pread(file.fileno(), sample, place.offset + place.size - sample))
    return digest.digest()
