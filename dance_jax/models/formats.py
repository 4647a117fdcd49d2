"""Formats of a matrix's weights: floats, or codes with a scale per group of inputs.

A matrix is always [in, out]: a row vector is multiplied from the left. The value of a quantised
weight is the float32 `scale * value(code) + offset`, in every implementation; products are summed
in float32.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

#: Arrays of a matrix by name, with shapes as in `WeightFormat.arrays`; in numpy or JAX.
Arrays = Mapping[str, Any]

#: Values of the 16 codes of the four-bit kinds.
TABLES = {
    "int4": tuple(float(code - 8) for code in range(16)),
    # OCP Microscaling Formats 1.0, section 5.3.3: e2m1, the sign in the highest bit.
    "mxfp4": (
        0.0,
        0.5,
        1.0,
        1.5,
        2.0,
        3.0,
        4.0,
        6.0,
        -0.0,
        -0.5,
        -1.0,
        -1.5,
        -2.0,
        -3.0,
        -4.0,
        -6.0,
    ),
}
#: Types of the values of kinds without scales.
FLOATS = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_CODES = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
#: Four-bit codes in a word.
_WORD = 8
#: Types of scales and offsets; "e8m0" is the exponent of a power of two, with bias 127, in a byte.
_SCALES = FLOATS | {"e8m0": np.dtype(np.uint8)}
_POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.nan).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """Format of a matrix's weights. `str` returns a text that `parse` reads."""

    #: One of FLOATS; "int8"; "fp8" (e4m3); "int4" or "mxfp4", with eight codes in a word.
    kind: str
    #: Number of inputs that share a scale (the last group may be smaller); 0 if the kind has no
    #: scales.
    group: int = 0
    #: Type of scales and offsets: one of FLOATS, or "e8m0".
    scale: str = ""
    #: Each group has an offset in addition to its scale.
    offset: bool = False

    def __str__(self) -> str:
        if not self.group:
            return self.kind
        return f"{self.kind}:{self.group}:{self.scale}" + (":offset" if self.offset else "")

    @staticmethod
    def parse(text: str) -> WeightFormat:
        """Parse the text of a format, as returned by `str`.

        Raises:
            ValueError: the text is not a format.
        """
        kind, *rest = text.split(":")
        if kind in FLOATS and not rest:
            return WeightFormat(kind)
        known = kind in _CODES or kind in TABLES
        if (
            not known
            or len(rest) not in (2, 3)
            or rest[1] not in _SCALES
            or rest[2:] != ["offset"] * len(rest[2:])
        ):
            raise ValueError(f"{text!r} is not a format of weights")
        return WeightFormat(kind, int(rest[0]), rest[1], bool(rest[2:]))

    def arrays(self, d_in: int, d_out: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of each array of a matrix: `values`, or `codes`, `scale` and `offset`.

        Four-bit codes are packed in uint32 [in / 8, out]; the lowest bits belong to the first
        input.

        Raises:
            ValueError: the format does not support this number of inputs.
        """
        if self.kind in FLOATS:
            return {"values": jax.ShapeDtypeStruct((d_in, d_out), FLOATS[self.kind])}
        if not self.fits(d_in):
            raise ValueError(f"{self}: group and inputs ({d_in}) must be multiples of {_WORD}")
        groups = jax.ShapeDtypeStruct((-(-d_in // self.group), d_out), _SCALES[self.scale])
        if self.kind in TABLES:
            codes = jax.ShapeDtypeStruct((d_in // _WORD, d_out), np.dtype(np.uint32))
        else:
            codes = jax.ShapeDtypeStruct((d_in, d_out), _CODES[self.kind])
        return {"codes": codes, "scale": groups} | ({"offset": groups} if self.offset else {})

    def fits(self, d_in: int) -> bool:
        """Whether the format supports a matrix with `d_in` inputs."""
        return self.kind not in TABLES or (d_in % _WORD == 0 and self.group % _WORD == 0)

    def bytes(self, d_in: int, d_out: int) -> int:
        """Bytes of a matrix."""
        arrays = self.arrays(d_in, d_out).values()
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)

    def quantise(self, values_io: np.ndarray) -> dict[str, np.ndarray]:
        """Round weights to this format: arrays of the matrix nearest to `values_io` [in, out].

        With int4, the weight of a group that is farthest from zero gets the code for -8, which has
        no positive counterpart.

        Raises:
            ValueError: a weight is NaN or infinite and the format has scales; or the format has
                offsets, or codes of another kind than mxfp4 with powers of two as scales.
        """
        if self.kind in FLOATS:
            return {"values": np.ascontiguousarray(values_io.astype(FLOATS[self.kind], copy=False))}
        if self.offset or (self.scale == "e8m0" and self.kind != "mxfp4"):
            raise ValueError(f"{self}: rounding to this format is not supported")
        values = np.asarray(values_io, np.float32)
        if count := np.count_nonzero(~np.isfinite(values)):
            raise ValueError(f"{count} of {values.size} weights are NaN or infinite")
        groups = [values[i : i + self.group] for i in range(0, len(values), self.group)]
        scale = self._rounded(np.stack([self._group_scale(group) for group in groups]))
        wide = np.repeat(_widened(scale), self.group, axis=0)[: len(values)]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(wide == 0, np.float32(0), values / wide)
        arrays = {"codes": self._codes(ratio), "scale": scale}
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def _group_scale(self, values_go: np.ndarray) -> np.ndarray:
        """Scales for the weights of one group, float32 [out]."""
        most = np.abs(values_go).max(axis=0)
        if self.kind == "int4":
            farthest = np.take_along_axis(values_go, np.abs(values_go).argmax(0)[None], 0)[0]
            return farthest / np.float32(-8)
        if self.kind == "mxfp4":  # section 6.3: largest power of two in the group / that of e2m1
            with np.errstate(divide="ignore"):
                power = np.floor(np.log2(most)) - 2
            return np.ldexp(np.float32(1), np.clip(np.nan_to_num(power), -127, 127).astype(int))
        return most / np.float32({"int8": 127, "fp8": 448}[self.kind])

    def _rounded(self, scale: np.ndarray) -> np.ndarray:
        """Convert scales to the type in which they are stored."""
        if self.scale == "e8m0":
            return (np.frexp(scale)[1] - 1 + 127).astype(np.uint8)
        return scale.astype(_SCALES[self.scale])

    def _codes(self, ratio_io: np.ndarray) -> np.ndarray:
        """The nearest codes for weights that are divided by their scales."""
        if self.kind == "int8":
            return np.clip(np.rint(ratio_io), -127, 127).astype(np.int8)
        if self.kind == "fp8":
            return np.clip(ratio_io, -448, 448).astype(_CODES["fp8"])
        if self.kind == "int4":
            return pack_words(np.clip(np.rint(ratio_io) + 8, 0, 15).astype(np.uint8))
        limits = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
        magnitude = np.searchsorted(limits, np.abs(ratio_io)).astype(np.uint8)
        return pack_words(magnitude | (np.signbit(ratio_io).astype(np.uint8) << 3))

    def dequantise(self, arrays: Arrays, d_in: int) -> Any:
        """Values of the weights, float32 [in, out], from arrays of numpy or JAX.

        Leading axes of the arrays are kept.
        """
        if self.kind in FLOATS:
            return arrays["values"].astype(np.float32)
        xp = np if isinstance(arrays["codes"], np.ndarray) else jnp
        codes = arrays["codes"]
        if self.kind in TABLES:
            shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
            nibbles = (codes[..., :, None, :] >> shifts) & np.uint32(15)
            nibbles = nibbles.reshape(*codes.shape[:-2], -1, codes.shape[-1])
            values = xp.asarray(TABLES[self.kind], np.float32)[nibbles]
        else:
            values = codes.astype(np.float32)

        def widened(name: str) -> Any:
            return xp.repeat(_widened(arrays[name]), self.group, axis=-2)[..., :d_in, :]

        values = values * widened("scale")
        return values + widened("offset") if self.offset else values


def _widened(scale: Any) -> Any:
    """Convert scales or offsets to float32."""
    if scale.dtype != np.uint8:
        return scale.astype(np.float32)
    return (_POWERS if isinstance(scale, np.ndarray) else jnp.asarray(_POWERS))[scale]


def pack_words(codes_io: np.ndarray) -> np.ndarray:
    """Pack codes 0..15, [in, out], into uint32 [in / 8, out]."""
    words = codes_io.reshape(-1, _WORD, codes_io.shape[-1]).astype(np.uint32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
    return np.bitwise_or.reduce(words << shifts, axis=1)


def unpack_words(words_io: np.ndarray) -> np.ndarray:
    """Inverse of `pack_words`: codes 0..15 as uint8 [in, out]."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
    codes = (words_io[:, None] >> shifts) & np.uint32(15)
    return codes.astype(np.uint8).reshape(-1, words_io.shape[-1])


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Weights [in, out] on the host, in a format."""

    format: WeightFormat
    arrays: dict[str, np.ndarray]
    d_in: int

    @staticmethod
    def of(values_io: np.ndarray) -> Matrix:
        """A matrix of floats of a type in FLOATS, or of float64, which becomes float32."""
        if values_io.dtype == np.float64:
            values_io = values_io.astype(np.float32)
        kind = next(kind for kind, dtype in FLOATS.items() if dtype == values_io.dtype)
        return Matrix(WeightFormat(kind), {"values": values_io}, len(values_io))

    def outputs(self, chosen: slice | np.ndarray) -> Matrix:
        """The matrix with only the chosen outputs, in the given order."""
        arrays = {name: array[:, chosen] for name, array in self.arrays.items()}
        return dataclasses.replace(self, arrays=arrays)

    def values(self) -> np.ndarray:
        """Values of the weights, float32 [in, out]."""
        return self.format.dequantise(self.arrays, self.d_in)

    def to(self, form: WeightFormat) -> Matrix:
        """Convert to another format: exactly if that format holds this one without loss
        (`common`), else to the nearest values.

        Raises:
            ValueError: see `WeightFormat.quantise`.
        """
        if form == self.format:
            return self
        if form.group and self.format.group and common([self.format, form]) == form:
            return Matrix(form, _recoded(self, form), self.d_in)
        return Matrix(form, form.quantise(self.values()), self.d_in)


def _recoded(matrix: Matrix, form: WeightFormat) -> dict[str, np.ndarray]:
    """Arrays of a matrix in a format that holds the matrix's format without loss."""
    old, arrays = matrix.format, matrix.arrays
    codes, factor = arrays["codes"], np.float32(1)
    if old.kind in TABLES and form.kind == "int8":
        # The values of e2m1 are multiples of 0.5.
        factor = np.float32(0.5 if old.kind == "mxfp4" else 1)
        codes = (np.array(TABLES[old.kind]) / factor).astype(np.int8)[unpack_words(codes)]

    def spread(name: str, factor: np.float32) -> np.ndarray:
        wide = np.repeat(_widened(arrays[name]), old.group, axis=0)[: matrix.d_in]
        return form._rounded(wide[:: form.group] * factor)

    out = {"codes": codes, "scale": spread("scale", factor)}
    if form.offset:
        none = np.zeros(out["scale"].shape, out["scale"].dtype)
        out["offset"] = spread("offset", np.float32(1)) if old.offset else none
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def common(formats: Iterable[WeightFormat]) -> WeightFormat:
    """The smallest format that holds weights of all these formats without loss."""
    return functools.reduce(_common, dict.fromkeys(formats))


def _common(one: WeightFormat, other: WeightFormat) -> WeightFormat:
    if one == other:
        return one
    kinds, scales = {one.kind, other.kind}, {one.scale, other.scale}
    if kinds & set(FLOATS) or ("fp8" in kinds and len(kinds) > 1):
        floats = kinds if kinds <= set(FLOATS) else {"float32"}
        return WeightFormat("float32" if len(floats) > 1 else floats.pop())
    return WeightFormat(
        one.kind if len(kinds) == 1 else "int8",
        math.gcd(one.group, other.group),
        scales.pop() if len(scales) == 1 else "float32",
        one.offset or other.offset,
    )


def described(matrices: Iterable[tuple[WeightFormat, int, int]]) -> str:
    """Text with the kinds of matrices, most weights first, and mean bits per weight with scales.

    Args:
        matrices: format, inputs and outputs of each matrix. Every kind is named, even if it has
            few weights.

    >>> described([(WeightFormat.parse("int4:32:bfloat16"), 64, 64)])
    'int4 (4.5 bits a weight)'
    """
    weights: dict[str, int] = collections.Counter()
    size = 0
    for form, d_in, d_out in matrices:
        weights[form.kind] += d_in * d_out
        size += form.bytes(d_in, d_out)
    kinds = " and ".join(sorted(weights, key=lambda kind: -weights[kind]))
    return f"{kinds} ({round(8 * size / sum(weights.values()), 2):g} bits a weight)"


@dataclasses.dataclass(frozen=True)
class Formats:
    """Formats of a model's weights."""

    #: Formats of a routed expert's matrices w_gate, w_up and w_down; the same for all experts.
    experts: Mapping[str, WeightFormat]
    #: Formats of the trunk's matrices by dotted path.
    trunk: Mapping[str, WeightFormat]

    def computed_in(self, dtype: str) -> Formats:
        """Formats in an engine with activations of `dtype`.

        With bfloat16 activations, float32 weights become bfloat16; nothing is widened.
        """
        if dtype == "float32":
            return self
        wide, narrow = WeightFormat("float32"), WeightFormat(dtype)
        return Formats(
            *(
                {name: narrow if form == wide else form for name, form in part.items()}
                for part in (self.experts, self.trunk)
            )
        )

    def to_json(self) -> dict[str, dict[str, str]]:
        """Texts of the formats, by part and matrix."""
        return {
            part: {name: str(form) for name, form in forms.items()}
            for part, forms in vars(self).items()
        }

    @staticmethod
    def from_json(parts: Mapping[str, Mapping[str, str]]) -> Formats:
        """Inverse of `to_json`.

        Raises:
            ValueError, KeyError, AttributeError: the value was not made by `to_json`.
        """
        return Formats(
            *(
                {name: WeightFormat.parse(text) for name, text in parts[part].items()}
                for part in ("experts", "trunk")
            )
        )
