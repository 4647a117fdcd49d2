"""The C++ library for CPUs: matrix products, experts, calls between servers.

A wheel has the library compiled for each instruction set (CMakeLists.txt). A checkout compiles it
for this machine, at installation by `python -m dance_jax.models.native` or else on first use. The
library is registered with XLA. Without it XLA's own operations run instead, more slowly.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from dance_jax.cache import processor

log = logging.getLogger(__name__)

_HERE = pathlib.Path(__file__).parent
#: The folder in which an installation builds the library.
INSTALLED = _HERE
#: Custom calls of the library, registered with XLA under `target(name)`.
_HANDLERS = (
    "Linear",
    "Columns",
    "GatedMlp",
    "Experts",
    "ReceiveSums",
    "SendCalls",
    "AttendFloat32",
    "AttendBfloat16",
    "NormFloat32",
    "NormBfloat16",
    "ChooseExperts",
    "SiblingsGather",
    "SiblingsSum",
)
#: The source file that is compiled once for each instruction set.
_PRODUCT = "product.cc"
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-w", "-ffp-contract=off")
_BUILD_TIMEOUT_S = 120
_library: ctypes.CDLL | None = None


class Instructions(NamedTuple):
    """An instruction set for which product.cc is compiled."""

    name: str
    #: Flags that /proc/cpuinfo must list.
    needs: tuple[str, ...]
    flags: tuple[str, ...]


#: Best first.
INSTRUCTIONS = (
    Instructions(
        "avx512",
        ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
        tuple(
            f"-m{name}"
            for name in ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"]
        ),
    ),
    Instructions("avx2", ("avx2", "fma", "f16c"), ("-mavx2", "-mfma", "-mf16c")),
    # On x86-64 the optimiser takes three times as long for this set, and few machines need it.
    Instructions("portable", (), ("-O1",) if platform.machine() == "x86_64" else ()),
)


def usable_instructions() -> list[Instructions]:
    """The instruction sets that this machine supports, best first."""
    found: set[str] = set()
    if platform.machine() == "x86_64":
        with contextlib.suppress(OSError):
            found = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    return [each for each in INSTRUCTIONS if found.issuperset(each.needs)]


def prebuilt() -> pathlib.Path | None:
    """Path of the wheel's library for this processor; None in a checkout."""
    libraries = (INSTALLED / f"native-{each.name}.so" for each in usable_instructions())
    return next((path for path in libraries if path.exists()), None)


def build(directory: pathlib.Path) -> pathlib.Path | None:
    """Compiles the library into `directory` with $CXX (default: c++), unless it exists.

    A library that the wheel or the installation brought is used in place. If several processes need
    the library at the same time, one compiles and the others wait.

    Returns:
        Path of the library. None if compiling fails; the log then gives the reason.
    """
    if (found := prebuilt()) is not None:
        return found
    compiler = _compiler()
    if shutil.which(compiler[0]) is None:
        log.warning(
            "no C++ compiler (%s): XLA's own operations run instead, more slowly; install a "
            "compiler or set CXX",
            compiler[0],
        )
        return None
    best = usable_instructions()[:1]
    sources = [path.read_bytes() for path in sorted(_HERE.glob("*.[ch]*"))]
    key = repr((sources, best, _FLAGS, compiler, jax.__version__, processor()))
    digest = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    name = f"native-{digest}.so"
    if (INSTALLED / name).exists():
        return INSTALLED / name
    library = directory / name
    try:
        with _lock(directory):
            if not library.exists():
                _compile(library, [*_HERE.glob("*.cc")], best)
    except subprocess.CalledProcessError as error:
        log.warning(
            "the native library was not built, so XLA's slower operations run: %s failed: %s",
            compiler[0],
            error.stderr.strip()[-500:],
        )
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning(
            "the native library could not be built, so XLA's slower operations run: %s", error
        )
        return None
    return library


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


@contextlib.contextmanager
def _lock(directory: pathlib.Path) -> Iterator[None]:
    """Locks `directory` among the processes of this machine. The lock ends with its process."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(
    library: pathlib.Path, sources: Sequence[pathlib.Path], instructions: Sequence[Instructions]
) -> None:
    """Compiles all sources in parallel, _PRODUCT once per instruction set, and links them."""
    compiler = _compiler()
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        include = f"-I{jax.ffi.include_dir()}"
        commands = [
            [str(source), "-march=native", include]
            if platform.machine() == "x86_64"
            else [str(source), include]
            for source in sorted(sources)
            if source.name != _PRODUCT
        ]
        commands += [
            [str(_HERE / _PRODUCT), f"-DDANCE_ISA={each.name}", *each.flags]
            for each in instructions
        ]
        objects = [str(pathlib.Path(folder, f"{number}.o")) for number in range(len(commands))]

        def compile_one(command: list[str], object_: str) -> None:
            _run([*compiler, *_FLAGS, "-c", *command, "-o", object_])

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(compile_one, commands, objects))
        new = str(pathlib.Path(folder, "native.so"))
        _run([*compiler, "-shared", *objects, "-o", new, "-pthread"])
        os.replace(new, library)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)


def register(library: str | os.PathLike[str] | None, threads: int = 0) -> None:
    """Makes the library usable in this process. Does nothing for None, a failed `build`.

    Call before the first step is traced. Only the first library is loaded, later calls do nothing.

    Args:
        threads: number of threads that share one call. 0 for all cores of this process.
    """
    global _library
    if library is None or _library is not None:
        return
    try:
        symbols = ctypes.CDLL(os.fspath(library))
    except OSError as error:
        log.warning(
            "the native library could not be loaded, so XLA's slower operations run: %s", error
        )
        return
    for symbol in _HANDLERS:
        handler = jax.ffi.pycapsule(getattr(symbols, symbol))
        jax.ffi.register_ffi_target(target(symbol), handler, platform="cpu")
    _library = symbols
    set_threads(threads)


def set_threads(threads: int) -> None:
    """Sets how many threads share one call, before the first call. 0 for all cores."""
    if _library is not None:
        _library.ThreadsSet(ctypes.c_int64(threads or _cores()))


def _cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load(directory: pathlib.Path) -> None:
    """Builds and registers the library."""
    register(build(directory))


def target(symbol: str) -> str:
    """The name under which a handler of the library is registered with XLA."""
    return f"dance_jax.{symbol}"


def library() -> ctypes.CDLL | None:
    """The library in use, or None."""
    return _library


def registered() -> str:
    """File name of the library in use, "" if none. Compiled steps depend on the library."""
    return "" if _library is None else os.path.basename(_library._name)


def usable() -> bool:
    """Whether a step that is traced now may call the library."""
    return _library is not None and jax.default_backend() == "cpu"
