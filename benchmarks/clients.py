"""What one client notices of many others: `python benchmarks/clients.py`.

One server of the demo on this machine, and one client that sends a request now and then:
alone; beside another client with 200 requests in flight; beside 300 connections of another client
that ask for long streams and never read them; and on a server that may open 400 files, beside
1,000 connections that send nothing. Clients are told apart by X-Forwarded-For, which the server
believes on its own machine. Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

# A script's import path has only its own folder; add the repository root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Only the server computes; this process needs no accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"

from rich.table import Table

from benchmarks.command import ROOT, say
from dance_jax import descriptors
from dance_jax.bench.cluster import RunError, started
from dance_jax.bench.http import Address, HttpError, request
from dance_jax.bench.terminal import exit_code, terminal
from dance_jax.launch.planning.hosts import read_hosts

#: The server has room for all experts of the demo.
HOSTS = "alone address=localhost experts=320\n"
#: Requests of another client in flight, and their tokens each.
REQUESTS, TOKENS = 200, 64
#: Connections that ask for a stream and do not read it, and the tokens that each asks for.
UNREAD, LONG = 300, 1500
#: Connections that send nothing, and the files that the server may open in that case.
IDLE, FILES = 1000, 400
#: Requests of the one client in each case; seconds between them; seconds that it tries.
REPEATS, PAUSE_S, PATIENCE_S = 10, 0.5, 120.0
#: Addresses of the clients, in the network for examples.
ONE, MANY = "192.0.2.1", "192.0.2.2"

#: Its name, the seconds to the first token of each request, and how often one was refused.
Case = tuple[str, list[float], int]


def main() -> int:
    """Run the benchmark and return its exit code."""
    argparse.ArgumentParser(
        prog="python benchmarks/clients.py", description=(__doc__ or "").partition("\n\n")[2]
    ).parse_args()
    console = terminal(110)

    def work() -> int:
        descriptors.raise_limit()
        table = Table("one client", "first token, median", "slowest", "refused before", title=None)
        for name, seconds, refused in _measure():
            table.add_row(
                name, f"{statistics.median(seconds):.3f} s", f"{max(seconds):.3f} s", str(refused)
            )
        console.print(table)
        return 0

    return exit_code(work, RunError, HttpError)


def _measure() -> list[Case]:
    limited = ("sh", "-c", f'ulimit -n {FILES}; exec "$@"', "sh")
    return [*_on_a_server((), alone, beside_requests, beside_unread), *_on_a_server(limited, idle)]


def _on_a_server(prefix: Sequence[str], *cases) -> list[Case]:
    """Measure cases on a server that is started with a prefix of its command."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = pathlib.Path(folder, "hosts.txt")
        hosts.write_text(HOSTS)
        arguments = ["--hosts", str(hosts), "--rebalance-interval", "0"]
        limited = lambda command: [*prefix, *command]  # noqa: E731
        with started(read_hosts(hosts), arguments, root=ROOT, elsewhere=limited) as cluster:

            async def measure() -> list[Case]:
                await cluster.ready()
                return [await case(cluster.addresses[0]) for case in cases]

            return asyncio.run(measure())


async def alone(server: Address) -> Case:
    return "alone", *await _first_tokens(server)


async def beside_requests(server: Address) -> Case:
    """Another client always has REQUESTS requests in flight."""

    async def ask_on() -> None:
        while True:
            async with _asked(server, MANY, TOKENS) as response:
                await response.read()

    others = [asyncio.create_task(ask_on()) for _ in range(REQUESTS)]
    await asyncio.sleep(2.0)
    found = await _first_tokens(server)
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return f"beside {REQUESTS} requests of another client", *found


async def beside_unread(server: Address) -> Case:
    """Another client reads nothing of UNREAD streams but their heads."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(UNREAD):
            _, writer = await asyncio.open_connection(server.host, server.port, limit=1)
            stack.callback(writer.close)
            body = _body(LONG)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {server}\r\nX-Forwarded-For: {MANY}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
        await asyncio.sleep(2.0)
        return f"beside {UNREAD} streams that nobody reads", *await _first_tokens(server)


async def idle(server: Address) -> Case:
    """IDLE connections are opened at once on a server with a limit of FILES descriptors."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(IDLE):
            _, writer = await asyncio.open_connection(server.host, server.port)
            stack.callback(writer.close)
        found = await _first_tokens(server)
        return f"{IDLE} idle connections, {FILES} files", *found


async def _first_tokens(server: Address) -> tuple[list[float], int]:
    """Seconds to the first tokens of REPEATS requests, and how often one was refused before."""
    seconds: list[float] = []
    refused = 0
    for _ in range(REPEATS):
        began = time.perf_counter()
        while (took := await _first_token(server, began)) is None:
            refused += 1
            if time.perf_counter() - began > PATIENCE_S:
                raise RunError(f"no answer within {PATIENCE_S:.0f} s")
            await asyncio.sleep(PAUSE_S)
        seconds.append(took)
        await asyncio.sleep(PAUSE_S)
    say(f"first tokens after {' '.join(f'{each:.3f}' for each in seconds)} s")
    return seconds, refused


async def _first_token(server: Address, began: float) -> float | None:
    """Seconds from `began` to the first token of a stream; None if the request is refused."""
    try:
        async with _asked(server, ONE, 8) as response:
            if response.status != 200:
                return None
            async for _ in response.events():
                return time.perf_counter() - began
    except HttpError:  # a refused connection may be closed before its answer is read
        return None
    raise RunError("a stream has no token")


def _asked(server: Address, client: str, tokens: int):
    return request(server, "POST", "/v1/completions", _body(tokens), {"X-Forwarded-For": client})


def _body(tokens: int) -> bytes:
    fields = {"prompt": "Es war", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    return json.dumps(fields).encode()


if __name__ == "__main__":
    sys.exit(main())
