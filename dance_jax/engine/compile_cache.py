"""A cache of compiled steps on disk, for a warm start of every process of a cluster.

Only process 0 writes JAX's own persistent cache, and each process of a cluster compiles its own
program (its pool has its own size), so the other processes would never hit that cache. Here each
process keeps its own executables. The key is made from everything the step depends on, including
this package's sources, and not from the step's trace, so a hit saves tracing as well.

Measured (jax 0.10.2, gloo, processes with 1, 1 and 2 CPU devices): executables with ppermute in
lax.switch in lax.scan, psum and donated arguments give the same results after deserialisation.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pathlib
import pickle
import platform
import tempfile
import time
from collections.abc import Callable

import jax
import jaxlib.version
from jax.experimental import serialize_executable

from dance_jax.cache import private_directory, processor
from dance_jax.memory import give_back
from dance_jax.models import native

log = logging.getLogger(__name__)

#: Must change whenever the file format changes.
_MAGIC = b"dance-jax-step-1\n"
_DIGEST_BYTES = 32
_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


class CompileCache:
    """The compiled functions of one process, kept in a directory.

    The files are pickles, which can run code when they are read. The directory is therefore used
    only if it belongs to this user and nobody else can write to it.

    Args:
        directory: created (mode 0700) if missing; None to compile always and keep nothing.
        scope: everything that all functions of this process depend on, e.g. the model's
            fingerprint and shapes, devices and slots of all servers, rank, dtype. Its repr is part
            of the key.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, scope: object = ()) -> None:
        self.directory = None if directory is None else private_directory(directory)
        self.scope = scope
        #: Number of functions read from files, and number compiled here.
        self.hits = 0
        self.misses = 0

    def compile(self, key: object, lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
        """The compiled function, from a file if there is one, else from `lower().compile()`.

        Args:
            key: identifies the function within the scope (bucket, shapes, options) by its repr.
            lower: traces and lowers the function; not called on a cache hit.
        """
        if self.directory is None:
            self.misses += 1
            return _compiled(lower)
        path = self.directory / f"{self._digest(key)}.step"
        started = time.monotonic()
        compiled = _read(path)
        if compiled is not None:
            self.hits += 1
            log.info("%r: read from the cache in %.2f s", key, time.monotonic() - started)
            return compiled
        self.misses += 1
        compiled = _compiled(lower)
        log.info("%r: compiled in %.2f s", key, time.monotonic() - started)
        _write(path, compiled, key)
        return compiled

    def _digest(self, key: object) -> str:
        text = repr((self.scope, key, environment()))
        return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def _compiled(lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
    """Lower and compile; the memory that this took is returned to the system."""
    compiled = lower().compile()
    give_back()
    return compiled


@functools.cache
def environment() -> tuple[str, ...]:
    """Everything but the model that compiled code depends on: versions, devices, CPU, sources."""
    devices = [(d.id, d.process_index, d.device_kind) for d in jax.devices()]
    return (
        jax.__version__,
        jaxlib.version.__version__,
        platform.python_version(),
        jax.devices()[0].client.platform_version,
        repr(devices),
        repr(jax.process_index()),
        processor(),
        native.registered(),
        # XLA:CPU partitions work by the number of cores it may use.
        repr(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        os.environ.get("XLA_FLAGS", ""),
        repr(jax.config.jax_default_matmul_precision),  # pyright: ignore
        _sources(),
    )


def _sources() -> str:
    """A hash of the package's source files that determine what steps compute."""
    digest = hashlib.blake2b(digest_size=20)
    for path in source_files():
        digest.update(f"{path}\0".encode() + (_PACKAGE / path).read_bytes() + b"\0")
    return digest.hexdigest()


def source_files() -> list[pathlib.Path]:
    """Source files that determine what steps compute, relative to the package."""
    files = [*_PACKAGE.glob("*.py")]
    for folder in ("placement", "models", "engine"):
        files += (_PACKAGE / folder).rglob("*.py")
    return sorted(file.relative_to(_PACKAGE) for file in files)


def _read(path: pathlib.Path) -> jax.stages.Compiled | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    head = len(_MAGIC) + _DIGEST_BYTES
    body = content[head:]
    whole = content.startswith(_MAGIC) and content[len(_MAGIC) : head] == _checksum(body)
    try:
        if not whole:
            raise ValueError("the file is damaged or incomplete")
        return serialize_executable.deserialize_and_load(*pickle.loads(body))
    except Exception as error:  # any error: compile again and replace the file
        log.warning("cached step %s cannot be used, compiling again: %s", path, error)
        return None


def _write(path: pathlib.Path, compiled: jax.stages.Compiled, key: object) -> None:
    try:
        body = pickle.dumps(serialize_executable.serialize(compiled))
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            try:
                file.write(_MAGIC + _checksum(body) + body)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except Exception as error:  # the cache is only an optimisation: the compiled step is fine
        log.warning("compiled step %r cannot be cached: %s", key, error)


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()
