"""This process's role: launch everything, or hold one server for a launcher on another node."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator

from dance_jax.config import ClusterSpec, UserError
from dance_jax.launch.agent.network import Network
from dance_jax.launch.agent.nodes import Nodes
from dance_jax.launch.agent.slurm_mpi import check_job, detected_job
from dance_jax.launch.control.channel import (
    ControlListener,
    bracketed,
    node_identity,
    server_identity,
)

#: Environment variable with the key of a launch, as an alternative to --key-file.
KEY_VARIABLE = "DANCE_JAX_KEY"
#: Default port at which node 0 listens for the other nodes.
NODE_PORT = 29401
_SHORTEST_KEY = 16


@dataclasses.dataclass(frozen=True)
class Role:
    """This process's part in a launch."""

    network: Network
    #: Rank of this node; None: this process starts every server, here and over ssh.
    node_rank: int | None = None

    @property
    def endpoint(self) -> str:
        """ZeroMQ endpoint at which node 0 listens for the other nodes."""
        host, port = self.network.control_addresses[0], self.network.control_port
        return f"tcp://{bracketed(host)}:{port}"

    @contextlib.contextmanager
    def gathered(
        self, spec: ClusterSpec, progress: Callable[[str, str], None]
    ) -> Iterator[Network]:
        """Wait for all nodes; yield the network with them; end them after the block.

        Args:
            spec: the servers.
            progress: called with (server's name, message).

        Raises:
            UserError: this node cannot listen, or another node does not connect.
        """
        network = self.network
        if self.node_rank is None:
            yield network
            return
        assert network.key is not None
        ranks = range(len(spec.servers))
        peers = [*map(node_identity, ranks), *map(server_identity, ranks)]
        with contextlib.closing(ControlListener(network.key, peers)) as listener:
            try:
                listener.listen(network.control_addresses, network.control_port)
            except OSError as error:
                raise UserError(
                    f"node 0 cannot listen at {self.endpoint}: {error}; the address of the hosts "
                    "file's first line must be this machine's, and --control-port a free port"
                ) from error
            with contextlib.closing(Nodes(spec, listener)) as nodes:
                nodes.meet(progress)
                yield dataclasses.replace(network, nodes=nodes)


def role(
    spec: ClusterSpec, network: Network, node_rank: int | None, key_file: pathlib.Path | None
) -> Role:
    """The role of this process, from the options and the environment.

    Args:
        spec: the servers.
        network: the settings from the options.
        node_rank: --node-rank; None: the rank in a Slurm or Open MPI job, if this process is in
            one.
        key_file: --key-file.

    Raises:
        UserError: the node does not exist, the job does not fit the servers, or there is no key.
    """
    job = detected_job() if node_rank is None else None
    if node_rank is None and job is None:
        if key_file is not None:
            raise UserError(
                "--key-file applies to --node-rank only: over ssh every launch makes its own key"
            )
        return Role(network)
    first = spec.servers[0].address
    if job is not None:
        check_job(job, spec)
        node_rank, first = job.rank, job.host
        network = dataclasses.replace(network, coordinator=job.coordinator)
    assert node_rank is not None
    if node_rank >= len(spec.servers):
        raise UserError(
            f"--node-rank {node_rank}: the hosts file has {len(spec.servers)} servers, "
            "numbered from 0"
        )
    network = dataclasses.replace(
        network,
        control_addresses=network.control_addresses or (first,),
        control_port=network.control_port or NODE_PORT,
        key=read_key(key_file),
    )
    return Role(network, node_rank)


def read_key(file: pathlib.Path | None) -> bytes:
    """Read the key that the user gave to all nodes, as 32 bytes.

    Raises:
        UserError: the key is missing or too short, or others may read its file.
    """
    if file is None:
        text, where = os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE
    else:
        where = f"--key-file {file}"
        try:
            if file.stat().st_mode & 0o077:
                raise UserError(f"{where}: other users can read the file; run chmod 600 on it")
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: cannot be read: {error}") from error
    if len(text.strip()) < _SHORTEST_KEY:
        raise UserError(
            f"{where}: the key {'is missing' if not text.strip() else 'is too short'}; give all "
            "nodes the same key (for example from openssl rand -hex 32), in a file (--key-file) or "
            f"in {KEY_VARIABLE}"
        )
    return hashlib.blake2b(text.strip().encode(), digest_size=32).digest()
