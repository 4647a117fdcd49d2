"""The grouped expert FFN on CPU, in C++: experts_cpu.cc, built on first use and registered here.

XLA:CPU copies every expert's matrices out of the pool before it multiplies by them; the C++ reads
them where they lie. Without a C++ compiler the FFN of experts.py serves, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp
from jax import Array

from dance_jax.cache import processor

log = logging.getLogger(__name__)

_SOURCE = pathlib.Path(__file__).with_suffix(".cc")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
_BUILD_TIMEOUT_S = 120
#: XLA's name of the custom call, and the library's symbol, per dtype.
_TARGETS = {
    "float32": ("dance_jax_grouped_ffn_float32", "GroupedFfnFloat32"),
    "bfloat16": ("dance_jax_grouped_ffn_bfloat16", "GroupedFfnBfloat16"),
}
_registered: str | None = None  # the library's file name


def build(directory: pathlib.Path) -> pathlib.Path | None:
    """The library in `directory`, compiled with $CXX (default: c++) if it is not there yet.

    Returns:
        None, and the reason in the log, when it cannot be compiled.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        log.warning("no C++ compiler (%s): experts run slower; install one", compiler[0])
        return None
    key = repr((_SOURCE.read_bytes(), _FLAGS, compiler, jax.__version__, processor()))
    digest = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    library = directory / f"experts-{digest}.so"
    if library.exists():
        return library
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as folder:
            new = pathlib.Path(folder, "experts.so")
            command = [*compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(_SOURCE)]
            subprocess.run(
                [*command, "-o", str(new)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_BUILD_TIMEOUT_S,
            )
            os.replace(new, library)
    except subprocess.CalledProcessError as error:
        log.warning("experts run slower, %s failed: %s", compiler[0], error.stderr.strip()[-500:])
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("experts run slower: %s", error)
        return None
    return library


def register(library: str | os.PathLike[str] | None) -> None:
    """Makes `grouped_ffn` usable in this process; None, what `build` gives on failure, does not.

    Before the first step is traced, and once: a second library is not loaded.
    """
    global _registered
    if library is None or _registered is not None:
        return
    try:
        symbols = ctypes.CDLL(os.fspath(library))
    except OSError as error:
        log.warning("experts run slower: %s", error)
        return
    for target, symbol in _TARGETS.values():
        handler = jax.ffi.pycapsule(getattr(symbols, symbol))
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    _registered = os.path.basename(library)


def load(directory: pathlib.Path) -> None:
    """`build` and `register`."""
    register(build(directory))


def registered() -> str:
    """Name of the library in use, "" for none. Compiled steps depend on it."""
    return _registered or ""


def usable() -> bool:
    """Whether steps traced now may call `grouped_ffn`."""
    return _registered is not None and jax.default_backend() == "cpu"


@jax.named_scope("experts")
def grouped_ffn(
    w_gate: Array, w_up: Array, w_down: Array, x_nd: Array, slot_nk: Array, weight_nk: Array
) -> Array:
    """What experts.grouped_ffn computes, on CPU; hidden activations stay float32.

    Args:
        w_gate, w_up: [s, d, f]; w_down: [s, f, d]; float32 or bfloat16.
        x_nd: [n, d] in the weights' dtype.
        slot_nk: int32 [n, k], -1 for none; weight_nk: float32 [n, k].

    Returns:
        float32 [n, d].
    """
    target, _ = _TARGETS[x_nd.dtype.name]
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(x_nd.shape, jnp.float32))
    return call(w_gate, w_up, w_down, x_nd, slot_nk, weight_nk)
