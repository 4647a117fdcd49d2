"""Model definitions and checkpoints; knows neither clusters nor placements.

What is imported here does without JAX: the preflight and the hosts file's reader use `models.hub`.
"""

from dance_jax.models.config import ModelConfig
from dance_jax.models.families import FAMILIES, model_config

__all__ = ["FAMILIES", "ModelConfig", "model_config"]
