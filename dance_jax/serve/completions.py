"""POST /v1/completions."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import fastapi

from dance_jax.engine.sequence import OutputDelta, SamplingParams
from dance_jax.serve.answers import Completion, CompletionChoice, CompletionLogprobs, Usage
from dance_jax.serve.bodies import JsonRoute
from dance_jax.serve.client import client_of
from dance_jax.serve.delivery import GENERATED, answered, ending
from dance_jax.serve.errors import ApiError
from dance_jax.serve.generation import Generation
from dance_jax.serve.info import RouteContext
from dance_jax.serve.logprobs import completion_logprobs, echoed_logprobs, prompt_logprobs
from dance_jax.serve.requests import MAX_CHOICES, CompletionRequest
from dance_jax.serve.sampling import sampling_params, structure_of

#: Logprobs of prompts in one answer.
MAX_PROMPT_LOGPROBS = 1 << 18
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


async def _start(server: RouteContext, body: CompletionRequest, client: str) -> _Completion:
    unique = uuid.uuid4().hex
    completion_id = f"cmpl-{body.request_id or unique}"
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    asked = body.prompt_logprobs, body.logprobs if body.echo else None
    of_prompt = max((each for each in asked if each is not None), default=None)
    params = sampling_params(
        server,
        body,
        max_tokens,
        await structure_of(body),
        logprobs=body.logprobs,
        prompt_logprobs=of_prompt,
    )
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
            if request.prompt is None or body.truncate_prompt_tokens is not None
            else request.prompt
            for request in requests
        ]
    prompts = [
        (echo, request.prompt_token_ids) for echo, request in zip(echoes, requests, strict=True)
    ]
    offsets = []
    if of_prompt is not None:
        _check_logprobs(prompts, params)
        if body.echo:
            offsets = [await server.prompts.offsets(ids) for _, ids in prompts]
    generation = Generation(server, requests, client)
    return _Completion(
        completion_id,
        server.info.model,
        body,
        generation,
        prompts,
        of_prompt is not None,
        offsets,
    )


def _check_logprobs(prompts: Sequence[tuple[str, list[int]]], params: SamplingParams) -> None:
    """Refuse answers that would keep the server busy with writing them."""
    tokens = sum(len(ids) for _, ids in prompts) * params.n
    count = tokens * (1 + (params.prompt_logprobs or 0))
    if count > MAX_PROMPT_LOGPROBS:
        raise ApiError(
            400,
            f"prompt_logprobs: {tokens} prompt tokens in all samples make {count} logprobs; at "
            f"most {MAX_PROMPT_LOGPROBS} are allowed: ask for fewer tokens, samples or logprobs",
            param="prompt_logprobs",
        )


@dataclasses.dataclass
class _Completion:
    """One HTTP request in progress."""

    id: str
    model: str
    body: CompletionRequest
    generation: Generation
    #: Per prompt, the text that precedes its samples' text, and its tokens.
    prompts: list[tuple[str, list[int]]]
    #: Whether logprobs of prompts are wanted.
    prompt_logprobs: bool
    #: Per prompt, the text of the first token and the places of all in the text, if prompts are
    #: repeated with logprobs.
    offsets: list[tuple[str, list[int]]]
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    async def parts(self) -> AsyncIterator[CompletionChoice]:
        """The next pieces of the choices, as they arrive."""
        # Characters so far, by choice.
        lengths: dict[int, int] = {}
        async for choice, delta in self._with_prompts():
            begins = choice not in lengths
            part = self._begun(choice, delta) if begins else CompletionChoice(index=choice, text="")
            offset = lengths.get(choice, 0) + len(part.text)
            own = completion_logprobs(delta, offset, bool(self.body.return_tokens_as_token_ids))
            if part.logprobs is None:
                part.logprobs = own
            elif own is not None:
                _extend_logprobs(part.logprobs, own)
            part.text += delta.text
            part.finish_reason, part.stop_reason = ending(delta), delta.stop_reason
            if self.body.return_token_ids:
                part.token_ids = delta.token_ids
            lengths[choice] = offset + len(delta.text)
            yield part

    async def _with_prompts(self) -> AsyncIterator[tuple[int, OutputDelta]]:
        """The deltas; the first of each choice has the logprobs of its prompt, if wanted.

        The engine gives them with the first sample of a prompt, for which the others wait here.
        """
        wanted = self.prompt_logprobs
        found: dict[int, Any] = {}
        waiting: dict[int, list[tuple[int, OutputDelta]]] = {}
        begun: set[int] = set()
        async for choice, delta in self.generation.deltas():
            number = choice // (self.body.n or 1)
            if wanted and number not in found and delta.prompt_logprobs is None:
                waiting.setdefault(number, []).append((choice, delta))
                continue
            if delta.prompt_logprobs is not None:
                found[number] = delta.prompt_logprobs
            for one, each in ((choice, delta), *waiting.pop(number, ())):
                if one not in begun:
                    begun.add(one)
                    each.prompt_logprobs = found.get(number)
                yield one, each

    def _begun(self, choice: int, delta: OutputDelta) -> CompletionChoice:
        """The beginning of a choice: what it tells of its prompt."""
        number = choice // (self.body.n or 1)
        echo, ids = self.prompts[number]
        part = CompletionChoice(index=choice, text=echo)
        found = delta.prompt_logprobs
        if found is not None and self.body.echo and self.body.logprobs is not None:
            as_ids = bool(self.body.return_tokens_as_token_ids)
            first, offsets = self.offsets[number]
            part.logprobs = echoed_logprobs(ids, first, offsets, found, as_ids)
        if found is not None and self.body.prompt_logprobs is not None:
            part.prompt_logprobs = prompt_logprobs(found)
        if self.body.return_token_ids:
            part.prompt_token_ids = ids
        return part

    async def chunks(self) -> AsyncIterator[Completion]:
        """The answer as a stream: one chunk per sampled token, even if its text is empty."""
        async for part in self.parts():
            usage = self.generation.usage if self.body.continuous_usage else None
            yield self._answer([part], usage)
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
    if choice.token_ids is not None and part.token_ids is not None:
        choice.token_ids += part.token_ids
    if choice.logprobs is not None and part.logprobs is not None:
        _extend_logprobs(choice.logprobs, part.logprobs)


def _extend_logprobs(whole: CompletionLogprobs, part: CompletionLogprobs) -> None:
    for name in CompletionLogprobs.model_fields:
        getattr(whole, name).extend(getattr(part, name))
