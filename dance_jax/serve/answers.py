"""Response bodies: OpenAI's, vLLM's extensions, and our own."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from dance_jax.launch.control.protocol import Decision, PlacedServer

StopReason = int | str | None
FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


def _is_none(value: object) -> bool:
    return value is None


#: Default of a field that is left out of the answer if it is None.
_OMITTED: Any = Field(default=None, exclude_if=_is_none)


class Usage(BaseModel):
    """Tokens of a call; a prompt counts once, however many samples it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @staticmethod
    def of(prompt_tokens: int, completion_tokens: int) -> Usage:
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )


class CompletionLogprobs(BaseModel):
    """One entry per output token in each list."""

    text_offset: list[int]
    #: None for the first token of a prompt that the answer repeats, as in `top_logprobs`.
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(BaseModel):
    """vLLM's form of `Logprob`."""

    logprob: float
    rank: int | None
    decoded_token: str | None


#: By token id, for each token of the prompt; None for the first.
PromptLogprobs = list[dict[int, PromptLogprob] | None]


class CompletionChoice(BaseModel):
    """A sample, or, in a stream, what was added to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: StopReason = None
    prompt_logprobs: PromptLogprobs | None = _OMITTED
    prompt_token_ids: list[int] | None = _OMITTED
    token_ids: list[int] | None = _OMITTED


class Completion(BaseModel):
    """Response of /v1/completions, or a chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    #: UTF-8 bytes of the token; None if the token is not whole characters.
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class FunctionCall(BaseModel):
    name: str
    #: JSON text.
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    #: None if the model only calls tools.
    content: str | None
    #: What the model thought.
    reasoning_content: str | None = _OMITTED
    tool_calls: list[ToolCall] | None = _OMITTED


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason
    stop_reason: StopReason = None
    token_ids: list[int] | None = _OMITTED


class ChatCompletion(BaseModel):
    """Response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = _OMITTED
    prompt_token_ids: list[int] | None = _OMITTED


class FunctionDelta(BaseModel):
    name: str | None = _OMITTED
    arguments: str


class ToolCallDelta(BaseModel):
    """What was added to a call; id, type and name come with the first delta of each call."""

    index: int
    id: str | None = _OMITTED
    type: Literal["function"] | None = _OMITTED
    function: FunctionDelta


class ChatDelta(BaseModel):
    """What was added to a message; unset fields are omitted."""

    role: Literal["assistant"] | None = _OMITTED
    content: str | None = _OMITTED
    reasoning_content: str | None = _OMITTED
    tool_calls: list[ToolCallDelta] | None = _OMITTED


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: StopReason = None
    token_ids: list[int] | None = _OMITTED


class ChatChunk(BaseModel):
    """A chunk of a stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_logprobs: PromptLogprobs | None = _OMITTED
    prompt_token_ids: list[int] | None = _OMITTED


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dance_jax"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(BaseModel):
    prompt: str


class Version(BaseModel):
    """Answer of /version."""

    version: str


class Readiness(BaseModel):
    ready: bool


class Health(BaseModel):
    """The servers as the launcher last reported them."""

    #: Number of the membership, which grows whenever a server is lost or back.
    epoch: int
    #: Names of the servers that run, and of those that are lost for the moment.
    alive: list[str]
    lost: list[str]


class PlacementAnswer(BaseModel):
    """The placement of experts; the version grows when a migration completes or stops half-way."""

    version: int
    #: As in `Health`.
    epoch: int
    #: A lost server's experts are those that it will come back with.
    servers: list[PlacedServer]
    #: Names of the servers that are lost for the moment.
    lost: list[str]
    last_decision: Decision | None
