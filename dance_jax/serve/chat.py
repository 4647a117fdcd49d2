"""POST /v1/chat/completions."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncIterator

import fastapi

from dance_jax.engine.sequence import OutputDelta
from dance_jax.serve.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    TokenLogprob,
    Usage,
)
from dance_jax.serve.bodies import JsonRoute
from dance_jax.serve.client import client_of
from dance_jax.serve.delivery import GENERATED, answered, ending
from dance_jax.serve.errors import ApiError
from dance_jax.serve.generation import Generation
from dance_jax.serve.info import RouteContext
from dance_jax.serve.logprobs import chat_logprobs
from dance_jax.serve.requests import ChatRequest
from dance_jax.serve.sampling import sampling_params


def routes(server: RouteContext) -> fastapi.APIRouter:
    """The route for chat completions."""
    router = fastapi.APIRouter(route_class=JsonRoute)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=GENERATED)
    async def chat_completions(request: fastapi.Request, body: ChatRequest) -> fastapi.Response:
        """Continue a conversation."""
        server.info.check_model(body.model)
        _check(body)
        completion = await _start(server, body, client_of(request))
        return await answered(
            request, completion.generation, completion.whole, completion.chunks, body.stream
        )

    return router


def _check(body: ChatRequest) -> None:
    limits = (body.max_tokens, body.max_completion_tokens)
    if None not in limits and body.max_tokens != body.max_completion_tokens:
        raise ApiError(
            400,
            f"max_tokens: is {body.max_tokens}, but max_completion_tokens is "
            f"{body.max_completion_tokens}; give only one of them",
            param="max_tokens",
        )
    if body.top_logprobs and not body.logprobs:
        raise ApiError(
            400, "top_logprobs: only allowed together with logprobs: true", param="top_logprobs"
        )


async def _start(server: RouteContext, body: ChatRequest, client: str) -> _ChatCompletion:
    unique = uuid.uuid4().hex
    completion_id = f"chatcmpl-{body.request_id or unique}"
    _, max_tokens = body.output_limit
    logprobs = body.top_logprobs or 0 if body.logprobs else None
    params = sampling_params(server, body, max_tokens, logprobs)
    request = await server.prompts.chat(f"chatcmpl-{unique}", body, params)
    generation = Generation(server, [request], client)
    return _ChatCompletion(completion_id, server.info.model, body, generation)


@dataclasses.dataclass
class _ChatCompletion:
    """One HTTP request in progress."""

    id: str
    model: str
    body: ChatRequest
    generation: Generation
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    async def chunks(self) -> AsyncIterator[ChatChunk]:
        """The answer as a stream: one chunk per sampled token, even if its text is empty."""
        begun: set[int] = set()
        async for number, delta in self.generation.deltas():
            if number not in begun:
                begun.add(number)
                first = ChatDelta(role="assistant", content="")
                yield self._chunk([ChatChunkChoice(index=number, delta=first)])
            logprobs = self._logprobs(delta)
            part = ChatChunkChoice(
                index=number,
                delta=ChatDelta(content=delta.text),
                logprobs=ChatLogprobs(content=logprobs) if logprobs else None,
                finish_reason=ending(delta),
                stop_reason=delta.stop_reason,
            )
            yield self._chunk([part])
        if self.body.include_usage:
            yield self._chunk([], self.generation.usage)

    async def whole(self) -> ChatCompletion:
        """The complete answer."""
        choices = [
            ChatChoice(
                index=number,
                message=AssistantMessage(content=""),
                logprobs=ChatLogprobs(content=[]) if self.body.logprobs else None,
                finish_reason="length",
            )
            for number in range(self.body.n or 1)
        ]
        async for number, delta in self.generation.deltas():
            choice = choices[number]
            choice.message.content += delta.text
            if choice.logprobs is not None:
                choice.logprobs.content += self._logprobs(delta)
            choice.finish_reason = ending(delta) or choice.finish_reason
            choice.stop_reason = delta.stop_reason
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=self.generation.usage,
        )

    def _logprobs(self, delta: OutputDelta) -> list[TokenLogprob]:
        return chat_logprobs(delta, self.body.top_logprobs or 0) if self.body.logprobs else []

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage
        )
