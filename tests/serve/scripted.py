"""A queue with scripted answers, for tests of HTTP without an engine."""

from __future__ import annotations

import asyncio
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import fastapi
import numpy as np
from fastapi.testclient import TestClient

from dance_jax.config import EngineConfig
from dance_jax.engine.report import EngineReport
from dance_jax.engine.sequence import Logprob, OutputDelta, Request
from dance_jax.launch.control.protocol import Decided, Decision, RebalanceWanted
from dance_jax.models import model_config
from dance_jax.models.random_weights import write_byte_tokenizer
from dance_jax.models.tokenizer import Tokenizer
from dance_jax.placement.core import Layout, Placement
from dance_jax.placement.devices import spread
from dance_jax.serve.app import ServeInfo, create_app
from dance_jax.serve.keys import Keys
from dance_jax.serve.parsers.formats import AnswerFormat
from dance_jax.serve.placement_state import PlacementState
from tests.tiny_models import SERVED

MODEL = "tiny"
CONTEXT = 64
VOCABULARY = SERVED["vocab_size"]
SERVERS = ("alpha", "beta")
HELLO = [{"role": "user", "content": "hello"}]

Script = Callable[[Request], Iterable[OutputDelta]]


def letters(request: Request) -> Iterable[OutputDelta]:
    """Each sample gives "a", "b", ... for max_tokens tokens, interleaved with the other samples."""
    params = request.params
    last = (params.max_tokens or 1) - 1
    for number in range(last + 1):
        letter = chr(ord("a") + number % 26)
        token = ord(letter)
        found = {token: Logprob(-0.5, 1, letter), token + 1: Logprob(-1.5, 2, chr(token + 1))}
        for sample in range(params.n):
            yield OutputDelta(
                request.request_id,
                sample,
                text=letter,
                token_ids=[token],
                logprobs=None if params.logprobs is None else [found],
                finish_reason="length" if number == last else None,
            )


def writes(text: str, finish_reason: Any = "stop") -> Script:
    """A script that writes a text in pieces of three characters."""

    def script(request: Request) -> Iterable[OutputDelta]:
        pieces = [text[at : at + 3] for at in range(0, len(text), 3)] or [""]
        for number, piece in enumerate(pieces, 1):
            last = finish_reason if number == len(pieces) else None
            yield OutputDelta(request.request_id, 0, piece, [number], finish_reason=last)

    return script


class ScriptedQueue:
    """Stands in for serve.queue.RequestQueue.

    Args:
        script: gives the deltas of a request.
        refusal: raised by `submit` after `accepted` requests; None to accept all.
        accepted: number of requests to accept before `refusal`.
    """

    def __init__(
        self, script: Script = letters, refusal: Exception | None = None, accepted: int = 0
    ) -> None:
        self._script = script
        self._refusal = refusal
        self._accepted = accepted
        self.requests: list[Request] = []
        self.closed: list[str] = []
        self.report: EngineReport | None = None
        self.ready = self.running = True
        self.in_flight = 0
        self.restarts = 0

    def submit(self, request: Request, unread: asyncio.Queue[OutputDelta | None]) -> None:
        if self._refusal is not None and len(self.requests) >= self._accepted:
            raise self._refusal
        self.requests.append(request)
        running = request.params.n
        for delta in self._script(request):
            running -= delta.finish_reason is not None
            unread.put_nowait(delta)
        if not running:
            unread.put_nowait(None)

    def abort(self, request_id: str) -> None:
        self.closed.append(request_id)


def serve_info(directory: pathlib.Path, **changes: Any) -> ServeInfo:
    """The ServeInfo of a model with a byte tokenizer and without weights.

    Args:
        directory: directory to write the tokenizer to.
        changes: changed fields of the ServeInfo.
    """
    config = model_config(SERVED)
    (directory / "config.json").write_text(json.dumps(SERVED))
    write_byte_tokenizer(directory, config)
    fields: dict[str, Any] = {
        "models": [MODEL],
        "tokenizer": Tokenizer.load(directory),
        "engine_config": EngineConfig(max_model_len=CONTEXT),
        "model_config": config,
        "servers": SERVERS,
        "rank": 0,
        "keys": Keys(),
        "allowed_origins": [],
        "sampling": {},
        "answer_format": AnswerFormat(),
        "created": 1_700_000_000,
    }
    return ServeInfo(**fields | changes)


def layout() -> Layout:
    """The layout of both servers, which share two experts of each layer."""
    resident = np.zeros((2, 2, 16), bool)
    resident[0, :, :10] = resident[1, :, 8:] = True
    return spread(Placement(resident), [1, 1], [21, 17])


def decision(wanted: RebalanceWanted) -> Decision:
    """The decision that `deciding` gives."""
    return Decision(
        when=1_700_000_000.0,
        policy="latency",
        forced=wanted.force,
        dry_run=wanted.dry_run,
        migrate=True,
        reason="it pays",
        present_seconds=4.0,
        expected_seconds=3.0,
        migration_seconds=0.5,
        experts_moved=7,
        gain=0.25,
    )


def deciding() -> PlacementState:
    """A placement state whose launcher decides at once."""
    experts = PlacementState(
        layout(), lambda wanted: experts.decided(Decided(wanted.id, decision(wanted)))
    )
    return experts


def application(
    queue: ScriptedQueue, info: ServeInfo, experts: PlacementState | None = None
) -> fastapi.FastAPI:
    """The app on this queue; if `experts` is None, its launcher decides at once."""
    experts = experts or deciding()
    return create_app(queue, info, experts)  # pyright: ignore[reportArgumentType]


def client(
    queue: ScriptedQueue, info: ServeInfo, experts: PlacementState | None = None
) -> TestClient:
    """A client of the app without a socket; exceptions in the app become status 500."""
    return TestClient(application(queue, info, experts), raise_server_exceptions=False)


def events(text: str) -> list[Any]:
    """The data of a stream of server-sent events, without the final "[DONE]"."""
    *chunks, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def error(answer: Any, status: int) -> dict[str, Any]:
    """Check the status of an error response and its form, which is OpenAI's; return the error."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]
