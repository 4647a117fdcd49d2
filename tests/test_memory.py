"""Memory settings of a process, and sizes in words."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dance_jax.memory import format_bytes

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


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1023.6, "1.0 KiB"),
        (48 * 2**10, "48.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (5 * 10**7, "47.7 MiB"),
        (16 * 2**30, "16.0 GiB"),
        (3 * 2**41, "6.0 TiB"),
        (10**18, "909494.7 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_a_size_has_a_unit_that_says_something(count: float, text: str) -> None:
    assert format_bytes(count) == text
