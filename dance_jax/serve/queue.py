"""The requests of a front end that are in flight: between users' connections and one engine after
another.

Everything happens on the front end's event loop. A request lives here from `submit` until its last
sample has ended, however many engines that takes: what one has brought, the next gets as
`Request.resumed`, and goes on from there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec

from dance_jax.engine.sequence import OutputDelta, Request
from dance_jax.launch.control.protocol import Abort, Command, Submit

if TYPE_CHECKING:
    from dance_jax.engine.report import EngineReport

#: Seconds without a completed step after which the engine counts as stuck.
STEP_TIMEOUT_S = 5.0
#: Engines that may die over a request without bringing it a token, until it is taken for the cause.
MAX_DEATHS = 3
#: What users that are turned away are told to wait: a queue moves fast, a start takes longer.
FULL_RETRY_S, UNAVAILABLE_RETRY_S = 1.0, 5.0


class QueueFull(Exception):
    """Too many requests wait for their first token."""

    retry_after_s = FULL_RETRY_S


class Unavailable(Exception):
    """No request is taken: the engine has not started yet, or the server is about to end."""

    retry_after_s = UNAVAILABLE_RETRY_S


@dataclasses.dataclass(eq=False)
class _InFlight:
    """A request and what has come of it."""

    request: Request
    #: Per sample, its output tokens so far; None: it has ended.
    tokens: list[list[int] | None]
    #: What the user has not read yet; None: that was all.
    unread: asyncio.Queue[OutputDelta | None]
    #: It has no token yet.
    waits: bool = True
    #: Engines that died since its latest token.
    deaths: int = 0

    def add(self, delta: OutputDelta) -> None:
        tokens = self.tokens[delta.index]
        if tokens is None:
            return
        if delta.token_ids:
            tokens += delta.token_ids
            self.waits, self.deaths = False, 0
        if delta.finish_reason is not None:
            self.tokens[delta.index] = None
        self.unread.put_nowait(delta)

    @property
    def ended(self) -> bool:
        """All samples have."""
        return all(tokens is None for tokens in self.tokens)

    def fail(self, why: str) -> None:
        """Ends what has not ended."""
        for index, tokens in enumerate(self.tokens):
            if tokens is not None:
                name = self.request.request_id
                self.add(OutputDelta(name, index, finish_reason="error", stop_reason=why))


class DeltaStream:
    """What comes of a request, until it has ended; closing it early aborts the request."""

    def __init__(self, queue: RequestQueue, one: _InFlight) -> None:
        self._queue, self._one = queue, one
        self._over = False

    def __aiter__(self) -> DeltaStream:
        return self

    async def __anext__(self) -> OutputDelta:
        if self._over:
            raise StopAsyncIteration
        delta = await self._one.unread.get()
        if delta is None:
            self._over = True
            raise StopAsyncIteration
        return delta

    async def aclose(self) -> None:
        """No more is wanted; may be called twice, but not while `__anext__` waits."""
        self._over = True
        self._queue.abort(self._one.request.request_id)


class RequestQueue:
    """Requests in flight on one server.

    Args:
        send: gives the running engine a command.
        max_queue: requests that may wait for their first token.
        seeds: of requests without one, which would else draw anew from every engine.
    """

    def __init__(
        self, send: Callable[[Command], None], max_queue: int, seeds: Iterator[int]
    ) -> None:
        self._send = send
        self._max_queue = max_queue
        self._seeds = seeds
        self._in_flight: dict[str, _InFlight] = {}
        #: Some engine has started; one runs now; no request is taken any more.
        self._started = self._running = self._draining = False
        self._last_step = float("-inf")
        self._empty = asyncio.Event()
        self._empty.set()
        #: The engine's latest.
        self.report: EngineReport | None = None
        #: Engines started after the first.
        self.restarts = 0

    # For users.

    def submit(self, request: Request) -> DeltaStream:
        """Takes a request in; what comes of it can be read from the result.

        Raises:
            Unavailable: the engine has not started yet, or the server is about to end.
            QueueFull: too many wait already.
        """
        if self._draining or not self._started:
            raise Unavailable("the server ends" if self._draining else "the server is starting")
        waiting = sum(one.waits for one in self._in_flight.values())
        if waiting >= self._max_queue:
            raise QueueFull(f"{waiting} requests wait for their first token")
        if request.request_id in self._in_flight:
            raise ValueError(f"request id {request.request_id!r} is in use")
        if request.params.seed is None:
            params = msgspec.structs.replace(request.params, seed=next(self._seeds))
            request = msgspec.structs.replace(request, params=params)
        one = _InFlight(request, [[] for _ in range(request.params.n)], asyncio.Queue())
        self._in_flight[request.request_id] = one
        self._empty.clear()
        if self._running:
            self._send(Submit([request]))
        return DeltaStream(self, one)

    @property
    def ready(self) -> bool:
        """An engine runs that completed a step within STEP_TIMEOUT_S, and requests are taken."""
        alive = time.monotonic() - self._last_step < STEP_TIMEOUT_S
        return self._running and alive and not self._draining

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._in_flight)

    def abort(self, request_id: str) -> None:
        """Forgets a request; one that has ended already is none."""
        if self._remove(request_id) and self._running:
            self._send(Abort([request_id]))

    # For the front end.

    def engine_started(self) -> None:
        """An engine waits for requests: it gets all there are."""
        self.restarts += self._started
        self._started = self._running = True
        self._last_step = time.monotonic()
        if self._in_flight:
            self._send(Submit([_resumed(one) for one in self._in_flight.values()]))

    def engine_died(self) -> None:
        """It is gone; its requests wait for the next one."""
        if not self._running:
            return
        self._running = False
        for name, one in list(self._in_flight.items()):
            one.deaths += 1
            if one.deaths >= MAX_DEATHS:
                one.fail(f"{MAX_DEATHS} engines in a row died over this request")
                self._end(name)

    def receive(self, deltas: Iterable[OutputDelta]) -> None:
        """The engine has brought these."""
        for delta in deltas:
            one = self._in_flight.get(delta.request_id)
            if one is None:
                continue  # aborted meanwhile
            one.add(delta)
            if one.ended:
                self._end(delta.request_id)

    def reported(self, report: EngineReport) -> None:
        """The engine completed a step."""
        self.report, self._last_step = report, time.monotonic()

    def drain(self) -> None:
        """Takes no more requests."""
        self._draining = True

    async def drained(self) -> None:
        """Returns when nothing is in flight."""
        await self._empty.wait()

    def close(self) -> None:
        """Ends everything that is in flight, for its readers too."""
        self._draining = True
        if self._in_flight and self._running:
            self._send(Abort(list(self._in_flight)))
        for name in list(self._in_flight):
            self._end(name)

    def _end(self, request_id: str) -> None:
        self._in_flight[request_id].unread.put_nowait(None)
        self._remove(request_id)

    def _remove(self, request_id: str) -> bool:
        """False: it was not there."""
        found = self._in_flight.pop(request_id, None) is not None
        if not self._in_flight:
            self._empty.set()
        return found


def _resumed(one: _InFlight) -> Request:
    return msgspec.structs.replace(one.request, resumed=one.tokens)
