"""`python -m dance_jax.launch`: starts the servers of a hosts file and runs prompts on them."""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import sys
import types

from rich.console import Console

from dance_jax.cache import default_cache_dir
from dance_jax.config import UserError
from dance_jax.engine.sequence import MAX_TOKENS
from dance_jax.launch.cluster import Cluster, ClusterError
from dance_jax.launch.defaults import (
    default_platform,
    demo_dir,
    engine_config,
)
from dance_jax.launch.hosts import read_hosts
from dance_jax.launch.plan import make_plan
from dance_jax.launch.prompts import check_writable, read_prompts, same_file, write_results
from dance_jax.launch.report import print_plan, print_summary
from dance_jax.launch.run import result_lines, run_prompts
from dance_jax.launch.stream import Startup, Stream, conversion

#: Exit codes: a server failed; the user must change something; ended by Ctrl-C (as shells do).
FAILED, WRONG, INTERRUPTED = 1, 2, 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dance_jax.launch",
        description="Starts one engine process per server of a hosts file and runs prompts.",
    )
    path = pathlib.Path
    parser.add_argument(
        "--hosts", type=path, required=True, help="servers, one a line: name key=value ..."
    )
    parser.add_argument(
        "--model", type=path, help="directory in Hugging Face format or converted (default: demo)"
    )
    parser.add_argument("--policy", default="dance", help="placement policy: dance or uniform")
    parser.add_argument("--activations", type=path, help="npz file of expert counts per server")
    parser.add_argument("--prompts", type=path, help="JSON Lines of prompts")
    parser.add_argument("--output", type=path, help="JSON Lines of completions, in input order")
    parser.add_argument(
        "--max-tokens", type=_positive, default=128, help="of prompts that name none (%(default)s)"
    )
    parser.add_argument(
        "--save-activations", type=path, help="write the run's expert counts and routes here"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of pool, activations and wire (default: float32 on CPU, bfloat16 on GPU)",
    )
    parser.add_argument("--max-model-len", type=_positive, help="context in tokens (<= 2048)")
    parser.add_argument(
        "--cache-dir", type=path, help=f"converted models, compiled steps ({default_cache_dir()})"
    )
    parser.add_argument("--log-dir", type=path, help="keep each server's log here as NAME.log")
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:20]) <= MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {MAX_TOKENS}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = parser().parse_args(arguments)
    # The plan is computed here; what it takes must not take the servers' accelerators.
    platform = default_platform()
    os.environ["JAX_PLATFORMS"] = "cpu"
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, _terminate)
    errors = Console(stderr=True)
    try:
        return _launch(options, platform, terminal())
    except (UserError, ClusterError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return WRONG if isinstance(error, UserError) else FAILED
    except KeyboardInterrupt:
        errors.print("interrupted; all servers were stopped", markup=False, soft_wrap=True)
        return INTERRUPTED


def terminal() -> Console:
    """Standard output; a file or pipe gets lines wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


def _terminate(number: int, frame: types.FrameType | None) -> None:
    """A signal becomes an exception, so that everything is cleaned up on the way out."""
    raise SystemExit(128 + number)


def _launch(options: argparse.Namespace, platform: str, console: Console) -> int:
    spec = read_hosts(options.hosts)
    prompts = None
    if options.prompts is not None:
        prompts = read_prompts(options.prompts, spec, options.max_tokens)
    elif not options.dry_run:
        raise UserError(
            "serving is not there yet: without --prompts this command will serve HTTP later; "
            "give --prompts FILE.jsonl, or --dry-run for the plan alone"
        )
    _check_paths(options)
    # Here, not above: wrong files are reported before anything slow is imported.
    from dance_jax.models.checkpoint import Checkpoint
    from dance_jax.models.convert import ensure_converted
    from dance_jax.models.tokenizer import Tokenizer
    from dance_jax.placement.activations import Activations

    activations = None
    if options.activations is not None:
        activations = Activations.load(options.activations)
    cache = options.cache_dir or default_cache_dir()
    source = options.model or demo_dir()
    tokenizer = Tokenizer.load(source)
    with conversion(console) as progress:
        path = ensure_converted(source, cache / "models", progress)
    checkpoint = Checkpoint.open(path)
    config = engine_config(
        checkpoint.config,
        options.max_model_len,
        seed=options.seed,
        dtype=options.dtype,
        platform=platform,
    )
    plan = make_plan(spec, checkpoint, config, options.policy, activations)
    print_plan(console, plan)
    if options.dry_run or prompts is None:
        return 0
    cluster = Cluster(
        spec,
        path,
        plan.layout,
        config,
        log_dir=options.log_dir,
        cache_dir=cache,
        platform=platform,
    )
    try:
        with Startup(console, spec.names) as startup:
            cluster.start(startup.update)
        with Stream(console, spec.names, prompts) as stream:
            result = run_prompts(cluster, plan, tokenizer, prompts, stream.update)
    finally:
        cluster.stop()
    if options.output is not None:
        write_results(options.output, result_lines(result))
    if options.save_activations is not None:
        result.activations(checkpoint.fingerprint).save(options.save_activations)
    print_summary(console, result)
    return 0


def _check_paths(options: argparse.Namespace) -> None:
    """What is to be written can be, and no result takes the place of another file of the run."""
    others = {
        "--hosts": options.hosts,
        "--prompts": options.prompts,
        "--activations": options.activations,
    }
    for option, path in (
        ("--output", options.output),
        ("--save-activations", options.save_activations),
    ):
        if path is None:
            continue
        if options.prompts is None:
            raise UserError(f"{option} needs --prompts")
        check_writable(path, option)
        for other, taken in others.items():
            if taken is not None and same_file(path, taken):
                raise UserError(f"{option} {path}: is the file of {other}; name another one")
        others[option] = path
    if options.log_dir is not None:
        try:
            options.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--log-dir {options.log_dir}: cannot be made: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
