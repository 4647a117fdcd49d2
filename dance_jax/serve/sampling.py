"""Conversion of a body's fields to the engine's SamplingParams."""

from __future__ import annotations

from typing import Any

from dance_jax.config import UserError
from dance_jax.engine.sequence import MAX_STOP_IDS, SamplingParams
from dance_jax.serve.errors import ApiError
from dance_jax.serve.info import RouteContext
from dance_jax.serve.requests import SamplingFields

#: Fields with the same name and meaning in both.
_SAME = {*SamplingFields.model_fields} & {*SamplingParams.__struct_fields__}
_SAME -= {"max_tokens", "logit_bias"}


def sampling_params(
    server: RouteContext, body: SamplingFields, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """The parameters of all requests of a call; what the body leaves out is the model's default.

    Args:
        server: provides the model's vocabulary and EOS tokens.
        body: body of the HTTP call.
        max_tokens: most output tokens, which the engine cuts to the context; None for the model's
            default, or for as many as fit.
        logprobs: number of alternatives per token; None for no logprobs at all.

    Raises:
        ApiError: 400 if a field is invalid.
    """
    defaults: dict[str, Any] = dict(server.info.sampling)
    if max_tokens is None:
        max_tokens = defaults.get("max_tokens")
    asked = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    fields = {name: value for name, value in defaults.items() if name in _SAME} | asked
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    server.prompts.known(list(bias), "logit_bias")
    server.prompts.known(body.stop_token_ids or [], "stop_token_ids")
    ends = {*server.info.model_config.eos_token_ids, *(body.stop_token_ids or [])}
    if body.min_tokens and len(ends) > MAX_STOP_IDS:
        raise ApiError(
            400,
            f"stop_token_ids: together with min_tokens, at most {MAX_STOP_IDS} ids are allowed, "
            f"including the model's EOS tokens; got {len(ends)}",
            param="stop_token_ids",
        )
    try:
        return SamplingParams(**fields, logit_bias=bias, max_tokens=max_tokens, logprobs=logprobs)
    except UserError as error:
        message = str(error).removeprefix("SamplingParams.")
        raise ApiError(400, message, param=message.partition(":")[0]) from error
