"""The limit of open descriptors."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROCESS = """
from dance_jax import descriptors
import resource
print(descriptors.raise_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "raised"), [(300, 900, 900), (300, 300, 300), (900, 1000, 1000)]
)
def test_the_soft_limit_becomes_the_hard_one(soft: int, hard: int, raised: int) -> None:
    limited = f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$0" -c "$1"'
    said = subprocess.check_output(["sh", "-c", limited, sys.executable, PROCESS], text=True)
    assert said.split() == [str(raised), str(raised), str(hard)]
