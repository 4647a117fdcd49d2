"""Show the result of a preflight: servers, links and problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dance_jax.launch.preflight.messages import Machine
from dance_jax.launch.preflight.run import Preflight
from dance_jax.launch.preflight.survey import Survey
from dance_jax.memory import format_bytes

#: With more servers than this, only the minimum and maximum of each server's links are shown.
_SERVERS_SHOWN = 6
#: Column heads by the name of the check.
_HEADS = {
    "reached": "reached",
    "names": "address",
    "ports": "ports",
    "software": "Python, jax",
    "model": "model",
    "memory": "memory",
    "clock": "clock",
    "links": "rate",
}


def print_preflight(console: Console, preflight: Preflight) -> None:
    """Print a row per server, the links between servers, and every finding with its remedy."""
    console.print(_servers(preflight))
    if preflight.links:
        shown = len(preflight.surveys) <= _SERVERS_SHOWN
        console.print(_links(preflight) if shown else _link_ranges(preflight))
    for finding in preflight.findings:
        word, style = ("error", "bold red") if finding.error else ("warning", "yellow")
        line = Text.assemble((f"{word}: ", style), finding.message)
        console.print(line, soft_wrap=True)
    if not preflight.errors:
        console.print(Text("preflight: all servers can work together", "green"), soft_wrap=True)


def format_rate(bits_per_second: float) -> str:
    """Format bits per second with a unit of the hosts file.

    >>> format_rate(478e6)
    '478 Mbps'
    """
    for unit, size in (("Gbps", 1e9), ("Mbps", 1e6), ("kbps", 1e3)):
        if bits_per_second >= size:
            return f"{bits_per_second / size:.3g} {unit}"
    return f"{bits_per_second:.3g} bps"


def format_seconds(seconds: float) -> str:
    """Format seconds as milliseconds, with two significant digits below 100 ms.

    >>> format_seconds(0.00021)
    '0.21 ms'
    """
    return f"{1000 * seconds:.2g} ms" if seconds < 0.1 else f"{1000 * seconds:.0f} ms"


def _servers(preflight: Preflight) -> Table:
    table = Table(title="Preflight", title_justify="left", caption=_caption(preflight))
    table.add_column("server")
    for head in _HEADS.values():
        table.add_column(head)
    for rank, survey in enumerate(preflight.surveys):
        cells = _cells(preflight, rank, survey)
        table.add_row(survey.name, *(_cell(preflight, survey, check, cells) for check in _HEADS))
    return table


def _caption(preflight: Preflight) -> str | None:
    marked = "! is an error, ~ a warning; " if preflight.findings else ""
    return f"{marked}memory: needed / free; clock: ahead of this machine's"


def _cell(preflight: Preflight, survey: Survey, check: str, cells: dict[str, str]) -> Text:
    """A table cell, marked if there are findings about it."""
    about = [f for f in preflight.findings if f.server == survey.name and f.check == check]
    text = cells.get(check, "")
    if any(finding.error for finding in about):
        return Text(f"! {text or 'no'}", style="bold red")
    return Text(f"~ {text or 'see below'}", style="yellow") if about else Text(text)


def _cells(preflight: Preflight, rank: int, survey: Survey) -> dict[str, str]:
    """The values of a server's row, by check."""
    machine, server = survey.machine, survey.server
    if machine is None:
        return {}
    resolved = machine.resolved[server.address].addresses
    rate = preflight.spec.servers[rank].bandwidth
    return {
        "reached": f"{survey.seconds:.1f} s",
        "names": resolved[0] if resolved else "unknown",
        "ports": " ".join(str(state.port) for state in _asked_ports(rank, machine)) or "-",
        "software": f"{machine.python.rpartition(' ')[2]}, {machine.packages['jax'] or 'none'}",
        "model": f"{machine.model.kind or 'none'} {machine.model.index[:6]}".strip(),
        "memory": _memory(preflight, rank, survey, machine),
        "clock": _clock(survey),
        "links": format_rate(rate) if rate else "unknown",
    }


def _asked_ports(rank: int, machine: Machine) -> Sequence:
    """The ports to show: the first entry of servers other than 0 only tested the address."""
    return machine.ports if rank == 0 else machine.ports[1:]


def _memory(preflight: Preflight, rank: int, survey: Survey, machine: Machine) -> str:
    need = preflight.needs[rank]
    if survey.server.platform == "cpu":
        free = "?" if machine.memory_free is None else format_bytes(machine.memory_free)
        return f"{format_bytes(need * survey.server.devices)} / {free}"
    chosen = survey.server.gpus
    free = [gpu.free for gpu in machine.gpus or [] if not chosen or gpu.index in chosen]
    return f"{format_bytes(need)} / {format_bytes(min(free))}" if free else "no GPU"


def _clock(survey: Survey) -> str:
    if survey.clock is None:
        return ""
    milliseconds, uncertainty = 1000 * survey.clock.seconds, 1000 * survey.clock.uncertainty
    return f"{milliseconds:+.1f}±{uncertainty:.1f} ms"


def _links(preflight: Preflight) -> Table:
    names = preflight.spec.names
    table = Table(title="Links: round trip, rate", title_justify="left")
    table.add_column("from \\ to")
    for name in names:
        table.add_column(name)
    for source, name in enumerate(names):
        table.add_row(
            name,
            *(
                "-" if source == target else _link(preflight, source, target)
                for target in range(len(names))
            ),
        )
    return table


def _link(preflight: Preflight, source: int, target: int) -> str:
    link = preflight.links.get((source, target))
    if link is not None and link.problem:
        return f"! {link.problem}"
    rtt, rate = preflight.rtt(source, target), preflight.rate(source, target)
    if rtt is None:
        servers = preflight.spec.servers
        same = servers[source].address == servers[target].address
        return "same address" if same else "not measured"
    return format_seconds(rtt) if rate is None else f"{format_seconds(rtt)}, {format_rate(rate)}"


def _link_ranges(preflight: Preflight) -> Table:
    table = Table(title="Links to the others, least and most", title_justify="left")
    for column in ("server", "round trip", "rate sent", "rate received"):
        table.add_column(column)
    ranks = range(len(preflight.surveys))
    for rank, name in enumerate(preflight.spec.names):
        others = [other for other in ranks if other != rank]
        trips = [preflight.rtt(rank, other) for other in others]
        sent = [preflight.rate(rank, other) for other in others]
        received = [preflight.rate(other, rank) for other in others]
        table.add_row(
            name,
            _range(trips, format_seconds),
            _range(sent, format_rate),
            _range(received, format_rate),
        )
    return table


def _range(values: Sequence[float | None], text: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    return f"{text(min(known))} - {text(max(known))}" if known else "-"
