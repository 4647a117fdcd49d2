"""One server of the three-process test cluster: answers commands on stdin with pickles on stdout.

The cluster is started once for the whole test session. Every server runs the same commands in the
same order. All servers share a jax.distributed job, which expert calls do not use. At the start,
each server sends its endpoint and receives the endpoints of all servers.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import sys
import threading

RANK, PORT, DEVICES = int(sys.argv[1]), sys.argv[2], tuple(map(int, sys.argv[3].split(",")))
os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={DEVICES[RANK]}"
replies = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # output of libraries must not mix with the pickles

from dance_jax.models.connections import Connections, Credentials, Identity  # noqa: E402

CREDENTIALS = Credentials(b"the key of this test", Identity("a model", "a format", "a type"))
names = [f"server-{rank}" for rank in range(len(DEVICES))]
connections = Connections(RANK, names, "127.0.0.1", CREDENTIALS)
pickle.dump(connections.endpoint, replies)
replies.flush()
connections.endpoints = pickle.load(sys.stdin.buffer)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_enable_preemption_service", False)
jax.distributed.initialize(f"127.0.0.1:{PORT}", len(DEVICES), RANK)

from dance_jax.engine import runner as runner_module  # noqa: E402
from dance_jax.engine.runner import Runner, cluster_mesh  # noqa: E402
from dance_jax.engine.staging import Staging, new_slots  # noqa: E402
from dance_jax.models import calls, host_state, native  # noqa: E402
from dance_jax.models.collectives import Collectives  # noqa: E402
from dance_jax.models.topology import AXIS  # noqa: E402
from dance_jax.placement.core import Layout  # noqa: E402
from tests.cluster import tiny  # noqa: E402

native.register(sys.argv[4] or None)
library = native.library()
mesh = cluster_mesh(DEVICES)
everyone = jax.shard_map(
    lambda: jax.lax.psum(jnp.ones(()), AXIS), mesh=mesh, in_specs=(), out_specs=PartitionSpec()
)
jax.jit(everyone)().block_until_ready()


def patient(server: type) -> type:
    """Raise the timeouts, so that a busy machine does not look like a lost server."""
    return type(
        server.__name__,
        (server,),
        {"__init__": functools.partialmethod(server.__init__, repeat_s=30.0, fail_s=60.0)},
    )


runner_module.CallServer = patient(calls.CallServer)
runner_module.CallSpec = patient(host_state.CallSpec)
#: With "mixed", the first server calls by the C++ library and the others call by the host.
transports = {"collectives": Collectives(), "calls": None, "mixed": None}


class Server:
    """The server; its methods are the commands."""

    def __init__(self) -> None:
        self.runners: dict[tuple[str, str, str], Runner] = {}
        self.leveled = contextlib.ExitStack()
        self.places = 0

    @property
    def runner(self) -> Runner:
        return self.runners[self.variant]

    def use(self, *variant: str) -> None:
        self.variant = variant
        native._library = None if variant[0] == "mixed" and RANK > 0 else library

    def place(self, layout: Layout) -> list[int]:
        """Apply a layout: build new pools and, for expert calls, new connections."""
        if self.variant in self.runners:
            runner = self.runner
            runner.pools = runner._build_pools(layout)
            runner.calls = runner._call_server()
            runner.use_tables(layout)
        else:
            transport, *more = self.variant
            self.runners[self.variant] = tiny.runner(layout, RANK, transports[transport], *more)
        self.staging = Staging(layout, RANK, self.runner.form)
        self.places += 1
        if self.runner.calls is not None:
            # Connections of the previous placement lead to call servers that no longer exist.
            calls.connect(self.runner.calls, connections, topic=f"calls {self.places}")
        return self.runner.pools.bytes

    def level_router(self, level: bool) -> None:
        if level:
            self.leveled.enter_context(tiny.level_router(self.runner))
        else:
            self.leveled.close()

    def stage(self, number: int, layout: Layout, ranks: tuple[int, ...]) -> None:
        """Load a batch, if this server is among `ranks`."""
        if RANK not in ranks:
            return
        weights = tiny.weights_of(layout, RANK, self.variant[2])
        needed = new_slots(self.staging.latest, layout, RANK)
        batch = self.staging.add(number, layout, {place: weights[place] for place in needed})
        if self.runner.calls is not None:
            self.runner.pools.write(batch.writes)
            self.runner.stage_tables(layout, number)

    def commit(self, number: int, ranks: tuple[int, ...]) -> None:
        """Note that all servers have loaded a batch, if this server is among `ranks`."""
        if RANK not in ranks:
            return
        if self.runner.calls is None:
            self.staging.commit(number)
        else:
            self.runner.use_tables(self.staging.take(number).layout, number)

    def drop(self, number: int, ranks: tuple[int, ...]) -> bool | None:
        if RANK not in ranks:
            return None
        self.runner.drop_tables(number)
        return self.staging.drop(number)

    def believe(self, layout: Layout, rank: int) -> None:
        """Give one server a table that may be wrong."""
        if rank == RANK:
            self.runner.use_tables(layout)

    def learn(self, layout: Layout, rank: int, seconds: float) -> None:
        """Like `believe`, but after a delay, during the next step."""
        if rank == RANK:
            threading.Timer(seconds, self.runner.use_tables, [layout]).start()

    def pool(self) -> dict:
        places = tiny.weights_of(self.staging.layout, RANK, self.variant[2])
        return {place: self.runner.pools.read(*place) for place in places}

    def counters(self) -> calls.Counters:
        assert self.runner.calls is not None
        return self.runner.calls.counters()

    def step(self, commands: list) -> list[dict]:
        reply = tiny.run(self.runner, commands[RANK], self.staging.tell())
        if number := reply[0]["loaded"]:
            batch = self.staging.take(number)
            self.runner.pools.write(batch.writes)
            self.runner.use_tables(batch.layout, number)
        return reply


server = Server()
while True:
    name, *arguments = pickle.load(sys.stdin.buffer)
    pickle.dump(getattr(server, name)(*arguments), replies)
    replies.flush()
