"""Conversion of prompts to requests, outside the event loop, with checks of the context length."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from dance_jax.config import UserError
from dance_jax.engine.detokenizer import Detokenizer
from dance_jax.engine.sequence import Request, SamplingParams
from dance_jax.models.chat_template import TemplateFailure, TemplateRefusal
from dance_jax.serve.errors import ApiError
from dance_jax.serve.requests import (
    ChatRequest,
    CompletionRequest,
    Message,
    Prompt,
    SamplingFields,
    TemplateFields,
)

if TYPE_CHECKING:
    from dance_jax.models.tokenizer import Tokenizer


class Prompts:
    """Encodes users' prompts.

    Args:
        tokenizer: the model's tokenizer.
        max_model_len: context length in tokens, prompt plus output.
        vocab_size: upper bound of token ids, exclusive.

    Raises:
        UserError: the chat template cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, max_model_len: int, vocab_size: int) -> None:
        tokenizer.check_chat_template()
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        longest = max(
            len(tokenizer.decode([token], skip_special_tokens=False))
            for token in range(tokenizer.vocab_size)
        )
        #: A longer text cannot fit the context; it is refused before it is tokenized.
        self._max_chars = longest * max_model_len

    async def completions(
        self, call_id: str, body: CompletionRequest, params: SamplingParams
    ) -> list[Request]:
        """Encode the prompts of a completion, one request each.

        Args:
            call_id: id of the call; prefix of the requests' ids.
            body: of the call.
            params: of all requests.

        Raises:
            ApiError: 400 if a prompt is empty, has an unknown token id, or leaves less room in the
                context than the body asks for.
        """
        requests = []
        for number, (where, item) in enumerate(_named(body.prompt)):
            text = item if isinstance(item, str) else None
            if isinstance(item, str):
                special = body.add_special_tokens is not False
                ids = await self.encoded(
                    item, special, where, params.truncate_prompt_tokens is not None
                )
            else:
                ids = self.known(item, where)
            ids = params.truncated(ids, self._max_model_len)
            self._check_room(len(ids), where, body)
            requests.append(Request(f"{call_id}-{number}", text, ids, params))
        return requests

    async def chat(
        self, call_id: str, text: str, body: ChatRequest, params: SamplingParams
    ) -> Request:
        """Encode a rendered conversation; other arguments as in `completions`.

        Raises:
            ApiError: 400 if the conversation leaves less room in the context than the body asks
                for.
        """
        # The template itself adds special tokens.
        truncated = params.truncate_prompt_tokens is not None
        ids = await self.encoded(text, bool(body.add_special_tokens), "messages", truncated)
        ids = params.truncated(ids, self._max_model_len)
        self._check_room(len(ids), "messages", body)
        return Request(f"{call_id}-0", text, ids, params)

    async def rendered(self, messages: Sequence[Message], how: TemplateFields) -> str:
        """Render a conversation as text with the model's chat template.

        Raises:
            ApiError: 400 if the template refuses the messages.
        """
        return await asyncio.to_thread(self._render, messages, how)

    async def offsets(self, tokens: list[int]) -> tuple[str, list[int]]:
        """The text of the first token, and the place in the text at which each token begins."""

        def found() -> tuple[str, list[int]]:
            detokenizer, places, length = Detokenizer(self._tokenizer), [], 0
            first = ""
            for number, token in enumerate(tokens):
                places.append(length)
                text = detokenizer.append(token)
                length += len(text)
                first = text if number == 0 else first
            return first, places

        return await asyncio.to_thread(found)

    async def encoded(
        self, text: str, add_special_tokens: bool, where: str, truncated: bool = False
    ) -> list[int]:
        """Tokenize a text without checking that it leaves room in the context.

        Args:
            text: the text.
            add_special_tokens: see `Tokenizer.encode`.
            where: the text's name in error messages.
            truncated: only the end is wanted, so the text may be longer than the context.

        Raises:
            ApiError: 400 if the text is too long for any tokenization to fit the context, or has a
                token that only the tokenizer knows.
        """
        if len(text) > self._max_chars and not truncated:
            raise self._too_long(f"{where}: {len(text)} characters", where)
        try:
            ids = await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens)
        except UserError as error:
            raise ApiError(400, str(error), param=where) from error
        return self.known(ids, where)

    async def detokenized(self, tokens: list[int]) -> str:
        """The text of tokens of the vocabulary."""
        return await asyncio.to_thread(self._tokenizer.decode, tokens)

    def marker(self, text: str) -> str | int:
        """A text of the model's own, as the id of the special token if it is one."""
        found = self._tokenizer.special_id(text)
        return text if found is None else found

    def known(self, tokens: list[int], where: str) -> list[int]:
        """Check that all token ids are in the vocabulary, and return them.

        Raises:
            ApiError: 400 if a token id is outside the vocabulary.
        """
        top = max(tokens, default=0)
        if top >= self._vocab_size:
            raise ApiError(
                400,
                f"{where}: token id {top} is out of range; the model's ids are "
                f"0..{self._vocab_size - 1}",
                param=where,
            )
        return tokens

    def _render(self, messages: Sequence[Message], how: TemplateFields) -> str:
        if not self._tokenizer.has_chat_template:
            raise ApiError(
                400,
                "messages: the model has no chat template; use /v1/completions",
                param="messages",
            )
        variables = [message.variables() for message in messages]
        try:
            return self._tokenizer.chat_text(variables, **self._variables(how))
        except TemplateFailure as error:
            verb = "rejects" if isinstance(error, TemplateRefusal) else "cannot render"
            message = f"messages: the model's chat template {verb} them: {error.reason}"
            raise ApiError(400, message, param="messages") from error
        except UserError as error:
            raise ApiError(400, str(error), param=str(error).partition(":")[0]) from error

    def _variables(self, how: TemplateFields) -> dict[str, Any]:
        """Arguments of `Tokenizer.chat_text`, which the template must know."""
        found, template = how.variables, self._tokenizer.template or ""
        if how.tools and "tools" in found and "tools" not in template:
            raise ApiError(400, "tools: the model's chat template has no tools", param="tools")
        if "reasoning_effort" not in template:
            effort = found.pop("reasoning_effort", None)
            if effort is not None and "enable_thinking" in template:
                found.setdefault("enable_thinking", effort != "none")
            elif effort not in (None, "none"):
                message = "reasoning_effort: the model's chat template has no reasoning_effort"
                raise ApiError(400, message, param="reasoning_effort")
        return found

    def _check_room(self, length: int, where: str, body: SamplingFields) -> None:
        """Check that a prompt of `length` tokens leaves room for the output asked for."""
        if length == 0:
            raise ApiError(400, f"{where}: must have at least one token", param=where)
        room = self._max_model_len - length
        if room < 1:
            raise self._too_long(f"{where}: {length} tokens", where)
        name, wanted = body.output_limit
        if wanted is not None and wanted > room:
            raise ApiError(
                400,
                f"{name}: {wanted} plus the prompt's {length} tokens are {length + wanted}, but "
                f"the model's maximum context length is {self._max_model_len} tokens; lower "
                f"{name} or shorten the prompt",
                param=name,
                code="context_length_exceeded",
            )
        if (body.min_tokens or 0) > room:
            message = f"min_tokens: must be at most max_tokens, {room}; got {body.min_tokens}"
            raise ApiError(400, message, param="min_tokens")

    def _too_long(self, what: str, param: str) -> ApiError:
        return ApiError(
            400,
            f"{what} plus at least one output token exceed the model's maximum context length of "
            f"{self._max_model_len} tokens; shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )


def _named(prompt: Prompt) -> Iterator[tuple[str, str | list[int]]]:
    """Pairs (name of the prompt in error messages, prompt)."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        yield "prompt", cast("str | list[int]", prompt)
        return
    for number, item in enumerate(cast("list[str] | list[list[int]]", prompt)):
        yield f"prompt[{number}]", item
