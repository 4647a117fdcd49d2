"""`python -m dance_jax.launch`: starts the servers of a hosts file and runs prompts on them."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import pathlib
import signal
import sys
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.text import Text

from dance_jax.cache import default_cache_dir
from dance_jax.config import ClusterSpec, EngineConfig, UserError
from dance_jax.engine.sequence import MAX_TOKENS
from dance_jax.launch.cluster import Cluster, ClusterError, Network
from dance_jax.launch.defaults import (
    WIRE_DTYPES,
    default_platform,
    demo_dir,
    engine_config,
    platform_of,
)
from dance_jax.launch.hosts import read_hosts
from dance_jax.launch.plan import Plan, Room, make_plan, matched, rooms
from dance_jax.launch.prompts import check_writable, read_prompts, same_file, write_results
from dance_jax.launch.report import print_plan, print_summary
from dance_jax.launch.roles import KEY_VARIABLE, Role, role
from dance_jax.launch.run import result_lines, run_prompts
from dance_jax.launch.stream import Startup, Stream, conversion, placing
from dance_jax.placement.policies import DEFAULT_POLICY, POLICIES

if TYPE_CHECKING:
    from dance_jax.launch.node import Nodes
    from dance_jax.models.checkpoint import Checkpoint
    from dance_jax.placement.activations import Activations

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
    parser.add_argument(
        "--policy",
        metavar="NAME",
        choices=tuple(POLICIES),
        default=DEFAULT_POLICY,
        help=f"where experts go: {', '.join(POLICIES)} (%(default)s)",
    )
    parser.add_argument(
        "--activations", type=path, help="npz file of expert counts and routes per server"
    )
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
    parser.add_argument(
        "--wire-dtype",
        choices=WIRE_DTYPES,
        default="compute",
        help="of hidden states between servers; compute: as they are, exact (%(default)s)",
    )
    parser.add_argument("--max-model-len", type=_positive, help="context in tokens (<= 2048)")
    parser.add_argument(
        "--cache-dir", type=path, help=f"converted models, compiled steps ({default_cache_dir()})"
    )
    parser.add_argument("--log-dir", type=path, help="keep each server's log here as NAME.log")
    _add_network_options(parser.add_argument_group("servers on other machines"))
    return parser


def _add_network_options(group: argparse._ArgumentGroup) -> None:
    path = pathlib.Path
    group.add_argument(
        "--preflight", action="store_true", help="check every server and link, and start nothing"
    )
    group.add_argument("--ssh-config", type=path, metavar="FILE", help="for ssh -F")
    group.add_argument(
        "--control-address",
        metavar="ADDRESS",
        help="of this machine, where the servers reach it (default: where ssh comes from)",
    )
    group.add_argument(
        "--control-port", type=_port, default=0, help="of this machine (default: a free one)"
    )
    group.add_argument(
        "--coordinator-port",
        type=_port,
        default=0,
        help="of the first server's jax.distributed (default: a free one)",
    )
    group.add_argument(
        "--node-rank",
        type=_rank,
        metavar="N",
        help="run server N (from 0) of the file here, without ssh; 0 also launches. "
        "Taken from Slurm or Open MPI inside their jobs",
    )
    group.add_argument(
        "--key-file",
        type=path,
        metavar="FILE",
        help=f"the launch's key, with --node-rank; or set {KEY_VARIABLE}",
    )


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:9]) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no TCP port")
    return int(text)


def _rank(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:9]) > 30:
        raise argparse.ArgumentTypeError(f"{text!r} is no server's number; the first is 0")
    return int(text)


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
    platform = platform_of(spec, platform)
    part = role(spec, _network(options), options.node_rank, options.key_file)
    if part.node:
        return _hold_server(options, part, console)
    prompts = None
    if options.prompts is not None:
        prompts = read_prompts(options.prompts, spec, options.max_tokens)
    elif not (options.dry_run or options.preflight):
        raise UserError(
            "serving is not there yet: without --prompts this command will serve HTTP later; "
            "give --prompts FILE.jsonl, --preflight for the checks or --dry-run for the plan alone"
        )
    _check_paths(options)
    # Here, not above: wrong files are reported before anything slow is imported.
    from dance_jax.launch.reach import needs_preflight
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
        wire_dtype=options.wire_dtype,
    )
    held = rooms(part.spec, checkpoint, config)
    activations = matched(activations, part.spec, checkpoint)
    place = functools.partial(_place, console, options.policy, activations, checkpoint, config)
    if options.dry_run:
        place(part.spec)
        return 0
    nodes = part.gather_nodes(lambda name, text: console.print(Text(f"{name}: {text}")))
    with contextlib.nullcontext() if nodes is None else contextlib.closing(nodes):
        spec, network = part.spec, part.network
        if options.preflight or needs_preflight(spec, nodes):
            fingerprint = checkpoint.fingerprint
            spec, network = _preflight(options, part, nodes, held, fingerprint, platform, console)
        if options.preflight or prompts is None:
            return 0
        plan = place(spec)
        cluster = Cluster(
            plan.spec,
            checkpoint,
            plan.layout,
            config,
            model=options.model,
            log_dir=options.log_dir,
            cache_dir=cache,
            platform=platform,
            network=network,
            nodes=nodes,
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


def _preflight(
    options: argparse.Namespace,
    part: Role,
    nodes: Nodes | None,
    held: Sequence[Room],
    fingerprint: str,
    platform: str,
    console: Console,
) -> tuple[ClusterSpec, Network]:
    """Asks all servers and prints what it finds: what is better known about them now."""
    from dance_jax.launch.preflight.report import print_preflight
    from dance_jax.launch.reach import checked, survey

    found = survey(
        part.spec,
        held,
        part.network,
        nodes,
        model=options.model,
        fingerprint=fingerprint,
        cache_dir=options.cache_dir,
        platform=platform,
        measure_all=options.preflight,
        progress=lambda text: console.print(Text(f"preflight: {text}")),
    )
    print_preflight(console, found)
    return checked(part.network, found)


def _place(
    console: Console,
    policy: str,
    activations: Activations | None,
    checkpoint: Checkpoint,
    config: EngineConfig,
    spec: ClusterSpec,
) -> Plan:
    """Decides where experts go, and prints it."""
    with placing(console, policy):
        plan = make_plan(spec, checkpoint, config, policy, activations)
    print_plan(console, plan)
    return plan


def _network(options: argparse.Namespace) -> Network:
    if options.ssh_config is not None and not options.ssh_config.is_file():
        raise UserError(f"--ssh-config {options.ssh_config}: no such file")
    address = options.control_address
    return Network(
        ssh_config=options.ssh_config,
        control_addresses=() if address is None else (address,),
        control_port=options.control_port,
        coordinator_port=options.coordinator_port,
    )


def _hold_server(options: argparse.Namespace, part: Role, console: Console) -> int:
    """--node-rank N for N > 0: this server's process, for the launcher of node 0."""
    from dance_jax.launch.node import run_node
    from dance_jax.launch.preflight.probe import answer_json

    assert part.node is not None and part.network.key is not None
    return run_node(
        part.spec,
        part.node,
        part.endpoint,
        part.network.key,
        answer_json,
        options.log_dir,
        lambda text: console.print(Text(text), soft_wrap=True),
    )


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


def _process() -> NoReturn:
    """`main` and then the end of this process; after a signal without taking JAX down.

    What XLA was compiling for a placement goes on behind an interrupted call, and would crash.
    """
    try:
        code = main()
    except SystemExit as ended:
        code = ended.code
    if isinstance(code, int) and code > 128:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _process()
