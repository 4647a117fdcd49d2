"""`python -m dance_jax.launch`: start the servers of a hosts file, to serve or to run prompts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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

from dance_jax import descriptors, logs, signals
from dance_jax.config import ClusterSpec, EngineConfig, RebalanceOptions, UserError
from dance_jax.launch.agent.network import Network
from dance_jax.launch.agent.role import Role, role
from dance_jax.launch.cli.options import (
    BATCH_TOKENS,
    PROG,
    check_mode,
    engine_options,
    parse,
    rebalance_options,
    serve_options,
)
from dance_jax.launch.cli.prompts import check_directory, check_writable, read_prompts, same_file
from dance_jax.launch.cli.report import print_plan
from dance_jax.launch.cli.start import Start, cache_dir, run_batch, serve, survivors_of, take_over
from dance_jax.launch.cli.stream import conversion, download, placing
from dance_jax.launch.cluster.fleet import ClusterError
from dance_jax.launch.cluster.succession import sole_launcher
from dance_jax.launch.planning.defaults import default_platform, engine_config
from dance_jax.launch.planning.hosts import read_hosts
from dance_jax.launch.planning.plan import ModelFacts, Plan, Room, make_plan, matched, rooms
from dance_jax.models.directory import demo_dir

if TYPE_CHECKING:
    from dance_jax.launch.rebalance.state import ServiceState
    from dance_jax.models.checkpoint import Checkpoint
    from dance_jax.models.convert import Outline
    from dance_jax.models.tokenizer import Tokenizer
    from dance_jax.placement.activations import Activations

#: Exit codes: a server failed; the user must change something; interrupted (as in shells).
FAILED, WRONG, INTERRUPTED = 1, 2, 130


def main(
    arguments: Sequence[str] | None = None, prog: str = PROG, batch: bool | None = None
) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: command-line arguments; None: those of the process.
        prog: the command's name in its help.
        batch: whether the options must name prompts; None: they may.
    """
    errors = Console(stderr=True)
    try:
        options = parse(arguments, prog)
        if batch is not None and batch != (options.prompts is not None):
            what = "needs --prompts" if batch else "does not take --prompts; use dance-jax batch"
            raise UserError(f"{prog} {what}")
    except UserError as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return WRONG
    # The plan is computed in this process, which must leave the accelerators to the servers.
    platform = default_platform()
    os.environ["JAX_PLATFORMS"] = "cpu"
    descriptors.raise_limit()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signals.handle(number, _terminate)
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
    """Turn a signal into an exception, so that everything is cleaned up on the way out."""
    raise SystemExit(128 + number)


def _launch(options: argparse.Namespace, platform: str, console: Console) -> int:
    spec = read_hosts(options.hosts, platform)
    part = role(spec, _network(options), options.node_rank, options.key_file)
    if part.node_rank:
        return _hold_server(options, part, spec, console)
    check_mode(options)
    serving, moving = serve_options(options), rebalance_options(options)
    prompts = None
    if options.prompts is not None:
        prompts = read_prompts(options.prompts, spec, options.max_tokens or BATCH_TOKENS)
    _check_paths(options)
    activations = _activations(options)
    model, tokenizer, directory = _model(options, console)
    wanted = engine_options(options)
    config = engine_config(model.config, wanted, platform=spec.platform, formats=model.formats)
    if prompts is None:
        config = dataclasses.replace(config, half_life=moving.half_life_s)
    held = rooms(spec, model, config, moving.survive)
    activations = matched(activations, spec, model)
    state = _state(console, moving, spec, model, held)
    place = functools.partial(
        _place, console, options.policy, activations, prompts is None, moving.survive, model, config
    )
    if state is not None:
        place = functools.partial(_resume, console, state, moving.survive, model, config)
    if options.dry_run:
        place(spec)
        return 0
    state_dir = None if options.preflight else moving.state_dir
    alone = contextlib.nullcontext() if state_dir is None else sole_launcher(state_dir)
    joined = part.gathered(spec, lambda name, text: console.print(Text(f"{name}: {text}")))
    with alone, joined as network:
        survivors = None
        if state_dir is not None:
            survivors = survivors_of(state_dir, config, serving, model.fingerprint)
        if survivors is not None:
            start = take_over(console, survivors, moving, model, network)
        else:
            if options.preflight or network.any_remote(spec):
                spec, network = _preflight(options, spec, network, held, model.fingerprint, console)
            if options.preflight:
                return 0
            if part.node_rank is None and not network.any_remote(spec):
                spec = _with_read_rate(spec, directory)
            start = Start.of(place(spec), model, config, network, state)
        if prompts is None:
            return serve(options, platform, console, serving, moving, start)
        assert tokenizer is not None and start.plan is not None
        return run_batch(options, console, prompts, tokenizer, start, start.plan)


def _with_read_rate(spec: ClusterSpec, model: pathlib.Path) -> ClusterSpec:
    """The servers of this machine, with the measured rate at which it reads the model."""
    from dance_jax.launch.preflight.disk import read_rate

    rate = read_rate(model)
    return ClusterSpec(
        tuple(dataclasses.replace(server, read_rate=rate) for server in spec.servers)
    )


def _activations(options: argparse.Namespace) -> Activations | None:
    # Imported here, as in the functions below, so that errors in the files are reported before the
    # slow imports.
    from dance_jax.placement.activations import Activations

    return None if options.activations is None else Activations.load(options.activations)


def _model(
    options: argparse.Namespace, console: Console
) -> tuple[Checkpoint | Outline, Tokenizer | None, pathlib.Path]:
    """The converted model, its tokenizer and its directory; with --dry-run, an outline."""
    from dance_jax.models.checkpoint import Checkpoint
    from dance_jax.models.convert import check_readable, ensure_converted, outline
    from dance_jax.models.hub import fetch_config, resolve
    from dance_jax.models.tokenizer import Tokenizer

    rounding = engine_options(options).rounding
    if options.dry_run:
        source = demo_dir() if options.model is None else fetch_config(options.model)
        return outline(source, rounding), None, source
    source = demo_dir() if options.model is None else resolve(options.model, download(console))
    check_readable(source)
    tokenizer = Tokenizer.load(source)
    with conversion(console) as progress:
        path = ensure_converted(source, cache_dir(options) / "models", progress, rounding)
        return Checkpoint.open(path), tokenizer, path


def _preflight(
    options: argparse.Namespace,
    spec: ClusterSpec,
    network: Network,
    held: Sequence[Room],
    fingerprint: str,
    console: Console,
) -> tuple[ClusterSpec, Network]:
    """Survey all servers and print the findings; returns spec and network with the results."""
    from dance_jax.launch.preflight.report import print_preflight
    from dance_jax.launch.preflight.run import run_preflight

    found = run_preflight(
        spec,
        model=options.model,
        fingerprint=fingerprint,
        cache_dir=options.cache_dir,
        needs=[room.device_bytes for room in held],
        network=network,
        measure_all=options.preflight,
        progress=lambda text: console.print(Text(f"preflight: {text}")),
    )
    print_preflight(console, found)
    return found.applied(network)


def _place(
    console: Console,
    policy: str,
    activations: Activations | None,
    service: bool,
    survive: int,
    model: ModelFacts,
    config: EngineConfig,
    spec: ClusterSpec,
) -> Plan:
    """Decide where experts go and print the plan."""
    with placing(console, policy):
        plan = make_plan(spec, model, config, policy, activations, service, survive)
    print_plan(console, plan)
    return plan


def _state(
    console: Console,
    moving: RebalanceOptions,
    spec: ClusterSpec,
    model: ModelFacts,
    held: Sequence[Room],
) -> ServiceState | None:
    """The state that a previous service saved for these servers; prints why if it is unusable."""
    from dance_jax.launch.rebalance.state import FILE_NAME, load

    directory = moving.state_dir
    if directory is None:
        return None
    why = ""
    try:
        state = load(directory)
    except UserError as error:
        state, why = None, str(error)
    else:
        if state is not None and {*state.servers} - {""} == {*spec.names}:
            # Perhaps in another order, or with vacant seats.
            state = state.of([state.servers.index(name) for name in spec.names])
        misfit = "" if state is None else state.misfit(spec, model, held, moving.survive)
        if misfit:
            state, why = None, f"{os.path.join(directory, FILE_NAME)}: {misfit}"
    if why:
        console.print(Text(f"{why}; experts are placed from scratch"), soft_wrap=True)
    return state


def _resume(
    console: Console,
    state: ServiceState,
    survive: int,
    model: ModelFacts,
    config: EngineConfig,
    spec: ClusterSpec,
) -> Plan:
    """Resume the placement of a previous service and print the plan."""
    from dance_jax.launch.rebalance.state import resumed_plan

    plan = resumed_plan(spec, model, config, state, survive)
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


def _hold_server(
    options: argparse.Namespace, part: Role, spec: ClusterSpec, console: Console
) -> int:
    """--node-rank N for N > 0: hold this server's process for the launcher on node 0."""
    from dance_jax.launch.agent.holder import run_node

    assert part.node_rank is not None and part.network.key is not None
    if options.log_dir is not None:
        check_directory(options.log_dir, "--log-dir")
    return run_node(
        spec.servers[part.node_rank],
        part.node_rank,
        part.endpoint,
        part.network.key,
        options.log_dir,
        lambda text: console.print(Text(text), soft_wrap=True),
    )


def _check_paths(options: argparse.Namespace) -> None:
    """Check that all outputs can be written and that none overwrites another file of the run."""
    others = {
        "--hosts": options.hosts,
        "--prompts": options.prompts,
        "--activations": options.activations,
    }
    for option, path in (
        ("--output", options.output),
        ("--save-activations", options.save_activations),
        ("--trace", options.trace),
    ):
        if path is None:
            continue
        check_writable(path, option)
        for other, taken in others.items():
            if taken is not None and same_file(path, taken):
                raise UserError(f"{option} {path}: is also the file of {other}; name another file")
        others[option] = path
    cache = options.cache_dir
    if cache is not None and cache.exists() and not cache.is_dir():
        raise UserError(f"--cache-dir {cache}: is a file; name a directory")
    if options.log_dir is not None:
        check_directory(options.log_dir, "--log-dir")


def process(
    arguments: Sequence[str] | None = None, prog: str = PROG, batch: bool | None = None
) -> NoReturn:
    """Run `main` and end this process; after a signal, skip JAX's shutdown.

    XLA may still be compiling for a placement when a call is interrupted, and a normal exit would
    then crash. Output that cannot be written ends nothing; the exit code is then FAILED.
    """
    outputs = logs.write_what_fits()
    try:
        code = main(arguments, prog, batch)
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    if not code and any(output.lost for output in outputs):
        print("error: some of the output could not be written; is its disk full?", file=sys.stderr)
        code = FAILED
    if isinstance(code, int) and code > 128:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    process()
