"""Interpret the answers of a preflight: pure functions from answers to findings."""

from __future__ import annotations

import collections
import dataclasses
import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from dance_jax.launch.preflight.messages import Machine
from dance_jax.launch.preflight.probe import GPU_PACKAGES, PACKAGES
from dance_jax.launch.preflight.survey import Measurements, Survey
from dance_jax.memory import format_bytes

#: Packages of the program that all servers run together; other packages may differ (a warning).
PROGRAM = ("jax", "jaxlib", "flax", *GPU_PACKAGES)
#: Kinds of models that are converted before serving.
_SOURCES = ("hf", "gguf")
#: Clocks that differ by more than this many seconds are reported.
MOST_SKEW_S = 1.0

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Finding:
    """A problem that the preflight found."""

    #: Name of the server concerned; None: all servers.
    server: str | None
    #: Column of the table: a key of `report._HEADS`.
    check: str
    #: What is wrong, where, and what to do.
    message: str
    #: True: the launch cannot succeed. False: a warning.
    error: bool = True


def reached(surveys: Iterable[Survey]) -> list[tuple[Survey, Machine]]:
    """The servers that answered, with their answers."""
    return [(survey, survey.machine) for survey in surveys if survey.machine is not None]


def unreachable(surveys: Sequence[Survey]) -> Iterator[Finding]:
    """Machines that the preflight could not reach."""
    for survey in surveys:
        if survey.machine is None:
            yield Finding(survey.name, "reached", survey.problem)


def names(surveys: Sequence[Survey]) -> Iterator[Finding]:
    """Addresses that a machine cannot look up, or that resolve to the wrong machine."""
    known = reached(surveys)
    several = len({survey.host for survey, _ in known}) > 1
    for target in dict.fromkeys(survey.server.address for survey in surveys):
        seen = {survey: machine.resolved[target] for survey, machine in known}
        for survey, found in seen.items():
            loopback = [each for each in found.addresses if ipaddress.ip_address(each).is_loopback]
            if found.problem:
                message = (
                    f"on {survey.name}, the host name {target} cannot be looked up "
                    f"({found.problem}); add it to /etc/hosts there, or write an IP address as "
                    "address="
                )
                yield Finding(survey.name, "names", message)
            elif several and loopback:
                message = (
                    f"on {survey.name}, {target} resolves to the loopback address {loopback[0]}, "
                    f"which the other servers cannot reach; remove the line `{loopback[0]} "
                    f"{target}` from /etc/hosts there, or write the IP address that the others "
                    "reach it by as address="
                )
                yield Finding(survey.name, "names", message)
        yield from _same_addresses(target, {s: set(r.addresses) for s, r in seen.items()})


def _same_addresses(target: str, seen: Mapping[Survey, set[str]]) -> Iterator[Finding]:
    """Machines on which a name resolves elsewhere than on most others (loopback aside)."""
    real = {
        survey: {each for each in found if not ipaddress.ip_address(each).is_loopback}
        for survey, found in seen.items()
    }
    real = {survey: found for survey, found in real.items() if found}
    usual = _most_common([frozenset(found) for found in real.values()])
    for survey, found in real.items():
        if usual and not found & usual:
            yield Finding(
                survey.name,
                "names",
                f"on {survey.name}, {target} resolves to {_listed(found)}, but on the other "
                f"servers to {_listed(usual)}; correct /etc/hosts or DNS there, or write an IP "
                "address as address=",
            )


def software(surveys: Sequence[Survey], own: Machine) -> Iterator[Finding]:
    """Versions and source files that differ between servers."""
    known = reached(surveys)
    differ = [survey.name for survey, m in known if m.source_hash != own.source_hash]
    for name in differ:
        yield Finding(
            name,
            "software",
            f"{name} has a different version of dance_jax than this machine (the source files "
            "differ); install the same version there",
        )
    pythons = {survey: machine.python for survey, machine in known}
    minor = {survey: text.rpartition(".")[0] for survey, text in pythons.items()}
    for survey, usual in _odd_ones(minor):
        yield Finding(
            survey.name,
            "software",
            f"{survey.name} has {pythons[survey]}, the other servers have {usual}; name a matching "
            "Python with python=",
        )
    for survey, usual in _odd_ones(pythons):
        if minor[survey] == usual.rpartition(".")[0]:
            message = f"{survey.name} has {pythons[survey]}, the other servers have {usual}"
            yield Finding(survey.name, "software", message, error=False)
    for package in (*PACKAGES[1:], *GPU_PACKAGES):
        yield from _package(package, known)


def _package(package: str, known: Sequence[tuple[Survey, Machine]]) -> Iterator[Finding]:
    versions = {survey: machine.packages.get(package) or "" for survey, machine in known}
    executables = {survey: machine.executable for survey, machine in known}
    usual = _most_common([version for version in versions.values() if version])
    if not usual and package in GPU_PACKAGES:
        return
    for survey, version in versions.items():
        wanted = f"{package}=={usual}" if usual else package
        remedy = f"run there: {executables[survey]} -m pip install {wanted}"
        if not version:
            yield Finding(survey.name, "software", f"{survey.name} lacks {package}; {remedy}")
        elif version != usual:
            message = (
                f"{survey.name} has {package} {version}, the other servers have {usual}; {remedy}"
            )
            yield Finding(survey.name, "software", message, error=package in PROGRAM)


def model(surveys: Sequence[Survey], own: Machine, fingerprint: str) -> Iterator[Finding]:
    """Models that are missing, incomplete, or different from the one this machine planned with.

    Servers that get their weights from peers need no model.

    Args:
        surveys: of all servers.
        own: this machine.
        fingerprint: of the model that this machine planned with.
    """
    known = reached(survey for survey in surveys if not survey.server.from_peers)
    indices = [m.model.index for m in (own, *(m for _, m in known)) if m.model.kind in _SOURCES]
    # This machine's index, unless it has only the converted weights.
    index = indices[0] if own.model.kind in _SOURCES else _most_common(indices)
    for survey, machine in known:
        name, state = survey.name, machine.model
        source = state.kind in _SOURCES
        same = state.index == index if source else state.fingerprint == fingerprint
        if state.problem:
            message = (
                f"on {name}, {state.path} is unusable: {state.problem}; copy the model there, or "
                "name the right directory with model="
            )
            yield Finding(name, "model", message)
        elif state.kind == "to download":
            message = (
                f"on {name}, {state.path} is not in the cache and will be downloaded when the "
                "servers start"
            )
            yield Finding(name, "model", message, error=False)
        elif not same or state.definition != own.model.definition:
            message = (
                f"on {name}, {state.path} is a different model than {own.model.path} on this "
                f"machine: the {'config or tokenizer' if same else 'weights'} differ; copy the "
                "same model to both machines"
            )
            yield Finding(name, "model", message)
        elif source and machine.cache_problem:
            message = f"on {name}, {machine.cache_problem}, so the model cannot be converted there"
            yield Finding(name, "model", f"{message}; choose another --cache-dir", error=False)


def memory(surveys: Sequence[Survey], needs: Sequence[int]) -> Iterator[Finding]:
    """Machines or GPUs with less free memory than the plan needs.

    Args:
        surveys: of all servers.
        needs: per server, bytes per device.
    """
    yield from _ram(surveys, needs)
    users: dict[tuple[str, int], str] = {}
    for survey, need in zip(surveys, needs, strict=True):
        machine = survey.machine
        if machine is None or survey.server.platform == "cpu":
            continue
        server, free = survey.server, {gpu.index: gpu.free for gpu in machine.gpus or []}
        roomy = [index for index, count in free.items() if count >= need]
        if machine.gpu_problem:
            message = f"on {server.name}, no GPU was found: {machine.gpu_problem}"
            yield Finding(server.name, "memory", message)
        elif not server.gpus and len(roomy) < server.devices:
            yield Finding(
                server.name,
                "memory",
                f"{server.name} needs {server.devices} GPUs with {format_bytes(need)} free, but "
                f"{len(roomy)} of its {len(free)} GPUs have that; give the server less memory= or "
                "experts=, or stop other programs on the GPUs",
            )
        for index in server.gpus if not machine.gpu_problem else ():
            other = users.setdefault((survey.memory_of, index), server.name)
            if other != server.name:
                message = f"{server.name} and {other} both use GPU {index} of one machine"
                yield Finding(server.name, "memory", f"{message}; give each its own GPUs in gpus=")
            elif index not in free:
                message = (
                    f"{server.name} has no GPU {index}; its GPUs are {_listed(map(str, free))}: "
                    "correct gpus="
                )
                yield Finding(server.name, "memory", message)
            elif free[index] < need:
                yield Finding(
                    server.name,
                    "memory",
                    f"GPU {index} of {server.name} has {format_bytes(free[index])} free but needs "
                    f"{format_bytes(need)}; give the server less memory= or experts=, or stop "
                    "other programs on the GPU",
                )


def _ram(surveys: Sequence[Survey], needs: Sequence[int]) -> Iterator[Finding]:
    """Machines with less free RAM than all devices of their CPU servers need together."""
    sharing: dict[str, list[tuple[Survey, int]]] = collections.defaultdict(list)
    for survey, need in zip(surveys, needs, strict=True):
        if survey.server.platform != "cpu":
            continue
        if survey.machine is not None and survey.machine.memory_free is not None:
            sharing[survey.memory_of].append((survey, need * survey.server.devices))
    for group in sharing.values():
        free = min(survey.machine.memory_free or 0 for survey, _ in group if survey.machine)
        needed = sum(need for _, need in group)
        if needed > free:
            who = " and ".join(survey.name for survey, _ in group)
            for survey, need in group:
                yield Finding(
                    survey.name,
                    "memory",
                    f"the machine of {who} has {format_bytes(free)} of free memory but needs "
                    f"{format_bytes(needed)} ({survey.name}: {format_bytes(need)}); give less "
                    "memory= or experts= in the hosts file",
                )


def ports(surveys: Sequence[Survey]) -> Iterator[Finding]:
    """Ports that cannot be used."""
    for survey, machine in reached(surveys):
        if machine.resolved[survey.server.address].problem:
            continue  # reported by `names`
        for state in machine.ports:
            if "assign" in state.problem:
                message = (
                    f"address={survey.server.address} is not an address of the machine of "
                    f"{survey.name} ({state.problem}); write the address of its network interface"
                )
            elif state.problem:
                message = (
                    f"on {survey.name}, port {state.port} of {survey.server.address} cannot be "
                    f"used ({state.problem}); choose another port, or stop the program that uses it"
                )
            else:
                continue
            yield Finding(survey.name, "ports", message)


def clocks(surveys: Sequence[Survey]) -> Iterator[Finding]:
    """Clocks that are off by more than the measurement's uncertainty."""
    for survey in surveys:
        clock = survey.clock
        if clock and abs(clock.seconds) - clock.uncertainty > MOST_SKEW_S:
            way = "ahead of" if clock.seconds > 0 else "behind"
            yield Finding(
                survey.name,
                "clock",
                f"the clock of {survey.name} is {abs(clock.seconds):.1f} s {way} this machine's, "
                "so log times will not match; synchronise both with a time server (NTP)",
                error=False,
            )


def compilers(surveys: Sequence[Survey]) -> Iterator[Finding]:
    """CPU servers without a C++ compiler."""
    for survey, machine in reached(surveys):
        if machine.compiler or survey.server.platform != "cpu":
            continue
        yield Finding(
            survey.name,
            "software",
            f"{survey.name} has no C++ compiler (c++, or the one in CXX), so it computes and "
            "answers expert calls more slowly; install one, e.g. g++",
            error=False,
        )


def links(surveys: Sequence[Survey], measured: Measurements) -> Iterator[Finding]:
    """Servers that another server cannot reach, and servers whose rate could not be measured."""
    for rank, why in measured.deaf.items():
        survey = surveys[rank]
        # Problems with the address itself are reported by `ports`.
        if survey.machine and not survey.machine.ports[0].problem:
            message = f"{survey.name} cannot listen at {survey.server.address}: {why}"
            yield Finding(survey.name, "links", message)
    for rank, why in measured.lost.items():
        yield Finding(surveys[rank].name, "links", f"{why} (while links were measured)")
    for (source, target), link in measured.links.items():
        # A lost server explains the links to it.
        if link.problem and target not in measured.lost:
            sender, receiver = surveys[source], surveys[target]
            known = sender.machine.resolved[receiver.server.address] if sender.machine else None
            address = known.addresses[0] if known and known.addresses else receiver.server.address
            yield Finding(
                sender.name,
                "links",
                f"{sender.name} cannot reach {receiver.name} ({address}:{measured.ports[target]}): "
                f"{link.problem}; "
                + (
                    "check that the address is that server's, and correct address="
                    if "refused" in link.problem
                    else "let firewalls pass all TCP ports between servers, or correct address="
                ),
            )
    links = measured.links.values()
    broken = measured.lost or any(link.problem for link in links)
    if broken or len(measured.ports) < len(surveys):
        return  # no rates were measured, for a reason that is already reported
    rated = {rank for pair, link in measured.links.items() if link.sent for rank in pair}
    for rank, survey in enumerate(surveys):
        if survey.server.measure_bandwidth and rank not in rated:
            why = "no time was left to measure its rate"
            if not measured.left_out:
                why = "no other server has another address"
            message = f"{survey.name} has bandwidth=auto, but {why}; the rate counts as unknown"
            yield Finding(survey.name, "links", message, error=False)
    if measured.left_out:
        message = (
            f"the rates of {measured.left_out} links were not measured, because there are too many "
            "links; write bandwidth= for servers whose rate you know"
        )
        yield Finding(None, "links", message, error=False)


def _odd_ones(values: Mapping[Survey, str]) -> Iterator[tuple[Survey, str]]:
    """The servers whose value differs from the most common one, each with that value."""
    usual = _most_common(list(values.values()))
    for survey, value in values.items():
        if value != usual:
            yield survey, usual or ""


def _most_common(values: Sequence[Value]) -> Value | None:
    """The most common value; of several, the first."""
    counted = collections.Counter(values).most_common(1)
    return counted[0][0] if counted else None


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted(values)) or "none"
