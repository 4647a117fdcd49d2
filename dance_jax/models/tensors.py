"""The table between a checkpoint's tensors (Hugging Face names and shapes) and our weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from dance_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Target:
    """One of our weights and how it is cut from the checkpoint's tensor."""

    #: Dotted path in the module, e.g. "layers.0.attention.kv_a.weight".
    path: str
    cut: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """One tensor of the checkpoint: its name, the shape it must have, and what it becomes."""

    source: str
    shape: tuple[int, ...]
    targets: tuple[Target, ...]


def same(source: str, shape: tuple[int, ...], path: str) -> TensorRule:
    """A tensor taken as it is; ".weight" is added to the source's name."""
    return TensorRule(f"{source}.weight", shape, (Target(path, lambda tensor: tensor),))


def transposed(source: str, shape: tuple[int, int], path: str) -> TensorRule:
    """A projection [out, in] that becomes [in, out]; ".weight" is added to the source's name."""
    return TensorRule(f"{source}.weight", shape, (Target(path, lambda tensor: tensor.T),))


def mlp_rules(source: str, d: int, width: int, path: str) -> list[TensorRule]:
    """The three projections of a gated feed-forward layer."""
    return [
        transposed(f"{source}.gate_proj", (width, d), f"{path}.gate.weight"),
        transposed(f"{source}.up_proj", (width, d), f"{path}.up.weight"),
        transposed(f"{source}.down_proj", (d, width), f"{path}.down.weight"),
    ]


def expert_rules(config: ModelConfig, source: str, names: tuple[str, str, str]) -> list[TensorRule]:
    """The three projections of one routed expert, named in the order gate, up, down."""
    d, f = config.hidden_size, config.expert_width
    gate, up, down = names
    return [
        transposed(f"{source}.{gate}", (f, d), "w_gate"),
        transposed(f"{source}.{up}", (f, d), "w_up"),
        transposed(f"{source}.{down}", (d, f), "w_down"),
    ]


def outer_rules(config: ModelConfig) -> list[TensorRule]:
    """Embedding, final norm and output projection, which every family names alike."""
    shape = (config.vocab_size, config.hidden_size)
    rules = [
        same("model.embed_tokens", shape, "embedding"),
        same("model.norm", (config.hidden_size,), "norm.weight"),
    ]
    if not config.tie_embeddings:
        rules.append(same("lm_head", shape, "head"))
    return rules
