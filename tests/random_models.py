"""Makes trunks and experts with random weights, without files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from dance_jax.models.build import fill
from dance_jax.models.config import ModelConfig
from dance_jax.models.experts import ExpertFormat, Weights
from dance_jax.models.formats import WeightFormat
from dance_jax.models.random_weights import Held, random_trunk_tensors
from dance_jax.models.tensors import arrays_of, expert_rules, parts_of, trunk_rules
from dance_jax.models.trunk import Trunk


def init_random(config: ModelConfig, seed: int, dtype: str = "float32") -> Trunk:
    """A trunk with random weights whose activations stay near unit size."""
    rules = {rule.source: rule for rule in trunk_rules(config)}
    form = WeightFormat(dtype)

    def weights() -> Iterable[tuple[str, np.ndarray]]:
        for name, tensor in random_trunk_tensors(config, seed):
            for path, part in parts_of(rules[name], Held(tensor)):
                yield from arrays_of(path, part, form).items()

    return fill(config, dtype, weights())


def random_expert(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    layer: int,
    expert: int,
    form: ExpertFormat,
) -> Weights:
    """One expert in `form`, from the tensors that `random_expert_tensors` yields.

    Args:
        layer: index of the MoE layer, from 0.
    """
    rules = expert_rules(config, config.moe_layers[layer], expert)
    found = {}
    for rule in rules:
        for path, part in parts_of(rule, Held(tensors[rule.source])):
            found |= arrays_of(path, part, form.matrix_form(path))
    return form.from_stored(found)
