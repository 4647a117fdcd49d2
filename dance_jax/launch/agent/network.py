"""How the launching process and servers on other machines reach each other."""

from __future__ import annotations

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Network:
    """Addresses, ports and the key of a launch."""

    #: For `ssh -F`.
    ssh_config: pathlib.Path | None = None
    #: Addresses of this machine at which the servers reach it (`preflight` finds them).
    control_addresses: tuple[str, ...] = ()
    #: TCP port of this process for them; 0: a free one.
    control_port: int = 0
    #: host:port where the first server coordinates jax.distributed; None: its own address.
    coordinator: str | None = None
    #: That port; 0: a free one.
    coordinator_port: int = 0
    #: The key of the launch; None: a new one.
    key: bytes | None = None
