"""Conversion of a body's fields to the engine's SamplingParams."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

from dance_jax.config import UserError
from dance_jax.engine.sequence import SamplingParams
from dance_jax.engine.structured import StructuredOutputsParams
from dance_jax.serve.errors import ApiError
from dance_jax.serve.info import RouteContext
from dance_jax.serve.requests import SamplingFields

#: Fields with the same name and meaning in both.
_SAME = {*SamplingFields.model_fields} & {*SamplingParams.__struct_fields__}
_SAME -= {"max_tokens", "logit_bias", "structured_outputs"}
#: Checks of structures, which may take long: tokenizing does not wait for them.
_CHECKS = concurrent.futures.ThreadPoolExecutor(1, "structures")
#: Fields with token ids.
_TOKEN_FIELDS = ("logit_bias", "stop_token_ids", "allowed_token_ids")


def sampling_params(
    server: RouteContext,
    body: SamplingFields,
    max_tokens: int | None,
    structure: StructuredOutputsParams | None,
    **more: Any,
) -> SamplingParams:
    """The parameters of all requests of a call; what the body leaves out is the model's default.

    Args:
        server: provides the model's vocabulary and defaults.
        body: body of the HTTP call.
        max_tokens: most output tokens, which the engine cuts to the context; None for the model's
            default, or for as many as fit.
        structure: what the output must be.
        more: fields of SamplingParams that are not the body's.

    Raises:
        ApiError: 400 if a field is invalid.
    """
    defaults: dict[str, Any] = dict(server.info.sampling)
    if max_tokens is None:
        max_tokens = defaults.get("max_tokens")
    asked = {name: value for name in _SAME if (value := getattr(body, name)) not in (None, [])}
    fields = {name: value for name, value in defaults.items() if name in _SAME} | asked | more
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    for name in _TOKEN_FIELDS:
        tokens = bias if name == "logit_bias" else getattr(body, name) or ()
        server.prompts.known([*tokens], name)
    try:
        return SamplingParams(
            **fields, logit_bias=bias, max_tokens=max_tokens, structured_outputs=structure
        )
    except UserError as error:
        message = str(error).removeprefix("SamplingParams.")
        raise ApiError(400, message, param=message.partition(":")[0]) from error


async def structure_of(body: SamplingFields) -> StructuredOutputsParams | None:
    """What the body says the output must be; None for anything.

    Raises:
        ApiError: 400 if several fields say something, or one cannot be followed.
    """
    asked = body.structures
    if len(asked) > 1:
        first, second, *_ = asked
        raise ApiError(400, f"{second}: give either it or {first}", param=second)
    for field, ways in asked.items():
        return await checked(ways, field)
    return None


async def checked(ways: dict[str, Any], field: str) -> StructuredOutputsParams:
    """A structure that can be followed.

    Args:
        ways: arguments of StructuredOutputsParams.
        field: the body's field, for errors.

    Raises:
        ApiError: 400 if it cannot.
    """
    try:
        structure = StructuredOutputsParams(**ways)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(_CHECKS, structure.check)
    except UserError as error:
        message = str(error).removeprefix("structured_outputs").lstrip(":. ")
        param = field.partition(":")[0]
        raise ApiError(400, f"{field}: {message}", param=param) from error
    return structure
