"""One server of the three-process test cluster: answers commands on stdin with pickles on stdout.

The cluster is started once for the whole test session; a command is a placement and one batch
per device, and every server runs the same commands in the same order.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys

RANK, PORT, DEVICES = int(sys.argv[1]), sys.argv[2], tuple(map(int, sys.argv[3].split(",")))
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={DEVICES[RANK]} --xla_backend_optimization_level=0"
)
replies = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what libraries print must not end up among the pickles

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_enable_preemption_service", False)
jax.distributed.initialize(f"127.0.0.1:{PORT}", len(DEVICES), RANK)

from dance_jax.engine.runner import Runner, cluster_mesh  # noqa: E402
from dance_jax.models import kernels_cpu  # noqa: E402
from dance_jax.models.topology import AXIS  # noqa: E402
from tests.cluster import tiny  # noqa: E402

kernels_cpu.register(sys.argv[4] or None)
mesh = cluster_mesh(DEVICES)
everyone = jax.shard_map(
    lambda: jax.lax.psum(jnp.ones(()), AXIS), mesh=mesh, in_specs=(), out_specs=PartitionSpec()
)
jax.jit(everyone)().block_until_ready()

runner: Runner | None = None
leveled = contextlib.ExitStack()
while True:
    command = pickle.load(sys.stdin.buffer)
    if command[0] == "stop":
        break
    if command[0] == "place":
        layout = command[1]
        if runner is None:
            runner = tiny.runner(layout, RANK)
        else:
            runner.place(layout)
        reply = [[shard.data.shape for shard in leaf.addressable_shards] for leaf in runner.pool]
    elif command[0] == "level router":
        assert runner is not None
        if command[1]:
            leveled.enter_context(tiny.level_router(runner))
        else:
            leveled.close()
        reply = None
    else:
        assert runner is not None
        reply = tiny.run(runner, command[1][RANK])
    pickle.dump(reply, replies)
    replies.flush()
