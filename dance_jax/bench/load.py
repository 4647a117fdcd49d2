"""A run under load: requests arrive at one or several servers, and their answers are measured.

The functions take the options of `dance_jax.bench.arguments.add_load`, and `url`: the URLs of
running servers, empty if a cluster is started.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console

from dance_jax.bench import cluster
from dance_jax.bench.arguments import RATE, REQUESTS
from dance_jax.bench.arrivals import Arrival, limited, poisson, read_trace
from dance_jax.bench.client import Answer, Api, Call
from dance_jax.bench.drive import open_loop
from dance_jax.bench.figures import Figures, by_server, failures
from dance_jax.bench.http import Address, HttpError
from dance_jax.bench.tables import print_failed, print_load
from dance_jax.bench.terminal import progress
from dance_jax.config import API_KEY_VARIABLE, ClusterSpec, ServerSpec, UserError
from dance_jax.launch.cli.prompts import Prompt
from dance_jax.launch.planning.hosts import read_hosts


@dataclasses.dataclass(frozen=True)
class Servers:
    """The servers that are measured.

    Attributes:
        addresses: where they listen.
        cluster: the cluster, if it was started for the run.
    """

    addresses: tuple[Address, ...]
    cluster: cluster.StartedCluster | None = None

    async def connect(self, console: Console, model: str | None = None) -> Api:
        """Wait until a cluster that was started is ready, and connect to the servers.

        The API key is taken from DANCE_JAX_API_KEY, which a cluster that was started inherits.

        Args:
            console: for a line that says how long the start took.
            model: name of the model; None for the only one that the servers serve.

        Raises:
            RunError: the cluster did not start.
            UserError: a server cannot be reached, rejects the key, or serves another model.
        """
        if self.cluster is not None:
            began = time.perf_counter()
            await self.cluster.ready()
            console.print(f"ready after {time.perf_counter() - began:.1f} s")
        return await Api.connect(self.addresses, os.environ.get(API_KEY_VARIABLE), model)


def servers_of(urls: Sequence[str], hosts: pathlib.Path | None) -> ClusterSpec:
    """Return the servers to measure: of the hosts file if there is one, else of the URLs.

    Raises:
        UserError: the hosts file or a URL is wrong, or their numbers differ.
    """
    addresses = [Address.of(url) for url in urls]
    if hosts is None:
        return ClusterSpec(tuple(ServerSpec(str(each), each.host) for each in addresses))
    spec = read_hosts(hosts)
    if urls and len(urls) != len(spec.servers):
        raise UserError(
            f"{hosts} has {len(spec.servers)} servers, but {len(urls)} URLs are given: give one "
            "URL per server, in the order of the file"
        )
    return spec


@contextlib.contextmanager
def running(
    options: argparse.Namespace,
    spec: ClusterSpec,
    console: Console,
    arguments: Sequence[str] = (),
    root: pathlib.Path | None = None,
) -> Iterator[Servers]:
    """Yield the servers at the URLs, or start a cluster for the block.

    Args:
        options: `url`, or for a cluster `hosts`, `model` and `launch` (the launcher's arguments).
        spec: the servers.
        console: for a line that says what is started.
        arguments: further arguments of the launcher.
        root: the checkout whose servers run; None for the installed package.

    Raises:
        RunError: the cluster ended before the block.
    """
    if options.url:
        yield Servers(tuple(map(Address.of, options.url)))
        return
    words = ["--hosts", str(options.hosts.absolute()), *arguments]
    words += ["--model", str(options.model.absolute())] if options.model else []
    with cluster.started(spec, [*words, *options.launch], root=root) as started:
        console.print(
            f"{', '.join(spec.names)}: starting at {started.addresses[0]} and the following ports"
        )
        yield Servers(started.addresses, started)
        started.check()


def arrivals_of(
    options: argparse.Namespace, servers: int, prompts: Sequence[Prompt] | None = None
) -> list[Arrival]:
    """Return the arrivals of a run, from a trace or a Poisson process at each server.

    Args:
        options: of the run.
        servers: number of servers.
        prompts: of --prompts. Servers without a prompt get no request. None: all servers get some.

    Raises:
        UserError: the trace is wrong, or no request arrives within --duration.
    """
    requests = options.requests
    if requests is None and options.duration is None:
        requests = REQUESTS if prompts is None else len(prompts)
    everything: Iterable[Arrival]
    if options.trace is not None:
        everything = read_trace(options.trace, servers, options.speedup or 1.0)
    else:
        asked = range(servers) if prompts is None else {prompt.rank for prompt in prompts}
        rates = [(options.rate or RATE) * (server in asked) for server in range(servers)]
        everything = poisson(rates, options.seed)
    found = limited(everything, requests, options.duration)
    if not found:
        raise UserError(
            f"--duration {options.duration:g}: no request arrives within that time; give a "
            "longer --duration"
        )
    return found


async def measure(
    api: Api, names: Sequence[str], calls: Sequence[Call], console: Console
) -> tuple[list[Answer], list[Figures]]:
    """Send the calls as they arrive, print the figures, and return answers and figures.

    Args:
        api: of the servers.
        names: of the servers.
        calls: the requests.
        console: for progress and results.

    Raises:
        HttpError: no request was answered.
    """
    with progress(console, "requests", len(calls)) as done:
        answers = await open_loop(api, calls, done)
    rows = by_server(names, answers)
    print_load(console, rows)
    print_failed(console, failures(answers))
    if not any(answer.complete for answer in answers):
        raise HttpError("no request was answered")
    return answers, rows
