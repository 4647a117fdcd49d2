"""POST /v1/completions."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncIterator

import fastapi

from dance_jax.serve.answers import Completion, CompletionChoice, CompletionLogprobs, Usage
from dance_jax.serve.bodies import JsonRoute
from dance_jax.serve.client import client_of
from dance_jax.serve.delivery import GENERATED, answered, ending
from dance_jax.serve.errors import ApiError
from dance_jax.serve.generation import Generation
from dance_jax.serve.info import RouteContext
from dance_jax.serve.logprobs import completion_logprobs
from dance_jax.serve.requests import MAX_CHOICES, CompletionRequest
from dance_jax.serve.sampling import sampling_params

#: OpenAI's default.
_DEFAULT_MAX_TOKENS = 16


def routes(server: RouteContext) -> fastapi.APIRouter:
    """The route for completions."""
    router = fastapi.APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions", response_model=Completion, responses=GENERATED)
    async def completions(request: fastapi.Request, body: CompletionRequest) -> fastapi.Response:
        """Continue prompts."""
        server.info.check_model(body.model)
        _check(body)
        completion = await _start(server, body, client_of(request))
        return await answered(
            request, completion.generation, completion.whole, completion.chunks, body.stream
        )

    return router


def _check(body: CompletionRequest) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(
            400,
            f"best_of: must equal n, which is {body.n or 1}; got {body.best_of}",
            param="best_of",
        )
    if body.echo and body.logprobs is not None:
        message = "echo: logprobs of prompts are not supported; leave out echo or logprobs"
        raise ApiError(400, message, param="echo")


async def _start(server: RouteContext, body: CompletionRequest, client: str) -> _Completion:
    unique = uuid.uuid4().hex
    completion_id = f"cmpl-{body.request_id or unique}"
    max_tokens = body.max_tokens or _DEFAULT_MAX_TOKENS
    params = sampling_params(server, body, max_tokens, body.logprobs)
    requests = await server.prompts.completions(f"cmpl-{unique}", body, params)
    if len(requests) * params.n > MAX_CHOICES:
        raise ApiError(
            400,
            f"n: {len(requests)} prompts with {params.n} samples each make "
            f"{len(requests) * params.n} samples; a request may have at most {MAX_CHOICES}",
            param="n",
        )
    echoes = [""] * len(requests)
    if body.echo:
        echoes = [
            await server.prompts.detokenized(request.prompt_token_ids)
            if request.prompt is None
            else request.prompt
            for request in requests
        ]
    generation = Generation(server, requests, client)
    return _Completion(completion_id, server.info.model, body, generation, echoes)


@dataclasses.dataclass
class _Completion:
    """One HTTP request in progress."""

    id: str
    model: str
    body: CompletionRequest
    generation: Generation
    #: Per prompt, the text that precedes its samples' text.
    echoes: list[str]
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    async def parts(self) -> AsyncIterator[CompletionChoice]:
        """The next pieces of the choices, as they arrive."""
        samples = self.body.n or 1
        # Characters so far, by choice.
        lengths: dict[int, int] = {}
        async for choice, delta in self.generation.deltas():
            echo = "" if choice in lengths else self.echoes[choice // samples]
            offset = lengths.get(choice, 0)
            text = echo + delta.text
            lengths[choice] = offset + len(text)
            yield CompletionChoice(
                index=choice,
                text=text,
                logprobs=completion_logprobs(delta, offset),
                finish_reason=ending(delta),
                stop_reason=delta.stop_reason,
            )

    async def chunks(self) -> AsyncIterator[Completion]:
        """The answer as a stream: one chunk per sampled token, even if its text is empty."""
        async for part in self.parts():
            yield self._answer([part])
        if self.body.include_usage:
            yield self._answer([], self.generation.usage)

    async def whole(self) -> Completion:
        """The complete answer."""
        choices: dict[int, CompletionChoice] = {}
        async for part in self.parts():
            if part.index in choices:
                _extend(choices[part.index], part)
            else:
                choices[part.index] = part
        return self._answer([choices[index] for index in sorted(choices)], self.generation.usage)

    def _answer(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage
        )


def _extend(choice: CompletionChoice, part: CompletionChoice) -> None:
    """Add the next part of a choice to it."""
    choice.text += part.text
    choice.finish_reason, choice.stop_reason = part.finish_reason, part.stop_reason
    if choice.logprobs is not None and part.logprobs is not None:
        for name in CompletionLogprobs.model_fields:
            getattr(choice.logprobs, name).extend(getattr(part.logprobs, name))
