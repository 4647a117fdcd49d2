"""The registry of model families; a new family is one file and one line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from dance_jax.models import deepseek, mixtral
from dance_jax.models.config import ModelConfig
from dance_jax.models.layers import Trunk
from dance_jax.models.tensors import TensorRule


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family supplies."""

    #: The trunk's module.
    trunk: Callable[[ModelConfig, jnp.dtype], Trunk]
    #: Tensors of the trunk in a Hugging Face checkpoint.
    tensor_rules: Callable[[ModelConfig], list[TensorRule]]
    #: Tensors of one routed expert: (config, absolute layer, expert) -> gate, up, down.
    expert_tensors: Callable[[ModelConfig, int, int], list[TensorRule]]


#: By config.json's model_type.
FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(deepseek.DeepseekV2, deepseek.tensor_rules, deepseek.expert_tensors),
    "mixtral": Family(mixtral.Mixtral, mixtral.tensor_rules, mixtral.expert_tensors),
}
