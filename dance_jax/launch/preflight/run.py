"""Check every server and link before anything starts, and report all problems at once."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Sequence

import numpy as np

from dance_jax.config import ClusterSpec, ServerSpec, UserError
from dance_jax.launch.agent.command import CONNECT_TIMEOUT_S
from dance_jax.launch.agent.network import Network
from dance_jax.launch.preflight import findings, probe
from dance_jax.launch.preflight.asker import Asker, ProbeAsker, Unreachable
from dance_jax.launch.preflight.at_once import at_once
from dance_jax.launch.preflight.findings import Finding
from dance_jax.launch.preflight.link_pairs import measure_links
from dance_jax.launch.preflight.messages import AskClock, AskMachine, Clock, Machine
from dance_jax.launch.preflight.survey import Links, Offset, Survey
from dance_jax.models.hub import portable_name
from dance_jax.placement.cost import of_pairs

#: Seconds for the first answer, which may include connecting, and for all others.
FIRST_TIMEOUT_S, ANSWER_TIMEOUT_S = CONNECT_TIMEOUT_S + 7.0, 10.0
#: Number of clock questions; the fastest answer counts.
_CLOCK_QUESTIONS = 5


@dataclasses.dataclass(frozen=True)
class Preflight:
    """Results of a preflight; `report.print_preflight` shows them, `check` raises the errors."""

    #: The servers, with measured rates where the file has bandwidth=auto.
    spec: ClusterSpec
    #: One per server.
    surveys: tuple[Survey, ...]
    #: Bytes per device of each server.
    needs: tuple[int, ...]
    #: Links between servers of different addresses.
    links: Links
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[str, ...]:
        """Messages of the findings that prevent a launch."""
        return tuple(finding.message for finding in self.findings if finding.error)

    @property
    def coordinator_port(self) -> int:
        """The first server's coordinator port, given or found free; 0 if it did not answer."""
        machine = self.surveys[0].machine
        return machine.ports[0].port if machine else 0

    @property
    def client_addresses(self) -> tuple[str | None, ...]:
        """Per server, this machine's address as the server sees it; None without ssh."""
        return tuple(
            survey.machine.ssh_client if survey.machine and survey.server.ssh else None
            for survey in self.surveys
        )

    def rtt(self, one: int, other: int) -> float | None:
        """Seconds of a round trip between two servers; None if not measured."""
        ways = [self.links.get((one, other)), self.links.get((other, one))]
        return min((link.rtt for link in ways if link and link.rtt is not None), default=None)

    def rate(self, source: int, target: int) -> float | None:
        """Bits per second from one server to another; None if not measured."""
        way, back = self.links.get((source, target)), self.links.get((target, source))
        if way and way.sent is not None:
            return way.sent
        return back.received if back else None

    def applied(self, network: Network) -> tuple[ClusterSpec, Network]:
        """The servers with measured rates, and the network with this machine's addresses.

        Raises:
            UserError: a launch would fail; the message has all reasons.
        """
        self.check()
        if not network.control_addresses:
            seen = [address for address in self.client_addresses if address is not None]
            network = dataclasses.replace(network, control_addresses=tuple(dict.fromkeys(seen)))
        return self.spec, network

    def check(self) -> None:
        """Check that a launch can succeed.

        Raises:
            UserError: with all that is wrong.
        """
        if self.errors:
            count = f"{len(self.errors)} problems" if len(self.errors) > 1 else "a problem"
            listed = "".join(f"\n  {message}" for message in self.errors)
            raise UserError(f"the preflight found {count}, no server was started:{listed}")


def run_preflight(
    spec: ClusterSpec,
    *,
    model: str | os.PathLike[str] | None,
    fingerprint: str,
    cache_dir: pathlib.Path | None,
    needs: Sequence[int],
    network: Network | None = None,
    measure_all: bool = False,
    askers: Sequence[Asker] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Preflight:
    """Ask all servers' machines at the same time and measure the links between them.

    Args:
        spec: the servers.
        model: the model's directory on this machine and on servers without model=, or its name on
            the hub; None: the demo of each installation.
        fingerprint: of the model that this machine planned with.
        cache_dir: of this machine and the servers; None: the default of each.
        needs: per server, bytes that each device will hold.
        network: how the servers are reached.
        measure_all: measure the rates of all links, not only of servers with bandwidth=auto.
        askers: one per server, closed by the caller; None: a probe on every server's machine,
            ended when this function returns.
        progress: called with what is being done.
    """
    network = network or Network()
    opened: list[ProbeAsker] = []
    try:
        if askers is None:
            for rank, server in enumerate(spec.servers):
                opened.append(ProbeAsker(rank, server, network))
            askers = opened
        model = None if model is None else portable_name(model)
        own = _own_machine(model)
        progress(f"asking {len(askers)} servers")
        questions = [
            AskMachine(
                address=server.address,
                names=[each.address for each in spec.servers],
                ports=[network.coordinator_port if rank == 0 else 0],
                model=server.model or model,
                needs_model=not server.from_peers,
                cache_dir=_absolute(cache_dir),
                platform=server.platform,
            )
            for rank, server in enumerate(spec.servers)
        ]
        surveys = _surveys(spec.servers, askers, questions)
        measured = measure_links(surveys, askers, measure_all, progress)
    finally:
        at_once([asker.close for asker in opened])
    found = [
        *findings.unreachable(surveys),
        *findings.names(surveys),
        *findings.ports(surveys),
        *findings.links(surveys, measured),
        *findings.software(surveys, own),
        *findings.compilers(surveys),
        *findings.model(surveys, own, fingerprint),
        *findings.memory(surveys, needs),
        *findings.clocks(surveys),
    ]
    return Preflight(
        spec=_with_read_rates(with_rates(spec, measured.links), surveys),
        surveys=tuple(surveys),
        needs=tuple(needs),
        links=measured.links,
        findings=tuple(dict.fromkeys(found)),
    )


def _with_read_rates(spec: ClusterSpec, surveys: Sequence[Survey]) -> ClusterSpec:
    return ClusterSpec(
        tuple(
            dataclasses.replace(server, read_rate=survey.machine and survey.machine.model.read_rate)
            for server, survey in zip(spec.servers, surveys, strict=True)
        )
    )


def with_rates(spec: ClusterSpec, links: Links) -> ClusterSpec:
    """Fill in measured rates and round trips.

    Servers with bandwidth=auto get the largest rate of any of their links; servers without
    round_trip= get their share of the round trips.
    """
    best: dict[int, float] = {}
    for pair, link in links.items():
        for rank in pair:
            rates = [rate for rate in (link.sent, link.received, best.get(rank)) if rate]
            best |= {rank: max(rates)} if rates else {}
    return ClusterSpec(
        tuple(
            dataclasses.replace(
                server,
                bandwidth=best.get(rank, server.bandwidth)
                if server.measure_bandwidth
                else server.bandwidth,
                round_trip=trip if server.round_trip is None else server.round_trip,
            )
            for rank, (server, trip) in enumerate(
                zip(spec.servers, _round_trips(len(spec.servers), links), strict=True)
            )
        )
    )


def _round_trips(servers: int, links: Links) -> list[float | None]:
    """`ServerSpec.round_trip` of each server; None if a pair was not measured."""
    seconds_nn = np.full((servers, servers), np.inf)
    for (one, other), link in links.items():
        if link.rtt is not None:
            least = min(seconds_nn[one, other], link.rtt)
            seconds_nn[one, other] = seconds_nn[other, one] = least
    np.fill_diagonal(seconds_nn, 0)
    if servers < 2 or np.isinf(seconds_nn).any():
        return [None] * servers
    return (2 * of_pairs(seconds_nn.sum(1) / (servers - 1))).tolist()


def _absolute(path: pathlib.Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _own_machine(model: str | None) -> Machine:
    """This machine's answer, to compare the servers' answers with."""
    question = AskMachine(
        address="localhost",
        names=[],
        ports=[],
        model=model,
        cache_dir=None,
        platform="cpu",
    )
    own = probe.answer(question)
    assert isinstance(own, Machine)
    return own


def _surveys(
    servers: Sequence[ServerSpec], askers: Sequence[Asker], questions: Sequence[AskMachine]
) -> list[Survey]:
    calls = [
        functools.partial(_survey, *each) for each in zip(servers, askers, questions, strict=True)
    ]
    surveys = []
    for result in at_once(calls):
        if isinstance(result, Exception):
            raise result
        surveys.append(result)
    return surveys


def _survey(server: ServerSpec, asker: Asker, question: AskMachine) -> Survey:
    """Ask one machine for its state and its clock."""
    began = time.monotonic()
    try:
        asker.ask(AskClock(), FIRST_TIMEOUT_S)
        seconds = time.monotonic() - began
        machine = asker.ask(question, ANSWER_TIMEOUT_S)
        assert isinstance(machine, Machine)
        offsets = [_offset(asker) for _ in range(_CLOCK_QUESTIONS)]
    except Unreachable as error:
        return Survey(server, problem=str(error))
    best = min(offsets, key=lambda offset: offset.uncertainty)
    return Survey(server, machine=machine, clock=best, seconds=seconds)


def _offset(asker: Asker) -> Offset:
    """A clock's offset from this machine's, assuming that both directions take equally long."""
    began, clock = time.monotonic(), time.time()
    reply = asker.ask(AskClock(), ANSWER_TIMEOUT_S)
    assert isinstance(reply, Clock)
    half = (time.monotonic() - began) / 2
    return Offset(reply.time - (clock + half), half)
