"""One server's engine process: `python -m dance_jax.launch.worker`, started by `Cluster`.

The order is what matters here: cores are limited while JAX makes its devices, because XLA sizes its
thread pools by them; all processes do one collective before anything else, because a first
collective of only some of them fails; then the engine loads, compiles, and steps together with all
others while any server has work.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import os
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

import msgspec
import zmq

from dance_jax.config import UserError
from dance_jax.engine.sequence import OutputDelta, Request
from dance_jax.launch import cores, protocol
from dance_jax.launch.protocol import Setup

if TYPE_CHECKING:
    from dance_jax.engine.engine import Engine

log = logging.getLogger("dance_jax.worker")

#: Seconds all servers have to find each other.
JOIN_TIMEOUT_S = 120


class Channel:
    """The socket to the parent; used by the main thread alone."""

    def __init__(self, endpoint: str, rank: int) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, b"server-%d" % rank)
        self.socket.setsockopt(zmq.LINGER, 1000)
        self.socket.connect(endpoint)

    def send(self, event: protocol.Event) -> None:
        self.socket.send(protocol.encode(event))

    def receive(self) -> protocol.Command:
        """Waits for the parent's next command."""
        return protocol.decode_command(self.socket.recv())

    @property
    def waiting(self) -> bool:
        """A command is there."""
        return bool(self.socket.poll(0))

    def close(self) -> None:
        """Sends what is left, for a second at most."""
        self.socket.close()
        self.context.term()


def main() -> None:
    """Reads the setup from standard input, serves until told to stop, and exits."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s"
    )
    logging.getLogger("jax").setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.WARNING)
    setup = msgspec.json.decode(_read_line(0), type=Setup)
    _end_with_parent(setup.private_dir)
    channel = Channel(setup.control, setup.rank)
    status = 0
    try:
        channel.send(protocol.Hello(os.getpid()))
        engine = _start(setup, channel)
        _serve(engine, channel)
    except BaseException as error:
        now = time.monotonic()
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        user = isinstance(error, UserError)
        channel.send(protocol.Failed(str(error) if user else message, user, now))
        status = 1
    channel.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: jax.distributed would wait at its exit for processes that may be gone.
    os._exit(status)


def _read_line(descriptor: int) -> bytes:
    """One line, unbuffered: what follows it stays in the pipe."""
    parts = []
    while (byte := os.read(descriptor, 1)) not in (b"", b"\n"):
        parts.append(byte)
    return b"".join(parts)


def _end_with_parent(private_dir: str) -> None:
    """Kills this process when standard input ends or the parent is another process."""
    parent = os.getppid()

    def watch() -> None:
        while True:
            readable, _, _ = select.select([0], [], [], 1.0)
            if (readable and not os.read(0, 1)) or os.getppid() != parent:
                shutil.rmtree(private_dir, ignore_errors=True)
                os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def _start(setup: Setup, channel: Channel) -> Engine:
    channel.send(protocol.Progress("joining", 0, 0))
    _join(setup)
    channel.send(protocol.Progress("loading", 0, 0))
    from dance_jax.engine.compile_cache import CompileCache
    from dance_jax.engine.engine import Engine
    from dance_jax.launch.plan import load_layout
    from dance_jax.models import kernels_cpu
    from dance_jax.models.checkpoint import Checkpoint
    from dance_jax.models.tokenizer import Tokenizer

    kernels_cpu.register(setup.expert_library)
    checkpoint = Checkpoint.open(setup.checkpoint)
    layout = load_layout(setup.layout)
    # The seed only reaches the step as an argument.
    shape = dataclasses.replace(setup.config, seed=0)
    threads = len(setup.cores)
    scope = (checkpoint.fingerprint, layout.devices, layout.slots_per_device, shape, threads)
    cache = CompileCache(setup.compile_dir, scope)
    engine = Engine(
        checkpoint,
        Tokenizer.load(setup.checkpoint),
        setup.spec,
        setup.rank,
        layout,
        setup.config,
        compile_cache=cache,
    )
    engine.warmup(lambda stage, done, total: channel.send(protocol.Progress(stage, done, total)))
    channel.send(protocol.Ready(cache.hits, cache.misses))
    return engine


def _join(setup: Setup) -> None:
    """Makes this process part of the cluster's jax.distributed job."""
    devices = setup.spec.devices[setup.rank]
    # Servers of one machine take its GPUs in their order; CPU devices are each process's own.
    first = sum(setup.spec.devices[: setup.rank]) if setup.platform == "cuda" else 0
    import jax

    # Gloo's address can be set nowhere else.
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

    jax.config.update("jax_platforms", setup.platform)
    # Off: JAX would catch SIGTERM and live on.
    jax.config.update("jax_enable_preemption_service", False)
    if setup.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", devices)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        make_collectives = _jax.make_gloo_tcp_collectives

        def at_address(distributed_client, hostname=None, interface=None):
            """Gloo would resolve this machine's host name, which may have no address."""
            return make_collectives(
                distributed_client=distributed_client,
                hostname=hostname or setup.address,
                interface=interface,
            )

        _jax.make_gloo_tcp_collectives = at_address
    log.info("JAX is imported; finding the others at %s", setup.coordinator)
    jax.distributed.initialize(
        setup.coordinator,
        num_processes=len(setup.spec.servers),
        process_id=setup.rank,
        coordinator_bind_address=setup.coordinator,
        initialization_timeout=JOIN_TIMEOUT_S,
        local_device_ids=list(range(first, first + devices)),
    )
    with cores.limited(setup.cores):
        log.info("all servers are there; devices: %s", ", ".join(map(str, jax.devices())))
    _first_collective(len(setup.spec.servers))


def _first_collective(num_servers: int) -> None:
    """A sum over all devices: gloo's first one needs everybody."""
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


def _serve(engine: Engine, channel: Channel) -> None:
    """Answers commands until told to stop."""
    while True:
        command = channel.receive()
        match command:
            case protocol.Stop():
                return
            case protocol.Work():
                _run(engine, channel, command.requests)
            case protocol.Abort():
                pass  # it came after the batch had ended


def _run(engine: Engine, channel: Channel, requests: list[Request]) -> None:
    """Steps together with all servers until none has work."""
    refused = []
    for request in requests:
        try:
            engine.add(request)
        except UserError as error:
            refused += [
                OutputDelta(
                    request.request_id, index, finish_reason="error", stop_reason=str(error)
                )
                for index in range(request.params.n)
            ]
    if refused:
        channel.send(protocol.Deltas(refused))
    active = True
    while active:
        if channel.waiting:
            match channel.receive():
                case protocol.Stop():
                    channel.close()
                    os._exit(0)
                case protocol.Abort():
                    engine.abort_all()
                case protocol.Work():
                    raise RuntimeError("work came before the last batch had ended")
        result = engine.step()
        active = result.active
        if result.outputs:
            channel.send(protocol.Deltas(result.outputs))
    channel.send(protocol.Done(msgspec.to_builtins(engine.stats())))


if __name__ == "__main__":
    main()
