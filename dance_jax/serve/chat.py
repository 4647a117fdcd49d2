"""POST /v1/chat/completions."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import fastapi
import msgspec

from dance_jax.engine.sequence import OutputDelta
from dance_jax.engine.structured import StructuredOutputsParams
from dance_jax.serve.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatFinishReason,
    ChatLogprobs,
    FunctionCall,
    FunctionDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from dance_jax.serve.bodies import JsonRoute
from dance_jax.serve.client import client_of
from dance_jax.serve.delivery import GENERATED, answered, ending
from dance_jax.serve.errors import ApiError
from dance_jax.serve.generation import Generation
from dance_jax.serve.info import RouteContext
from dance_jax.serve.logprobs import chat_logprobs, prompt_logprobs
from dance_jax.serve.parsers.parsed import AnswerParser, CallDelta
from dance_jax.serve.requests import ChatRequest
from dance_jax.serve.sampling import checked, sampling_params, structure_of
from dance_jax.serve.tools import Tool, calls_grammar, forced_tools, offered


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
    tools, forced = offered(body), forced_tools(body)
    text = await server.prompts.rendered(body.messages, body)
    form = server.info.answer_format
    structure = await _structure(body, forced)
    if structure is not None:
        around = form.before_answer(text)
        if tools and not forced and form.call_begins is not None:
            around["unless_begins_with"] = server.prompts.marker(form.call_begins)
        structure = msgspec.structs.replace(structure, **around)
    marked = form.is_harmony or (form.special_tokens and bool(tools))
    more = {"skip_special_tokens": False} if marked else {}
    params = sampling_params(
        server,
        body,
        max_tokens,
        structure,
        logprobs=body.top_logprobs or 0 if body.logprobs else None,
        **more,
    )
    request = await server.prompts.chat(f"chatcmpl-{unique}", text, body, params)
    generation = Generation(server, [request], client)
    choices = [
        _Choice(
            number,
            body,
            form.parser(text, tools or None, required=bool(forced)),
            form.call_id,
        )
        for number in range(params.n)
    ]
    return _ChatCompletion(
        completion_id, server.info.model, body, generation, request.prompt_token_ids, choices
    )


async def _structure(body: ChatRequest, forced: list[Tool]) -> StructuredOutputsParams | None:
    """What the answer must be: calls of some tools, or what the body says."""
    if not forced:
        return await structure_of(body)
    for tool in forced:
        schema = tool["function"].get("parameters") or {"type": "object"}
        field = f"tools: parameters of {tool['function']['name']:.80}"
        await checked({"json": schema, "lenient": True}, field)
    parallel = isinstance(body.tool_choice, str) and body.parallel_tool_calls is not False
    return await checked({"grammar": calls_grammar(forced, parallel)}, "tools")


class _Choice:
    """One sample of a chat: what the model writes becomes content, reasoning and calls.

    Args:
        index: of the choice.
        body: of the call.
        parser: of this sample's output.
        new_id: makes the id of a call.
    """

    def __init__(
        self, index: int, body: ChatRequest, parser: AnswerParser, new_id: Callable[[], str]
    ) -> None:
        self.index = index
        self._body = body
        self._parser = parser
        self._new_id = new_id
        self._calls = False

    def add(self, delta: OutputDelta) -> ChatChunkChoice:
        """What a delta adds to the choice."""
        parsed = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            parsed.extend(self._parser.finish())
        calls = [self._call(call) for call in parsed.calls if self._wanted(call)]
        self._calls |= bool(calls)
        reasoning = parsed.reasoning if self._body.include_reasoning is not False else ""
        silent = not (calls or reasoning)
        logprobs = self._logprobs(delta)
        finish_reason: ChatFinishReason | None = ending(delta)
        if finish_reason == "stop" and self._calls and not isinstance(delta.stop_reason, str):
            finish_reason = "tool_calls"
        return ChatChunkChoice(
            index=self.index,
            delta=ChatDelta(
                content=parsed.content if parsed.content or silent else None,
                reasoning_content=reasoning or None,
                tool_calls=calls or None,
            ),
            logprobs=ChatLogprobs(content=logprobs) if logprobs else None,
            finish_reason=finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._body.return_token_ids else None,
        )

    def _wanted(self, call: CallDelta) -> bool:
        return self._body.parallel_tool_calls is not False or call.index == 0

    def _call(self, call: CallDelta) -> ToolCallDelta:
        function = FunctionDelta(name=call.name, arguments=call.arguments)
        if call.name is None:
            return ToolCallDelta(index=call.index, function=function)
        return ToolCallDelta(
            index=call.index, id=self._new_id(), type="function", function=function
        )

    def _logprobs(self, delta: OutputDelta) -> list[TokenLogprob]:
        if not self._body.logprobs:
            return []
        as_ids = bool(self._body.return_tokens_as_token_ids)
        return chat_logprobs(delta, self._body.top_logprobs or 0, as_ids)


@dataclasses.dataclass
class _ChatCompletion:
    """One HTTP request in progress."""

    id: str
    model: str
    body: ChatRequest
    generation: Generation
    prompt: list[int]
    choices: list[_Choice]
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    async def chunks(self) -> AsyncIterator[ChatChunk]:
        """The answer as a stream: one chunk per sampled token, even if its text is empty."""
        begun: set[int] = set()
        async for number, delta in self.generation.deltas():
            usage = self.generation.usage if self.body.continuous_usage else None
            if number not in begun:
                first = ChatDelta(role="assistant", content="")
                of_prompt = {} if begun else self._of_prompt(delta)
                yield self._chunk([ChatChunkChoice(index=number, delta=first)], usage, **of_prompt)
                begun.add(number)
            yield self._chunk([self.choices[number].add(delta)], usage)
        if self.body.include_usage:
            yield self._chunk([], self.generation.usage)

    async def whole(self) -> ChatCompletion:
        """The complete answer."""
        choices = [
            ChatChoice(
                index=choice.index,
                message=AssistantMessage(content=""),
                logprobs=ChatLogprobs(content=[]) if self.body.logprobs else None,
                finish_reason="length",
                token_ids=[] if self.body.return_token_ids else None,
            )
            for choice in self.choices
        ]
        of_prompt: dict[str, Any] = {}
        async for number, delta in self.generation.deltas():
            of_prompt = of_prompt or self._of_prompt(delta)
            _extend(choices[number], self.choices[number].add(delta))
        for choice in choices:
            if choice.message.tool_calls and not choice.message.content:
                choice.message.content = None
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=self.generation.usage,
            **of_prompt,
        )

    def _of_prompt(self, delta: OutputDelta) -> dict[str, Any]:
        """Fields of the answer about the prompt, from the first delta."""
        found, fields = delta.prompt_logprobs, {}
        if found is not None:
            fields["prompt_logprobs"] = prompt_logprobs(found)
        if self.body.return_token_ids:
            fields["prompt_token_ids"] = self.prompt
        return fields

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: Usage | None = None, **of_prompt: Any
    ) -> ChatChunk:
        return ChatChunk(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage,
            **of_prompt,
        )


def _extend(choice: ChatChoice, part: ChatChunkChoice) -> None:
    """Add the next part of a choice to it."""
    message, delta = choice.message, part.delta
    message.content = (message.content or "") + (delta.content or "")
    if delta.reasoning_content:
        message.reasoning_content = (message.reasoning_content or "") + delta.reasoning_content
    for call in delta.tool_calls or ():
        if call.id is not None:
            function = FunctionCall(name=call.function.name or "", arguments="")
            calls = message.tool_calls = message.tool_calls or []
            calls.append(ToolCall(id=call.id, function=function))
        assert message.tool_calls is not None
        message.tool_calls[-1].function.arguments += call.function.arguments
    if choice.logprobs is not None and part.logprobs is not None:
        choice.logprobs.content += part.logprobs.content
    if choice.token_ids is not None:
        choice.token_ids += part.token_ids or []
    choice.finish_reason = part.finish_reason or choice.finish_reason
    choice.stop_reason = part.stop_reason
