"""The completions API of several servers: calls, their streams, and what came when."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from dance_jax.config import UserError

from .http import Address, HttpError, Response, request

#: Seconds after which a stream that has not ended counts as failed.
LONGEST_ANSWER_S = 900.0


@dataclasses.dataclass(frozen=True)
class Call:
    """What a user asks of a server."""

    server: int
    #: Token ids.
    prompt: list[int]
    max_tokens: int
    #: Seconds after the run's start.
    arrival_s: float = 0.0
    temperature: float = 0.0
    #: The answer has exactly max_tokens.
    ignore_eos: bool = True
    #: Most likely tokens that are told with each token; None: none.
    logprobs: int | None = None
    #: Pieces after which the user hangs up; None: waits for the end.
    hang_up_after: int | None = None

    def body(self, model: str) -> bytes:
        """JSON of /v1/completions."""
        fields: dict[str, Any] = {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "ignore_eos": self.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.logprobs is not None:
            fields["logprobs"] = self.logprobs
        return msgspec.json.encode(fields)


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of an answer, where logprobs were asked for."""

    text: str
    logprob: float
    #: The most likely tokens there.
    top: Mapping[str, float]


@dataclasses.dataclass
class Answer:
    """What came of a call; seconds after the run's start."""

    call: Call
    #: When the user wanted it.
    asked_s: float
    #: When each piece with tokens came.
    piece_s: list[float] = dataclasses.field(default_factory=list)
    end_s: float = 0.0
    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    hung_up: bool = False
    #: Why there is no whole answer.
    error: str | None = None

    @property
    def good(self) -> bool:
        """The whole answer came."""
        return self.error is None and not self.hung_up


class Api:
    """Servers of one model.

    Attributes:
        addresses: of the servers.
        model: its name.
        max_model_len: tokens of the longest prompt with its answer.
    """

    def __init__(
        self, addresses: Sequence[Address], model: str, max_model_len: int, key: str | None = None
    ) -> None:
        self.addresses = tuple(addresses)
        self.model = model
        self.max_model_len = max_model_len
        self._headers = _headers(key)

    @classmethod
    async def connect(cls, addresses: Sequence[Address], key: str | None = None) -> Api:
        """Asks the servers what they serve.

        Args:
            key: for servers that want one.

        Raises:
            UserError: one cannot be reached, wants another key, or they serve different models.
        """
        cards = [await _served(address, _headers(key)) for address in addresses]
        if len({card.id for card in cards}) != 1:
            served = ", ".join(f"{a}: {c.id}" for a, c in zip(addresses, cards, strict=True))
            raise UserError(f"the servers serve different models ({served})")
        return cls(addresses, cards[0].id, min(card.max_model_len for card in cards), key)

    async def answer(
        self,
        call: Call,
        origin: float,
        asked_s: float,
        heard: Callable[[int], None] | None = None,
    ) -> Answer:
        """The answer to a call; what goes wrong is told in it.

        Args:
            origin: the run's start, of `time.perf_counter`.
            asked_s: when the user wanted it, seconds after that.
            heard: called at each piece with tokens, with the number of pieces so far.
        """
        found = Answer(call, asked_s)
        try:
            async with (
                asyncio.timeout(LONGEST_ANSWER_S),
                request(
                    self.addresses[call.server],
                    "POST",
                    "/v1/completions",
                    call.body(self.model),
                    self._headers,
                ) as response,
            ):
                if response.status == 200:
                    found.error = await _follow(response, found, origin, heard)
                else:
                    found.error = await _refusal(response)
        except (HttpError, msgspec.DecodeError) as error:
            found.error = str(error)
        except TimeoutError:
            found.error = f"not finished after {LONGEST_ANSWER_S:g} s"
        found.end_s = time.perf_counter() - origin
        return found

    async def post(self, server: int, body: bytes) -> tuple[int, bytes]:
        """Status and answer to any body for /v1/completions.

        Raises:
            HttpError: there is no answer.
        """
        address = self.addresses[server]
        async with request(address, "POST", "/v1/completions", body, self._headers) as response:
            return response.status, await response.read()

    async def metrics(self, server: int) -> dict[str, float]:
        """What a server tells Prometheus, by name without labels; metrics with several labels add.

        Raises:
            HttpError: there is no answer.
        """
        return parse_metrics((await self.get(server, "/metrics")).decode())

    async def get(self, server: int, path: str) -> bytes:
        """What a server answers there.

        Raises:
            HttpError: nothing, or an error.
        """
        address = self.addresses[server]
        async with request(address, "GET", path, headers=self._headers) as response:
            if response.status != 200:
                raise HttpError(f"{address}{path} answers {response.status}")
            return await response.read()


def parse_metrics(text: str) -> dict[str, float]:
    """Prometheus's text format: name -> sum over labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            # Values of labels may have spaces, the sample's value has none.
            series, _, value = line.rpartition(" ")
            name = series.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


class _Logprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class _Choice(msgspec.Struct):
    text: str
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Error(msgspec.Struct):
    message: str


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class _Card(msgspec.Struct):
    id: str
    max_model_len: int


class _Models(msgspec.Struct):
    data: list[_Card]


class _Refused(msgspec.Struct):
    error: _Error


_chunks = msgspec.json.Decoder(_Chunk)


def _headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


async def _served(address: Address, headers: Mapping[str, str]) -> _Card:
    try:
        async with request(address, "GET", "/v1/models", headers=headers) as response:
            if response.status != 200:
                raise UserError(f"{address}: {await _refusal(response)}")
            (card,) = msgspec.json.decode(await response.read(), type=_Models).data
            return card
    except HttpError as error:
        raise UserError(f"{address}: {error}") from error
    except ValueError as error:
        raise UserError(f"{address}/v1/models names no single model: {error}") from error


async def _follow(
    response: Response, answer: Answer, origin: float, heard: Callable[[int], None] | None
) -> str | None:
    """Adds a stream to an answer; returns what went wrong."""
    async with contextlib.aclosing(response.events()) as events:
        async for data in events:
            now_s = time.perf_counter() - origin
            if data == b"[DONE]":
                return None if answer.finish_reason else "the stream has no finish_reason"
            chunk = _chunks.decode(data)
            if chunk.error is not None:
                return chunk.error.message
            if chunk.usage is not None:
                answer.prompt_tokens = chunk.usage.prompt_tokens
                answer.output_tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                _add(answer, choice, now_s)
                if heard is not None:
                    heard(len(answer.piece_s))
            leaves = answer.call.hang_up_after
            if leaves is not None and len(answer.piece_s) >= leaves:
                answer.hung_up = True
                return None
    return "the stream ended without [DONE]"


def _add(answer: Answer, choice: _Choice, now_s: float) -> None:
    """Adds a part; each has a token, though not always text."""
    answer.finish_reason = choice.finish_reason or answer.finish_reason
    answer.text += choice.text
    if choice.logprobs is not None:
        told = choice.logprobs
        rows = zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True)
        answer.tokens += [Token(*row) for row in rows]
    answer.piece_s.append(now_s)


async def _refusal(response: Response) -> str:
    """What a server says that answers with another status than 200."""
    body = await response.read()
    try:
        message = msgspec.json.decode(body, type=_Refused).error.message
    except msgspec.DecodeError:
        message = body[:200].decode(errors="replace")
    return f"HTTP {response.status}: {message}"
