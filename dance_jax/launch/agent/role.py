"""What this process does: launch everything, or hold one server for a launcher on another node."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable

from dance_jax.config import ClusterSpec, UserError
from dance_jax.launch.agent.jobs import check_job, detected_job
from dance_jax.launch.agent.network import Network
from dance_jax.launch.agent.node import Nodes
from dance_jax.launch.control.channel import ControlListener, bracketed

#: Where the key of a launch may be, besides --key-file.
KEY_VARIABLE = "DANCE_JAX_KEY"
#: Where node 0 listens for the other nodes, unless it is told otherwise.
NODE_PORT = 29401
_SHORTEST_KEY = 16


@dataclasses.dataclass(frozen=True)
class Role:
    """This process's part in a launch."""

    spec: ClusterSpec
    network: Network
    #: Number of this node; None: this process starts every server, here and over ssh.
    node: int | None = None

    @property
    def endpoint(self) -> str:
        """Where node 0 listens, for the other nodes."""
        host, port = self.network.control_addresses[0], self.network.control_port
        return f"tcp://{bracketed(host)}:{port}"

    def gather_nodes(self, progress: Callable[[str, str], None]) -> Nodes | None:
        """As node 0, waits for all other nodes; None without --node-rank.

        Raises:
            UserError: it cannot listen, or a node does not call.
        """
        if self.node is None:
            return None
        network = self.network
        assert network.key is not None
        listener = ControlListener(network.key)
        try:
            listener.listen(network.control_addresses, network.control_port)
            nodes = Nodes(self.spec, listener)
            nodes.meet(progress)
        except OSError as error:
            listener.close()
            raise UserError(
                f"node 0 cannot listen at {self.endpoint}: {error}; the first line's address must "
                "be this machine's, and --control-port a free port"
            ) from error
        except BaseException:
            listener.close()
            raise
        return nodes


def role(
    spec: ClusterSpec, network: Network, node: int | None, key_file: pathlib.Path | None
) -> Role:
    """The role that options and environment give this process.

    Args:
        spec: the servers.
        network: as the options have it.
        node: --node-rank; None: Slurm's or Open MPI's number, if this is one of their jobs.
        key_file: --key-file.

    Raises:
        UserError: there is no such node, the job does not fit the servers, or the key is missing.
    """
    job = detected_job() if node is None else None
    if node is None and job is None:
        if key_file is not None:
            raise UserError(
                "--key-file is for --node-rank: over ssh every launch makes its own key"
            )
        return Role(spec, network)
    first = spec.servers[0].address
    if job is not None:
        check_job(job, spec)
        node, first = job.rank, job.host
        network = dataclasses.replace(network, coordinator=job.coordinator)
    assert node is not None
    if node >= len(spec.servers):
        raise UserError(
            f"--node-rank {node}: the hosts file has {len(spec.servers)} servers, numbered from 0"
        )
    network = dataclasses.replace(
        network,
        control_addresses=network.control_addresses or (first,),
        control_port=network.control_port or NODE_PORT,
        key=read_key(key_file),
    )
    # Each server is a process of its own node.
    servers = tuple(dataclasses.replace(server, ssh=None) for server in spec.servers)
    return Role(ClusterSpec(servers), network, node)


def read_key(file: pathlib.Path | None) -> bytes:
    """The key that the user gave to all nodes, as 32 bytes.

    Raises:
        UserError: there is none, it is short, or others may read its file.
    """
    if file is None:
        text, where = os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE
    else:
        where = f"--key-file {file}"
        try:
            if file.stat().st_mode & 0o077:
                raise UserError(f"{where}: others can read it; chmod 600 it")
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: cannot be read: {error}") from error
    if len(text.strip()) < _SHORTEST_KEY:
        raise UserError(
            f"{where}: {'is empty' if not text.strip() else 'is too short'}; all nodes need the "
            "same key, made with e.g. openssl rand -hex 32, in a file (--key-file) or in "
            f"{KEY_VARIABLE}"
        )
    return hashlib.blake2b(text.strip().encode(), digest_size=32).digest()
