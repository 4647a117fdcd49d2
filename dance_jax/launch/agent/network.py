"""Settings for connections between the launcher and servers on other machines."""

from __future__ import annotations

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Network:
    """Addresses, ports and the key of a launch."""

    #: Configuration file for `ssh -F`.
    ssh_config: pathlib.Path | None = None
    #: Addresses of this machine that the servers connect to (`preflight` finds them).
    control_addresses: tuple[str, ...] = ()
    #: TCP port of this process that the servers connect to; 0: a free port.
    control_port: int = 0
    #: host:port at which the first server coordinates jax.distributed; None: its own address.
    coordinator: str | None = None
    #: Port of that coordinator; 0: a free port.
    coordinator_port: int = 0
    #: The key of the launch; None: a new key.
    key: bytes | None = None
