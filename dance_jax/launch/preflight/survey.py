"""What is known of servers and links after they were asked."""

from __future__ import annotations

import dataclasses

from dance_jax.config import ServerSpec
from dance_jax.launch.preflight.messages import Link, Machine

#: Links by (rank from, rank to).
Links = dict[tuple[int, int], Link]


@dataclasses.dataclass(frozen=True)
class Offset:
    """A machine's clock, compared with that of this one."""

    #: How far it is ahead.
    seconds: float
    #: By how much that may be wrong: half a round trip.
    uncertainty: float


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
    """What one server's machine has answered."""

    server: ServerSpec
    #: None: it cannot be asked, because of `problem`.
    machine: Machine | None = None
    clock: Offset | None = None
    problem: str = ""
    #: Seconds until its first answer.
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.server.name

    @property
    def host(self) -> str:
        """Equal for servers whose traffic takes the same network interfaces."""
        known = self.machine.network_id if self.machine else ""
        return known or self.server.address

    @property
    def memory_of(self) -> str:
        """Equal for servers that share their memory."""
        known = self.machine.machine_id if self.machine else ""
        return known or (self.server.ssh.host if self.server.ssh else "")


@dataclasses.dataclass
class Measurements:
    """What the servers found when they talked to each other."""

    links: Links
    #: By rank, the port each listened on.
    ports: dict[int, int]
    #: By rank, why a server could not listen.
    deaf: dict[int, str]
    #: Links whose rates were wanted and not measured, because time ran out.
    left_out: int = 0
