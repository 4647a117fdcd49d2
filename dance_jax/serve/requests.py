"""Request bodies: OpenAI's fields and vLLM's extras.

Fields that cannot change the answer are accepted and ignored. A field that would change it and is
not supported is refused by name, unless its value is null, empty, or what holds anyway.
"""

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
from pydantic_core import PydanticCustomError, core_schema

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


#: Values that mean the same as leaving the field out.
_EMPTY = (None, "", [], {})


class Only:
    """Annotation of a parameter that is not supported, but may have values that change nothing.

    Args:
        values: such values, beside those that say nothing.
    """

    def __init__(self, *values: Any) -> None:
        self._values = (*_EMPTY, *values)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": [*self._values]}

    def _check(self, value: Any) -> None:
        if value not in self._values:
            raise PydanticCustomError("unsupported", "this server does not support it")


def _only_text(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") != "text":
        raise PydanticCustomError("unsupported", 'unsupported: only {"type": "text"} is supported')
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


#: A parameter that would change the answer but is not implemented.
Unsupported = Annotated[None, Only()]
#: A parameter that is accepted but does not change the answer.
Harmless = Annotated[Any, Field(description="Accepted, but has no effect.")]

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS, strict=True)]
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
RequestId = Annotated[str, Field(pattern=r"^[!-~]{1,128}$")]


class _Body(BaseModel):
    """Base of request bodies. Numbers are converted as vLLM converts them: 16.0 and "16" are 16.

    Unknown fields are errors, unless they say nothing.
    """

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={"additionalProperties": {"enum": [*_EMPTY]}},
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_says_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: value
            for name, value in values.items()
            if name in cls.model_fields or value not in _EMPTY
        }


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: Harmless = None
    continuous_usage_stats: Annotated[None, Only(False)] = None


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

    bad_words: Unsupported = None
    allowed_token_ids: Unsupported = None
    length_penalty: Annotated[None, Only(1)] = None
    use_beam_search: Annotated[None, Only(False)] = None
    early_stopping: Annotated[None, Only(False)] = None
    skip_special_tokens: Annotated[None, Only(True)] = None
    spaces_between_special_tokens: Annotated[None, Only(True)] = None
    include_stop_str_in_output: Annotated[None, Only(False)] = None
    truncate_prompt_tokens: Unsupported = None
    prompt_logprobs: Unsupported = None
    return_token_ids: Annotated[None, Only(False)] = None
    return_tokens_as_token_ids: Annotated[None, Only(False)] = None
    structured_outputs: Unsupported = None
    guided_json: Unsupported = None
    guided_regex: Unsupported = None
    guided_choice: Unsupported = None
    guided_grammar: Unsupported = None
    priority: Annotated[None, Only(0)] = None

    request_id: RequestId | None = Field(None, description="Part of the answer's id.")
    session_id: Harmless = None
    chat_id: Harmless = None
    cache_salt: Harmless = None
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
    response_format: Annotated[None, Only({"type": "text"})] = None
    suffix: Unsupported = None


class Part(_Body):
    """A part of a message's content: text, or what an assistant refused, which is text as well.

    Images and audio are not supported.
    """

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    cache_control: Harmless = None

    @model_validator(mode="after")
    def _check_text(self) -> Part:
        if getattr(self, self.type) is None:
            raise PydanticCustomError("missing", "Field required: {name}", {"name": self.type})
        return self

    @property
    def content(self) -> str:
        """The text."""
        return getattr(self, self.type)


Content = Annotated[
    Annotated[str, Tag("<one>")] | Annotated[list[Part], Field(min_length=1), Tag("<many>")],
    Discriminator(_one_or_many),
]


class Message(BaseModel):
    """A turn of a conversation; other fields (name, tool_calls, ...) go to the chat template."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Content | None = Field(None, description="Text; null is the empty text.")

    def variables(self) -> dict[str, Any]:
        """The message as a dict for chat templates, with its content joined to one text."""
        fields = self.model_dump(exclude_unset=True)
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.content for part in content)
        return fields | {"content": content}


Messages = Annotated[list[Message], Field(min_length=1)]


class ResponseFormat(_Body):
    type: Literal["text"]


class TemplateFields(_Body):
    """How messages become a text."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(
        None, description="The answer goes on where the last message ends."
    )
    add_special_tokens: bool | None = Field(
        None, description="Beside those that the chat template adds; default: false for messages."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="More variables of the chat template."
    )
    documents: list[dict[str, Any]] | None = Field(
        None, description="Texts for templates that take some."
    )
    chat_template: Unsupported = None

    @model_validator(mode="after")
    def _check_template_fields(self) -> TemplateFields:
        if "messages" in (self.chat_template_kwargs or {}):
            raise PydanticCustomError(
                "chat_template_kwargs", "chat_template_kwargs cannot have messages"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise PydanticCustomError(
                "continue_final_message",
                "continue_final_message goes on with the last message; leave out "
                "add_generation_prompt",
            )
        return self

    @property
    def variables(self) -> dict[str, Any]:
        """Arguments of `Tokenizer.chat_text`."""
        documents = {"documents": self.documents} if self.documents else {}
        return {
            **(self.chat_template_kwargs or {}),
            **documents,
            "add_generation_prompt": self.add_generation_prompt is not False,
            "continue_final_message": bool(self.continue_final_message),
        }


class ChatRequest(SamplingFields, TemplateFields):
    """Body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    response_format: Annotated[ResponseFormat, BeforeValidator(_only_text)] | None = None
    modalities: list[Literal["text"]] | None = None
    echo: Annotated[None, Only(False)] = None
    #: Whether to call tools, of which there are none.
    tool_choice: Annotated[None, Only("none", "auto")] = None
    tools: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    reasoning_effort: Annotated[None, Only("none")] = None
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


class TokenizeRequest(TemplateFields):
    """Body of /tokenize: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None


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

    model_config = ConfigDict(strict=True)

    force: bool | None = Field(None, description="Move experts whatever the cost.")
    dry_run: bool | None = Field(None, description="Decide, but move nothing.")
    servers: list[WantedServer] | None = Field(
        None,
        description="The wanted placement, in the form of /placement: experts move there "
        "whatever the cost.",
    )
