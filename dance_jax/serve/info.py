"""Server information and services that every route gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dance_jax.config import EngineConfig
from dance_jax.serve.errors import ApiError

# These imports would load JAX, which this package does not need at run time.
if TYPE_CHECKING:
    from dance_jax.models.config import ModelConfig
    from dance_jax.models.tokenizer import Tokenizer
    from dance_jax.serve.keys import Keys
    from dance_jax.serve.metrics import Metrics
    from dance_jax.serve.parsers.formats import AnswerFormat
    from dance_jax.serve.placement_state import PlacementState
    from dance_jax.serve.prompts import Prompts
    from dance_jax.serve.queue import RequestQueue
    from dance_jax.serve.view import Views


@dataclasses.dataclass(frozen=True)
class ServeInfo:
    """Properties of one server."""

    #: Names of the model in requests; the first is that in responses.
    models: Sequence[str]
    tokenizer: Tokenizer
    engine_config: EngineConfig
    model_config: ModelConfig
    #: Names of all servers by rank, "" for vacant seats; and this server's rank. The names change
    #: as servers join and leave.
    servers: Sequence[str]
    rank: int
    #: Bearer tokens, one of which requests must carry.
    keys: Keys
    #: Web sites whose pages may call the server. Other servers' dashboards are added.
    allowed_origins: list[str]
    #: The model's defaults of fields of `SamplingParams`.
    sampling: Mapping[str, int | float]
    #: How the model writes calls and reasoning.
    answer_format: AnswerFormat
    #: Start of the server, unix time in seconds.
    created: int

    @property
    def seated(self) -> dict[int, str]:
        """Names of the servers by rank, without vacant seats."""
        return {rank: name for rank, name in enumerate(self.servers) if name}

    @property
    def max_model_len(self) -> int:
        """Context length in tokens, prompt plus output."""
        return self.engine_config.max_model_len

    @property
    def model(self) -> str:
        """Name of the model in responses."""
        return self.models[0]

    def check_model(self, name: str | None) -> None:
        """Check that a request names no model or the served one.

        Raises:
            ApiError: 404 if it names another model.
        """
        if name and name not in self.models:
            served = " or ".join(map(repr, self.models))
            raise ApiError(
                404,
                f"model: {name!r:.80} does not exist; this server serves {served}",
                param="model",
                code="model_not_found",
            )


@dataclasses.dataclass(frozen=True)
class RouteContext:
    """The services that routes use."""

    queue: RequestQueue
    info: ServeInfo
    prompts: Prompts
    metrics: Metrics
    experts: PlacementState
    views: Views
