"""Model definitions and checkpoints, independent of clusters and placements.

This file must import nothing that needs JAX: the preflight and the reader of the hosts file use
`models.hub`.
"""

from dance_jax.models.config import ModelConfig
from dance_jax.models.families import FAMILIES, model_config

__all__ = ["FAMILIES", "ModelConfig", "model_config"]
