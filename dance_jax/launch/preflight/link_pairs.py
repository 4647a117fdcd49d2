"""Measure the links between all servers such that no two measurements share a link."""

from __future__ import annotations

import functools
import itertools
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from dance_jax.launch.preflight.asker import Asker, Unreachable
from dance_jax.launch.preflight.at_once import at_once
from dance_jax.launch.preflight.link import (
    CONNECT_TIMEOUT_S,
    RATE_LONGEST_S,
    STALL_TIMEOUT_S,
    TOKEN_CHARACTERS,
)
from dance_jax.launch.preflight.messages import Link, Listen, Listening, Measure, Measured, Peer
from dance_jax.launch.preflight.survey import Links, Measurements, Survey

#: Target seconds for all rates together; minimum and maximum seconds for one direction of a link.
RATES_S, SHORTEST_RATE_S, LONGEST_RATE_S = 8.0, 0.3, 1.0
#: Seconds after which no further rate measurement starts.
RATES_DEADLINE_S = 12.0
#: Seconds after which listeners end by themselves.
_LISTEN_S = 120.0
#: Seconds for an answer beyond the measurement itself.
_SLACK_S = 4.0


def measure_links(
    surveys: Sequence[Survey],
    askers: Sequence[Asker],
    measure_all: bool,
    progress: Callable[[str], None],
) -> Measurements:
    """Measure round trips between all servers of different addresses, and the rates asked for.

    Rates are measured only if every server answered and reaches all others.

    Args:
        surveys: of all servers; those that did not answer are left out.
        askers: of all servers.
        measure_all: measure all rates, not only those of servers with bandwidth=auto.
        progress: called with what is being done.
    """
    progress("measuring round trips")
    token = secrets.token_hex(TOKEN_CHARACTERS // 2)
    ports, deaf = _listen(surveys, askers, token)
    pairs = [
        (one, other)
        for one, other in itertools.combinations(sorted(ports), 2)
        if surveys[one].server.address != surveys[other].server.address
    ]
    lost: dict[int, str] = {}
    measure = functools.partial(_measure, surveys, askers, ports, token, lost)
    both = [*pairs, *((other, one) for one, other in pairs)]
    links = measure(both, 0.0)
    if len(ports) < len(surveys) or lost or any(link.problem for link in links.values()):
        return Measurements(links, ports, deaf, lost)
    wanted = [
        pair
        for pair in pairs
        if measure_all or any(surveys[rank].server.measure_bandwidth for rank in pair)
    ]
    rounds = disjoint_rounds(wanted, [survey.host for survey in surveys])
    deadline = time.monotonic() + RATES_DEADLINE_S
    for number, together in enumerate(rounds, 1):
        if time.monotonic() > deadline:
            left_out = sum(map(len, rounds[number - 1 :]))
            return Measurements(links, ports, deaf, lost, left_out)
        progress(f"measuring rates, {number} of {len(rounds)}")
        seconds = min(max(RATES_S / (2 * len(rounds)), SHORTEST_RATE_S), LONGEST_RATE_S)
        for pair, link in measure(together, seconds).items():
            # The round trip was measured while the link was idle.
            link.rtt = links[pair].rtt
            links[pair] = link
    return Measurements(links, ports, deaf, lost)


def disjoint_rounds(
    pairs: Iterable[tuple[int, int]], hosts: Sequence[str]
) -> list[list[tuple[int, int]]]:
    """Split pairs of ranks into rounds such that no two pairs of a round share a host.

    Each pair goes to the first round with room. All pairs of n hosts take n - 1 rounds if n is a
    power of two, fewer than 2n otherwise.

    >>> disjoint_rounds([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], ["a", "b", "c", "d"])
    [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 3), (1, 2)]]
    """
    rounds: list[list[tuple[int, int]]] = []
    busy: list[set[str]] = []
    for pair in pairs:
        used = {hosts[rank] for rank in pair}
        number = next((n for n, taken in enumerate(busy) if not used & taken), len(rounds))
        if number == len(rounds):
            rounds.append([])
            busy.append(set())
        rounds[number].append(pair)
        busy[number] |= used
    return rounds


def _listen(
    surveys: Sequence[Survey], askers: Sequence[Asker], token: str
) -> tuple[dict[int, int], dict[int, str]]:
    """Make every server listen; returns ports and problems, both by rank."""

    def ask(rank: int) -> int:
        request = Listen(address=surveys[rank].server.address, token=token, seconds=_LISTEN_S)
        reply = askers[rank].ask(request, _SLACK_S)
        assert isinstance(reply, Listening)
        return reply.port

    ranks = [rank for rank, survey in enumerate(surveys) if survey.machine is not None]
    replies = at_once([functools.partial(ask, rank) for rank in ranks])
    answers = dict(zip(ranks, replies, strict=True))
    ports = {rank: answer for rank, answer in answers.items() if isinstance(answer, int)}
    return ports, {rank: str(why) for rank, why in answers.items() if rank not in ports}


def _measure(
    surveys: Sequence[Survey],
    askers: Sequence[Asker],
    ports: Mapping[int, int],
    token: str,
    lost: dict[int, str],
    pairs: Sequence[tuple[int, int]],
    seconds: float,
) -> Links:
    """Measure links; each server measures its links one after the other.

    Servers that cannot be asked are added to `lost`, and links from them are left out.
    """
    targets: dict[int, list[int]] = {}
    for source, target in pairs:
        targets.setdefault(source, []).append(target)
    # Data flows in both directions, and each may wait for a connection or stall.
    patience = 2 * (RATE_LONGEST_S + STALL_TIMEOUT_S) if seconds else 0.0
    patience += CONNECT_TIMEOUT_S + STALL_TIMEOUT_S + _SLACK_S

    def ask(source: int) -> list[Link]:
        peers = [Peer(surveys[rank].server.address, ports[rank]) for rank in targets[source]]
        request = Measure(peers=peers, token=token, seconds=seconds)
        try:
            reply = askers[source].ask(request, patience)
        except Unreachable as error:
            lost[source] = str(error)
            return []
        assert isinstance(reply, Measured)
        return reply.links

    found: Links = {}
    replies = at_once([functools.partial(ask, source) for source in targets])
    for (source, ranks), links in zip(targets.items(), replies, strict=True):
        if isinstance(links, Exception):
            raise links
        # A lost server has no links.
        found |= {(source, rank): link for rank, link in zip(ranks, links, strict=False)}
    return found
