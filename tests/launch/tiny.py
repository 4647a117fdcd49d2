"""A tiny random DeepSeek-V2 for launches that must start fast."""

from __future__ import annotations

import pathlib

from dance_jax.models.random_weights import write_random_checkpoint
from tests.tiny_models import SERVED

LAYERS, EXPERTS = 2, 16
EXPERT_BYTES = 3 * 32 * 16 * 4  # three float32 matrices

HOSTS = f"""\
alpha address=localhost devices=1 experts=14 bandwidth=500Mbps
beta  address=localhost devices=1 memory={11 * EXPERT_BYTES + 5}B  # 11 slots and a bit
gamma address=localhost devices=2 experts=10 checkpoint=peer
"""


def write_model(directory: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """The model in Hugging Face format."""
    return write_random_checkpoint(directory, SERVED, seed=seed)
