"""Measure a served cluster over HTTP: `python benchmarks/serve.py`.

benchmarks/serving/__init__.py describes what is measured and defines the terms.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pathlib
import sys
from collections.abc import Callable

# A script's import path has only its own folder; add the repository root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Only the servers compute; this process needs no accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"

from rich.console import Console

from benchmarks.arguments import (
    add_results,
    add_service,
    check_module,
    check_results,
    some_of,
)
from benchmarks.command import EXAMPLES, ROOT, verdict
from benchmarks.serving import idle, long, plots, prefix, report, soak, static, tables
from benchmarks.serving.report import SECTIONS, Results
from benchmarks.serving.setting import Setting
from benchmarks.serving.task_files import read_texts, task_files
from benchmarks.targets import Target
from dance_jax.bench import load
from dance_jax.bench.arguments import MAX_TOKENS, add_load, check_load, count
from dance_jax.bench.client import Api, Call
from dance_jax.bench.cluster import RunError
from dance_jax.bench.http import HttpError
from dance_jax.bench.terminal import exit_code, terminal
from dance_jax.bench.texts import Texts
from dance_jax.bench.workload import calls_of_prompts, calls_of_texts
from dance_jax.config import ClusterSpec, EngineOptions, UserError
from dance_jax.launch.cli.prompts import read_prompts
from dance_jax.models.directory import demo_dir
from dance_jax.models.tokenizer import Tokenizer

#: Used without --tasks: one task for the users of each of the demo's servers, as in
#: examples/prompts.jsonl.
DEMO_TASKS = [
    EXAMPLES / "tasks" / f"{name}.heldout.jsonl" for name in ("code", "english", "german")
]
#: Defaults: requests of the soak, seconds of arrivals in `static`.
SOAK_REQUESTS, WINDOW_S = 2000, 60.0
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
    add(
        "--tasks",
        type=pathlib.Path,
        metavar="DIR",
        help="directory of *.jsonl files with prompts, one file per task",
    )
    add_load(parser)
    add(
        "--sections",
        type=some_of(SECTIONS),
        metavar="A,B",
        help=f"measure some of: {', '.join(SECTIONS)} (with --check, all). --requests is then the "
        f"number of the section soak ({SOAK_REQUESTS}), and --duration the seconds per rate of the "
        f"section static ({WINDOW_S:g})",
    )
    add_results(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    options, console = parser().parse_args(arguments), terminal(WIDTH)

    def work() -> int:
        return verdict(console, run(options, console), options.check)

    return exit_code(work, RunError, HttpError)


def run(options: argparse.Namespace, console: Console) -> list[Target]:
    """Measure running servers, or servers started here; write the results and return targets."""
    check(options)
    spec = load.servers_of(options.url or (), options.hosts)
    # Report wrong files before starting any server.
    files = task_files(options.tasks) if options.tasks else DEMO_TASKS
    texts = read_texts(files, len(spec.servers), Tokenizer.load(options.model or demo_dir()))
    calls_for = None if options.sections else call_maker(options, spec, texts)
    arguments = ["--max-num-seqs", str(options.max_num_seqs)]
    with load.running(options, spec, console, arguments, ROOT) as servers:

        async def measure() -> Results:
            api = await servers.connect(console)
            if calls_for is not None:
                return Results(*await load.measure(api, spec.names, calls_for(api), console))
            setting = Setting(
                api=api,
                names=spec.names,
                rows=tuple(options.max_num_seqs * devices for devices in spec.devices),
                batch_rows=tuple(options.batch_seqs * devices for devices in spec.devices),
                texts=texts,
                seed=options.seed,
                console=console,
                pid=None if servers.cluster is None else servers.cluster.pid,
            )
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
    check_load(options)
    if options.tasks is not None and options.prompts is not None:
        raise UserError("--tasks and --prompts both set the prompts: give only one of them")
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
    if "soak" in (options.sections or ()):
        check_module("psutil", "soak")
    if not options.url:
        options.hosts = options.hosts or EXAMPLES / "hosts.txt"
    check_results(options)


def call_maker(
    options: argparse.Namespace, spec: ClusterSpec, texts: Texts
) -> Callable[[Api], list[Call]]:
    """Return a function that makes the requests of a run under load for servers.

    Raises:
        UserError: a file is wrong, or no request arrives within --duration.
    """
    if options.prompts is not None:
        prompts = read_prompts(options.prompts, spec, options.max_tokens)
        calls = calls_of_prompts(load.arrivals_of(options, len(spec.servers), prompts), prompts)
        return lambda api: calls
    coming = load.arrivals_of(options, len(spec.servers))
    return lambda api: calls_of_texts(
        coming, texts, options.max_tokens, api.max_model_len, options.seed
    )


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
