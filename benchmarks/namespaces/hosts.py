"""Description of a testbed's hosts: names, addresses, devices, link rates."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re

from dance_jax.config import UserError

#: Name of the host from which commands are launched.
HEAD = "head"
SUBNET = "10.77.0"
#: The maximum of dance_jax.launch.
MAX_HOSTS = 31
#: Names for hosts beyond those in the hosts file.
GREEK = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")

_RATE = re.compile(r"(\d+(?:\.\d+)?)([kMG]?)(?:bps|bit)", re.IGNORECASE)
_FACTORS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}


@dataclasses.dataclass(frozen=True)
class Host:
    """One host of the testbed."""

    name: str
    address: str
    #: Keys and values of the host's line in the hosts file, without address and bandwidth.
    keys: dict[str, str]
    #: The host's share of the cores: a number of cores (quota), a list of cores (pin), or None if
    #: the host may use all cores.
    share: float | list[int] | None = None

    @property
    def devices(self) -> int:
        return int(self.keys.get("devices", "1"))


def parse_rate(text: str) -> int | None:
    """Parse `500Mbps` or `500Mbit` to bits per second, and `none` to None.

    >>> parse_rate("1.5Mbps")
    1500000

    Raises:
        argparse.ArgumentTypeError: the text is none of these.
    """
    if text.lower() == "none":
        return None
    match = _RATE.fullmatch(text)
    rate = float(match[1]) * _FACTORS[match[2].lower()] if match else 0
    if not 1e5 <= rate <= 1e12:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a rate from 100kbps to 1000Gbps (500Mbit is 500Mbps) and not 'none'"
        )
    return round(rate)


def parse_seconds(text: str) -> float:
    """The seconds of a time such as `10ms`, `250us` or `1s`.

    >>> parse_seconds("10ms")
    0.01

    Raises:
        argparse.ArgumentTypeError: it is not such a time, or is above 10 s.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(us|ms|s)", text)
    seconds = float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]] if match else -1.0
    if not 0 <= seconds <= 10:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time from 0s to 10s, such as 10ms or 250us"
        )
    return seconds


def show_rate(rate: int | None) -> str:
    """Format a rate as in a hosts file: `500Mbps`."""
    return "not shaped" if rate is None else f"{rate / 1e6:.12g}Mbps"


def hosts_like(template: str, count: int | None = None) -> list[Host]:
    """Make hosts with the keys of a hosts file's lines.

    Args:
        template: the file's text.
        count: number of hosts; if larger than the number of lines, the lines repeat. One host per
            line if None.

    Raises:
        UserError: a line cannot be a host of the testbed, or the file has no lines.
    """
    lines = [line.split("#", 1)[0].split() for line in template.splitlines()]
    lines = [words for words in lines if words]
    names = [words[0] for words in lines]
    for name in names:
        if name == HEAD or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,30}", name):
            raise UserError(
                f"{name!r} cannot be a host of the testbed: a name needs up to 31 letters, digits "
                f"and '-', and must not be {HEAD}"
            )
    if not lines or len(set(names)) < len(names):
        raise UserError("the hosts file has no lines, or two lines with the same name")
    more = [*GREEK, *(f"host{number}" for number in range(1, MAX_HOSTS + 1))]
    names += [name for name in more if name not in names]
    hosts = []
    for index, words in zip(range(count or len(lines)), itertools.cycle(lines), strict=False):
        pairs = [word.partition("=") for word in words[1:]]
        keys = {key: value for key, _, value in pairs if key not in ("address", "bandwidth")}
        if not re.fullmatch(r"[1-9]\d{0,2}", keys.get("devices", "1")):
            raise UserError(
                f"host {words[0]}: devices={keys['devices']} is not a whole number from 1 to 999"
            )
        hosts.append(Host(names[index], f"{SUBNET}.{index + 11}", keys))
    return hosts


def hosts_line(host: Host, **keys: str | None) -> str:
    """Return a host's line for a hosts file, with its own and further keys; None omits a key."""
    words = [f"{key}={value}" for key, value in (keys | host.keys).items() if value is not None]
    return " ".join([host.name, *words])
