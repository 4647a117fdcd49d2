"""Delivery of answers, as one body or as server-sent events, until the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar, cast

import fastapi
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from dance_jax.engine.sequence import OutputDelta
from dance_jax.serve.answers import FinishReason
from dance_jax.serve.errors import ApiError, api_error, documented
from dance_jax.serve.generation import Generation
from dance_jax.serve.unread import MAX_UNREAD, UNREAD_S

log = logging.getLogger(__name__)
Result = TypeVar("Result")

#: FastAPI's `responses` of the routes that generate: the event stream and the errors.
GENERATED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream: true, server-sent events with chunks of it",
        "content": {"text/event-stream": {}},
    }
} | documented(400, 401, 404, 408, 413, 415, 429, 500, 503)

#: nginx's status for a client that closed the connection; no client ever receives it.
_CLIENT_GONE = 499


#: Seconds between two looks at whether a client reads.
_LOOK_S = 1.0
#: Seconds without a token after which a stream gets a comment, because proxies and clients give up
#: connections on which nothing comes; before the first token, the stream begins then.
COMMENT_S = 15.0


class Disconnected(Exception):
    """The client hung up before the answer was complete."""


class NotRead(Exception):
    """The client does not read the answer."""


async def answered(
    request: fastapi.Request,
    generation: Generation,
    whole: Callable[[], Awaitable[BaseModel]],
    chunks: Callable[[], AsyncIterator[BaseModel]],
    stream: bool | None,
) -> Response:
    """The response of a call that generates; the call is aborted if the client hangs up.

    A stream begins with its first chunk, or after COMMENT_S. Until then a proxy can repeat the call
    on another server, and an error has its status.

    Args:
        request: the HTTP request, whose body has been read.
        generation: in flight; closed here or with the response.
        whole: gives the complete answer.
        chunks: gives the answer in chunks, at least one.
        stream: whether to send chunks.

    Raises:
        ApiError: the generation failed before anything was sent.
    """
    with contextlib.ExitStack() as failed:
        failed.enter_context(contextlib.closing(generation))
        try:
            if stream:
                parts = chunks()
                first = asyncio.ensure_future(anext(parts))
                failed.callback(first.cancel)
                waiting = asyncio.wait({first}, timeout=COMMENT_S)
                if (await while_connected(request.receive, waiting))[0]:
                    first.result()
                failed.pop_all()
                return EventStream(generation, first, parts)
            answer = await while_connected(request.receive, whole())
        except Disconnected:
            return Response(status_code=_CLIENT_GONE)
    return Response(answer.model_dump_json(), media_type="application/json")


class EventStream(Response):
    """Sends chunks as events until they end, or until the client hangs up or does not read them.

    A client that does not read has its connection closed in the middle of the stream: there is no
    room left to send it an error.

    Args:
        generation: source of the chunks; always closed at the end of the stream.
        first: body of the first event, which may not be there yet.
        chunks: bodies of the events that follow, in order.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        first: asyncio.Future[BaseModel],
        chunks: AsyncIterator[BaseModel],
    ) -> None:
        # Proxies must not buffer the stream.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._first, self._chunks = first, chunks
        #: time.monotonic() since which an event waits for room in the connection, if one waits.
        self._waits_since: float | None = None
        #: time.monotonic() when the last event was sent.
        self._sent_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.closing(self._generation):
            try:
                watchers = self._not_read(), self._comment(send)
                await while_connected(receive, self._send_all(send), *watchers)
            except Disconnected:
                return
            except NotRead:
                self._generation.not_read()
            finally:
                self._first.cancel()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            first = await self._first
            await self._send_event(send, first.model_dump_json())
            async for chunk in self._chunks:
                await self._send_event(send, chunk.model_dump_json())
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("a stream failed")
            # The status 200 has been sent already; OpenAI's client raises on an error event.
            await self._send_event(send, api_error(error).answer.model_dump_json())
        await self._send_event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_event(self, send: Send, data: str) -> None:
        body = f"data: {data}\n\n".encode()
        self._waits_since = self._sent_at = time.monotonic()
        await send({"type": "http.response.body", "body": body, "more_body": True})
        self._waits_since = None

    async def _comment(self, send: Send) -> NoReturn:
        """Send a comment whenever no event was sent for a while."""
        while True:
            quiet_s = time.monotonic() - self._sent_at
            if quiet_s < COMMENT_S or self._waits_since is not None:
                await asyncio.sleep(max(COMMENT_S - quiet_s, _LOOK_S))
                continue
            self._sent_at = time.monotonic()
            await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})

    async def _not_read(self) -> NoReturn:
        """Raise NotRead as soon as the client leaves too much unread, or for too long."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if self._waits_since is None:
                continue
            waited_s = time.monotonic() - self._waits_since
            if waited_s > UNREAD_S or self._generation.num_unread > MAX_UNREAD:
                raise NotRead


async def while_connected(
    receive: Receive, work: Awaitable[Result], *watchers: Awaitable[NoReturn]
) -> Result:
    """The result of `work`, which is cancelled if the client hangs up.

    Args:
        receive: ASGI's receive of a call whose body has been read.
        watchers: raise what ends the work too.

    Raises:
        Disconnected: the client hung up.
    """
    task = asyncio.ensure_future(work)
    watching = [asyncio.ensure_future(each) for each in (_disconnected(receive), *watchers)]
    try:
        await asyncio.wait((task, *watching), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            next(each for each in watching if each.done()).result()
        return task.result()
    finally:
        # Runs also if this coroutine is cancelled.
        for each in (task, *watching):
            each.cancel()
        await asyncio.gather(task, *watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> NoReturn:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise Disconnected


def ending(delta: OutputDelta) -> FinishReason | None:
    """Why a choice ended, if it did; `Generation` raises an ApiError for all other reasons."""
    return cast("FinishReason | None", delta.finish_reason)
