"""What one HTTP call has in flight in the engine."""

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
    """What the queue returns: closing it aborts the request."""

    async def __anext__(self) -> OutputDelta: ...

    async def aclose(self) -> None: ...


class Generation:
    """The engine requests of one call, from `start` until they are finished or this is closed.

    An async context manager: leaving it aborts what has not finished.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self._output_tokens = 0
        self._observations: list[Observation] = []
        self._streams: list[_Deltas] = []
        #: The next delta of each stream that has not ended -> its number.
        self._expected: dict[asyncio.Task[OutputDelta | None], int] = {}

    @staticmethod
    async def start(server: RouteContext, requests: Sequence[Request]) -> Generation:
        """Submits all of the requests, or none.

        Raises:
            ApiError: 429 or 503, the queue takes no more.
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
        """Tokens so far."""
        prompts = sum(len(request.prompt_token_ids) for request in self.requests)
        return Usage.of(prompts, self._output_tokens)

    async def deltas(self) -> AsyncIterator[tuple[int, OutputDelta]]:
        """(number of the choice, what is new in it) until all choices are finished.

        Raises:
            ApiError: 500 or 503, the engine gave a request up.
        """
        for number in range(len(self._streams)):
            self._expect(number)
        while self._expected:
            done, _ = await asyncio.wait(self._expected, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = self._expected.pop(task)
                delta = task.result()
                if delta is None:
                    continue
                self._expect(number)
                self._observations[number].add(delta)
                _check(delta)
                self._output_tokens += len(delta.token_ids)
                yield number * self.requests[number].params.n + delta.index, delta
        if not all(observation.finished for observation in self._observations):
            raise ApiError(503, _STOPPED)

    def _expect(self, number: int) -> None:
        task = asyncio.create_task(_next(self._streams[number]))
        self._expected[task] = number

    async def close(self) -> None:
        """Abort what has not finished; may be called twice."""
        for observation in self._observations:
            observation.close()
        # A stream that is being read cannot be closed.
        for task in self._expected:
            task.cancel()
        await asyncio.gather(*self._expected, return_exceptions=True)
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
    """None: that was all."""
    return await anext(stream, None)


def _check(delta: OutputDelta) -> None:
    if delta.finish_reason == "error":
        raise ApiError(500, f"the engine failed: {delta.stop_reason}")
    if delta.finish_reason == "abort":
        raise ApiError(503, _STOPPED)
