"""Connections between servers of a test, all in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from dance_jax.models.connections import Connections, Credentials, Identity

CREDENTIALS = Credentials(b"k" * 32, Identity("model", "float32", "float32"))


@contextlib.contextmanager
def connected(names: Sequence[str]) -> Iterator[list[Connections]]:
    """The connections of each server, which know each other's endpoints; closed at the end."""
    with contextlib.ExitStack() as stack:
        servers = [Connections(rank, names, "127.0.0.1", CREDENTIALS) for rank in range(len(names))]
        for server in servers:
            stack.callback(server.close)
            server.endpoints = [each.endpoint for each in servers]
        yield servers
