"""The C++ library beside this file: products, experts, calls between servers, on CPUs.

A wheel has the library for each set of instructions (CMakeLists.txt). A checkout builds one for its
own processor, at installation by `python -m dance_jax.models.native` or else on first use. The
library is registered with XLA; where it cannot be built, XLA's own operations serve, slower.
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
#: Where an installation has built the library.
INSTALLED = _HERE
#: Custom calls of the library; XLA knows them by the same names.
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
#: What is compiled for one set of instructions or several.
_PRODUCT = "product.cc"
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-w", "-ffp-contract=off")
_BUILD_TIMEOUT_S = 120
_library: ctypes.CDLL | None = None


class Instructions(NamedTuple):
    """A set of a processor's instructions for which product.cc is compiled."""

    name: str
    #: What /proc/cpuinfo must list.
    needs: tuple[str, ...]
    flags: tuple[str, ...]


#: The best first.
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
    # The optimiser takes three times as long for it on x86-64, where hardly a machine needs it.
    Instructions("portable", (), ("-O1",) if platform.machine() == "x86_64" else ()),
)


def usable_instructions() -> list[Instructions]:
    """Those that this machine has."""
    found: set[str] = set()
    if platform.machine() == "x86_64":
        with contextlib.suppress(OSError):
            found = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    return [each for each in INSTRUCTIONS if found.issuperset(each.needs)]


def prebuilt() -> pathlib.Path | None:
    """The library of a wheel for this processor; None in a checkout."""
    libraries = (INSTALLED / f"native-{each.name}.so" for each in usable_instructions())
    return next((path for path in libraries if path.exists()), None)


def build(directory: pathlib.Path) -> pathlib.Path | None:
    """The library, compiled into `directory` with $CXX (default: c++) if there is none yet.

    A library that the wheel or the installation brought is used where it lies. Where several
    processes want the library at once, one compiles and the others wait for it.

    Returns:
        None, and the reason in the log, when it cannot be compiled.
    """
    if (found := prebuilt()) is not None:
        return found
    compiler = _compiler()
    if shutil.which(compiler[0]) is None:
        log.warning("no C++ compiler (%s): products run slower; install one", compiler[0])
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
        log.warning("products run slower, %s failed: %s", compiler[0], error.stderr.strip()[-500:])
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("products run slower: %s", error)
        return None
    return library


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


@contextlib.contextmanager
def _lock(directory: pathlib.Path) -> Iterator[None]:
    """Among the processes of this machine; it ends with the process, however that ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(
    library: pathlib.Path, sources: Sequence[pathlib.Path], instructions: Sequence[Instructions]
) -> None:
    """Compiles sources at the same time, _PRODUCT for each set of instructions, and links them."""
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
    """Makes the library usable in this process; None, what `build` gives on failure, does not.

    Before the first step is traced, and once: a second library is not loaded.

    Args:
        threads: that share one call; 0: as many as there are cores for this process.
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
    set_threads(threads)


def set_threads(threads: int) -> None:
    """How many threads share one call, said before the first; 0: as many as there are cores."""
    if _library is not None:
        _library.ThreadsSet(ctypes.c_int64(threads or _cores()))


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    """Whether steps traced now may call the library."""
    return _library is not None and jax.default_backend() == "cpu"
