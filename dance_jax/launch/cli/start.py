"""What the launcher starts once it knows servers, model and placement: a service or a batch."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

from rich.console import Console
from rich.text import Text

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
from dance_jax.launch.cli.answers import AnswerFile
from dance_jax.launch.cli.attend import attend
from dance_jax.launch.cli.report import print_summary
from dance_jax.launch.cli.run import run_prompts
from dance_jax.launch.cli.stream import Startup, Stream
from dance_jax.launch.cluster.batch import Cluster
from dance_jax.launch.cluster.fleet import Fleet
from dance_jax.launch.cluster.independent import IndependentService
from dance_jax.launch.cluster.service import Service
from dance_jax.launch.cluster.succession import Survivors, find_survivors
from dance_jax.launch.cluster.together import TogetherService
from dance_jax.launch.planning.hosts_file import HostsFile
from dance_jax.launch.planning.plan import ModelFacts, Plan, rooms

if TYPE_CHECKING:
    from dance_jax.launch.cli.prompts import Prompt
    from dance_jax.launch.rebalance.state import ServiceState
    from dance_jax.launch.rebalance.workload import Statistics
    from dance_jax.models.tokenizer import Tokenizer
    from dance_jax.placement.core import Layout

_Fleet = TypeVar("_Fleet", bound=Fleet)


def cache_dir(options: argparse.Namespace) -> pathlib.Path:
    """Directory of converted models and compiled steps."""
    return options.cache_dir or default_cache_dir()


@dataclasses.dataclass(frozen=True)
class Start:
    """What is started, or taken over."""

    spec: ClusterSpec
    model: ModelFacts
    layout: Layout
    config: EngineConfig
    network: Network
    #: Statistics of a previous service, if any.
    before: Statistics | None
    #: None: the servers are taken over.
    plan: Plan | None = None
    survivors: Survivors | None = None

    @classmethod
    def of(
        cls,
        plan: Plan,
        model: ModelFacts,
        config: EngineConfig,
        network: Network,
        state: ServiceState | None,
    ) -> Self:
        """All servers of a plan."""
        config = dataclasses.replace(config, exchange=plan.exchange.name)
        before = None if state is None else state.statistics
        return cls(plan.spec, model, plan.layout, config, network, before, plan)


def take_over(
    console: Console,
    survivors: Survivors,
    moving: RebalanceOptions,
    model: ModelFacts,
    network: Network,
) -> Start:
    """Go on where the launcher of these servers stopped."""
    from dance_jax.launch.rebalance.state import load
    from dance_jax.placement.core import Layout

    text = f"taking over the servers of {moving.state_dir}, which still run"
    console.print(Text(text), soft_wrap=True)
    left = survivors.handover
    before = None
    with contextlib.suppress(UserError):  # then the statistics begin anew
        state = load(moving.state_dir or "")
        if state is not None and state.servers == left.spec.names:
            before = state.statistics
    layout = Layout.from_bytes(survivors.latest.layout)
    return Start(
        left.spec,
        model,
        dataclasses.replace(layout, holders=moving.survive + 1),
        left.config,
        dataclasses.replace(network, control_addresses=left.control_addresses),
        before,
        survivors=survivors,
    )


def serve(
    options: argparse.Namespace,
    platform: str,
    console: Console,
    serving: ServeOptions,
    moving: RebalanceOptions,
    start: Start,
) -> int:
    """Serve until a signal ends it."""
    how: dict[str, Any] = {"rebalance": moving, "before": start.before}
    make: type[Service] = TogetherService
    if start.config.exchange != "collectives":
        make = IndependentService
        how |= {
            "hosts_file": HostsFile(options.hosts, platform),
            "survey": functools.partial(
                _survey_one, options, start.network, start.model, start.config
            ),
            "survivors": start.survivors,
        }
    with _started(options, console, start, functools.partial(make, serving), **how) as service:
        attend(service, console)
    return 0


def run_batch(
    options: argparse.Namespace,
    console: Console,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    start: Start,
    plan: Plan,
) -> int:
    """Answer prompts."""

    def notice(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    names = start.spec.names
    with (
        AnswerFile(options.output, names, notice) as file,
        _started(options, console, start, Cluster) as cluster,
        Stream(console, names, prompts) as stream,
    ):
        result = run_prompts(cluster, plan, tokenizer, prompts, stream.update, file.add)
        file.write()
    if options.save_activations is not None:
        result.activations(start.model.source).save(options.save_activations)
    print_summary(console, result)
    return 0


@contextlib.contextmanager
def _started(
    options: argparse.Namespace,
    console: Console,
    start: Start,
    make: Callable[..., _Fleet],
    **how: Any,
) -> Iterator[_Fleet]:
    """Start a cluster or a service, showing its progress, and stop it at the end."""
    fleet = make(
        start.spec,
        start.model,
        start.layout,
        start.config,
        model=options.model,
        log_dir=options.log_dir,
        cache_dir=cache_dir(options),
        network=start.network,
        trace=options.trace,
        **how,
    )
    try:
        with Startup(console, start.spec.names) as startup:
            fleet.start(startup.update)
        yield fleet
    finally:
        fleet.stop()


def survivors_of(
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
