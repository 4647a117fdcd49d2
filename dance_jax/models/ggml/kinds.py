"""The weight types of GGUF, and the `WeightFormat` that holds each of them.

Blocks are as ggml defines them: a row of a matrix, one output, is cut into blocks of 32 or 256
inputs. The formats below hold a block's weights exactly, except for the types in `NOT_EXACT`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from dance_jax.models.formats import FLOATS, TABLES, Matrix, WeightFormat

#: Codes of blocks [n, weights] (0..15 for four-bit formats), scales and optionally offsets, each
#: [n, groups].
Unpacked = tuple[np.ndarray, ...]
#: Number of weights that are unpacked at a time.
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A GGUF block type."""

    #: Weights per block, and bytes per block.
    weights: int
    size: int
    format: WeightFormat
    #: Unpacks blocks, uint8 [n, size].
    unpack: Callable[[np.ndarray], Unpacked]

    @property
    def bits(self) -> float:
        """Bits per weight in the file."""
        return 8 * self.size / self.weights

    @property
    def our_bits(self) -> float:
        """Bits per weight in our format."""
        return 8 * self.format.bytes(256, 8) / (256 * 8)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """float16 [n, 1] at a byte of each block."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _wide(blocks: np.ndarray, at: int) -> np.ndarray:
    """`_half` as float32."""
    return _half(blocks, at).astype(np.float32)


def _bits(data: np.ndarray, width: int, shifts: Sequence[int], mask: int) -> np.ndarray:
    """uint8 [n, weights]: for every `width` bytes, first the lowest bits, then the shifted ones."""
    parts = data.reshape(len(data), -1, 1, width) >> np.array(shifts, np.uint8)[:, None]
    return (parts & np.uint8(mask)).reshape(len(data), -1)


def _nibbles(data: np.ndarray, width: int) -> np.ndarray:
    return _bits(data, width, (0, 4), 15)


def _q8_0(blocks: np.ndarray) -> Unpacked:
    return blocks[:, 2:].view(np.int8), _half(blocks, 0)


def _q4_0(blocks: np.ndarray) -> Unpacked:
    return _nibbles(blocks[:, 2:], 16), _half(blocks, 0)


def _q4_1(blocks: np.ndarray) -> Unpacked:
    scale = _wide(blocks, 0)
    return _nibbles(blocks[:, 4:], 16), scale, 8 * scale + _wide(blocks, 2)


def _fifth(blocks: np.ndarray, at: int) -> np.ndarray:
    """Codes 0..31 of five bits: 4 bytes with the highest bits, then 16 bytes with the low bits."""
    high = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return _nibbles(blocks[:, at + 4 :], 16) | high << 4


def _q5_0(blocks: np.ndarray) -> Unpacked:
    return _fifth(blocks, 2).view(np.int8) - np.int8(16), _half(blocks, 0)


def _q5_1(blocks: np.ndarray) -> Unpacked:
    return _fifth(blocks, 4).view(np.int8), _half(blocks, 0), _half(blocks, 2)


def _mxfp4(blocks: np.ndarray) -> Unpacked:
    # ggml doubles the table of values and halves the scale; together they give e2m1.
    return _nibbles(blocks[:, 1:], 16), blocks[:, :1]


def _q2_k(blocks: np.ndarray) -> Unpacked:
    codes, pairs = _bits(blocks[:, 16:80], 32, (0, 2, 4, 6), 3), blocks[:, :16]
    return codes + np.uint8(8), _wide(blocks, 80) * (pairs & 15), -_wide(blocks, 82) * (pairs >> 4)


def _q3_k(blocks: np.ndarray) -> Unpacked:
    high = _bits(blocks[:, :32], 32, range(8), 1)
    codes = _bits(blocks[:, 32:96], 32, (0, 2, 4, 6), 3) + (high << 2) + np.uint8(4)
    low = _bits(blocks[:, 96:104], 8, (0, 4), 15)
    scale = low | _bits(blocks[:, 104:108], 4, (0, 2, 4, 6), 3) << 4
    return codes, _wide(blocks, 108) * (scale.astype(np.float32) - 32)


def _scales_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset, float32 [n, 8], of Q4_K and Q5_K: six bits each, times a float16."""
    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scale = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    least = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return _wide(blocks, 0) * scale, -_wide(blocks, 2) * least


def _q4_k(blocks: np.ndarray) -> Unpacked:
    scale, offset = _scales_k(blocks)
    return _nibbles(blocks[:, 16:], 32), scale, 8 * scale + offset


def _q5_k(blocks: np.ndarray) -> Unpacked:
    high = _bits(blocks[:, 16:48], 32, range(8), 1)
    codes = _nibbles(blocks[:, 48:], 32) | high << 4
    return codes.view(np.int8), *_scales_k(blocks)


def _q6_k(blocks: np.ndarray) -> Unpacked:
    codes = _nibbles(blocks[:, :128], 64) | _bits(blocks[:, 128:192], 32, (0, 2, 4, 6), 3) << 4
    scale = _wide(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return codes.view(np.int8) - np.int8(32), scale


#: Types that store weights in blocks. Our groups are ggml's groups. Each product of two of ggml's
#: numbers is stored as one float32.
KINDS = {
    "Q4_0": BlockType(32, 18, WeightFormat("int4", 32, "float16"), _q4_0),
    "Q4_1": BlockType(32, 20, WeightFormat("int4", 32, "float32", True), _q4_1),
    "Q5_0": BlockType(32, 22, WeightFormat("int8", 32, "float16"), _q5_0),
    "Q5_1": BlockType(32, 24, WeightFormat("int8", 32, "float16", True), _q5_1),
    "Q8_0": BlockType(32, 34, WeightFormat("int8", 32, "float16"), _q8_0),
    "MXFP4": BlockType(32, 17, WeightFormat("mxfp4", 32, "e8m0"), _mxfp4),
    "Q2_K": BlockType(256, 84, WeightFormat("int4", 16, "float32", True), _q2_k),
    "Q3_K": BlockType(256, 110, WeightFormat("int4", 16, "float32"), _q3_k),
    "Q4_K": BlockType(256, 144, WeightFormat("int4", 32, "float32", True), _q4_k),
    "Q5_K": BlockType(256, 176, WeightFormat("int8", 32, "float32", True), _q5_k),
    "Q6_K": BlockType(256, 210, WeightFormat("int8", 16, "float32"), _q6_k),
}
#: Types whose offset is 8 scales above ggml's offset, because our codes begin at -8. That sum is
#: rounded to float32 once, so a weight may differ by this rounding.
NOT_EXACT = ("Q4_1", "Q4_K")
#: Types that store plain values, without blocks.
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def format_of(kind: str) -> WeightFormat:
    """The format that holds a GGUF type. Raises KeyError for an unsupported type."""
    return WeightFormat(PLAIN[kind]) if kind in PLAIN else KINDS[kind].format


def decode(kind: str, data: np.ndarray, shape: tuple[int, int]) -> Matrix:
    """Decodes stored rows to the matrix [in, out].

    Args:
        data: uint8, the bytes of all rows.
        shape: [out, in]
    """
    rows, d_in = shape
    form = format_of(kind)
    if kind in PLAIN:
        return Matrix(form, {"values": data.view(FLOATS[form.kind]).reshape(shape).T}, d_in)
    own = KINDS[kind]
    arrays = {
        name: np.empty(array.shape, array.dtype) for name, array in form.arrays(d_in, rows).items()
    }
    step = max(1, _CHUNK // d_in)
    lines = data.reshape(rows, -1)
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        codes, *others = own.unpack(np.ascontiguousarray(lines[part]).reshape(-1, own.size))
        codes = codes.reshape(-1, d_in)
        found = [_words(codes) if form.kind in TABLES else codes, *others]
        for array, values in zip(arrays.values(), found, strict=True):
            array[:, part] = values.reshape(part.stop - begin, -1).T
    return Matrix(form, arrays, d_in)


def _words(codes_oi: np.ndarray) -> np.ndarray:
    """uint32 [out, in / 8] of codes 0..15; the first input's code is in the lowest bits."""
    pairs = codes_oi[:, 0::2] | codes_oi[:, 1::2] << 4
    return np.ascontiguousarray(pairs).view("<u4")


def values(kind: str, data: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The values of stored rows: float32 [out, in], or the type that `PLAIN` gives."""
    if kind in PLAIN:
        return data.view(FLOATS[PLAIN[kind]]).reshape(shape)
    rows, d_in = shape
    out = np.empty(shape, np.float32)
    step = max(1, _CHUNK // d_in)
    lines = data.reshape(rows, -1)
    for begin in range(0, rows, step):
        part = lines[begin : begin + step]
        matrix = decode(kind, part.reshape(-1), (len(part), d_in))
        out[begin : begin + step] = matrix.values().T
    return out
