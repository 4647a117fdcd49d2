"""The command `dance-jax bench`; see `dance_jax.bench`."""

from __future__ import annotations

import argparse
import asyncio
import pathlib
from collections.abc import Callable, Sequence

from rich.console import Console

from dance_jax.bench.arguments import MAX_TOKENS, add_load, check_load
from dance_jax.bench.client import Api, Call
from dance_jax.bench.cluster import RunError
from dance_jax.bench.http import HttpError
from dance_jax.bench.load import arrivals_of, measure, running, servers_of
from dance_jax.bench.report import plain_load, write_json
from dance_jax.bench.terminal import exit_code, terminal
from dance_jax.bench.texts import TEXT, Texts
from dance_jax.bench.workload import calls_of_passages, calls_of_prompts, calls_of_texts
from dance_jax.config import API_KEY_VARIABLE, ClusterSpec, UserError
from dance_jax.launch.cli.prompts import check_writable, read_prompts

#: Columns of the tables when stdout is not a terminal.
WIDTH = 110


def parser(prog: str = "dance-jax bench") -> argparse.ArgumentParser:
    """Return the parser of the command line up to --."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Measures servers with OpenAI's API over HTTP: running ones by their URLs, or "
        "a cluster that is started for the run with --hosts. Prints tokens/s, TTFT, TPOT, ITL and "
        "end to end latency of each server and of all.",
        epilog="Options after -- are passed to dance_jax.launch, e.g. --hosts FILE -- --policy "
        f"latency. The API key is read from the variable {API_KEY_VARIABLE}. "
        "Exit codes: 1 if no request was answered or the cluster failed, 2 if an option or a file "
        "is wrong.",
    )
    add = parser.add_argument
    add("url", nargs="*", metavar="URL", help="URL of a running server, http://host:port")
    add(
        "--hosts",
        type=pathlib.Path,
        help="hosts file of the cluster to start; with URLs: the file that names them",
    )
    add(
        "--model",
        type=pathlib.Path,
        metavar="DIR",
        help="model to serve with --hosts (default: the demo model); with URLs: the served model, "
        "whose tokenizer --trace needs",
    )
    add(
        "--served-model-name",
        metavar="NAME",
        help="model to ask for (default: the only model served)",
    )
    add_load(parser)
    add("--output", type=pathlib.Path, metavar="JSON", help="write results here")
    return parser


def main(arguments: Sequence[str], prog: str = "dance-jax bench") -> int:
    """Run the command and return its exit code."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    options = parser(prog).parse_args(words[:at])
    options.launch = words[at + 1 :]
    console = terminal(WIDTH)

    def work() -> int:
        run(options, console)
        return 0

    return exit_code(work, RunError, HttpError)


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure running servers, or servers started here; print and write the results."""
    check(options)
    spec = servers_of(options.url, options.hosts)
    # Report wrong files before starting any server.
    calls_for = call_maker(options, spec)
    with running(options, spec, console) as servers:

        async def work() -> None:
            api = await servers.connect(console, options.served_model_name)
            _, rows = await measure(api, spec.names, calls_for(api), console)
            if options.output is not None:
                setup = vars(options) | {"servers": spec.names, "served_model_name": api.model}
                write_json(options.output, setup, plain_load(rows))

        asyncio.run(work())


def check(options: argparse.Namespace) -> None:
    """Fill in and check the options.

    Raises:
        UserError: options are missing or contradict each other, or --output cannot be written.
    """
    options.max_tokens = options.max_tokens or MAX_TOKENS
    if not options.url and options.hosts is None:
        raise UserError(
            "no servers are given: name the URLs of running servers (http://host:port), or a "
            "cluster to start with --hosts FILE"
        )
    check_load(options)
    if options.url and options.trace is not None and options.model is None:
        raise UserError(
            "--trace sets the prompts' lengths in tokens: name the directory of the served model, "
            "which has its tokenizer, with --model"
        )
    if options.url and options.model is not None and options.trace is None:
        raise UserError(
            "--model: no server is launched where URLs are given, and only --trace needs the "
            "model's tokenizer; leave out --model (to choose one of a server's models, use "
            "--served-model-name)"
        )
    launched = {word.partition("=")[0] for word in options.launch}
    if options.trace is not None and "--model" in launched:
        raise UserError("--trace needs the model's tokenizer: give --model before the --")
    if options.output is not None:
        check_writable(options.output, "--output")


def call_maker(options: argparse.Namespace, spec: ClusterSpec) -> Callable[[Api], list[Call]]:
    """Return a function that makes the requests for servers.

    Raises:
        UserError: a file is wrong, or no request arrives within --duration.
    """
    count = len(spec.servers)
    if options.prompts is not None:
        prompts = read_prompts(options.prompts, spec, options.max_tokens)
        calls = calls_of_prompts(arrivals_of(options, count, prompts), prompts)
        return lambda api: calls
    coming = arrivals_of(options, count)
    if options.trace is None:
        calls = calls_of_passages(coming, options.max_tokens, options.seed)
        return lambda api: calls
    # Imported here, because other runs need no tokenizer, and JAX loads slowly.
    from dance_jax.models.directory import demo_dir
    from dance_jax.models.tokenizer import Tokenizer

    tokens = Tokenizer.load(options.model or demo_dir()).encode(TEXT)
    texts = Texts([[tokens]] * count)
    return lambda api: calls_of_texts(
        coming, texts, options.max_tokens, api.max_model_len, options.seed
    )
