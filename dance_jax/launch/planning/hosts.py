"""Read the hosts file: one server per line, `name key=value ...`; `#` begins a comment.

Values reach a shell only as one quoted word, and none that ssh reads can begin with a dash: a value
that does not look like a host, a user or an absolute path is refused here.
"""

from __future__ import annotations

import decimal
import ipaddress
import os
import pathlib
import re

from dance_jax.config import ClusterSpec, ServerSpec, SshTarget, UserError
from dance_jax.models.hub import parse_name

KEYS = (
    "address",
    "devices",
    "memory",
    "experts",
    "bandwidth",
    "round_trip",
    "expert_time",
    "ssh",
    "python",
    "model",
    "platform",
    "gpus",
    "checkpoint",
)

MEMORY_UNITS = {
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
#: In nanoseconds.
_TIME_UNITS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]*)")
_HOST = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9_])?"
_SSH = re.compile(
    rf"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9._-]{{0,63}})@)?"
    rf"(?:(?P<host>{_HOST})|\[(?P<ipv6>[0-9A-Fa-f:.]{{2,45}})\])(?::(?P<port>[0-9]{{1,5}}))?"
)


def read_hosts(path: str | os.PathLike[str], platform: str = "cpu") -> ClusterSpec:
    """Read a hosts file.

    Args:
        platform: see `parse_hosts`.

    Raises:
        UserError: the file cannot be read, or a line is wrong; the message names file and line.
    """
    return parse_hosts(hosts_text(path), str(path), platform)


def hosts_text(path: str | os.PathLike[str]) -> str:
    """The content of a hosts file; raises UserError if the file cannot be read."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the hosts file cannot be read: {error}") from error


def parse_hosts(text: str, source: str = "hosts", platform: str = "cpu") -> ClusterSpec:
    """Parse the content of a hosts file.

    >>> parse_hosts("alpha address=localhost devices=2 memory=48MiB bandwidth=500Mbps").devices
    (2,)

    Args:
        text: the content.
        source: the file's name, for messages.
        platform: platform of servers whose lines have neither platform= nor gpus=.

    Raises:
        UserError: a line is wrong, there is no server, or the servers cannot reach each other.
    """
    servers: list[ServerSpec] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        where = f"{source}:{number}"
        server = _server(words, where, platform)
        if server.name in line_of:
            first = line_of[server.name]
            raise UserError(f"{where}: server {server.name} is already on line {first}")
        line_of[server.name] = number
        servers.append(server)
    if not servers:
        raise UserError(f"{source}: has no servers; write one per line: name key=value ...")
    _check_together(servers, line_of, source)
    return ClusterSpec(tuple(servers))


def _server(words: list[str], where: str, platform: str) -> ServerSpec:
    name = words[0]
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{where}: {name!r} is not a valid server name; a line is `name key=value ...` and a "
            "name has letters, digits, '.', '_' and '-'"
        )
    values: dict[str, str] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r}; the keys are {', '.join(KEYS)}")
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
    gpus = tuple(_integer(each, "gpus", where) for each in _list(values.get("gpus", "")))
    if len(set(gpus)) < len(gpus):
        raise UserError(f"{where}: gpus={values['gpus']}: a GPU is named twice")
    memory = tuple(
        int(quantity(each, "memory", MEMORY_UNITS, where))
        for each in _list(values.get("memory", ""))
    )
    devices = _devices(values.get("devices"), gpus, memory, where)
    from_peers = _from_peers(values.get("checkpoint", "own"), where)
    if from_peers and "model" in values:
        raise UserError(
            f"{where}: checkpoint=peer and model= contradict each other: remove model= if the "
            "server has no copy of the model, or checkpoint=peer if it has one"
        )
    rate = values.get("bandwidth", "auto")
    address = values.get("address", name)
    if not _is_address(address):
        raise UserError(f"{where}: address={address}: must be a host name or an IP address")
    return ServerSpec(
        name=name,
        address=address,
        devices=devices,
        memory=(memory * devices if len(memory) == 1 else memory) or None,
        experts=_integer(values["experts"], "experts", where) if "experts" in values else None,
        bandwidth=None
        if rate == "auto"
        else float(quantity(rate, "bandwidth", _BANDWIDTH_UNITS, where)),
        measure_bandwidth="bandwidth" in values and rate == "auto",
        round_trip=_seconds(values.get("round_trip"), "round_trip", where),
        expert_time=_seconds(values.get("expert_time"), "expert_time", where),
        ssh=_ssh(values.get("ssh"), address, where),
        python=_path(values, "python", where),
        model=_model(values, where),
        platform=_platform(values.get("platform"), gpus, platform, where),
        gpus=gpus,
        from_peers=from_peers,
    )


def _platform(text: str | None, gpus: tuple[int, ...], default: str, where: str) -> str:
    if text not in (None, "cpu", "cuda"):
        raise UserError(f"{where}: platform={text}: write cpu or cuda")
    if text == "cpu" and gpus:
        raise UserError(f"{where}: platform=cpu and gpus= contradict each other: remove one")
    return text or ("cuda" if gpus else default)


def _from_peers(text: str, where: str) -> bool:
    if text not in ("own", "peer"):
        raise UserError(
            f"{where}: checkpoint={text}: write own (this server has a copy of the model) or peer "
            "(the weights come from servers that have a copy)"
        )
    return text == "peer"


def _list(text: str) -> list[str]:
    return text.split(",") if text else []


def _devices(text: str | None, gpus: tuple[int, ...], memory: tuple[int, ...], where: str) -> int:
    """Number of devices, from devices= or from a list with an entry per device."""
    many = memory if len(memory) > 1 else ()
    devices = _integer(text, "devices", where) if text else len(gpus or many) or 1
    if devices < 1:
        raise UserError(f"{where}: devices={devices}: a server has at least one device")
    for key, values in (("gpus", gpus), ("memory", many)):
        if values and len(values) != devices:
            raise UserError(f"{where}: {key} has {len(values)} values for {devices} devices")
    return devices


def _ssh(text: str | None, address: str, where: str) -> SshTarget | None:
    """The ssh target of ssh=; by default, ssh to the address of any server not on loopback."""
    if text is None:
        return None if is_loopback(address) else SshTarget(address)
    match = _SSH.fullmatch(text)
    if not match or not 0 < int(match["port"] or 22) < 65536:
        raise UserError(
            f"{where}: ssh={text}: write ssh=user@host:port; user and port are optional"
        )
    port = int(match["port"]) if match["port"] else None
    return SshTarget(match["host"] or match["ipv6"], match["user"], port)


def _path(values: dict[str, str], key: str, where: str) -> str | None:
    """An absolute path on the server's machine (a relative one would have no defined base)."""
    path = values.get(key)
    if path is not None and not (path.startswith("/") and path.isprintable()):
        raise UserError(f"{where}: {key}={path}: must be an absolute path on the server")
    return path


def _model(values: dict[str, str], where: str) -> str | None:
    model = values.get("model")
    if model is None or parse_name(model) is not None:
        return model
    try:
        return _path(values, "model", where)
    except UserError as error:
        raise UserError(f"{error}, or org/name or org/name@revision on the hub") from error


def _integer(text: str, key: str, where: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{where}: {key}={text}: must be a whole number")
    return int(text)


def quantity(text: str, key: str, units: dict[str, int], where: str) -> decimal.Decimal:
    match = _QUANTITY.fullmatch(text)
    if not match or match[2] not in units:
        raise UserError(f"{where}: {key}={text}: must be a number with a unit ({', '.join(units)})")
    value = decimal.Decimal(match[1]) * units[match[2]]
    if value < 1:
        raise UserError(f"{where}: {key}={text}: must be more than 0")
    return value


def _seconds(text: str | None, key: str, where: str) -> float | None:
    return None if text is None else float(quantity(text, key, _TIME_UNITS, where) / 10**9)


def is_loopback(address: str) -> bool:
    """Whether the address is a loopback address; names other than localhost are not looked up."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _is_address(address: str) -> bool:
    if re.fullmatch(_HOST, address):
        return not re.fullmatch(r"[0-9.]+", address) or _is_ip(address)
    return _is_ip(address)


def _is_ip(text: str) -> bool:
    try:
        return not ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


def _check_together(servers: list[ServerSpec], line_of: dict[str, int], source: str) -> None:
    """Check what no single line shows: reachability, copies of the model, comparable costs."""
    local = [server for server in servers if is_loopback(server.address)]
    remote = [server for server in servers if not is_loopback(server.address)]
    if local and remote:
        raise UserError(
            f"{source}:{line_of[local[0].name]}: address={local[0].address} can be reached only "
            f"from its own machine, but {remote[0].name} (line {line_of[remote[0].name]}, "
            f"address={remote[0].address}) is elsewhere: give {local[0].name} the address that the "
            "others reach it by, or give all servers a loopback address"
        )
    if all(server.from_peers for server in servers):
        raise UserError(
            f"{source}: all servers have checkpoint=peer, so none has a copy of the model: remove "
            "it from at least one server whose model= or --model is a directory on its machine"
        )
    timed = next((server for server in servers if server.expert_time is not None), None)
    if timed and not any(
        server.bandwidth or server.measure_bandwidth or server.round_trip for server in servers
    ):
        raise UserError(
            f"{source}:{line_of[timed.name]}: expert_time= also needs bandwidth= or round_trip= "
            "on at least one server, because call times are weighed against link times"
        )
