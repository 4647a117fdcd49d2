"""Reads the hosts file: one server a line, `name key=value ...`, `#` begins a comment."""

from __future__ import annotations

import decimal
import ipaddress
import os
import pathlib
import re

from dance_jax.config import ClusterSpec, ServerSpec, UserError

KEYS = ("address", "devices", "memory", "experts", "bandwidth")

_MEMORY_UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_BANDWIDTH_UNITS = {"bps": 1, "kbps": 10**3, "Mbps": 10**6, "Gbps": 10**9}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]*)")


def read_hosts(path: str | os.PathLike[str]) -> ClusterSpec:
    """Reads a hosts file.

    Raises:
        UserError: the file cannot be read, or a line is wrong; the message has file and line.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the hosts file cannot be read: {error}") from error
    return parse_hosts(text, str(path))


def parse_hosts(text: str, source: str = "hosts") -> ClusterSpec:
    """Parses the content of a hosts file.

    >>> parse_hosts("alpha address=localhost devices=2 memory=48MiB bandwidth=500Mbps").devices
    (2,)

    Args:
        text: the content.
        source: the file's name, for messages.

    Raises:
        UserError: a line is wrong, there is no server, or a server is not on this machine.
    """
    servers: list[ServerSpec] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        where = f"{source}:{number}"
        server = _server(words, where)
        if server.name in line_of:
            first = line_of[server.name]
            raise UserError(f"{where}: server {server.name} is already on line {first}")
        line_of[server.name] = number
        servers.append(server)
    if not servers:
        raise UserError(f"{source}: no server; write one a line: name key=value ...")
    return ClusterSpec(tuple(servers))


def _server(words: list[str], where: str) -> ServerSpec:
    name = words[0]
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{where}: {name!r} is not a server's name; a line is `name key=value ...` and "
            "a name has letters, digits, '.', '_' and '-'"
        )
    values: dict[str, str] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r}; there are {', '.join(KEYS)}")
        if not equals or not value:
            raise UserError(f"{where}: {key} has no value; write {key}=...")
        if key in values:
            raise UserError(f"{where}: {key} is given twice")
        values[key] = value
    if ("memory" in values) == ("experts" in values):
        given = "both are" if "memory" in values else "neither is"
        raise UserError(
            f"{where}: give memory= (per device, e.g. 48MiB) or experts= (slots per device); "
            f"{given} given"
        )
    address = values.get("address", name)
    devices = _integer(values.get("devices", "1"), "devices", where)
    if devices < 1:
        raise UserError(f"{where}: devices={devices}: a server has at least one device")
    memory = experts = bandwidth = None
    if "memory" in values:
        memory = int(_quantity(values["memory"], "memory", _MEMORY_UNITS, where))
    else:
        experts = _integer(values["experts"], "experts", where)
    if "bandwidth" in values:
        bandwidth = float(_quantity(values["bandwidth"], "bandwidth", _BANDWIDTH_UNITS, where))
    _check_local(address, "address" in values, where)
    return ServerSpec(name, address, devices, memory, experts, bandwidth)


def _integer(text: str, key: str, where: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{where}: {key}={text}: a whole number is needed")
    return int(text)


def _quantity(text: str, key: str, units: dict[str, int], where: str) -> decimal.Decimal:
    match = _QUANTITY.fullmatch(text)
    if not match or match[2] not in units:
        raise UserError(
            f"{where}: {key}={text}: a number and a unit ({', '.join(units)}) is needed"
        )
    value = decimal.Decimal(match[1]) * units[match[2]]
    if value < 1:
        raise UserError(f"{where}: {key}={text}: more than nothing is needed")
    return value


def _check_local(address: str, given: bool, where: str) -> None:
    """Servers on other machines are not started yet."""
    if address == "localhost":
        return
    try:
        if ipaddress.ip_address(address).is_loopback:
            return
    except ValueError:
        pass
    what = f"address={address}" if given else f"the address of {address} is its name by default and"
    raise UserError(
        f"{where}: {what} is not this machine; servers on other machines are not supported yet: "
        "write address=localhost"
    )
