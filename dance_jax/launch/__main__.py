"""`python -m dance_jax.launch`: start the servers of a hosts file, to serve or to run prompts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rich.console import Console
from rich.text import Text

from dance_jax import descriptors, logs, signals
from dance_jax.cache import default_cache_dir
from dance_jax.config import (
    ClusterSpec,
    EngineConfig,
    RebalanceOptions,
    ServeOptions,
    ServerSpec,
    UserError,
)
from dance_jax.launch.agent.network import Network
from dance_jax.launch.agent.role import Role, role
from dance_jax.launch.cli.answers import AnswerFile
from dance_jax.launch.cli.attend import attend
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
from dance_jax.launch.cli.report import print_plan, print_summary
from dance_jax.launch.cli.run import run_prompts
from dance_jax.launch.cli.stream import Startup, Stream, conversion, download, placing
from dance_jax.launch.cluster.batch import Cluster
from dance_jax.launch.cluster.fleet import ClusterError, Fleet
from dance_jax.launch.cluster.service import Service
from dance_jax.launch.cluster.succession import Survivors, find_survivors, sole_launcher
from dance_jax.launch.planning.defaults import default_platform, demo_dir, engine_config
from dance_jax.launch.planning.hosts import read_hosts
from dance_jax.launch.planning.plan import ModelFacts, Plan, Room, make_plan, matched, rooms

if TYPE_CHECKING:
    from dance_jax.launch.rebalance.state import ServiceState
    from dance_jax.placement.activations import Activations
    from dance_jax.placement.core import Layout

_Fleet = TypeVar("_Fleet", bound=Fleet)

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
    # Imported here, so that errors in the files are reported before the slow imports.
    from dance_jax.models.checkpoint import Checkpoint
    from dance_jax.models.convert import check_readable, ensure_converted, outline
    from dance_jax.models.hub import fetch_config, resolve
    from dance_jax.models.tokenizer import Tokenizer
    from dance_jax.placement.activations import Activations
    from dance_jax.placement.core import Layout

    activations = None
    if options.activations is not None:
        activations = Activations.load(options.activations)
    cache = options.cache_dir or default_cache_dir()
    wanted = engine_options(options)
    rounding = wanted.rounding
    if options.dry_run:
        source = demo_dir() if options.model is None else fetch_config(options.model)
        model = outline(source, rounding)
    else:
        source = demo_dir() if options.model is None else resolve(options.model, download(console))
        check_readable(source)
        tokenizer = Tokenizer.load(source)
        with conversion(console) as progress:
            path = ensure_converted(source, cache / "models", progress, rounding)
            model = Checkpoint.open(path)
    config = engine_config(
        model.config,
        wanted,
        platform=spec.platform,
        formats=model.formats,
    )
    if prompts is None:
        config = dataclasses.replace(config, half_life=moving.half_life_s)
    held = rooms(spec, model, config, moving.survive)
    activations = matched(activations, spec, model)
    state = _state(console, moving, spec, model, held)
    if state is None:
        service = options.prompts is None
        place = functools.partial(
            _place, console, options.policy, activations, service, moving.survive, model, config
        )
    else:
        place = functools.partial(_resume, console, state, moving.survive, model, config)
    if options.dry_run:
        place(spec)
        return 0
    survivors = None
    alone = contextlib.nullcontext()
    if moving.state_dir is not None and not options.preflight:
        alone = sole_launcher(moving.state_dir)
    joined = part.gathered(spec, lambda name, text: console.print(Text(f"{name}: {text}")))
    with alone, joined as network:
        if moving.state_dir is not None and not options.preflight:
            survivors = _survivors(moving.state_dir, config, serving, model.fingerprint)
        if survivors is not None:
            text = f"taking over the servers of {moving.state_dir}, which still run"
            console.print(Text(text), soft_wrap=True)
            left = survivors.handover
            spec, config = left.spec, left.config
            layout = Layout.from_bytes(survivors.latest.layout)
            layout = dataclasses.replace(layout, holders=moving.survive + 1)
            network = dataclasses.replace(network, control_addresses=left.control_addresses)
        else:
            if options.preflight or network.any_remote(spec):
                spec, network = _preflight(options, spec, network, held, model.fingerprint, console)
            if options.preflight:
                return 0
            plan = place(spec)
            spec, layout = plan.spec, plan.layout
            config = dataclasses.replace(config, exchange=plan.exchange.name)
        started = functools.partial(
            _started,
            console,
            spec,
            model,
            layout,
            config,
            model=options.model,
            log_dir=options.log_dir,
            cache_dir=cache,
            network=network,
            trace=options.trace,
        )

        def notice(text: str) -> None:
            console.print(Text(text), soft_wrap=True)

        if prompts is None:
            before = None if state is None else state.statistics
            make = functools.partial(
                Service,
                serving,
                rebalance=moving,
                before=before,
                read_hosts=functools.partial(read_hosts, options.hosts, platform),
                survey=functools.partial(_survey_one, options, network, model, config),
                survivors=survivors,
            )
            with started(make) as service:
                attend(service, console)
            return 0
        with (
            AnswerFile(options.output, spec.names, notice) as file,
            started(Cluster) as cluster,
            Stream(console, spec.names, prompts) as stream,
        ):
            result = run_prompts(cluster, plan, tokenizer, prompts, stream.update, file.add)
            file.write()
    if options.save_activations is not None:
        result.activations(model.source).save(options.save_activations)
    print_summary(console, result)
    return 0


@contextlib.contextmanager
def _started(
    console: Console,
    spec: ClusterSpec,
    facts: ModelFacts,
    layout: Layout,
    config: EngineConfig,
    make: Callable[..., _Fleet],
    **how: Any,
) -> Iterator[_Fleet]:
    """Start a cluster or a service, showing its progress, and stop it at the end."""
    fleet = make(spec, facts, layout, config, **how)
    try:
        with Startup(console, spec.names) as startup:
            fleet.start(startup.update)
        yield fleet
    finally:
        fleet.stop()


def _survivors(
    directory: str, config: EngineConfig, serving: ServeOptions, model: str
) -> Survivors | None:
    """The servers that a lost launcher has left; None if there are none.

    Raises:
        UserError: they are not those that the user asks for.
    """
    found = find_survivors(directory)
    if found is None:
        return None
    if misfit := found.handover.misfit(config, serving, model):
        found.listener.close()
        raise UserError(
            f"--state-dir {directory}: servers of an earlier launch still run there, with "
            f"{misfit}; start with the same to take them over, or end them with: dance-jax stop "
            f"--state-dir {directory}"
        )
    return found


def _survey_one(
    options: argparse.Namespace,
    network: Network,
    model: ModelFacts,
    config: EngineConfig,
    server: ServerSpec,
) -> tuple[ServerSpec, Network]:
    """Survey a server that is to join a running service, if it is on another machine.

    Raises:
        UserError: the server cannot join.
    """
    spec = ClusterSpec((server,))
    if not network.any_remote(spec):
        return server, network
    from dance_jax.launch.preflight.run import run_preflight

    room = rooms(spec, model, config, alone=False)[0]
    found = run_preflight(
        spec,
        model=options.model,
        fingerprint=model.fingerprint,
        cache_dir=options.cache_dir,
        needs=[room.device_bytes],
        network=network,
        measure_all=False,
        progress=lambda text: None,
    )
    spec, network = found.applied(network)
    return spec.servers[0], network


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
        if state is not None and {*state.servers} == {*spec.names}:  # perhaps in another order
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
