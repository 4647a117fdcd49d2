"""One server of the three-process test cluster: answers commands on stdin with pickles on stdout.

The cluster is started once for the whole test session; a command is a placement and one batch
per device, and every server runs the same commands in the same order. Before that, a server says
where it listens for the others, and is told where they do.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys

RANK, PORT, DEVICES = int(sys.argv[1]), sys.argv[2], tuple(map(int, sys.argv[3].split(",")))
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES[RANK]}"
replies = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what libraries print must not end up among the pickles

from dance_jax.models.connections import Listener  # noqa: E402

KEY = b"the key of this test"
names = [f"server-{rank}" for rank in range(len(DEVICES))]
listener = Listener(RANK, names, "127.0.0.1", KEY)
pickle.dump(listener.endpoint, replies)
replies.flush()
endpoints = pickle.load(sys.stdin.buffer)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_enable_preemption_service", False)
jax.distributed.initialize(f"127.0.0.1:{PORT}", len(DEVICES), RANK)

from dance_jax.engine.runner import Runner, cluster_mesh  # noqa: E402
from dance_jax.engine.staging import Staging, new_slots  # noqa: E402
from dance_jax.models import links_cpu, native  # noqa: E402
from dance_jax.models.collectives import Collectives  # noqa: E402
from dance_jax.models.topology import AXIS  # noqa: E402
from tests.cluster import tiny  # noqa: E402

native.register(sys.argv[4] or None)
mesh = cluster_mesh(DEVICES)
everyone = jax.shard_map(
    lambda: jax.lax.psum(jnp.ones(()), AXIS), mesh=mesh, in_specs=(), out_specs=PartitionSpec()
)
jax.jit(everyone)().block_until_ready()

usable = native.library() is not None
sockets = links_cpu.connect(RANK, names, listener, endpoints, KEY, usable=usable)
transports = {"collectives": Collectives(), "sockets": sockets}
runners: dict[tuple[str, str, str], Runner] = {}
staging: Staging | None = None
variant = ("collectives", "compute", "latent")
leveled = contextlib.ExitStack()
while True:
    command = pickle.load(sys.stdin.buffer)
    if command[0] == "stop":
        break
    if command[0] == "use":
        variant = command[1:]
        reply = transports[variant[0]].name
    elif command[0] == "place":
        layout = command[1]
        if variant in runners:
            runners[variant].place(layout)
        else:
            runners[variant] = tiny.runner(layout, RANK, transports[variant[0]], *variant[1:])
        staging = Staging(layout, RANK, runners[variant].form)
        reply = runners[variant].pools.bytes
    elif command[0] == "level router":
        if command[1]:
            leveled.enter_context(tiny.level_router(runners[variant]))
        else:
            leveled.close()
        reply = None
    elif command[0] == "stage":
        _, number, layout, ranks = command
        if RANK in ranks:
            weights = tiny.weights_of(layout, RANK, variant[2])
            needed = new_slots(staging.latest, layout, RANK)
            staging.add(number, layout, {place: weights[place] for place in needed})
        reply = None
    elif command[0] == "drop":
        reply = staging.drop(command[1]) if RANK in command[2] else None
    elif command[0] == "pool":
        places = tiny.weights_of(staging.layout, RANK, variant[2])
        reply = {place: runners[variant].pools.read(*place) for place in places}
    elif command[0] == "counters":
        reply = links_cpu.counters(len(DEVICES))
    else:
        reply = tiny.run(runners[variant], command[1][RANK], staging.tell())
        if number := reply[0]["loaded"]:
            batch = staging.take(number)
            runners[variant].pools.write(batch.writes)
            runners[variant].use_tables(batch.layout)
    pickle.dump(reply, replies)
    replies.flush()
