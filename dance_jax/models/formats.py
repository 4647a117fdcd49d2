"""How a matrix's weights are kept: as floats, or as codes with a scale for a group of inputs.

A matrix is [in, out] everywhere: a row vector is multiplied from the left. What a weight is worth
is one float32, `scale * value(code) + offset`, whatever computes with it; a product sums in
float32.
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

#: Arrays of a matrix by name, [in, out] or as `WeightFormat.arrays` says, in numpy or JAX.
Arrays = Mapping[str, Any]

#: What the 16 codes of the four-bit kinds are worth.
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
#: Types of the values of kinds that have no scales.
FLOATS = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_CODES = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
#: Codes of one word of the four-bit kinds.
_WORD = 8
#: Types of scales and offsets; "e8m0" is the exponent of a power of two, its bias 127, in a byte.
_SCALES = FLOATS | {"e8m0": np.dtype(np.uint8)}
_POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.nan).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """The kind of a matrix's weights. Its text form, `str`, is read by `parse`."""

    #: One of FLOATS; "int8"; "fp8" (e4m3); "int4" or "mxfp4", eight codes in a word.
    kind: str
    #: Inputs that share a scale, the last group may have fewer; 0: there are no scales.
    group: int = 0
    #: Type of scales and offsets: one of FLOATS, or "e8m0".
    scale: str = ""
    #: Each group has an offset beside its scale.
    offset: bool = False

    def __str__(self) -> str:
        if not self.group:
            return self.kind
        return f"{self.kind}:{self.group}:{self.scale}" + (":offset" if self.offset else "")

    @staticmethod
    def parse(text: str) -> WeightFormat:
        """The format that `str` wrote.

        Raises:
            ValueError: it is none.
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
            raise ValueError(f"{text!r} is no format of weights")
        return WeightFormat(kind, int(rest[0]), rest[1], bool(rest[2:]))

    def arrays(self, d_in: int, d_out: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of each array of a matrix: `values` alone, or `codes`, `scale`, `offset`.

        Codes of four bits are uint32 [in / 8, out]; the lowest bits are the first input's.

        Raises:
            ValueError: the format does not fit the shape.
        """
        if self.kind in FLOATS:
            return {"values": jax.ShapeDtypeStruct((d_in, d_out), FLOATS[self.kind])}
        if not self.fits(d_in):
            raise ValueError(f"{self} does not fit {d_in} inputs")
        groups = jax.ShapeDtypeStruct((-(-d_in // self.group), d_out), _SCALES[self.scale])
        if self.kind in TABLES:
            codes = jax.ShapeDtypeStruct((d_in // _WORD, d_out), np.dtype(np.uint32))
        else:
            codes = jax.ShapeDtypeStruct((d_in, d_out), _CODES[self.kind])
        return {"codes": codes, "scale": groups} | ({"offset": groups} if self.offset else {})

    def fits(self, d_in: int) -> bool:
        """Whether a matrix with so many inputs can be kept so."""
        return self.kind not in TABLES or (d_in % _WORD == 0 and self.group % _WORD == 0)

    def bytes(self, d_in: int, d_out: int) -> int:
        """Bytes of a matrix."""
        arrays = self.arrays(d_in, d_out).values()
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)

    def quantise(self, values_io: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of a matrix whose weights are nearest to `values_io`, floats [in, out].

        Of four-bit integers the weight farthest from zero becomes -8, as that code has no opposite.

        Raises:
            ValueError: a weight is NaN or infinite and the format has scales; or the format has
                offsets, or codes of another kind than mxfp4 with powers of two as scales.
        """
        if self.kind in FLOATS:
            return {"values": np.ascontiguousarray(values_io.astype(FLOATS[self.kind], copy=False))}
        if self.offset or (self.scale == "e8m0" and self.kind != "mxfp4"):
            raise ValueError(f"{self}: nothing is rounded to such a format")
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
        """float32 [out] of the weights of one group."""
        most = np.abs(values_go).max(axis=0)
        if self.kind == "int4":
            farthest = np.take_along_axis(values_go, np.abs(values_go).argmax(0)[None], 0)[0]
            return farthest / np.float32(-8)
        if self.kind == "mxfp4":  # section 6.3: the largest power of two in the group, less e2m1's
            with np.errstate(divide="ignore"):
                power = np.floor(np.log2(most)) - 2
            return np.ldexp(np.float32(1), np.clip(np.nan_to_num(power), -127, 127).astype(int))
        return most / np.float32({"int8": 127, "fp8": 448}[self.kind])

    def _rounded(self, scale: np.ndarray) -> np.ndarray:
        """Scales in the type they are kept in."""
        if self.scale == "e8m0":
            return (np.frexp(scale)[1] - 1 + 127).astype(np.uint8)
        return scale.astype(_SCALES[self.scale])

    def _codes(self, ratio_io: np.ndarray) -> np.ndarray:
        """Nearest codes of weights divided by their scales."""
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
        """What the weights are worth, float32 [in, out]; of numpy arrays or of JAX's.

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
    """Scales or offsets as float32."""
    if scale.dtype != np.uint8:
        return scale.astype(np.float32)
    return (_POWERS if isinstance(scale, np.ndarray) else jnp.asarray(_POWERS))[scale]


def pack_words(codes_io: np.ndarray) -> np.ndarray:
    """uint32 [in / 8, out] of codes 0..15, [in, out]."""
    words = codes_io.reshape(-1, _WORD, codes_io.shape[-1]).astype(np.uint32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
    return np.bitwise_or.reduce(words << shifts, axis=1)


def unpack_words(words_io: np.ndarray) -> np.ndarray:
    """uint8 [in, out], codes 0..15: the inverse of `pack_words`."""
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
        """Floats of a kind in FLOATS, or float64, which becomes float32."""
        if values_io.dtype == np.float64:
            values_io = values_io.astype(np.float32)
        kind = next(kind for kind, dtype in FLOATS.items() if dtype == values_io.dtype)
        return Matrix(WeightFormat(kind), {"values": values_io}, len(values_io))

    def outputs(self, chosen: slice | np.ndarray) -> Matrix:
        """Some outputs, in the order given."""
        arrays = {name: array[:, chosen] for name, array in self.arrays.items()}
        return dataclasses.replace(self, arrays=arrays)

    def values(self) -> np.ndarray:
        """float32 [in, out]"""
        return self.format.dequantise(self.arrays, self.d_in)

    def to(self, form: WeightFormat) -> Matrix:
        """The same weights in another format: exactly where it holds them (`common`), else the
        nearest.

        Raises:
            ValueError: see `WeightFormat.quantise`.
        """
        if form == self.format:
            return self
        if form.group and self.format.group and common([self.format, form]) == form:
            return Matrix(form, _recoded(self, form), self.d_in)
        return Matrix(form, form.quantise(self.values()), self.d_in)


def _recoded(matrix: Matrix, form: WeightFormat) -> dict[str, np.ndarray]:
    """The arrays of a matrix in a format that holds its own."""
    old, arrays = matrix.format, matrix.arrays
    codes, factor = arrays["codes"], np.float32(1)
    if old.kind in TABLES and form.kind == "int8":
        # e2m1's values are halves.
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
    """The smallest format that holds weights of all these without loss."""
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
    """The kinds of matrices, most weights first, and the mean bits of a weight with its scales.

    Args:
        matrices: format, inputs and outputs of each; a kind is named however few it has.

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
    """How a model's weights are kept."""

    #: Of a routed expert's matrices: w_gate, w_up, w_down; the same for all experts.
    experts: Mapping[str, WeightFormat]
    #: Of the trunk's matrices by dotted path.
    trunk: Mapping[str, WeightFormat]

    def computed_in(self, dtype: str) -> Formats:
        """As an engine with activations of `dtype` keeps them.

        Weights of float32 become bfloat16 where activations are, and nothing is widened.
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
        """By names of parts and matrices, the formats' texts."""
        return {
            part: {name: str(form) for name, form in forms.items()}
            for part, forms in vars(self).items()
        }

    @staticmethod
    def from_json(parts: Mapping[str, Mapping[str, str]]) -> Formats:
        """Inverse of `to_json`.

        Raises:
            ValueError, KeyError, AttributeError: it is not of that kind.
        """
        return Formats(
            *(
                {name: WeightFormat.parse(text) for name, text in parts[part].items()}
                for part in ("experts", "trunk")
            )
        )
