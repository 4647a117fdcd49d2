"""What a preflight's answers mean: pure functions from answers to findings."""

from __future__ import annotations

import collections
import dataclasses
import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from dance_jax.launch.planning.plan import format_bytes
from dance_jax.launch.preflight.messages import Machine
from dance_jax.launch.preflight.probe import GPU_PACKAGES, PACKAGES
from dance_jax.launch.preflight.survey import Measurements, Survey

#: Packages that make the program which all servers run together; others may differ with a warning.
PROGRAM = ("jax", "jaxlib", "flax", *GPU_PACKAGES)
#: Kinds of models that are converted before they are served.
_SOURCES = ("hf", "gguf")
#: Clocks that differ by more seconds than this are worth a word.
MOST_SKEW_S = 1.0

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    #: Name of the server it is about; None: of all.
    server: str | None
    #: Column of the table.
    check: str
    #: What is wrong, where, and what to do.
    message: str
    #: The launch cannot succeed; otherwise it is a warning.
    error: bool = True


def reached(surveys: Iterable[Survey]) -> list[tuple[Survey, Machine]]:
    """Those that answered, with their answers."""
    return [(survey, survey.machine) for survey in surveys if survey.machine is not None]


def unreachable(surveys: Sequence[Survey]) -> Iterator[Finding]:
    """Machines that cannot be asked."""
    for survey in surveys:
        if survey.machine is None:
            yield Finding(survey.name, "reached", survey.problem)


def names(surveys: Sequence[Survey]) -> Iterator[Finding]:
    """Addresses that a machine cannot look up, or that lead elsewhere than they should."""
    known = reached(surveys)
    far = len({survey.host for survey, _ in known}) > 1
    for target in dict.fromkeys(survey.server.address for survey in surveys):
        seen = {survey: machine.resolved[target] for survey, machine in known}
        for survey, found in seen.items():
            loopback = [each for each in found.addresses if ipaddress.ip_address(each).is_loopback]
            if found.problem:
                message = (
                    f"on {survey.name}, the name {target} cannot be looked up ({found.problem}); "
                    f"add it to /etc/hosts there, or write an IP address as address="
                )
                yield Finding(survey.name, "names", message)
            elif far and loopback:
                message = (
                    f"on {survey.name}, the name {target} leads to {loopback[0]}, which is that "
                    f"machine itself and out of the others' reach; remove the line "
                    f"`{loopback[0]} {target}` from /etc/hosts there, or write the IP address that "
                    "the others reach it by as address="
                )
                yield Finding(survey.name, "names", message)
        yield from _same_addresses(target, {s: set(r.addresses) for s, r in seen.items()})


def _same_addresses(target: str, seen: Mapping[Survey, set[str]]) -> Iterator[Finding]:
    """The name leads all machines to the same place; loopback addresses are another finding."""
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
                f"on {survey.name}, the name {target} leads to {_listed(found)}, on the others to "
                f"{_listed(usual)}; correct /etc/hosts or DNS there, or write an IP address as "
                "address=",
            )


def software(surveys: Sequence[Survey], own: Machine) -> Iterator[Finding]:
    """Versions and sources that differ."""
    known = reached(surveys)
    differ = [survey.name for survey, m in known if m.source_hash != own.source_hash]
    for name in differ:
        yield Finding(
            name,
            "software",
            f"{name} runs another dance_jax than this machine: its source files differ; install "
            "the same version there",
        )
    pythons = {survey: machine.python for survey, machine in known}
    minor = {survey: text.rpartition(".")[0] for survey, text in pythons.items()}
    for survey, usual in _odd_ones(minor):
        yield Finding(
            survey.name,
            "software",
            f"{survey.name} has {pythons[survey]}, the others have {usual}; name an equal Python "
            "with python=",
        )
    for survey, usual in _odd_ones(pythons):
        if minor[survey] == usual.rpartition(".")[0]:
            message = f"{survey.name} has {pythons[survey]}, the others have {usual}"
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
        remedy = f"there: {executables[survey]} -m pip install {wanted}"
        if not version:
            yield Finding(survey.name, "software", f"{survey.name} lacks {package}; {remedy}")
        elif version != usual:
            message = f"{survey.name} has {package} {version}, the others have {usual}; {remedy}"
            yield Finding(survey.name, "software", message, error=package in PROGRAM)


def model(surveys: Sequence[Survey], own: Machine, fingerprint: str) -> Iterator[Finding]:
    """Models that are missing, incomplete, or not the one that was planned with here, of servers
    that are to have one.

    Args:
        surveys: of all servers.
        own: this machine.
        fingerprint: of the model that was planned with.
    """
    known = reached(survey for survey in surveys if not survey.server.from_peers)
    indices = [m.model.index for m in (own, *(m for _, m in known)) if m.model.kind in _SOURCES]
    # This machine's, unless it has the converted weights only.
    index = indices[0] if own.model.kind in _SOURCES else _most_common(indices)
    for survey, machine in known:
        name, state = survey.name, machine.model
        source = state.kind in _SOURCES
        same = state.index == index if source else state.fingerprint == fingerprint
        if state.problem:
            message = (
                f"on {name}, {state.path} is not usable: {state.problem}; copy the model there, or "
                "name the right directory with model="
            )
            yield Finding(name, "model", message)
        elif state.kind == "to download":
            message = (
                f"on {name}, {state.path} is not in the cache: it is downloaded there when the "
                "servers start"
            )
            yield Finding(name, "model", message, error=False)
        elif not same or state.definition != own.model.definition:
            message = (
                f"on {name}, {state.path} is another model than {own.model.path} on this machine: "
                f"its {'config or tokenizer' if same else 'weights'} differ; copy the same to both"
            )
            yield Finding(name, "model", message)
        elif source and machine.cache_problem:
            message = f"on {name}, {machine.cache_problem}: the model cannot be converted there"
            yield Finding(name, "model", f"{message}; name another --cache-dir", error=False)


def memory(surveys: Sequence[Survey], needs: Sequence[int]) -> Iterator[Finding]:
    """Machines, or GPUs, with too little memory for what the plan puts there.

    Args:
        surveys: of all servers.
        needs: bytes per device of each.
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
            message = f"on {server.name}, no GPU is seen: {machine.gpu_problem}"
            yield Finding(server.name, "memory", message)
        elif not server.gpus and len(roomy) < server.devices:
            yield Finding(
                server.name,
                "memory",
                f"{server.name} needs {server.devices} GPUs with {format_bytes(need)} free; of its "
                f"{len(free)}, {len(roomy)} have that; give it less memory= or experts=, or end "
                "what else uses them",
            )
        for index in server.gpus if not machine.gpu_problem else ():
            other = users.setdefault((survey.memory_of, index), server.name)
            if other != server.name:
                message = f"{server.name} and {other} both name GPU {index} of one machine"
                yield Finding(server.name, "memory", f"{message}; give each its own in gpus=")
            elif index not in free:
                message = f"{server.name} has no GPU {index}; there are {_listed(map(str, free))}"
                yield Finding(server.name, "memory", message)
            elif free[index] < need:
                yield Finding(
                    server.name,
                    "memory",
                    f"GPU {index} of {server.name} has {format_bytes(free[index])} free, "
                    f"{format_bytes(need)} are needed; give it less memory= or experts=, or end "
                    "what else uses it",
                )


def _ram(surveys: Sequence[Survey], needs: Sequence[int]) -> Iterator[Finding]:
    """All devices of all servers of a machine share what is free there."""
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
                    f"the machine of {who} has {format_bytes(free)} free, {format_bytes(needed)} "
                    f"are needed ({survey.name}: {format_bytes(need)}); give less memory= or "
                    "experts= in the hosts file",
                )


def ports(surveys: Sequence[Survey]) -> Iterator[Finding]:
    """Ports that cannot be used."""
    for survey, machine in reached(surveys):
        if machine.resolved[survey.server.address].problem:
            continue  # that is said of the name
        for state in machine.ports:
            if "assign" in state.problem:
                message = (
                    f"address={survey.server.address} is no address of the machine of "
                    f"{survey.name} ({state.problem}); write the one that its network interface has"
                )
            elif state.problem:
                message = (
                    f"on {survey.name}, port {state.port} of {survey.server.address} cannot be "
                    f"used ({state.problem}); name another one, or end what uses it"
                )
            else:
                continue
            yield Finding(survey.name, "ports", message)


def clocks(surveys: Sequence[Survey]) -> Iterator[Finding]:
    """Clocks that are wrong beyond doubt."""
    for survey in surveys:
        clock = survey.clock
        if clock and abs(clock.seconds) - clock.uncertainty > MOST_SKEW_S:
            way = "ahead of" if clock.seconds > 0 else "behind"
            yield Finding(
                survey.name,
                "clock",
                f"the clock of {survey.name} is {abs(clock.seconds):.1f} s {way} this machine's: "
                "times in logs will not fit together; let both follow a time server (NTP)",
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
            f"{survey.name} has no C++ compiler (c++, or what CXX names): it computes slower, and "
            "answers the others slower; install one, e.g. g++",
            error=False,
        )


def links(surveys: Sequence[Survey], measured: Measurements) -> Iterator[Finding]:
    """Servers that another one cannot reach, and those of which no rate could be had."""
    for rank, why in measured.deaf.items():
        survey = surveys[rank]
        # What is wrong with its address is said where ports are.
        if survey.machine and not survey.machine.ports[0].problem:
            message = f"{survey.name} cannot listen at {survey.server.address}: {why}"
            yield Finding(survey.name, "links", message)
    for (source, target), link in measured.links.items():
        if link.problem:
            sender, receiver = surveys[source], surveys[target]
            known = sender.machine.resolved[receiver.server.address] if sender.machine else None
            address = known.addresses[0] if known and known.addresses else receiver.server.address
            yield Finding(
                sender.name,
                "links",
                f"{sender.name} cannot reach {receiver.name} ({address}:{measured.ports[target]}): "
                f"{link.problem}; "
                + (
                    "does this address lead to another machine? Correct address="
                    if "refused" in link.problem
                    else "let the firewalls pass all TCP ports between servers, or correct address="
                ),
            )
    links = measured.links.values()
    if len(measured.ports) < len(surveys) or any(link.problem for link in links):
        return  # no rate was measured, for which there is a better reason
    rated = {rank for pair, link in measured.links.items() if link.sent for rank in pair}
    for rank, survey in enumerate(surveys):
        if survey.server.measure_bandwidth and rank not in rated:
            why = "no time was left to measure it"
            if not measured.left_out:
                why = "no other server has another address"
            message = f"{survey.name} has bandwidth=auto, but {why}: its rate is taken as unknown"
            yield Finding(survey.name, "links", message, error=False)
    if measured.left_out:
        message = (
            f"the rates of {measured.left_out} links were not measured, there are too many; write "
            "bandwidth= where you know it"
        )
        yield Finding(None, "links", message, error=False)


def _odd_ones(values: Mapping[Survey, str]) -> Iterator[tuple[Survey, str]]:
    """Those whose value is not the usual one, and that one."""
    usual = _most_common(list(values.values()))
    for survey, value in values.items():
        if value != usual:
            yield survey, usual or ""


def _most_common(values: Sequence[Value]) -> Value | None:
    """The most common value, of several the first."""
    counted = collections.Counter(values).most_common(1)
    return counted[0][0] if counted else None


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted(values)) or "none"
