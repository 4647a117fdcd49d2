"""Conversion of prompts to tokens, outside the event loop, with checks of the context length."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from dance_jax.config import UserError
from dance_jax.serve.errors import ApiError
from dance_jax.serve.requests import Message

if TYPE_CHECKING:
    from dance_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt in the engine's form."""

    #: None if the prompt was given as tokens.
    text: str | None
    token_ids: list[int]


class Prompts:
    """Encodes users' prompts.

    Args:
        tokenizer: the model's tokenizer.
        max_model_len: context length in tokens, prompt plus output.
        vocab_size: upper bound of token ids, exclusive.
    """

    def __init__(self, tokenizer: Tokenizer, max_model_len: int, vocab_size: int) -> None:
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
        self, prompt: str | list[str] | list[int] | list[list[int]], add_special_tokens: bool
    ) -> list[EncodedPrompt]:
        """Encode the prompts of a completion.

        Raises:
            ApiError: 400 if a prompt is empty, has an unknown token id, or leaves no room in the
                context.
        """
        encoded = []
        for where, item in _named(prompt):
            if isinstance(item, str):
                ids = await self.encoded(item, add_special_tokens, where)
                found = EncodedPrompt(item, ids)
            else:
                found = EncodedPrompt(None, self.known(item, where))
            self._check_room(len(found.token_ids), where)
            encoded.append(found)
        return encoded

    async def chat(self, messages: Sequence[Message], add_generation_prompt: bool) -> EncodedPrompt:
        """Encode a conversation with the model's chat template.

        Raises:
            ApiError: 400 if the template refuses the messages, or if they leave no room in the
                context.
        """
        text = await self.rendered(messages, add_generation_prompt)
        # The template itself adds special tokens.
        ids = await self.encoded(text, False, "messages")
        self._check_room(len(ids), "messages")
        return EncodedPrompt(text, ids)

    async def rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Render a conversation as text with the model's chat template.

        Raises:
            ApiError: 400 if the template refuses the messages.
        """
        return await asyncio.to_thread(self._render, messages, add_generation_prompt)

    async def encoded(self, text: str, add_special_tokens: bool, where: str) -> list[int]:
        """Tokenize a text without checking that it leaves room in the context.

        Raises:
            ApiError: 400 if the text is too long for any tokenization to fit the context.
        """
        if len(text) > self._max_chars:
            raise self._too_long(f"{where}: {len(text)} characters", where)
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens)

    async def detokenized(self, tokens: list[int]) -> str:
        """The text of tokens.

        Raises:
            ApiError: 400 if a token id is outside the vocabulary.
        """
        return await asyncio.to_thread(self._tokenizer.decode, self.known(tokens, "tokens"))

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

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        for number, message in enumerate(messages):
            _check_content(message, f"messages[{number}].content")
        if not self._tokenizer.has_chat_template:
            raise ApiError(
                400,
                "messages: the model has no chat template; use /v1/completions",
                param="messages",
            )
        variables = [message.variables() for message in messages]
        try:
            return self._tokenizer.chat_text(variables, add_generation_prompt)
        except UserError as error:
            reason = error.__cause__ or error  # the cause does not show the template's path
        except Exception as error:  # a template is a program, which can raise anything
            reason = error
        raise ApiError(
            400, f"messages: the model's chat template rejects them: {reason}", param="messages"
        )

    def _check_room(self, length: int, where: str) -> None:
        if length == 0:
            raise ApiError(400, f"{where}: must have at least one token", param=where)
        if length + 1 > self._max_model_len:
            raise self._too_long(f"{where}: {length} tokens", where)

    def _too_long(self, what: str, param: str) -> ApiError:
        return ApiError(
            400,
            f"{what} plus at least one output token exceed the model's maximum context length of "
            f"{self._max_model_len} tokens; shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )


def _named(
    prompt: str | list[str] | list[int] | list[list[int]],
) -> Iterator[tuple[str, str | list[int]]]:
    """Pairs (name of the prompt in error messages, prompt)."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        yield "prompt", cast("str | list[int]", prompt)
        return
    for number, item in enumerate(cast("list[str] | list[list[int]]", prompt)):
        yield f"prompt[{number}]", item


def _check_content(message: Message, where: str) -> None:
    calls = (message.model_extra or {}).get("tool_calls")
    if message.content is None and not (message.role == "assistant" and calls):
        raise ApiError(400, f"{where}: must be text", param=where)
