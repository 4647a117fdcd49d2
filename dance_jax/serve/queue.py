"""The requests in flight of a front end, which outlive its engines.

Everything runs on the front end's event loop. A request stays in the queue from `submit` until its
last sample has ended, however many engines that takes: a restarted engine gets the output tokens so
far as `Request.resumed` and continues from there.
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

#: Seconds without a completed step after which the engine counts as not ready.
STEP_TIMEOUT_S = 5.0
#: A request fails, as the presumed cause, after so many engine deaths in a row without a token for
#: it.
MAX_DEATHS = 3
#: Retry-After of refused requests, in seconds: a full queue frees places quickly; an engine's start
#: takes longer.
FULL_RETRY_S, UNAVAILABLE_RETRY_S = 1.0, 5.0


class QueueFull(Exception):
    """The request is refused: too many requests wait for their first token."""

    #: Error code for programs, and label of the metric.
    reason = "queue_full"
    retry_after_s = FULL_RETRY_S


class ClientQueueFull(QueueFull):
    """The request is refused: too many requests of its client wait for their first token."""

    reason = "client_queue_full"


class Unavailable(Exception):
    """This server cannot take the request now; the message says why."""

    reason = "unavailable"
    retry_after_s = UNAVAILABLE_RETRY_S


#: `reason` of all refusals.
REASONS = tuple(each.reason for each in (QueueFull, ClientQueueFull, Unavailable))


@dataclasses.dataclass(eq=False)
class _InFlight:
    """A request in flight; its `resumed` grows with its output."""

    request: Request
    #: Gets the deltas, and None at the end.
    unread: asyncio.Queue[OutputDelta | None]
    #: Whether the request still waits for its first token.
    waits: bool = True
    #: Engine deaths since its latest token.
    deaths: int = 0

    def add(self, delta: OutputDelta) -> None:
        tokens = self.request.resumed[delta.index]
        if tokens is None:
            return
        if delta.token_ids:
            tokens += delta.token_ids
            self.waits, self.deaths = False, 0
        if delta.finish_reason is not None:
            self.request.resumed[delta.index] = None
        self.unread.put_nowait(delta)

    @property
    def ended(self) -> bool:
        """Whether all samples have ended."""
        return all(tokens is None for tokens in self.request.resumed)

    def fail(self, why: str) -> None:
        """End all unfinished samples with an error."""
        for index, tokens in enumerate(self.request.resumed):
            if tokens is not None:
                name = self.request.request_id
                self.add(OutputDelta(name, index, finish_reason="error", stop_reason=why))


class RequestQueue:
    """Requests in flight on one server.

    Args:
        send: sends a command to the running engine.
        max_queue: requests that may wait for their first token.
        client_queue: how many of them may come from one client.
        seeds: for requests without a seed, so that a restarted engine goes on with the same one.
    """

    def __init__(
        self,
        send: Callable[[Command], None],
        max_queue: int,
        client_queue: int,
        seeds: Iterator[int],
    ) -> None:
        self._send = send
        self._max_queue, self._client_queue = max_queue, client_queue
        self._seeds = seeds
        self._in_flight: dict[str, _InFlight] = {}
        #: Whether an engine has ever started.
        self._started = False
        #: Whether an engine runs now.
        self._running = False
        #: Whether new requests are refused, because the server is shutting down.
        self._draining = False
        #: time.monotonic() at the latest start of an engine or completed step.
        self._last_step = float("-inf")
        self._empty = asyncio.Event()
        self._empty.set()
        #: Why the servers that run cannot answer; "": they can.
        self.short = ""
        #: The engine's latest report.
        self.report: EngineReport | None = None
        #: Engines started after the first.
        self.restarts = 0

    # For users.

    def submit(self, request: Request, unread: asyncio.Queue[OutputDelta | None]) -> None:
        """Accept a request.

        Args:
            request: with an id that no other request has.
            unread: gets the request's deltas, and None at its end unless it is aborted.

        Raises:
            Unavailable: the engine has not started yet, or the server is shutting down.
            QueueFull: too many requests wait already.
            ClientQueueFull: too many requests of this client wait already.
        """
        if self._draining or not self._started:
            raise Unavailable(
                "the server is shutting down" if self._draining else "the server is starting"
            )
        if self.short:
            raise Unavailable(self.short)
        self._check_room(request.client)
        params = request.params
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=next(self._seeds))
        begun = [[] for _ in range(params.n)]
        request = msgspec.structs.replace(request, params=params, resumed=begun)
        self._in_flight[request.request_id] = _InFlight(request, unread)
        self._empty.clear()
        if self._running:
            self._send(Submit([request]))

    def _check_room(self, client: str) -> None:
        waiting = [entry.request.client for entry in self._in_flight.values() if entry.waits]
        if len(waiting) >= self._max_queue:
            raise QueueFull(
                f"the queue is full: {len(waiting)} requests wait for their first token "
                "(--max-queue)"
            )
        if (own := waiting.count(client)) >= self._client_queue:
            raise ClientQueueFull(
                f"this client's share of the queue is full: {own} of its requests wait for their "
                "first token (--max-queue-per-client)"
            )

    @property
    def ready(self) -> bool:
        """Whether requests are accepted and the engine completed a step within STEP_TIMEOUT_S."""
        alive = time.monotonic() - self._last_step < STEP_TIMEOUT_S
        return self._running and alive and not self._draining and not self.short

    @property
    def running(self) -> bool:
        """Whether an engine runs requests."""
        return self._running

    @property
    def in_flight(self) -> int:
        """Number of requests that have not ended."""
        return len(self._in_flight)

    def abort(self, request_id: str) -> None:
        """Abort a request; does nothing if the request has ended."""
        if self._remove(request_id) and self._running:
            self._send(Abort([request_id]))

    # For the front end.

    def engine_started(self) -> None:
        """An engine is ready: submit all requests in flight to it."""
        self.restarts += self._started
        self._started = self._running = True
        self._last_step = time.monotonic()
        if self._in_flight:
            self._send(Submit([entry.request for entry in self._in_flight.values()]))

    def engine_died(self) -> None:
        """The engine died: keep its requests for the next one."""
        if not self._running:
            return
        self._running = False
        for name, entry in list(self._in_flight.items()):
            entry.deaths += 1
            if entry.deaths >= MAX_DEATHS:
                entry.fail(f"{MAX_DEATHS} engines in a row died while they ran this request")
                self._end(name)

    def receive(self, deltas: Iterable[OutputDelta]) -> None:
        """Take in deltas from the engine."""
        for delta in deltas:
            entry = self._in_flight.get(delta.request_id)
            if entry is None:
                continue  # the request was aborted in the meantime
            entry.add(delta)
            if entry.ended:
                self._end(delta.request_id)

    def reported(self, report: EngineReport) -> None:
        """Take in the engine's report after a step."""
        self.report, self._last_step = report, time.monotonic()

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._draining = True

    async def drained(self) -> None:
        """Wait until no request is in flight."""
        await self._empty.wait()

    def close(self) -> None:
        """Abort all requests in flight and end their streams."""
        self._draining = True
        if self._in_flight and self._running:
            self._send(Abort(list(self._in_flight)))
        for name in list(self._in_flight):
            self._end(name)

    def _end(self, request_id: str) -> None:
        self._in_flight[request_id].unread.put_nowait(None)
        self._remove(request_id)

    def _remove(self, request_id: str) -> bool:
        """Remove a request; returns False if it is not in flight."""
        found = self._in_flight.pop(request_id, None) is not None
        if not self._in_flight:
            self._empty.set()
        return found
