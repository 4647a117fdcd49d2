"""What preflights report about made-up machines; how links are chosen and rates combined."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.launch.preflight import probe
from dance_jax.launch.preflight.asker import Unreachable
from dance_jax.launch.preflight.link_pairs import disjoint_rounds
from dance_jax.launch.preflight.messages import (
    Clock,
    Gpu,
    Link,
    Listen,
    Listening,
    Machine,
    Measure,
    Measured,
    ModelState,
    Refused,
    Reply,
    Request,
    Resolved,
)
from dance_jax.launch.preflight.run import Preflight, with_rates
from tests.launch.preflight.helpers import LOCAL, run, text


class MadeUp:
    """Answers like this machine, with changes made by a function."""

    def __init__(self, change: Callable[[Machine], None] = lambda machine: None, ahead: float = 0):
        self._change = change
        self._ahead = ahead

    def ask(self, request: Request, timeout_s: float) -> Reply:
        reply = probe.answer(request)
        if isinstance(reply, Machine):
            self._change(reply)
        if isinstance(reply, Clock):
            reply.time += self._ahead
        if isinstance(reply, Refused):
            raise Unreachable(reply.why)
        return reply

    def close(self) -> None:
        raise AssertionError("the caller closes its own")


def made_up(*servers: MadeUp, hosts: str = LOCAL, **options: Any) -> Preflight:
    return run(hosts, askers=servers, **options)


def changed(**fields: Any) -> MadeUp:
    def change(machine: Machine) -> None:
        for name, value in fields.items():
            setattr(machine, name, value)

    return MadeUp(change)


def package(name: str, version: str | None) -> MadeUp:
    return MadeUp(lambda machine: machine.packages.update({name: version}))


def only(found: Preflight, error: bool = True) -> str:
    (finding,) = found.findings
    assert finding.error == error
    return finding.message


def test_versions_that_differ() -> None:
    same = MadeUp()
    message = only(made_up(same, package("jax", "0.9.1"), same))
    assert (
        "beta has jax 0.9.1, the other servers have" in message and "pip install jax==" in message
    )
    assert "gamma lacks flax" in only(made_up(same, same, package("flax", None)))
    assert "numpy 1.0" in only(made_up(package("numpy", "1.0"), same, same), error=False)
    assert "CPython 3.99.1" in only(made_up(same, changed(python="CPython 3.99.1"), same))
    patch = f"CPython {sys.version_info[0]}.{sys.version_info[1]}.99"
    assert patch in only(made_up(same, same, changed(python=patch)), error=False)
    message = only(made_up(same, same, changed(source_hash="0")))
    assert "gamma has a different version of dance_jax" in message


def test_a_plugin_that_only_one_has() -> None:
    found = made_up(package("jax-cuda13-plugin", "0.10.2"), MadeUp(), MadeUp())
    assert len(found.errors) == 2 and "lacks jax-cuda13-plugin" in found.errors[0]


def test_one_without_a_compiler() -> None:
    servers = [MadeUp(), changed(compiler=False), MadeUp()]
    assert "beta has no C++ compiler" in only(made_up(*servers), error=False)


def test_clocks_that_are_wrong() -> None:
    found = made_up(MadeUp(), MadeUp(ahead=-90), MadeUp(ahead=0.4))
    assert "the clock of beta is 90.0 s behind" in only(found, error=False)
    found.check()
    assert found.surveys[2].clock and 0.3 < found.surveys[2].clock.seconds < 0.5


class Elsewhere(MadeUp):
    """A machine with a made-up network as well."""

    def ask(self, request: Request, timeout_s: float) -> Reply:
        match request:
            case Listen():
                return Listening(4711)
            case Measure():
                return Measured([Link(rtt=0.01) for _ in request.peers])
        return super().ask(request, timeout_s)


def resolving(host: str, **names: str) -> MadeUp:
    """A machine of its own on which some names resolve to other addresses ("": to none)."""

    def change(machine: Machine) -> None:
        machine.network_id = host
        for name in machine.resolved:
            meant = names.get(name, f"10.0.0.{ord(name[0])}")
            machine.resolved[name] = (
                Resolved(meant.split()) if meant else Resolved([], "name or service not known")
            )
        for state in machine.ports:
            state.problem = ""

    return Elsewhere(change)


@pytest.fixture
def quick_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lookups of made-up machines' names fail; this keeps the failures quick."""
    monkeypatch.setattr(probe, "LOOKUP_TIMEOUT_S", 0.05)


NAMED = "alpha experts=1\nbeta experts=1\ngamma experts=1"


def test_names_that_lead_to_loopback(quick_lookups: None) -> None:
    machines = [resolving("a"), resolving("b", beta="127.0.1.1"), resolving("c")]
    message = only(made_up(*machines, hosts=NAMED))
    assert (
        "on beta, beta resolves to the loopback address 127.0.1.1" in message
        and "/etc/hosts" in message
    )
    machines = [resolving("a"), resolving("b"), resolving("c", alpha="::1")]
    assert "on gamma, alpha resolves to the loopback address ::1" in only(
        made_up(*machines, hosts=NAMED)
    )


def test_names_of_servers_on_one_machine_may_lead_to_loopback(quick_lookups: None) -> None:
    machines = [resolving("a", **dict.fromkeys(("alpha", "beta", "gamma"), "127.0.0.1"))] * 3
    made_up(*machines, hosts=NAMED).check()


def test_names_that_lead_to_different_places_or_nowhere(quick_lookups: None) -> None:
    machines = [resolving("a"), resolving("b"), resolving("c", beta="10.9.9.9")]
    message = only(made_up(*machines, hosts=NAMED))
    assert "on gamma, beta resolves to 10.9.9.9, but on the other servers to 10.0.0.98" in message
    machines = [resolving("a"), resolving("b", gamma=""), resolving("c")]
    message = only(made_up(*machines, hosts=NAMED))
    assert "on beta, the host name gamma cannot be looked up" in message
    machines = [resolving("a"), resolving("b", beta="10.0.0.98 fd00::1"), resolving("c")]
    made_up(*machines, hosts=NAMED).check()


def test_an_address_of_another_machine() -> None:
    hosts = "a address=198.51.100.1 experts=1\nb address=198.51.100.2 experts=1"
    found = made_up(MadeUp(), MadeUp(), hosts=hosts)
    assert len(found.errors) == 2
    assert "address=198.51.100.1 is not an address of the machine of a" in found.errors[0]


def gpus(*free_gib: int, problem: str = "", machine: str = "m") -> MadeUp:
    found = [Gpu(index, free << 30) for index, free in enumerate(free_gib)]
    return changed(gpus=found, gpu_problem=problem, machine_id=machine)


def test_memory_of_gpus() -> None:
    hosts = "a address=127.0.0.1 experts=1 gpus={}\nb address=127.0.0.2 experts=1 gpus={}"
    needs = [10 << 30] * 2

    def found(first: str, second: str, *machines: MadeUp) -> Preflight:
        listed = hosts.format(first, second)
        return made_up(*machines, hosts=listed, needs=needs)

    found("0,1", "2", gpus(20, 20, 20), gpus(20, 20, 20)).check()
    assert "both use GPU 1" in only(found("0,1", "1,2", *[gpus(20, 20, 20)] * 2))
    found("0,1", "1,2", gpus(20, 20, 20, machine="m"), gpus(20, 20, 20, machine="n")).check()
    assert "GPU 2 of b has 9.0 GiB free" in only(found("0", "1,2", *[gpus(20, 20, 9)] * 2))
    assert "b has no GPU 7; its GPUs are 0, 1" in only(found("0", "7", *[gpus(20, 20)] * 2))
    broken = gpus(problem="nvidia-smi was not found", machine="n")
    assert "nvidia-smi was not found" in only(found("0", "0", gpus(20), broken))
    unnamed = "a address=127.0.0.1 experts=1 devices=2 platform=cuda"
    (error,) = made_up(gpus(20, 9), hosts=unnamed, needs=[10 << 30]).errors
    assert "a needs 2 GPUs with 10.0 GiB free" in error


def test_converted_models_are_compared_with_the_plan() -> None:
    def converted(fingerprint: str) -> MadeUp:
        def change(machine: Machine) -> None:
            machine.model.kind, machine.model.fingerprint = "converted", fingerprint

        return MadeUp(change)

    servers = [converted("f00d"), converted("beef"), MadeUp()]
    found = made_up(*servers, fingerprint="f00d")
    assert "on beta" in only(found) and "the weights differ" in only(found)


def test_a_model_that_is_to_be_downloaded_is_a_warning() -> None:
    def change(machine: Machine) -> None:
        machine.model = ModelState(path="org/name@v1", kind="to download")

    found = made_up(MadeUp(), MadeUp(change), MadeUp())
    assert "on beta, org/name@v1 is not in the cache" in only(found, error=False)
    assert "~ to download" in text(found, 200)


def test_a_cache_that_cannot_be_written_is_a_warning() -> None:
    servers = [MadeUp(), changed(cache_problem="/x cannot be written"), MadeUp()]
    assert "cannot be converted there" in only(made_up(*servers), error=False)


def test_servers_that_cannot_reach_each_other() -> None:
    class Deaf(MadeUp):
        def ask(self, request: Request, timeout_s: float) -> Reply:
            reply = super().ask(request, timeout_s)
            if isinstance(reply, Measured):
                reply.links[0] = Link("timed out")
            return reply

    found = made_up(MadeUp(), Deaf(), MadeUp(), measure_all=True)
    assert "beta cannot reach gamma (127.0.0.3:" in only(found)
    assert found.rate(0, 1) is None and "! timed out" in text(found)


def test_a_server_that_is_lost_while_links_are_measured() -> None:
    """One finding says so, and none blames a link."""

    class Lost(MadeUp):
        def ask(self, request: Request, timeout_s: float) -> Reply:
            if isinstance(request, Measure):
                raise Unreachable("beta is lost")
            return super().ask(request, timeout_s)

    class Reset(MadeUp):
        def ask(self, request: Request, timeout_s: float) -> Reply:
            reply = super().ask(request, timeout_s)
            if isinstance(reply, Measured):
                reply.links[0] = Link("connection reset by peer")  # the link to beta
            return reply

    found = made_up(Reset(), Lost(), MadeUp(), measure_all=True)
    assert only(found) == "beta is lost (while links were measured)"
    assert found.rtt(0, 2) is not None


def test_many_servers_have_ranges() -> None:
    hosts = "\n".join(f"s{n} address=127.0.0.{n + 1} experts=1" for n in range(8))
    found = made_up(*[MadeUp()] * 8, hosts=hosts)
    found.check()
    assert "least and most" in text(found)


# Pure functions.


@given(hosts=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=12))
def test_rounds_measure_every_pair_once_and_share_no_host(hosts: Sequence[str]) -> None:
    pairs = list(itertools.combinations(range(len(hosts)), 2))
    rounds = disjoint_rounds(pairs, hosts)
    assert sorted(itertools.chain(*rounds)) == pairs
    for together in rounds:
        used = [host for pair in together for host in {hosts[rank] for rank in pair}]
        assert len(used) == len(set(used))


@given(count=st.integers(2, 31))
def test_rounds_are_few(count: int) -> None:
    hosts = [str(rank) for rank in range(count)]
    rounds = disjoint_rounds(itertools.combinations(range(count), 2), hosts)
    assert len(rounds) < 2 * count


@given(rates=st.lists(st.floats(1, 1e12), min_size=4, max_size=4))
def test_the_largest_rate_counts_and_the_file_overrides(rates: list[float]) -> None:
    spec = parse_hosts(
        "a address=127.0.0.1 experts=1 bandwidth=auto\nb address=127.0.0.2 experts=1\n"
        "c address=127.0.0.3 experts=1 bandwidth=5bps"
    )
    first = Link(rtt=1.0, sent=rates[0], received=rates[1])
    second = Link(rtt=1.0, sent=rates[2], received=rates[3])
    found = with_rates(spec, {(0, 1): first, (2, 0): second})
    assert [server.bandwidth for server in found.servers] == [max(rates), None, 5.0]
    assert [server.round_trip for server in found.servers] == [None] * 3, "a pair is missing"


def test_round_trips_of_pairs_are_parted_and_the_file_overrides() -> None:
    """There is a link in each direction of a pair; the shorter time counts."""
    lines = [f"{name} address=127.0.0.{n} experts=1" for n, name in enumerate("abcd")]
    trips = np.array([4e-3, 20e-3, 1e-3, 7e-3])
    links = {
        (one, other): Link(rtt=float(trips[[one, other]].mean()) + 1e-4 * (one > other))
        for one, other in itertools.permutations(range(4), 2)
    }
    found = with_rates(parse_hosts("\n".join(lines)), links)
    np.testing.assert_allclose([server.round_trip for server in found.servers], trips)
    assert [server.bandwidth for server in found.servers] == [None] * 4
    lines[1] += " round_trip=5ms"
    found = with_rates(parse_hosts("\n".join(lines)), links)
    np.testing.assert_allclose(
        [server.round_trip for server in found.servers], [4e-3, 5e-3, 1e-3, 7e-3]
    )
    # With a single pair, each server gets half of the round trip.
    pair = with_rates(parse_hosts("\n".join(lines[2:])), {(0, 1): Link(rtt=3e-3)})
    assert [server.round_trip for server in pair.servers] == [3e-3, 3e-3]
    links[0, 3] = links[3, 0] = Link("timed out")
    found = with_rates(parse_hosts("\n".join(lines)), links)
    assert [server.round_trip for server in found.servers] == [None, 5e-3, None, None]
    alone = with_rates(parse_hosts(lines[0]), {})
    assert alone.servers[0].round_trip is None
