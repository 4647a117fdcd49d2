"""From the fields of a request to the engine's SamplingParams and Requests."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dance_jax.config import UserError
from dance_jax.engine.sequence import MAX_STOP_IDS, Request, SamplingParams
from dance_jax.serve.errors import ApiError
from dance_jax.serve.info import RouteContext, ServeInfo
from dance_jax.serve.prompts import EncodedPrompt
from dance_jax.serve.requests import MAX_CHOICES, SamplingFields

#: Fields that mean the same here and there; those left out have the engine's defaults.
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
    """One engine request per prompt.

    Args:
        server: what knows the model's limits.
        body: of the HTTP call.
        call_id: its id, from which those of the requests are made.
        prompts: that fit the context.
        max_tokens: most output tokens, as the user gave it; refused where there is no room.
        default_max_tokens: what holds without, cut to the room there is; None: all of it.
        logprobs: alternatives per token; None: no logprobs at all.

    Raises:
        ApiError: 400, a field is wrong.
    """
    choices = len(prompts) * (body.n or 1)
    if choices > MAX_CHOICES:
        raise ApiError(
            400,
            f"n: {len(prompts)} prompts with {body.n} samples each are {choices}; "
            f"at most {MAX_CHOICES} are answered in one call",
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
        f"max_tokens: {max_tokens} and the prompt's {prompt_tokens} tokens are "
        f"{prompt_tokens + max_tokens}; the model's maximum context length is "
        f"{info.max_model_len} tokens",
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
            f"stop_token_ids: with min_tokens they and the model's own ends are at most "
            f"{MAX_STOP_IDS} ids; these are {len(ends)}",
            param="stop_token_ids",
        )
    try:
        return SamplingParams(**fields, logit_bias=bias, max_tokens=max_tokens, logprobs=logprobs)
    except UserError as error:
        message = str(error).removeprefix("SamplingParams.")
        raise ApiError(400, message, param=message.partition(":")[0]) from error
