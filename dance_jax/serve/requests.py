"""Request bodies: OpenAI's fields and vLLM's extras; no field is ignored silently."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dance_jax.engine.sequence import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_TOKENS

#: Maximum number of prompts in one call.
MAX_PROMPTS = 64
#: Maximum number of samples of one prompt, and of all prompts of a call together.
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
#: Maximum length of a stop string, in characters.
MAX_STOP_CHARS = 1024
#: Maximum number of ids in stop_token_ids.
MAX_STOP_TOKENS = 128


def _unsupported(value: Any) -> Any:
    if value is not None:
        raise PydanticCustomError("unsupported", "this server does not support it")
    return value


def _only_text(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") != "text":
        raise PydanticCustomError(
            "unsupported", 'unsupported: only {{"type": "text"}} is supported'
        )
    return value


def _prompt_form(value: Any) -> str:
    """Tag of the prompt's form; the angle brackets keep it out of error messages."""
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else ""
    return "<texts>" if isinstance(first, str) else "<ids>" if not _many(first) else "<many ids>"


def _many(value: Any) -> bool:
    return isinstance(value, list)


def _one_or_many(value: Any) -> str:
    return "<many>" if _many(value) else "<one>"


#: A parameter that would change the answer but is not implemented: must be null or absent.
Unsupported = Annotated[None, BeforeValidator(_unsupported)]
#: A parameter that is accepted but does not change the answer.
Harmless = Annotated[Any, Field(description="Accepted, but has no effect.")]

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
#: Limits of a list of texts or of token lists.
_Several = Field(min_length=1, max_length=MAX_PROMPTS)
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], _Several, Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], _Several, Tag("<many ids>")],
    Discriminator(_prompt_form),
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = Annotated[
    Annotated[StopString, Tag("<one>")]
    | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS), Tag("<many>")],
    Discriminator(_one_or_many),
]
BiasKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
MaxTokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class _Body(BaseModel):
    """Base of request bodies: strict types (5 is not "5"), and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: Harmless = None


class SamplingFields(_Body):
    """Fields that completions and chats share; null means the same as absent."""

    model: str | None = Field(None, description="The served model; may be omitted.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    max_tokens: MaxTokens | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # vLLM's fields.
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None

    user: Harmless = None
    metadata: Harmless = None
    store: Harmless = None
    service_tier: Harmless = None
    safety_identifier: Harmless = None
    prompt_cache_key: Harmless = None
    prompt_cache_retention: Harmless = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "stream_options is only allowed together with stream: true"
            )
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def output_limit(self) -> tuple[str, int | None]:
        """The field that limits the output tokens, and its value."""
        return "max_tokens", self.max_tokens


class CompletionRequest(SamplingFields):
    """Body of /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None, description="Must equal n if given."
    )
    logprobs: Logprobs | None = None
    add_special_tokens: bool | None = None
    suffix: Unsupported = None


class TextPart(_Body):
    """A text part of a message's content; images and audio are not supported."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<one>")] | Annotated[list[TextPart], Field(min_length=1), Tag("<many>")],
    Discriminator(_one_or_many),
]


class Message(BaseModel):
    """A turn of a conversation; other fields (name, tool_calls, ...) go to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Content | None = Field(
        None, description="Text; optional only for an assistant's message with tool_calls."
    )

    def variables(self) -> dict[str, Any]:
        """The message as a dict for chat templates, with its content joined to one text."""
        fields = self.model_dump(exclude_unset=True)
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        return fields | {"content": content}


Messages = Annotated[list[Message], Field(min_length=1)]


class ResponseFormat(_Body):
    type: Literal["text"]


class ChatRequest(SamplingFields):
    """Body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    add_generation_prompt: bool | None = None

    response_format: Annotated[ResponseFormat, BeforeValidator(_only_text)] | None = None
    modalities: list[Literal["text"]] | None = None
    tool_choice: Literal["none"] | None = None
    tools: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
    #: A hint that can only make answers faster.
    prediction: Harmless = None
    parallel_tool_calls: Harmless = None

    @property
    def output_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is None:
            return super().output_limit
        return "max_completion_tokens", self.max_completion_tokens


class TokenizeRequest(_Body):
    """Body of /tokenize: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeRequest(_Body):
    """Body of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class WantedServer(_Body):
    """Experts wanted on one server, in the form of `servers` in /placement."""

    name: str
    resident: list[list[Annotated[int, Field(ge=0, strict=True)]]]


class RebalanceRequest(_Body):
    """Body of /placement/rebalance."""

    force: bool | None = Field(None, description="Move experts whatever the cost.")
    dry_run: bool | None = Field(None, description="Decide, but move nothing.")
    servers: list[WantedServer] | None = Field(
        None,
        description="The wanted placement, in the form of /placement: experts move there "
        "whatever the cost.",
    )
