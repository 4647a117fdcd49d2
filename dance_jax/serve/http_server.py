"""The HTTP server of a front end: uvicorn, with a limited number of connections.

A connection is closed if it brings no request in time, or if its client does not read an answer. A
client that has closed only its side of a connection still gets its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import socket
from collections.abc import Iterator
from typing import Any, cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from dance_jax import descriptors
from dance_jax.logs import OnceASecond
from dance_jax.serve.errors import AlwaysAnswers, ApiError, error_response
from dance_jax.serve.metrics import HttpConnections
from dance_jax.serve.unread import UNREAD_S

log = logging.getLogger(__name__)
log.addFilter(OnceASecond())

#: Connections accepted before the excess ones among them are refused.
ACCEPTED_AT_ONCE = 16
#: Descriptors for everything but HTTP connections: engines that start again, the launcher, logs,
#: and connections that are being refused.
RESERVE = 128
#: Seconds that a client has to send a request's line and headers.
HEAD_S = 10.0
#: Seconds that a refused client has to read why, and until it shall try again.
REFUSED_S, RETRY_S = 1.0, 5
#: Refused connections that are given that time; others are closed at once.
LINGERING = 32
#: Seconds between the first two probes of a half-closed connection; then twice as many, up to the
#: second number.
PROBE_S = (0.1, 10.0)
#: Seconds for which a client may read nothing of what waits for it: longer than streams allow
#: (delivery.EventStream), and Linux (unread.limit_unread).
NOT_READ_S = 2 * UNREAD_S
#: Start of every answer.
_VERSION = b"HTTP/1.1 "


def most_connections() -> int:
    """Maximum number of HTTP connections for this process's limit of descriptors."""
    limit = descriptors.raise_limit()
    return max(limit - RESERVE, limit // 4)


class HttpServer(uvicorn.Server):
    """A uvicorn server that leaves signal handling to the front end.

    Args:
        app: the application.
        graceful_s: seconds that a shutdown waits for answers.
        backlog: connections that may wait to be accepted.
        most: maximum number of connections; None: as many as the limit of descriptors allows.
        counts: of the connections; kept up to date.
        trusted_proxies: addresses or networks, with commas between them, whose X-Forwarded-For
            is believed.
        keep_alive_s: seconds for which a connection without a request stays open after an answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        graceful_s: float,
        backlog: int,
        most: int | None = None,
        counts: HttpConnections | None = None,
        trusted_proxies: str = "",
        keep_alive_s: float = 75.0,
    ) -> None:
        self._backlog = backlog
        most = most_connections() if most is None else most
        counted = counts or HttpConnections()

        class Limited(Connection):
            MOST, COUNTS = most, counted

        super().__init__(
            uvicorn.Config(
                AlwaysAnswers(app),
                http=Limited,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                backlog=ACCEPTED_AT_ONCE,
                timeout_keep_alive=cast("int", keep_alive_s),
                timeout_graceful_shutdown=int(graceful_s),
                forwarded_allow_ips=trusted_proxies,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # asyncio uses one number for two things: how many connections wait in the kernel, and how
        # many it accepts in a row.
        for each in sockets or ():
            each.listen(self._backlog)


class Connection(H11Protocol):
    """One HTTP connection."""

    #: Maximum number of connections of the server.
    MOST = 1
    #: Counts of the server.
    COUNTS = HttpConnections()

    _refused = False
    #: Closes the connection unless a request arrives in time; None while there is a request.
    _head_timer: asyncio.TimerHandle | None = None
    #: Probes the client, which has closed its side of the connection; None if it has not.
    _probe_timer: asyncio.TimerHandle | None = None
    #: Looks whether the client reads what waits for it; None if nothing waits.
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.COUNTS.open = len(self.connections)
        if len(self.connections) > self.MOST:
            self._refuse()
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.COUNTS.open = len(self.connections)
        self._unset_keepalive_if_required()
        for timer in (self._head_timer, self._probe_timer, self._read_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        self._await_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_reading()
        if self._probe_timer is not None and not self._answering:
            self._unset_keepalive_if_required()
            self.transport.close()

    @property
    def _answering(self) -> bool:
        """Whether a request has arrived whose answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _error(self, error: ApiError) -> None:
        """Send an error that no request's application can send, and no more."""
        if self.transport.is_closing() or self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        response = error_response(error)
        headers = [*response.raw_headers, (b"connection", b"close")]
        reason = http.HTTPStatus(error.status_code).phrase
        events = (
            h11.Response(status_code=error.status_code, headers=headers, reason=reason),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        )
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))

    # A request that does not come, or is no request.

    def _await_head(self) -> None:
        """Limit the time until the next request, if none is being answered."""
        if self._answering:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._answering:
            return
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self.COUNTS.late += 1
            self._error(ApiError(408, f"the headers did not arrive within {HEAD_S:.0f} s"))
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._error(ApiError(400, "the request is not valid HTTP"))
        self.transport.close()

    # A client that does not read.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reading()

    def _await_reading(self) -> None:
        """Close the connection unless its client reads some of what waits for it in time."""
        if self._read_timer is not None:
            self._read_timer.cancel()
        waits = self.transport.get_write_buffer_size()
        self._read_timer = (
            self.loop.call_later(NOT_READ_S, self._look_at_reading, waits) if waits else None
        )

    def _look_at_reading(self, waited: int) -> None:
        # While more of an answer is written, as many bytes may wait although the client reads.
        complete = self.flow.write_paused or not self._answering
        if complete and self.transport.get_write_buffer_size() >= waited:
            log.warning("a connection was closed: its client does not read its answer")
            self.transport.abort()
        else:
            self._await_reading()

    # Too many connections.

    def _refuse(self) -> None:
        log.warning("a connection was refused: %d are open (raise ulimit -Hn)", self.MOST)
        self._refused = True
        self.COUNTS.refused += 1
        message = f"too many connections: {self.MOST} are open; try again in {RETRY_S} s"
        self._error(ApiError(503, message, code="unavailable", retry_after_s=RETRY_S))
        if len(self.connections) > self.MOST + LINGERING:
            self.transport.close()
            return
        # If this closed the connection now, the client's system would drop the answer as soon as it
        # sends its request.
        with contextlib.suppress(OSError):  # the client has closed the connection
            self.transport.write_eof()
        self.loop.call_later(REFUSED_S, self.transport.close)

    # A client that has closed its side: it may be gone, or may wait for its answer.

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open for the answer to a complete request."""
        if self._refused or not self._answering or self.cycle.more_body:
            return False
        if self._probe_timer is None:
            self.transport = self.cycle.transport = cast("Any", _EarlyVersion(self.transport))
            self._probe(PROBE_S[0])
        return True

    def _probe(self, wait_s: float) -> None:
        """Send the client something that changes no answer; if it is gone, the next write fails."""
        if self.transport.is_closing():
            return
        if self.cycle.response_started and not self.flow.write_paused:
            # Only event streams take long between their start and their end; this is a comment.
            self.transport.write(self.conn.send(h11.Data(data=b":\n\n")) or b"")
        elif not self.cycle.response_started:
            cast("_EarlyVersion", self.transport).probe()
        next_s = min(2 * wait_s, PROBE_S[1])
        self._probe_timer = self.loop.call_later(wait_s, self._probe, next_s)


class _EarlyVersion:
    """A transport that can send the start of the next answer, byte by byte, before the answer."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        #: Bytes of _VERSION that were sent before the answer that they belong to.
        self._sent = 0

    def probe(self) -> None:
        self._transport.write(_VERSION[self._sent : self._sent + 1])
        self._sent = min(self._sent + 1, len(_VERSION))

    def write(self, data: bytes) -> None:
        self._transport.write(data[self._sent :])
        self._sent = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
