"""Products with weights in any format on CPUs, by the C++ library (native/product.cc, experts.cc).

XLA:CPU copies every expert's matrices out of the pool before multiplying by them, uses a single
thread for the trunk's matrices if there are few rows, and does not support eight-bit or four-bit
weights. The library stores weights in its own layout, which it reads sequentially on all threads.
A row's result is bit-identical regardless of the other rows.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dance_jax.models import native
from dance_jax.models.config import Activation
from dance_jax.models.formats import Arrays, WeightFormat

#: Kinds of weights, of scales and of `Activation`, in the order of their numbers in C++.
_KINDS = ("float32", "bfloat16", "float16", "int8", "fp8", "int4", "mxfp4")
_SCALES = ("", "float32", "bfloat16", "float16", "e8m0")
_ACTIVATIONS = ("silu", "gelu", "clamped")

#: Format of a matrix, and its panels made by `pack`; with a matrix per head, the panels of all.
Packed = tuple[WeightFormat, Array]


def format_words(forms: Sequence[WeightFormat]) -> np.ndarray:
    """Encode formats for C++: int64 [4 * forms]."""
    words = [
        (_KINDS.index(form.kind), _SCALES.index(form.scale), form.group, form.offset)
        for form in forms
    ]
    return np.array(words, np.int64).reshape(-1)


def pack(form: WeightFormat, arrays: Arrays, d_in: int, d_out: int) -> np.ndarray:
    """Lay out a matrix in the order in which products read it (native/product.h): uint8 [n].

    Args:
        arrays: arrays of the format, [in, out].
    """
    library = native.library()
    assert library is not None
    library.PanelsBytes.restype = ctypes.c_int64
    words = format_words([form])  # the variable keeps the array alive while C++ reads it
    shape = ctypes.c_void_p(words.ctypes.data), ctypes.c_int64(d_in), ctypes.c_int64(d_out)
    panels = np.empty(library.PanelsBytes(*shape), np.uint8)
    own = [np.ascontiguousarray(array) for array in arrays.values()]
    own += [np.empty(0)] * (3 - len(own))
    library.PanelsPack(*shape, *(ctypes.c_void_p(each.ctypes.data) for each in (*own, panels)))
    return panels


def linear(weight: Packed, x: Array, d_out: int) -> Array:
    """x [n, in] @ w, or x[:, h] @ w[h] for each head h of x [n, h, in]: float32 [..., d_out]."""
    form, panels = weight
    call = _call("Linear", (*x.shape[:-1], d_out))
    return call(x.astype(jnp.float32), panels, formats=format_words([form]))


def columns(weight: Packed, chosen_t: Array, d_in: int, d_out: int) -> Array:
    """Values of the weights of some outputs, float32 [t, in]."""
    form, panels = weight
    call = _call("Columns", (len(chosen_t), d_in))
    return call(chosen_t, panels, formats=format_words([form]), outputs=np.int64(d_out))


def gated_mlp(activation: Activation, weights: Sequence[Packed], width: int, x_nd: Array) -> Array:
    """A gated feed-forward, down(activation(gate(x), up(x))), for all rows: float32 [n, d].

    Args:
        weights: gate [d, width], up [d, width] and down [width, d].
        x_nd: [n, d] of any float type.
    """
    return _call("GatedMlp", x_nd.shape)(
        x_nd.astype(jnp.float32),
        *(panels for _, panels in weights),
        formats=format_words([form for form, _ in weights]),
        width=np.int64(width),
        activation=np.int32(_ACTIVATIONS.index(activation.kind)),
        alpha=np.float32(activation.alpha),
        limit=np.float32(activation.limit),
    )


@jax.named_scope("experts")
def experts(pool: Array, x_nd: Array, slot_nk: Array, weight_nk: Array) -> Array:
    """Weighted sum of each row's experts in a `NativePool`: float32 [n, d].

    Args:
        pool: int32 [], `NativePool.number`.
        x_nd: [n, d] of any float type.
        slot_nk: int32 [n, k], -1 for none; weight_nk: float32 [n, k].
    """
    # The pool's memory is not an operand, but the call is not marked as having side effects: JAX
    # would then run the program from Python, which costs milliseconds per step (measured).
    call = _call("Experts", x_nd.shape)
    return call(pool, x_nd.astype(jnp.float32), slot_nk, weight_nk)


def _call(kernel: str, shape: tuple[int, ...]) -> Callable[..., Array]:
    """A kernel of the library that returns float32 of the given shape."""
    return jax.ffi.ffi_call(native.target(kernel), jax.ShapeDtypeStruct(shape, jnp.float32))


def routed_seconds() -> tuple[int, float, int]:
    """Totals for routed experts over all devices of this process.

    Returns:
        Number of calls, seconds spent in them, and number of computed (row, expert) pairs.
    """
    counters = np.zeros(3, np.int64)
    if (library := native.library()) is not None:
        library.ExpertsCounters(counters.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)))
    calls, ns, assignments = counters.tolist()
    return calls, ns / 1e9, assignments


class NativePool:
    """The slots of a device, in the library's memory. Any thread may write a slot during steps.

    Args:
        d, f: hidden and inner width.
        activation: activation of the experts.
        forms: formats of gate, up and down.
        bias: whether experts have biases.
        slots: number of slots.
    """

    def __init__(
        self,
        d: int,
        f: int,
        activation: Activation,
        forms: Sequence[WeightFormat],
        bias: bool,
        slots: int,
    ) -> None:
        library = native.library()
        assert library is not None
        self._library = library
        library.PoolNew.restype = library.PoolBytes.restype = ctypes.c_int64
        library.PoolPut.restype = library.PoolGet.restype = ctypes.c_bool
        words = format_words(forms)
        #: Number by which steps refer to the pool.
        self.number: int = library.PoolNew(
            ctypes.c_int64(d),
            ctypes.c_int64(f),
            ctypes.c_int32(_ACTIVATIONS.index(activation.kind)),
            ctypes.c_float(activation.alpha),
            ctypes.c_float(activation.limit),
            ctypes.c_void_p(words.ctypes.data),
            ctypes.c_bool(bias),
            ctypes.c_int64(slots),
        )
        weakref.finalize(self, library.PoolDelete, ctypes.c_int64(self.number))

    def put(self, slot: int, expert: int, arrays: Sequence[np.ndarray]) -> None:
        """Copy an expert into a slot; computations in progress keep the previous expert alive.

        Args:
            expert: number of the expert in the model: layer * experts per layer + expert.

        Raises:
            IndexError: there is no such slot.
        """
        whole = [np.ascontiguousarray(array) for array in arrays]
        if not self._library.PoolPut(*self._at(slot), ctypes.c_int64(expert), _pointers(whole)):
            raise IndexError(f"slot {slot} does not exist in the pool")

    def get(self, slot: int, arrays: Sequence[np.ndarray]) -> None:
        """Copy the expert in a slot into contiguous arrays.

        Raises:
            IndexError: the slot is empty or does not exist.
        """
        if not self._library.PoolGet(*self._at(slot), _pointers(arrays)):
            raise IndexError(f"slot {slot} is empty or does not exist in the pool")

    def _at(self, slot: int) -> tuple[ctypes.c_int64, ctypes.c_int64]:
        return ctypes.c_int64(self.number), ctypes.c_int64(slot)

    @property
    def bytes(self) -> int:
        """Bytes of the experts in the pool; outputs are padded to multiples of 16."""
        return self._library.PoolBytes(ctypes.c_int64(self.number))


def _pointers(arrays: Sequence[np.ndarray]) -> ctypes.Array:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
