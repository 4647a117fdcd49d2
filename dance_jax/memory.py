"""Memory of this process, and sizes in words."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

_TUNABLES = "GLIBC_TUNABLES"


def use_huge_pages() -> None:
    """Make glibc allocate memory in huge pages, where the system leaves that choice to programs.

    glibc reads the setting when a process starts, so the process restarts if the setting is
    missing; call this function first. Measured: a decode reads every weight once; with 200 M
    parameters it takes 8.7 ms of processor time per token instead of 10.5 ms, and no more memory.
    """
    if sys.platform == "linux" and _TUNABLES not in os.environ:
        os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)


def give_back() -> None:
    """Return unused memory to the system.

    glibc keeps freed memory. Measured: 170 MB after compiling a step, 100 to 400 MB after reading
    experts.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def format_bytes(count: float) -> str:
    """Format a size with the binary unit that shows it best; all messages with sizes use it.

    >>> format_bytes(1536), format_bytes(1023.97 * 2**20), format_bytes(3 * 2**41)
    ('1.5 KiB', '1.0 GiB', '6.0 TiB')
    """
    if abs(count) < 1023.5:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if abs(count) < 1023.95:  # it would be written as 1024.0
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"
