"""Memory settings of a process."""

from __future__ import annotations

import os
import subprocess
import sys

_CODE = """
import os, sys
from dance_jax.memory import use_huge_pages
print("begun", flush=True)
use_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:])
"""


def run(**environment: str) -> list[str]:
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", _CODE, "a word", "another"]
    shown = subprocess.run(command, env=plain | environment, stdout=subprocess.PIPE, check=True)
    return shown.stdout.decode().splitlines()


def test_a_process_begins_anew_once_for_huge_pages() -> None:
    begins, setting = (2, "glibc.malloc.hugetlb=1") if sys.platform == "linux" else (1, None)
    assert run() == ["begun"] * begins + [f"{setting} a word another"]
    # A value that the user has set is kept.
    assert run(GLIBC_TUNABLES="glibc.malloc.check=0") == [
        "begun",
        "glibc.malloc.check=0 a word another",
    ]
