"""The directory where converted models and compiled code are kept between runs."""

from __future__ import annotations

import logging
import os
import pathlib
import platform

log = logging.getLogger(__name__)


def default_cache_dir() -> pathlib.Path:
    """$XDG_CACHE_HOME/dance_jax, by default ~/.cache/dance_jax."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "dance_jax"


def private_directory(directory: str | os.PathLike[str]) -> pathlib.Path | None:
    """Create a directory for files that are executed as code.

    Returns:
        None, with a warning in the log, if other users can write there or it cannot be created.
    """
    path = pathlib.Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = path.stat()
    except OSError as error:
        log.warning("compiled code is not cached: %s", error)
        return None
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        log.warning(
            "compiled code is not cached: %s must belong to you and be writable by you alone", path
        )
        return None
    return path


def processor() -> str:
    """Model and instruction sets: code compiled for one processor may not run on another."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return repr(sorted({line for line in lines if line.startswith(wanted)}))
