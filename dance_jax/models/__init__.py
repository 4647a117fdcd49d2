"""Model definitions and checkpoints; knows neither clusters nor placements."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dance_jax.models.config import ModelConfig
    from dance_jax.models.families import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "ModelConfig"]

_HOME = {
    "FAMILIES": "dance_jax.models.families",
    "Family": "dance_jax.models.families",
    "ModelConfig": "dance_jax.models.config",
}


def __getattr__(name: str) -> Any:
    # Lazily: the preflight and the hosts file's reader use `models.hub` and must not import JAX.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
