"""A whole run of prompts, from the head: what launch does, with a stop between start and run.

Says `ready` on standard output when the servers are, runs when it is sent a line, and answers with
one line of JSON; the servers are ended when standard input ends.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys

from dance_jax.cache import default_cache_dir
from dance_jax.launch.cluster import Cluster, Network
from dance_jax.launch.defaults import demo_dir, engine_config
from dance_jax.launch.hosts import read_hosts
from dance_jax.launch.plan import make_plan
from dance_jax.launch.prompts import read_prompts
from dance_jax.launch.run import run_prompts
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import ensure_converted
from dance_jax.models.tokenizer import Tokenizer
from dance_jax.placement.activations import Activations


def main(hosts: str, ssh_config: str, address: str, prompts: str, activations: str, wire: str):
    """
    Args:
        hosts, ssh_config, prompts, activations: files; address: the head's.
        wire: a wire dtype.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = read_hosts(hosts)
    checkpoint = Checkpoint.open(ensure_converted(demo_dir(), default_cache_dir() / "models"))
    config = engine_config(checkpoint.config, wire_dtype=wire)
    plan = make_plan(spec, checkpoint, config, "dance", Activations.load(activations))
    network = Network(pathlib.Path(ssh_config), (address,))
    cache = default_cache_dir()
    cluster = Cluster(spec, checkpoint, plan.layout, config, cache_dir=cache, network=network)
    with cluster:
        print("ready", file=answers, flush=True)
        sys.stdin.readline()
        tokenizer = Tokenizer.load(checkpoint.path)
        result = run_prompts(cluster, plan, tokenizer, read_prompts(prompts, spec, 128))
        traffic = result.traffic
        report = {
            "prompts": len(result.outputs),
            "tokens": int(traffic.tokens.sum()),
            "seconds": result.seconds,
            "local_share": result.local_share,
            "transfers": traffic.transfers.sum(0).tolist(),
            "hidden": checkpoint.config.hidden_size,
            "payload_bytes": int(traffic.bytes_sent.sum()),
        }
        print(json.dumps(report), file=answers, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(*sys.argv[1:])
