"""What the HTTP side of a server knows and uses; handed to every route."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from dance_jax.config import EngineConfig
from dance_jax.serve.errors import ApiError

# At run time this package needs no JAX.
if TYPE_CHECKING:
    from dance_jax.models.config import ModelConfig
    from dance_jax.models.tokenizer import Tokenizer
    from dance_jax.placement.core import Layout
    from dance_jax.serve.metrics import Metrics
    from dance_jax.serve.placement_state import PlacementState
    from dance_jax.serve.prompts import Prompts
    from dance_jax.serve.queue import RequestQueue


@dataclasses.dataclass(frozen=True)
class ServeInfo:
    """One server as its users see it."""

    #: Name of the model in requests and answers.
    model: str
    tokenizer: Tokenizer
    engine_config: EngineConfig
    model_config: ModelConfig
    #: Names of all servers by rank, and which of them this is.
    servers: tuple[str, ...]
    rank: int
    #: Where every expert is at the start.
    layout: Layout
    #: What requests must carry as bearer token; None: nothing.
    api_key: str | None
    #: When the server was started, unix time in seconds.
    created: int

    @property
    def max_model_len(self) -> int:
        """Context in tokens, prompt and output."""
        return self.engine_config.max_model_len

    def check_model(self, name: str | None) -> None:
        """A request may name no model, or the one that is served.

        Raises:
            ApiError: 404, it names another.
        """
        if name is not None and name != self.model:
            raise ApiError(
                404,
                f"model: there is no {name!r:.80} here; this server has {self.model!r}",
                param="model",
                code="model_not_found",
            )


@dataclasses.dataclass(frozen=True)
class RouteContext:
    """What routes work with."""

    queue: RequestQueue
    info: ServeInfo
    prompts: Prompts
    metrics: Metrics
    experts: PlacementState
