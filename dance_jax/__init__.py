"""Serve one Mixture-of-Experts model on several unequal machines with slow links."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dance_jax.engine.sequence import RequestOutput, SamplingParams
    from dance_jax.engine.structured import StructuredOutputsParams
    from dance_jax.llm import LLM

__all__ = ["LLM", "RequestOutput", "SamplingParams", "StructuredOutputsParams"]

_HOME = {
    "LLM": "dance_jax.llm",
    "RequestOutput": "dance_jax.engine.sequence",
    "SamplingParams": "dance_jax.engine.sequence",
    "StructuredOutputsParams": "dance_jax.engine.structured",
}


def __getattr__(name: str) -> Any:
    # Imported lazily: `import dance_jax.config` and the start of the workers must not import JAX.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
