"""What the devices of one server hand each other on CPUs, through memory: native/siblings.cc.

XLA's collectives on CPU go through the network even inside a process, one message after the other.
(measured) With 1, 1 and 2 devices they took most of a layer's time wherever the links were fast.
All devices of a server must make the same calls in the same order, which data dependence ensures.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dance_jax.models import native


def gather(device: Array, devices: int, x_td: Array) -> Array:
    """[devices * t, d]: the rows of all devices, in their order.

    Args:
        device: int32 [], this one's number in its server; devices: how many there are.
        x_td: [t, d] of any dtype.
    """
    shape = jax.ShapeDtypeStruct((devices * x_td.shape[0], *x_td.shape[1:]), x_td.dtype)
    return _call("SiblingsGather", shape, devices, device, x_td)


def sum_rows(
    device: Array, devices: int, y_nd: Array, first: Array, count: Array, rows: int
) -> Array:
    """float32 [rows, d]: rows [first, first + count) of the sum over devices, then anything.

    Args:
        device, devices: as of `gather`.
        y_nd: float32 [n, d].
        first, count: int32 []; each device chooses its own.
    """
    shape = jax.ShapeDtypeStruct((rows, y_nd.shape[1]), y_nd.dtype)
    return _call("SiblingsSum", shape, devices, device, first, count, y_nd)


def _call(
    symbol: str, result: jax.ShapeDtypeStruct, devices: int, device: Array, *operands: Array
) -> Array:
    handler = jax.ffi.ffi_call(native.target(symbol), result, has_side_effect=True)
    return handler(device.astype(jnp.int32), *operands, devices=np.int64(devices))
