"""HTTP/1.1 client on asyncio streams; lean, because it shares the machine with the servers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Mapping

from dance_jax.config import UserError

#: Maximum bytes of a header line, or of a line of the chunked encoding.
LONGEST_LINE = 1 << 16
READ_BYTES = 1 << 16


class HttpError(Exception):
    """The connection failed, or the answer is not HTTP."""


class NotReached(HttpError):
    """No connection could be made."""


@dataclasses.dataclass(frozen=True)
class Address:
    """The address on which a server listens."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Address:
        """Parse a URL of the form http://host:port.

        Raises:
            UserError: the URL does not have that form.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            parts, host, port = None, None, None
        if parts is None or parts.scheme != "http" or not host or parts.path.strip("/"):
            raise UserError(f"{url!r} is not a server's URL: http://host:port is needed")
        return cls(host, port or 80)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Response:
    """Status of an answer, and its body, which can be read once as it arrives."""

    def __init__(self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader):
        self.status = status
        self._headers = headers
        self._reader = reader

    async def read(self) -> bytes:
        """Return the whole body."""
        return b"".join([piece async for piece in self.pieces()])

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield the data of server-sent events, one line each, as they arrive."""
        rest = b""
        async for piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body in pieces that may be cut anywhere.

        Raises:
            HttpError: the body ends too early, or is not HTTP.
        """
        try:
            if self._headers.get("transfer-encoding", "").lower() == "chunked":
                async for chunk in self._chunks():
                    yield chunk
            elif "content-length" in self._headers:
                yield await self._reader.readexactly(int(self._headers["content-length"]))
            else:
                while piece := await self._reader.read(READ_BYTES):
                    yield piece
        except (asyncio.IncompleteReadError, OSError) as error:
            raise HttpError("the connection ended in the middle of an answer") from error
        except ValueError as error:
            raise HttpError(f"the answer's body is not valid HTTP: {error}") from error

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int((await self._reader.readuntil(b"\n")).partition(b";")[0], 16):
            yield await self._reader.readexactly(size)
            await self._reader.readuntil(b"\n")


@contextlib.asynccontextmanager
async def request(
    address: Address,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> AsyncIterator[Response]:
    """Send a request on a new connection; leaving the block closes the connection.

    Raises:
        NotReached: no connection could be made.
        HttpError: the server does not answer.
    """
    fields = {
        "Host": str(address),
        "Connection": "close",
        "Content-Length": str(len(body)),
        **({"Content-Type": "application/json"} if body else {}),
        **(headers or {}),
    }
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    try:
        reader, writer = await asyncio.open_connection(
            address.host, address.port, limit=LONGEST_LINE
        )
    except OSError as error:
        raise NotReached(f"{address} cannot be reached: {error.strerror or error}") from error
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        yield Response(*await _head(reader), reader)
    finally:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Read the status, and the headers by their names in lower case."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        version, status, *_ = head.split(b" ", 2)
        if not version.startswith(b"HTTP/1."):
            raise ValueError(f"the answer begins with {version[:20]!r}")
        fields = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
        return int(status), {name.strip().lower(): value.strip() for name, _, value in fields}
    except (asyncio.IncompleteReadError, OSError) as error:
        raise HttpError("the connection ended before the answer") from error
    except (ValueError, asyncio.LimitOverrunError) as error:
        raise HttpError(f"the answer is not valid HTTP: {error}") from error
