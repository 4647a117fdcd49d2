"""Make the devices of a server's process, alone or as part of a jax.distributed job."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable

from dance_jax.config import UserError
from dance_jax.launch.control.channel import bracketed
from dance_jax.launch.control.protocol import Setup
from dance_jax.launch.worker import cores, environment
from dance_jax.models.connections import Connections, Credentials

log = logging.getLogger("dance_jax.worker")

#: Seconds for all servers to find each other.
JOIN_TIMEOUT_S = 120


def coordinator_endpoint(setup: Setup) -> str:
    """host:port at which this server would coordinate jax.distributed."""
    address = own_address(setup)
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, setup.coordinator_port))
        except OSError as error:
            port = f"port {setup.coordinator_port}" if setup.coordinator_port else "a port"
            raise UserError(f"{address}: cannot listen on {port}: {error}") from error
        port = probe.getsockname()[1]
    return f"{bracketed(address)}:{port}"


def listen(setup: Setup, credentials: Credentials) -> Connections:
    """Listen for connections from other servers with the same credentials."""
    address = own_address(setup)
    try:
        connections = Connections(setup.rank, setup.spec.names, address, credentials)
    except OSError as error:
        raise UserError(f"{address}: cannot listen on a port: {error}") from error
    connections.rates = [server.bandwidth for server in setup.spec.servers]
    return connections


def own_address(setup: Setup) -> str:
    """Address at which this server listens for the others."""
    address = setup.spec.servers[setup.rank].address
    return "127.0.0.1" if address == "localhost" else address


def join(setup: Setup, coordinator: str | None) -> int:
    """Make the devices of this process.

    Args:
        coordinator: of the jax.distributed job that all servers form; None: each server is alone.

    Returns:
        Number of cores that the thread pools are sized for.
    """
    server = setup.spec.servers[setup.rank]
    # CPU devices belong to each process; with gpus=, the process sees only its own GPUs.
    shared = server.platform == "cuda" and not server.gpus
    first = setup.first_gpu if shared else 0
    mine = cores.share(cores.available(), setup.machine_devices)[setup.machine_index]
    import jax

    jax.config.update("jax_platforms", server.platform)
    # Disabled, because JAX would catch SIGTERM and keep running.
    jax.config.update("jax_enable_preemption_service", False)
    if server.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", server.devices)
    if coordinator is not None:
        _initialize(setup, coordinator, range(first, first + server.devices))
    elif shared:
        jax.config.update("jax_cuda_visible_devices", _listed(range(first, first + server.devices)))
    with cores.limited(mine):
        log.info("devices: %s", ", ".join(map(str, jax.devices())))
    if coordinator is not None:
        _first_collective(len(setup.spec.servers))
    return len(mine)


def _listed(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _initialize(setup: Setup, coordinator: str, devices: Iterable[int]) -> None:
    """Join the cluster's jax.distributed job with these devices."""
    import jax

    # The address of gloo can be set only through this module.
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

    if setup.spec.platform == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        make_collectives = _jax.make_gloo_tcp_collectives

        def at_address(distributed_client, hostname=None, interface=None):
            """Replace the default of gloo, this machine's host name, which may not resolve."""
            return make_collectives(
                distributed_client=distributed_client,
                hostname=hostname or own_address(setup),
                interface=interface,
            )

        _jax.make_gloo_tcp_collectives = at_address
    environment.bypass_proxy(coordinator.rpartition(":")[0].strip("[]"))
    log.info("JAX is imported; finding the others at %s", coordinator)
    jax.distributed.initialize(
        coordinator,
        num_processes=len(setup.spec.servers),
        process_id=setup.rank,
        coordinator_bind_address=coordinator,
        initialization_timeout=JOIN_TIMEOUT_S,
        local_device_ids=list(devices),
    )


def _first_collective(num_servers: int) -> None:
    """Sum over all devices: the first collective of gloo needs all processes."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("all",))
    ones = [jax.device_put(np.ones(1, np.int32), device) for device in jax.local_devices()]
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    everyone = jax.make_array_from_single_device_arrays((mesh.size,), sharding, ones)
    total = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(jnp.sum(x), "all"),
            mesh=mesh,
            in_specs=PartitionSpec("all"),
            out_specs=PartitionSpec(),
        )
    )(everyone)
    if int(total) != mesh.size or jax.process_count() != num_servers:
        raise RuntimeError(f"{int(total)} of {mesh.size} devices took part in the first sum")
    log.info("joined: %d devices of %d servers", mesh.size, num_servers)
