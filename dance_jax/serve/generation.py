"""The engine requests of one HTTP call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

import msgspec

from dance_jax.engine.sequence import OutputDelta, Request
from dance_jax.serve.answers import Usage
from dance_jax.serve.errors import ApiError, refused
from dance_jax.serve.info import RouteContext
from dance_jax.serve.metrics import Observation
from dance_jax.serve.queue import QueueFull, Unavailable

log = logging.getLogger("dance_jax.generation")

_STOPPED = "the server stopped before the answer was complete"


class Generation:
    """The engine requests of one call: submits all of them, or none.

    Args:
        server: provides the queue and the metrics.
        requests: with equally many samples each.
        client: who sent the call, see `client_of`.

    Raises:
        ApiError: 429 or 503 if the queue refuses a request.
    """

    def __init__(self, server: RouteContext, requests: Sequence[Request], client: str = "") -> None:
        self._server = server
        self._requests = [msgspec.structs.replace(one, client=client) for one in requests]
        self._client = client
        self._output_tokens = 0
        #: By request id, of the requests in the queue.
        self._observations: dict[str, Observation] = {}
        self._unread: asyncio.Queue[OutputDelta | None] = asyncio.Queue()
        try:
            for request in self._requests:
                server.queue.submit(request, self._unread)
                self._observations[request.request_id] = server.metrics.observe(request)
        except BaseException as error:
            self.close()
            if isinstance(error, QueueFull | Unavailable):
                server.metrics.refused(error)
                raise refused(error) from error
            raise

    @property
    def usage(self) -> Usage:
        """Token usage so far."""
        prompts = sum(len(request.prompt_token_ids) for request in self._requests)
        return Usage.of(prompts, self._output_tokens)

    async def deltas(self) -> AsyncIterator[tuple[int, OutputDelta]]:
        """Pairs (number of the choice, delta) until all choices are finished.

        Raises:
            ApiError: 500 if the engine failed a request, 503 if it aborted one.
        """
        # Number of each request's first choice.
        first = {one.request_id: n * one.params.n for n, one in enumerate(self._requests)}
        left = len(first)
        while left:
            delta = await self._unread.get()
            # `get` does not wait while deltas are there: without this, other connections would.
            await asyncio.sleep(0)
            if delta is None:
                left -= 1
                continue
            self._observations[delta.request_id].add(delta)
            if delta.finish_reason == "error":
                field, _, _ = str(delta.stop_reason).partition(":")
                if field == "structured_outputs":
                    raise ApiError(400, str(delta.stop_reason), param=field)
                raise ApiError(500, f"the engine failed: {delta.stop_reason}")
            if delta.finish_reason == "abort":
                raise ApiError(503, _STOPPED)
            self._output_tokens += len(delta.token_ids)
            yield first[delta.request_id] + delta.index, delta
        if not all(observation.finished for observation in self._observations.values()):
            raise ApiError(503, _STOPPED)

    @property
    def num_unread(self) -> int:
        """Number of deltas that have arrived and that `deltas` has not given out."""
        return self._unread.qsize()

    def not_read(self) -> None:
        """Record that the call ends because its client did not read the answer."""
        log.warning(
            "%s: ended: client %s does not read its stream, %d tokens wait for it",
            self._requests[0].request_id,
            self._client,
            self.num_unread,
        )
        self._server.metrics.not_read()

    def close(self) -> None:
        """Abort unfinished requests; may be called twice."""
        for request_id, observation in self._observations.items():
            observation.close()
            self._server.queue.abort(request_id)
