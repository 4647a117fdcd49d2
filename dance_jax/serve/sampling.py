"""Conversion of a request's fields to the engine's SamplingParams and Requests."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dance_jax.config import UserError
from dance_jax.engine.sequence import MAX_STOP_IDS, Request, SamplingParams
from dance_jax.serve.errors import ApiError
from dance_jax.serve.info import RouteContext, ServeInfo
from dance_jax.serve.prompts import EncodedPrompt
from dance_jax.serve.requests import MAX_CHOICES, SamplingFields

#: Fields with the same name and meaning in SamplingParams; absent ones get the engine's defaults.
_SAME = (
    "n",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
)


def engine_requests(
    server: RouteContext,
    body: SamplingFields,
    call_id: str,
    prompts: Sequence[EncodedPrompt],
    *,
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
) -> list[Request]:
    """Create one engine request per prompt.

    Args:
        server: provides the model's limits.
        body: body of the HTTP call.
        call_id: id of the call; prefix of the requests' ids.
        prompts: prompts that fit the context.
        max_tokens: the user's limit of output tokens, refused if it exceeds the room left in the
            context; None if not given.
        default_max_tokens: limit if `max_tokens` is None, cut to the room left in the context; None
            for all of that room.
        logprobs: number of alternatives per token; None for no logprobs at all.

    Raises:
        ApiError: 400 if a field is invalid.
    """
    choices = len(prompts) * (body.n or 1)
    if choices > MAX_CHOICES:
        raise ApiError(
            400,
            f"n: {len(prompts)} prompts with {body.n} samples each make {choices} samples; "
            f"a call may have at most {MAX_CHOICES}",
            param="n",
        )
    now = time.time()
    requests = []
    for number, prompt in enumerate(prompts):
        room = server.info.max_model_len - len(prompt.token_ids)
        if max_tokens is not None and max_tokens > room:
            raise _no_room(server.info, len(prompt.token_ids), max_tokens)
        longest = max_tokens or min(default_max_tokens or room, room)
        params = _params(server, body, longest, logprobs)
        requests.append(Request(f"{call_id}-{number}", prompt.text, prompt.token_ids, params, now))
    return requests


def _no_room(info: ServeInfo, prompt_tokens: int, max_tokens: int) -> ApiError:
    return ApiError(
        400,
        f"max_tokens: {max_tokens} plus the prompt's {prompt_tokens} tokens are "
        f"{prompt_tokens + max_tokens}, but the model's maximum context length is "
        f"{info.max_model_len} tokens; lower max_tokens or shorten the prompt",
        param="max_tokens",
        code="context_length_exceeded",
    )


def _params(
    server: RouteContext, body: SamplingFields, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    fields = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
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
