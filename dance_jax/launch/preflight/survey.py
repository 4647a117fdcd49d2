"""What the preflight learned about servers and links."""

from __future__ import annotations

import dataclasses

from dance_jax.config import ServerSpec
from dance_jax.launch.preflight.messages import Link, Machine

#: Links by (source rank, target rank).
Links = dict[tuple[int, int], Link]


@dataclasses.dataclass(frozen=True)
class Offset:
    """A machine's clock relative to this machine's."""

    #: Seconds by which the clock is ahead.
    seconds: float
    #: Possible error of that in seconds: half a round trip.
    uncertainty: float


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
    """The answers of one server's machine."""

    server: ServerSpec
    #: None if the machine did not answer; `problem` then gives the reason.
    machine: Machine | None = None
    clock: Offset | None = None
    problem: str = ""
    #: Seconds until the first answer.
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.server.name

    @property
    def host(self) -> str:
        """Equal for servers whose traffic uses the same network interfaces."""
        known = self.machine.network_id if self.machine else ""
        return known or self.server.address

    @property
    def memory_of(self) -> str:
        """Equal for servers that share memory."""
        known = self.machine.machine_id if self.machine else ""
        return known or (self.server.ssh.host if self.server.ssh else "")


@dataclasses.dataclass
class Measurements:
    """Results of the measurements between servers."""

    links: Links
    #: By rank, the port at which the server listened.
    ports: dict[int, int]
    #: By rank, why a server could not listen.
    deaf: dict[int, str]
    #: By rank, why a server that had answered could not be asked to measure.
    lost: dict[int, str] = dataclasses.field(default_factory=dict)
    #: Links whose rates should have been measured but were not, because time ran out.
    left_out: int = 0
