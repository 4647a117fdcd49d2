"""Request bodies: OpenAI's fields and vLLM's extras.

Fields that cannot change the answer are accepted and ignored. A field that would change it and is
not supported is refused by name, unless its value is null, empty, or what holds anyway.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
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
#: Maximum number of bad_words, and of their characters.
MAX_BAD_WORDS, MAX_WORD_CHARS = 64, 128

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
MaxTokens = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
RequestId = Annotated[str, Field(pattern=r"^[!-~]{1,128}$")]


class Body(BaseModel):
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


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Harmless = None
    continuous_usage_stats: bool | None = Field(
        None, description="Whether each chunk has the usage so far; with include_usage."
    )


Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class StructuredOutputs(Body):
    """What the output must be, in exactly one of the ways; vLLM's field."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = Field(None, description="In the syntax of Lark or GBNF.")
    disable_any_whitespace: Annotated[None, Only(False)] = None
    disable_additional_properties: Annotated[None, Only(False)] = None
    whitespace_pattern: Unsupported = None
    structural_tag: Unsupported = None


class JsonSchema(Body):
    """A schema of `ResponseFormat`; the output follows the schema, strict or not."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: Harmless = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "json_schema", 'json_schema is required with type "json_schema", and only there'
            )
        return self


class SamplingFields(Body):
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
    bad_words: (
        Annotated[
            list[Annotated[str, Field(pattern=r"\S", max_length=MAX_WORD_CHARS)]],
            Field(max_length=MAX_BAD_WORDS),
        ]
        | None
    ) = None
    allowed_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    prompt_logprobs: Logprobs | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    length_penalty: Annotated[None, Only(1)] = None
    use_beam_search: Annotated[None, Only(False)] = None
    early_stopping: Annotated[None, Only(False)] = None
    spaces_between_special_tokens: Annotated[None, Only(True)] = None
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
    def continuous_usage(self) -> bool:
        """Whether each chunk of the stream has the usage so far."""
        options = self.stream_options
        return options is not None and self.include_usage and bool(options.continuous_usage_stats)

    @property
    def structures(self) -> dict[str, dict[str, Any]]:
        """What each field says the output must be, as arguments of `StructuredOutputsParams`."""
        asked: dict[str, dict[str, Any]] = {}
        form, own = self.response_format, self.structured_outputs
        if form is not None and form.type != "text":
            schema = None if form.json_schema is None else form.json_schema.json_schema
            asked["response_format"] = {"json_object": True} if schema is None else {"json": schema}
        ways = {} if own is None else own.model_dump(by_alias=True, exclude_unset=True)
        ways = {name: value for name, value in ways.items() if value not in (*_EMPTY, False)}
        if ways:
            asked["structured_outputs"] = ways
        for name in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{name}")) not in _EMPTY:
                asked[f"guided_{name}"] = {name: value}
        return asked

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


class Part(Body):
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
        """The message as a dict for chat templates; all parts of its content are of type text."""
        fields = self.model_dump(exclude_unset=True)
        content = self.content
        if isinstance(content, list):
            content = [{"type": "text", "text": part.content} for part in content]
        return fields | {"content": content}


Messages = Annotated[list[Message], Field(min_length=1)]


def _check_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for number, tool in enumerate(tools):
        function = tool.get("function")
        function = function if isinstance(function, dict) else {}
        name = function.get("name")
        if tool.get("type") != "function" or not isinstance(name, str) or not name:
            raise PydanticCustomError(
                "tool",
                'tool {number}: must be {"type": "function", "function": {"name": ...}}',
                {"number": number},
            )
        if not isinstance(function.get("parameters") or {}, dict):
            raise PydanticCustomError(
                "tool", "tool {number}: parameters must be a JSON schema", {"number": number}
            )
    return tools


#: Functions that the model may call; chat templates get them as they are.
Tools = Annotated[list[dict[str, Any]], AfterValidator(_check_tools)]


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    """The function that the model must call."""

    type: Literal["function"]
    function: NamedFunction


def _is_named(value: Any) -> str:
    return "<function>" if isinstance(value, dict | NamedTool) else "<word>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedTool, Tag("<function>")],
    Discriminator(_is_named),
]


class TemplateFields(Body):
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
    tools: Tools | None = None
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
        more = {"documents": self.documents, "tools": self.tools}
        return {
            **(self.chat_template_kwargs or {}),
            **{name: value for name, value in more.items() if value},
            "add_generation_prompt": self.add_generation_prompt is not False,
            "continue_final_message": bool(self.continue_final_message),
        }


class ChatRequest(SamplingFields, TemplateFields):
    """Body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    modalities: list[Literal["text"]] | None = None
    echo: Annotated[None, Only(False)] = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    include_reasoning: bool | None = Field(
        None, description="False: what the model thinks is left out."
    )
    reasoning_effort: str | None = Field(None, description="A variable of the chat template.")
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
    #: A hint that can only make answers faster.
    prediction: Harmless = None

    @property
    def variables(self) -> dict[str, Any]:
        found = super().variables
        if self.tool_choice == "none":
            found.pop("tools", None)
        if self.reasoning_effort:
            found["reasoning_effort"] = self.reasoning_effort
        return found

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


class DetokenizeRequest(Body):
    """Body of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class WantedServer(Body):
    """Experts wanted on one server, in the form of `servers` in /placement."""

    name: str
    resident: list[list[Annotated[int, Field(ge=0, strict=True)]]]


class RebalanceRequest(Body):
    """Body of /placement/rebalance."""

    model_config = ConfigDict(strict=True)

    force: bool | None = Field(None, description="Move experts whatever the cost.")
    dry_run: bool | None = Field(None, description="Decide, but move nothing.")
    servers: list[WantedServer] | None = Field(
        None,
        description="The wanted placement, in the form of /placement: experts move there "
        "whatever the cost.",
    )
