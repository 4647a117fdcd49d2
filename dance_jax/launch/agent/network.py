"""How the launcher reaches the servers, and starts their processes."""

from __future__ import annotations

import dataclasses
import pathlib

from dance_jax.config import ClusterSpec, ServerSpec
from dance_jax.launch.agent.nodes import Nodes
from dance_jax.launch.agent.process import ChildProcess, ServerProcess


@dataclasses.dataclass(frozen=True)
class Network:
    """Addresses, ports and the key of a launch, and the launchers on other nodes."""

    #: Configuration file for `ssh -F`.
    ssh_config: pathlib.Path | None = None
    #: Addresses of this machine that the servers connect to (the preflight finds them).
    control_addresses: tuple[str, ...] = ()
    #: TCP port of this process that the servers connect to; 0: a free port.
    control_port: int = 0
    #: host:port at which the first server coordinates jax.distributed; None: its own address.
    coordinator: str | None = None
    #: Port of that coordinator; 0: a free port.
    coordinator_port: int = 0
    #: The key of the launch; None: a new key.
    key: bytes | None = None
    #: Launchers that hold all servers but the first; None: this process starts every server, here
    #: or over ssh.
    nodes: Nodes | None = None

    def as_started(self, server: ServerSpec) -> ServerSpec:
        """The server, without ssh= if nodes hold the servers."""
        return server if self.nodes is None else dataclasses.replace(server, ssh=None)

    def any_remote(self, spec: ClusterSpec) -> bool:
        """Whether any server is on another machine, so that a preflight is needed.

        Nodes count as other machines.
        """
        return self.nodes is not None or any(server.ssh for server in spec.servers)

    def start(
        self,
        rank: int,
        server: ServerSpec,
        module: str,
        *,
        log_path: pathlib.Path | None = None,
        answers: bool = False,
        drains: bool = False,
        private: str = "",
    ) -> ServerProcess:
        """Start a process on a server's machine.

        Args:
            rank, server: the server.
            module: of this package, which the process runs.
            log_path: as for `ChildProcess`; the log of a node is on the node.
            answers: as for `ChildProcess`.
            drains: SIGTERM drains the process, so a node passes the signal on.
            private: directory that the child removes if its parent is killed; not used on another
                machine.

        Raises:
            UserError: the process cannot be started.
        """
        if self.nodes is not None and self.nodes.has(rank):
            return self.nodes.start(rank, module, answers=answers, drains=drains)
        return ChildProcess(
            self.as_started(server),
            module,
            log_path=log_path,
            ssh_config=self.ssh_config,
            answers=answers,
            private=private,
        )
