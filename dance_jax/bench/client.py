"""Client of several servers' completions API: calls, streamed answers, and arrival times."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from dance_jax.bench.http import Address, HttpError, Response, request
from dance_jax.config import API_KEY_VARIABLE, UserError

#: Seconds after which a stream that has not ended counts as failed.
LONGEST_ANSWER_S = 900.0
#: Seconds within which a server must say which models it serves.
MODELS_S = 30.0


@dataclasses.dataclass(frozen=True)
class Call:
    """A request of a user to a server."""

    server: int
    #: Token ids, or text that the server makes tokens of.
    prompt: list[int] | str
    max_tokens: int
    #: Seconds after the run's start.
    arrival_s: float = 0.0
    temperature: float = 0.0
    #: Ask for exactly max_tokens tokens.
    ignore_eos: bool = True
    #: Most likely tokens to return with each token; None for none.
    logprobs: int | None = None
    #: Pieces of the stream after which the user disconnects; None to wait for the end.
    hang_up_after: int | None = None

    def body(self, model: str) -> bytes:
        """Return the JSON body for POST /v1/completions."""
        fields: dict[str, Any] = {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            # Not a field of OpenAI's, so other servers may refuse it.
            fields["ignore_eos"] = True
        if self.logprobs is not None:
            fields["logprobs"] = self.logprobs
        return msgspec.json.encode(fields)


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of an answer to a call with logprobs."""

    text: str
    logprob: float
    #: Logprobs of the most likely tokens at this position, by text.
    top: Mapping[str, float]


@dataclasses.dataclass
class Answer:
    """The answer to a call, also a failed one; times are in seconds after the run's start."""

    call: Call
    #: When the request was due.
    due_s: float
    #: When each piece with tokens arrived.
    piece_s: list[float] = dataclasses.field(default_factory=list)
    end_s: float = 0.0
    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    #: Whether the user disconnected.
    hung_up: bool = False
    #: Why the answer is not complete; None if it is.
    error: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the answer is complete."""
        return self.error is None and not self.hung_up


class Api:
    """Client of servers that serve the same model.

    Attributes:
        addresses: of the servers.
        model: name of the model.
        max_model_len: maximum tokens of a prompt with its answer; None if the servers do not say.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        model: str,
        max_model_len: int | None,
        key: str | None = None,
    ) -> None:
        self.addresses = tuple(addresses)
        self.model = model
        self.max_model_len = max_model_len
        self._headers = _headers(key)

    @classmethod
    async def connect(
        cls, addresses: Sequence[Address], key: str | None = None, model: str | None = None
    ) -> Api:
        """Connect to servers and ask which model they serve.

        Args:
            addresses: of the servers.
            key: API key, if the servers require one.
            model: name of the model, for servers that serve several.

        Raises:
            UserError: a server cannot be reached, rejects the key, or does not serve `model`; or
                the servers serve different models.
        """
        cards = [await _served(address, _headers(key), model) for address in addresses]
        if len({card.id for card in cards}) != 1:
            served = ", ".join(f"{a}: {c.id}" for a, c in zip(addresses, cards, strict=True))
            raise UserError(
                f"the servers serve different models ({served}): give only servers of one model"
            )
        known = [card.max_model_len for card in cards if card.max_model_len is not None]
        return cls(addresses, cards[0].id, min(known, default=None), key)

    async def answer(
        self,
        call: Call,
        origin: float,
        due_s: float,
        on_piece: Callable[[int], None] | None = None,
    ) -> Answer:
        """Send a call and return its answer; errors are recorded in the answer.

        Args:
            call: the request.
            origin: `time.perf_counter()` of the run's start.
            due_s: when the request was due, in seconds after `origin`.
            on_piece: called at each piece with tokens, with the number of pieces so far.
        """
        found = Answer(call, due_s)
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
                    found.error = await _follow(response, found, origin, on_piece)
                else:
                    found.error = await _refusal(response)
        except (HttpError, msgspec.DecodeError) as error:
            found.error = str(error)
        except TimeoutError:
            found.error = f"the answer was not finished after {LONGEST_ANSWER_S:g} s"
        found.end_s = time.perf_counter() - origin
        return found

    async def post(self, server: int, body: bytes) -> tuple[int, bytes]:
        """Send any body to /v1/completions; return the status and the answer's body.

        Raises:
            HttpError: the server cannot be reached or does not answer.
        """
        address = self.addresses[server]
        async with request(address, "POST", "/v1/completions", body, self._headers) as response:
            return response.status, await response.read()

    async def metrics(self, server: int) -> dict[str, float]:
        """Return a server's Prometheus metrics by name, each summed over its labels.

        Raises:
            HttpError: the server cannot be reached, or answers with an error.
        """
        return parse_metrics((await self.get(server, "/metrics")).decode())

    async def get(self, server: int, path: str) -> bytes:
        """Return the body of a server's answer to GET `path`.

        Raises:
            HttpError: the server cannot be reached, or answers with an error.
        """
        address = self.addresses[server]
        async with request(address, "GET", path, headers=self._headers) as response:
            if response.status != 200:
                raise HttpError(f"{address}: GET {path} returned HTTP {response.status}")
            return await response.read()


def parse_metrics(text: str) -> dict[str, float]:
    """Parse Prometheus's text format to metrics by name, each summed over its labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            # Label values may have spaces; the sample's value has none.
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
    #: Of vLLM and of this project; other servers do not give it.
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Card]


class _Refused(msgspec.Struct):
    error: _Error


_chunks = msgspec.json.Decoder(_Chunk)


def _headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


async def _served(address: Address, headers: Mapping[str, str], model: str | None) -> _Card:
    """Return a server's card of the model of that name, or of the only model."""
    try:
        async with (
            asyncio.timeout(MODELS_S),
            request(address, "GET", "/v1/models", headers=headers) as response,
        ):
            if response.status != 200:
                raise UserError(
                    f"GET http://{address}/v1/models: {await _refusal(response)}; "
                    + (
                        f"set {API_KEY_VARIABLE} to the key of the servers"
                        if response.status in (401, 403)
                        else "give the URL of a server of OpenAI's API"
                    )
                )
            cards = msgspec.json.decode(await response.read(), type=_Models).data
    except TimeoutError:
        raise UserError(
            f"GET http://{address}/v1/models: no answer within {MODELS_S:g} s; see whether this is "
            "a server of OpenAI's API, and whether its machine is overloaded"
        ) from None
    except HttpError as error:
        raise UserError(
            f"GET http://{address}/v1/models: {error}; start the server, or correct the URL"
        ) from error
    except msgspec.DecodeError as error:
        raise UserError(
            f"{address}: GET /v1/models does not list models, so this is no server of OpenAI's "
            f"API: {error}"
        ) from error
    found = [card for card in cards if model in (None, card.id)]
    if len(found) != 1:
        names = ", ".join(card.id for card in cards) or "none"
        raise UserError(
            f"{address}: exactly one model{'' if model is None else f' {model!r}'} is needed, but "
            f"the server's models are: {names}; name one with --served-model-name"
        )
    return found[0]


async def _follow(
    response: Response, answer: Answer, origin: float, on_piece: Callable[[int], None] | None
) -> str | None:
    """Read a stream into an answer; return the error, or None."""
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
                if on_piece is not None:
                    on_piece(len(answer.piece_s))
            leaves = answer.call.hang_up_after
            if leaves is not None and len(answer.piece_s) >= leaves:
                answer.hung_up = True
                return None
    return "the stream ended without [DONE]"


def _add(answer: Answer, choice: _Choice, now_s: float) -> None:
    """Add a piece to the answer; each piece has a token, though not always text."""
    answer.finish_reason = choice.finish_reason or answer.finish_reason
    answer.text += choice.text
    if choice.logprobs is not None:
        parts = choice.logprobs
        rows = zip(parts.tokens, parts.token_logprobs, parts.top_logprobs, strict=True)
        answer.tokens += [Token(*row) for row in rows]
    answer.piece_s.append(now_s)


async def _refusal(response: Response) -> str:
    """Return the error message of an answer whose status is not 200."""
    body = await response.read()
    try:
        message = msgspec.json.decode(body, type=_Refused).error.message
    except msgspec.DecodeError:
        message = " ".join(body.decode(errors="replace").split())[:200]
    return f"HTTP {response.status}: {message}"
