"""Products with weights on CPU, in C++: kernels_cpu.cc.

XLA:CPU copies every expert's matrices out of the pool before it multiplies by them, and reads a
trunk's on one thread where rows are few; the C++ reads them where they lie, on all threads. Without
a C++ compiler XLA's own products serve, slower.

One library is built on first use from all C++ beside this file and registered here.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dance_jax.cache import processor
from dance_jax.models.config import Activation

log = logging.getLogger(__name__)

_SOURCES = tuple(
    pathlib.Path(__file__).with_name(f"{name}_cpu.cc")
    for name in ("kernels", "attention", "rows", "links", "siblings")
)
_HEADER = pathlib.Path(__file__).with_name("lanes_cpu.h")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
_BUILD_TIMEOUT_S = 120
#: The library's symbols by (kernel, dtype); XLA knows them by the same names.
_SYMBOLS = {
    (kernel, dtype): kernel + dtype.capitalize()
    for kernel in ("GroupedFfn", "Linear", "Attend", "Norm", "Heads")
    for dtype in ("float32", "bfloat16")
}
_HANDLERS = (
    *_SYMBOLS.values(),
    "ChooseExperts",
    "LinksDispatch",
    "LinksReturn",
    "SiblingsGather",
    "SiblingsSum",
)
#: Kinds of `Activation` by their numbers in C++.
_ACTIVATIONS = ("silu", "gelu", "clamped")
_library: ctypes.CDLL | None = None


def build(directory: pathlib.Path) -> pathlib.Path | None:
    """The library in `directory`, compiled with $CXX (default: c++) if it is not there yet.

    Where several processes want it at once, one compiles and the others wait for it.

    Returns:
        None, and the reason in the log, when it cannot be compiled.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        log.warning("no C++ compiler (%s): products run slower; install one", compiler[0])
        return None
    sources = [source.read_bytes() for source in (*_SOURCES, _HEADER)]
    key = repr((sources, _FLAGS, compiler, jax.__version__, processor()))
    digest = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    library = directory / f"kernels-{digest}.so"
    try:
        with _lock(directory):
            if not library.exists():
                _compile(compiler, library)
    except subprocess.CalledProcessError as error:
        log.warning("products run slower, %s failed: %s", compiler[0], error.stderr.strip()[-500:])
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("products run slower: %s", error)
        return None
    return library


@contextlib.contextmanager
def _lock(directory: pathlib.Path) -> Iterator[None]:
    """Among the processes of this machine; it ends with the process, however that ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(compiler: list[str], library: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        new = pathlib.Path(folder, "kernels.so")
        command = [*compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", *map(str, _SOURCES)]
        subprocess.run(
            [*command, "-o", str(new)],
            check=True,
            capture_output=True,
            text=True,
            timeout=_BUILD_TIMEOUT_S,
        )
        os.replace(new, library)


def register(library: str | os.PathLike[str] | None) -> None:
    """Makes the kernels usable in this process; None, what `build` gives on failure, does not.

    Before the first step is traced, and once: a second library is not loaded.
    """
    global _library
    if library is None or _library is not None:
        return
    try:
        symbols = ctypes.CDLL(os.fspath(library))
    except OSError as error:
        log.warning("products run slower: %s", error)
        return
    for symbol in _HANDLERS:
        handler = jax.ffi.pycapsule(getattr(symbols, symbol))
        jax.ffi.register_ffi_target(target(symbol), handler, platform="cpu")
    _library = symbols


def load(directory: pathlib.Path) -> None:
    """`build` and `register`."""
    register(build(directory))


def target(symbol: str) -> str:
    """The name under which XLA knows a handler of the library."""
    return f"dance_jax.{symbol}"


def library() -> ctypes.CDLL | None:
    """The library in use."""
    return _library


def registered() -> str:
    """Name of the library in use, "" for none. Compiled steps depend on it."""
    return "" if _library is None else os.path.basename(_library._name)


def usable() -> bool:
    """Whether steps traced now may call these kernels."""
    return _library is not None and jax.default_backend() == "cpu"


def routed_seconds() -> tuple[int, float, int]:
    """Of all devices of this process so far: calls for routed experts, seconds in them, and pairs
    of a row and an expert that they computed.
    """
    counters = np.zeros(3, np.int64)
    if _library is not None:
        _library.KernelsCounters(counters.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)))
    calls, ns, assignments = counters.tolist()
    return calls, ns / 1e9, assignments


@jax.named_scope("experts")
def grouped_ffn(
    activation: Activation,
    leaves: Sequence[Array],
    x_nd: Array,
    slot_nk: Array,
    weight_nk: Array,
    routed: bool = True,
) -> Array:
    """What experts.grouped_ffn computes, on CPU; hidden activations stay float32.

    Args:
        activation: between the projections.
        leaves: w_gate, w_up [s, d, f] and w_down [s, f, d], float32 or bfloat16; where experts have
            biases, b_gate, b_up [s, f] and b_down [s, d] too, float32.
        x_nd: [n, d] in the weights' dtype.
        slot_nk: int32 [n, k], -1 for none; weight_nk: float32 [n, k].
        routed: the time is counted in `routed_seconds`.

    Returns:
        float32 [n, d].
    """
    weights, biases = leaves[:3], leaves[3:]
    return _call("GroupedFfn", x_nd, x_nd.shape)(
        *weights,
        x_nd,
        slot_nk,
        weight_nk,
        *biases,
        routed=routed,
        activation=np.int32(_ACTIVATIONS.index(activation.kind)),
        alpha=np.float32(activation.alpha),
        limit=np.float32(activation.limit),
    )


def gated_mlp(
    activation: Activation, w_gate: Array, w_up: Array, w_down: Array, x_nd: Array
) -> Array:
    """down(activation(gate(x), up(x))), all rows through one expert: float32 [n, d].

    Args:
        w_gate, w_up: [d, f]; w_down: [f, d]; x_nd: [n, d]; of one dtype.
    """
    rows = (x_nd.shape[0], 1)
    return grouped_ffn(
        activation,
        [w_gate[None], w_up[None], w_down[None]],
        x_nd,
        jnp.zeros(rows, jnp.int32),
        jnp.ones(rows, jnp.float32),
        routed=False,
    )


def linear(x_nd: Array, w_df: Array) -> Array:
    """x @ w, summed in float32, for operands of one dtype, float32 or bfloat16: float32 [n, f]."""
    return _call("Linear", x_nd, (x_nd.shape[0], w_df.shape[1]))(x_nd, w_df)


def _call(kernel: str, x: Array, shape: tuple[int, ...]) -> Callable[..., Array]:
    """The kernel for x's dtype; it returns float32 of that shape."""
    symbol = _SYMBOLS[kernel, x.dtype.name]
    return jax.ffi.ffi_call(target(symbol), jax.ShapeDtypeStruct(shape, jnp.float32))
