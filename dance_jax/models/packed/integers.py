"""Shared parts of the integer formats: codes in 32-bit words, scales and zero points of groups."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dance_jax.models.formats import Matrix, WeightFormat
from dance_jax.models.packed.base import SCALES, PackedTensor, Pieces


def integer_format(bits: int, group: int, pieces: Pieces, offset: bool) -> WeightFormat:
    """The format for 4-bit or 8-bit integers, with scales in their stored type.

    Offsets are float32, which holds the product of a 16-bit scale and a zero point.
    """
    scale = pieces.get("scale")
    stored = SCALES.get(scale.kind if scale else "", "float32")
    return WeightFormat(f"int{bits}", group, "float32" if offset else stored, offset)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpacks int32 [..., n] to uint8 [..., n * 32 / bits], the lowest bits first."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1)


def signed(codes: np.ndarray) -> np.ndarray:
    """int8 values of unsigned 8-bit codes whose middle is 128."""
    return (codes ^ np.uint8(128)).view(np.int8)


def integer_matrix(
    form: WeightFormat, codes: np.ndarray, scale_go: np.ndarray, zeros_go: np.ndarray | None
) -> Matrix:
    """The matrix of scale * (code - zero).

    The matrix holds the equal value scale * (code - middle) + scale * (middle - zero).

    Args:
        codes: as the format stores them.
        scale_go: scales [groups, out].
        zeros_go: zero points as unsigned codes [groups, out]. None if all are the middle code.
    """
    arrays = {"codes": codes, "scale": scale_go}
    if form.offset:
        assert zeros_go is not None
        wide, middle = scale_go.astype(np.float32), 8 if form.kind == "int4" else 128
        arrays |= {"scale": wide, "offset": wide * (np.float32(middle) - zeros_go)}
    d_in = codes.shape[0] * (8 if form.kind == "int4" else 1)
    return Matrix(form, {k: np.ascontiguousarray(array) for k, array in arrays.items()}, d_in)


def zero_faults(tensor: PackedTensor, zeros: np.ndarray, middle: int) -> Iterator[str]:
    """A fault if zero points differ from the middle code although the format has no offsets."""
    if count := np.count_nonzero(zeros != middle):
        yield tensor.says(
            "zeros",
            f"{count} of {zeros.size} are not {middle}, but quantization_config says that the "
            "weights are symmetric",
        )


def order_faults(tensor: PackedTensor, group: int) -> Iterator[str]:
    """A fault if g_idx, the group of each input, does not list the groups in order."""
    order = tensor.pieces.get("order")
    if order is not None and (order.read() != np.arange(tensor.inputs) // group).any():
        yield tensor.says(
            "order",
            "the groups of inputs are not in turn (desc_act, actorder), which is not supported: "
            "use a copy of the model that was quantised without it",
        )
