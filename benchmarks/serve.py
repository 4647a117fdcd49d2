"""Measure a served cluster over HTTP: `python benchmarks/serve.py`.

benchmarks/serving/__init__.py describes what is measured and defines the terms.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# A script's import path has only its own folder; add the repository root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Only the servers compute; this process needs no accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"

from rich.console import Console

from benchmarks.arguments import (
    add_results,
    add_seed,
    add_service,
    check_module,
    check_results,
    count,
    positive,
    some_of,
)
from benchmarks.command import EXAMPLES, exit_code, terminal, verdict
from benchmarks.serving import (
    arrivals,
    cluster,
    idle,
    long,
    plots,
    prefix,
    report,
    soak,
    static,
    tables,
)
from benchmarks.serving.client import Api, Call
from benchmarks.serving.cluster import ClusterError
from benchmarks.serving.drive import open_loop
from benchmarks.serving.figures import by_server
from benchmarks.serving.http import Address, HttpError
from benchmarks.serving.report import SECTIONS, Results
from benchmarks.serving.setting import Setting, failures
from benchmarks.serving.texts import read_texts, task_files
from benchmarks.serving.workload import calls_of_prompts, calls_of_texts
from benchmarks.targets import Target
from dance_jax.config import ClusterSpec, EngineOptions, ServerSpec, UserError
from dance_jax.launch.cli.prompts import read_prompts
from dance_jax.launch.planning.defaults import demo_dir
from dance_jax.launch.planning.hosts import read_hosts
from dance_jax.models.tokenizer import Tokenizer

#: Used without --tasks: one task for the users of each of the demo's servers, as in
#: examples/prompts.jsonl.
DEMO_TASKS = [
    EXAMPLES / "tasks" / f"{name}.heldout.jsonl" for name in ("code", "english", "german")
]
KEY_VARIABLE = "DANCE_JAX_API_KEY"
#: Defaults: requests of a run under load, requests of the soak, seconds of arrivals in `static`.
REQUESTS, SOAK_REQUESTS, WINDOW_S = 100, 2000, 60.0
RATE, MAX_TOKENS = 1.0, 256
#: Columns of the tables when stdout is not a terminal.
WIDTH = 110


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/serve.py",
        description="Measures a served cluster over HTTP. The cluster is started here, or given "
        "with --url. Without --sections and --check: one run under load.",
        epilog="Options after -- are passed to dance_jax.launch, e.g. -- --policy latency",
    )
    add = parser.add_argument
    add(
        "--hosts",
        type=pathlib.Path,
        help="hosts file of the cluster to start (examples/hosts.txt)",
    )
    add("--url", nargs="+", metavar="URL", help="URLs of running servers, in the hosts' order")
    add_service(parser)
    add(
        "--max-num-seqs",
        type=count,
        default=EngineOptions().max_num_seqs,
        help="sequences that a device runs at once (%(default)s)",
    )
    add(
        "--batch-seqs",
        type=count,
        default=8,
        help="sequences per device in a batch of the section static (%(default)s, the size of a "
        "batch before servers batched continuously)",
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--tasks",
        type=pathlib.Path,
        metavar="DIR",
        help="directory of *.jsonl files with prompts, one file per task",
    )
    asked.add_argument(
        "--prompts",
        type=pathlib.Path,
        metavar="FILE",
        help="file of prompts, as --prompts of dance_jax.launch",
    )
    coming = parser.add_mutually_exclusive_group()
    coming.add_argument("--rate", type=positive, help=f"requests/s per server ({RATE:g})")
    coming.add_argument(
        "--trace",
        type=pathlib.Path,
        metavar="CSV",
        help="replay the arrivals and lengths of a trace in the format of the Azure traces",
    )
    add("--speedup", type=positive, help="how much faster to replay the trace (1)")
    add(
        "--requests",
        type=count,
        help=f"total requests ({REQUESTS}; in the section soak {SOAK_REQUESTS})",
    )
    add(
        "--duration",
        type=positive,
        help="seconds during which requests arrive (no limit); in the section static, seconds "
        f"per rate ({WINDOW_S:g})",
    )
    add("--max-tokens", type=count, help=f"maximum tokens per answer ({MAX_TOKENS})")
    add_seed(parser, "seed of arrivals, lengths and texts")
    add(
        "--sections",
        type=some_of(SECTIONS),
        metavar="A,B",
        help=f"measure some of: {', '.join(SECTIONS)} (with --check, all)",
    )
    add_results(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    options, console = parser().parse_args(arguments), terminal(WIDTH)

    def work() -> int:
        return verdict(console, run(options, console), options.check)

    return exit_code(work, ClusterError, HttpError)


def run(options: argparse.Namespace, console: Console) -> list[Target]:
    """Measure running servers, or servers started here; write the results and return targets."""
    check(options)
    spec = servers_of(options)
    # Report wrong files before starting any server.
    tokenizer = Tokenizer.load(options.model or demo_dir())
    files = task_files(options.tasks) if options.tasks else DEMO_TASKS
    texts = read_texts(files, len(spec.servers), tokenizer)
    coming = None if options.sections else work_of(options, spec, tokenizer)
    with addresses_of(options, spec, console) as (addresses, running):

        async def measure() -> Results:
            if running is not None:
                began = time.perf_counter()
                await running.ready()
                console.print(f"ready after {time.perf_counter() - began:.1f} s")
            # Servers started here inherit the same variable.
            api = await Api.connect(addresses, os.environ.get(KEY_VARIABLE))
            setting = Setting(
                api=api,
                names=spec.names,
                rows=tuple(options.max_num_seqs * devices for devices in spec.devices),
                batch_rows=tuple(options.batch_seqs * devices for devices in spec.devices),
                texts=texts,
                seed=options.seed,
                console=console,
                pid=None if running is None else running.pid,
            )
            if coming is not None:
                return await load(setting, coming(setting))
            return await measure_sections(setting, options)

        results = asyncio.run(measure())
    if options.output is not None:
        report.write(
            options.output,
            vars(options) | {"servers": spec.names, "devices": spec.devices},
            results,
        )
    if options.plot is not None:
        plots.draw(spec.names, results, options.plot)
    return results.targets() if options.sections else []


def check(options: argparse.Namespace) -> None:
    """Fill in and check the options.

    Raises:
        UserError: options contradict each other, or a result cannot be written.
    """
    if options.check and options.sections is None:
        options.sections = SECTIONS
    if options.max_tokens is None and not options.sections:
        options.max_tokens = MAX_TOKENS
    if options.speedup is not None and options.trace is None:
        raise UserError("--speedup needs --trace")
    if options.prompts is not None and options.trace is not None:
        raise UserError(
            "--trace and --prompts both set the prompts' lengths: give only one of them"
        )
    if options.sections:
        for name in ("rate", "trace", "prompts", "max_tokens"):
            if getattr(options, name) is not None:
                option = name.replace("_", "-")
                raise UserError(
                    f"--{option} applies only to a run under load: leave out --check and --sections"
                )
        for name, section in (("requests", "soak"), ("duration", "static")):
            if getattr(options, name) is not None and section not in options.sections:
                raise UserError(
                    f"--{name} applies only to the section {section}, which is not in --sections"
                )
        if "static" in options.sections and options.url and options.hosts is None:
            raise UserError(
                "section static with --url needs --hosts too: the devices of each server decide "
                "how many sequences run at once"
            )
    if options.url and options.launch:
        raise UserError(
            f"{options.launch[0]}: with --url no server is launched; leave out the options after --"
        )
    if "soak" in (options.sections or ()):
        check_module("psutil", "soak")
    check_results(options)


def servers_of(options: argparse.Namespace) -> ClusterSpec:
    """Return the servers to measure, from --url or the hosts file; set options.hosts.

    Raises:
        UserError: the hosts file is wrong, or has not as many servers as --url.
    """
    if options.url and options.hosts is None:
        addresses = [Address.of(url) for url in options.url]
        return ClusterSpec(tuple(ServerSpec(str(each), each.host) for each in addresses))
    options.hosts = options.hosts or EXAMPLES / "hosts.txt"
    spec = read_hosts(options.hosts)
    if options.url and len(options.url) != len(spec.servers):
        raise UserError(
            f"{options.hosts} has {len(spec.servers)} servers but --url names {len(options.url)}: "
            "give one URL per server"
        )
    return spec


def work_of(
    options: argparse.Namespace, spec: ClusterSpec, tokenizer: Tokenizer
) -> Callable[[Setting], list[Call]]:
    """Return a function that makes the requests of a run under load from its setting.

    Raises:
        UserError: a file is wrong, or no request arrives within --duration.
    """
    prompts = None
    if options.prompts is not None:
        prompts = read_prompts(options.prompts, spec, options.max_tokens)
    requests, rate = options.requests, options.rate or RATE
    if requests is None and options.duration is None:
        requests = REQUESTS if prompts is None else len(prompts)
    if options.trace is not None:
        everything: Any = arrivals.read_trace(
            options.trace, len(spec.servers), options.speedup or 1.0
        )
    else:
        users = range(len(spec.servers)) if prompts is None else {each.rank for each in prompts}
        rates = [rate * (server in users) for server in range(len(spec.servers))]
        everything = arrivals.poisson(rates, options.seed)
    coming = arrivals.limited(everything, requests, options.duration)
    if not coming:
        raise UserError(
            f"--duration {options.duration:g}: no request arrives within that time; give more"
        )
    if prompts is not None:
        calls = calls_of_prompts(coming, prompts, tokenizer)
        return lambda setting: calls
    return lambda setting: calls_of_texts(
        coming, setting.texts, options.max_tokens, setting.api.max_model_len, setting.seed
    )


@contextlib.contextmanager
def addresses_of(
    options: argparse.Namespace, spec: ClusterSpec, console: Console
) -> Iterator[tuple[Sequence[Address], cluster.Cluster | None]]:
    """Yield the servers' addresses, and the cluster if it is started here, for the block."""
    if options.url:
        yield [Address.of(url) for url in options.url], None
        return
    arguments = ["--hosts", str(options.hosts.absolute())]
    arguments += ["--max-num-seqs", str(options.max_num_seqs)]
    arguments += ["--model", str(options.model.absolute())] if options.model else []
    with cluster.started(spec, [*arguments, *options.launch]) as running:
        console.print(f"{', '.join(spec.names)}: starting on {running.addresses[0]} and up")
        yield running.addresses, running
        running.check()


async def load(setting: Setting, calls: list[Call]) -> Results:
    """Make a run under load and print its results."""
    with setting.progress("requests", len(calls)) as done:
        answers = await open_loop(setting.api, calls, done)
    rows = by_server(setting.names, answers)
    tables.print_load(setting.console, rows)
    tables.print_failed(setting.console, failures(answers))
    if not any(answer.good for answer in answers):
        raise HttpError("no request was answered")
    return Results(answers=answers, load=rows)


async def measure_sections(setting: Setting, options: argparse.Namespace) -> Results:
    """Measure the sections in turn and print each one's results."""
    results, console = Results(), setting.console
    if "idle" in options.sections:
        results.idle = await idle.measure(setting)
        tables.print_idle(console, results.idle)
    if "static" in options.sections:
        results.static = await static.measure(setting, options.duration or WINDOW_S)
        tables.print_static(console, results.static)
    if "long" in options.sections:
        results.long = await long.measure(setting)
        tables.print_long(console, results.long)
    if "prefix" in options.sections:
        results.prefix = await prefix.measure(setting)
        tables.print_prefix(console, results.prefix)
    if "soak" in options.sections:
        results.soak = await soak.measure(setting, options.requests or SOAK_REQUESTS)
        tables.print_soak(console, results.soak)
    return results


if __name__ == "__main__":
    sys.exit(main())
