"""The engine requests of one HTTP call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Protocol

from dance_jax.engine.sequence import OutputDelta, Request
from dance_jax.serve.answers import Usage
from dance_jax.serve.errors import ApiError, refused
from dance_jax.serve.info import RouteContext
from dance_jax.serve.metrics import Observation
from dance_jax.serve.queue import QueueFull, Unavailable

_STOPPED = "the server stopped before the answer was complete"


class _Deltas(Protocol):
    """The stream that the queue returns for a request; closing it aborts the request."""

    async def __anext__(self) -> OutputDelta: ...

    async def aclose(self) -> None: ...


class Generation:
    """The engine requests of one call, from `start` until they finish or `close` is called.

    This is an async context manager: leaving it aborts unfinished requests.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self._output_tokens = 0
        self._observations: list[Observation] = []
        self._streams: list[_Deltas] = []
        #: Task for the next delta of each open stream -> number of the stream.
        self._pending: dict[asyncio.Task[OutputDelta | None], int] = {}

    @staticmethod
    async def start(server: RouteContext, requests: Sequence[Request]) -> Generation:
        """Submit all of the requests, or none.

        Raises:
            ApiError: 429 or 503 if the queue refuses a request.
        """
        generation = Generation(requests)
        try:
            for request in requests:
                generation._streams.append(server.queue.submit(request))
                generation._observations.append(server.metrics.observe(request))
        except BaseException as error:
            await generation.close()
            if isinstance(error, QueueFull | Unavailable):
                server.metrics.refused(error)
                raise refused(error) from error
            raise
        return generation

    @property
    def usage(self) -> Usage:
        """Token usage so far."""
        prompts = sum(len(request.prompt_token_ids) for request in self.requests)
        return Usage.of(prompts, self._output_tokens)

    async def deltas(self) -> AsyncIterator[tuple[int, OutputDelta]]:
        """Pairs (number of the choice, delta) until all choices are finished.

        Raises:
            ApiError: 500 if the engine failed a request, 503 if it aborted one.
        """
        for number in range(len(self._streams)):
            self._read_next(number)
        while self._pending:
            done, _ = await asyncio.wait(self._pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = self._pending.pop(task)
                delta = task.result()
                if delta is None:
                    continue
                self._read_next(number)
                self._observations[number].add(delta)
                _check(delta)
                self._output_tokens += len(delta.token_ids)
                yield number * self.requests[number].params.n + delta.index, delta
        if not all(observation.finished for observation in self._observations):
            raise ApiError(503, _STOPPED)

    def _read_next(self, number: int) -> None:
        task = asyncio.create_task(_next(self._streams[number]))
        self._pending[task] = number

    async def close(self) -> None:
        """Abort unfinished requests; may be called twice."""
        for observation in self._observations:
            observation.close()
        # A stream cannot be closed while a task reads from it.
        for task in self._pending:
            task.cancel()
        await asyncio.gather(*self._pending, return_exceptions=True)
        await asyncio.gather(*(stream.aclose() for stream in self._streams))

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


async def _next(stream: _Deltas) -> OutputDelta | None:
    """The next delta; None at the end of the stream."""
    return await anext(stream, None)


def _check(delta: OutputDelta) -> None:
    if delta.finish_reason == "error":
        raise ApiError(500, f"the engine failed: {delta.stop_reason}")
    if delta.finish_reason == "abort":
        raise ApiError(503, _STOPPED)
