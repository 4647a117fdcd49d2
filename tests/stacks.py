"""Stacks the experts of a checkpoint, one array per leaf."""

from __future__ import annotations

from collections.abc import Sequence

from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.experts import Weights


def stacked(
    checkpoint: Checkpoint, pairs: Sequence[tuple[int, int]], dtype: str = "float32"
) -> Weights:
    """[n, *shape] for each leaf of the format, in the order of `pairs`."""
    form = checkpoint.form(dtype)
    return form.stacked(len(pairs), checkpoint.experts(pairs, form))
