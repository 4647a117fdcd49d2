"""Train the demo model for a given time; a stopped training resumes from its last checkpoint.

The learning rate rises, stays constant, and falls linearly to zero at the end of --minutes, which
is the total over all restarts. Checkpoints are written completely, then renamed.
"""

import argparse
import json
import os
import pickle
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from data import batches, unigram
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from model import AXIS, Config, init, learnt, loss
from optax import contrib
from tokenizer import DOMAINS

# (sequences, tokens of each sequence) in a batch; sequences get longer during the training
SHAPES = {"short": (16, 256), "middle": (8, 512), "wide": (4, 1024), "long": (2, 2048)}
SHORT_UNTIL, MIDDLE_UNTIL = 0.3, 0.7  # shares of the time
HELD_UNTIL = 0.3  # share of the time during which the initialised copying heads are kept fixed
LONG_EVERY = 8  # after the phase of short batches, every eighth batch is long
AVERAGED = ("balance", "dropped", "size")  # figures for the log, averaged over the devices
WARMUP_STEPS, DECAY_SHARE = 60, 0.45


def muon_axes(params: dict) -> dict:
    """Select Muon for matrices (one per expert), AdamW for embedding, head, router and norms."""

    def axes(path: tuple, leaf: jax.Array) -> contrib.MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path)
        if leaf.ndim < 2 or any(part in name for part in ("embed", "head", "router")):
            return None
        return contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


OPTIMIZER = contrib.muon(
    1e-2,
    ns_steps=4,
    consistent_rms=0.2,
    weight_decay=0.05,
    adam_learning_rate=4e-3,
    adam_b2=0.95,
    muon_weight_dimension_numbers=muon_axes,
)


def split(tree: dict | tuple, mesh: Mesh) -> dict | tuple:
    """Split each expert stack [E, ., .] over the mesh, so that a device updates its own experts."""

    def place(leaf: jax.Array) -> jax.Array:
        spec = P(AXIS) if leaf.ndim == 3 else P()
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


@partial(jax.jit, static_argnums=(4, 5, 6), donate_argnums=(0, 1))
def train_step(
    params: dict,
    state: tuple,
    tokens: jax.Array,
    rate: jax.Array,
    held: bool,
    config: Config,
    mesh: Mesh,
):
    """One update on tokens [B, T+1]; `rate` in [0, 1] scales the peak learning rates.

    Each device of the mesh takes its share of the batch's sequences; gradients are averaged. With
    `held`, the weights that `look_back` and `find_again` have set stay unchanged.
    """

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(AXIS)),
        out_specs=(P(), {"nll": P(AXIS)} | dict.fromkeys(AVERAGED, P())),
        check_vma=False,
    )
    def mean_gradient(params: dict, tokens: jax.Array):
        (_, logged), grads = jax.value_and_grad(loss, has_aux=True)(params, tokens, config)
        averaged = {name: jax.lax.pmean(logged[name], AXIS) for name in AVERAGED}
        return jax.lax.pmean(grads, AXIS), logged | averaged

    grads, logged = mean_gradient(params, tokens)
    updates, state = OPTIMIZER.update(split(grads, mesh), split(state, mesh), split(params, mesh))
    updates = jax.tree.map(lambda u: u * rate, updates)
    if held:
        updates = jax.tree.map(jnp.multiply, updates, learnt(params, config))
    params = jax.lax.with_sharding_constraint(
        optax.apply_updates(params, updates), NamedSharding(mesh, P())
    )
    return params, split(state, mesh), logged


def schedule(step: int, progress: float) -> float:
    """Return the share of the peak learning rate after a share `progress` of the time."""
    return max(0.0, min((step + 1) / WARMUP_STEPS, (1 - progress) / DECAY_SHARE, 1.0))


def shape(step: int, progress: float) -> str:
    """Return the name in SHAPES of the batch that the step trains on."""
    if progress < SHORT_UNTIL:
        return "short"
    if step % LONG_EVERY == 0:
        return "long"
    return "middle" if progress < MIDDLE_UNTIL else "wide"


def save(path: Path, params: dict, state: tuple, iterators: dict, counters: dict) -> None:
    arrays = jax.tree.map(np.asarray, (params, state))
    data = {name: it.get_state() for name, it in iterators.items()}
    with path.with_suffix(".new").open("wb") as file:
        pickle.dump({"arrays": arrays, "data": data, "counters": counters}, file)
    os.replace(path.with_suffix(".new"), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of data.py")
    parser.add_argument(
        "--minutes", type=float, required=True, help="total minutes of training, over all restarts"
    )
    parser.add_argument("--save-every", type=float, default=3, help="minutes between checkpoints")
    parser.add_argument("--devices", type=int, default=os.cpu_count(), help="cores to train on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = jax.make_mesh((args.devices,), (AXIS,), axis_types=(AxisType.Auto,))
    config = Config()
    path = args.work / "checkpoint.pickle"
    iterators = {
        name: batches(args.work / "tokens", length, batch, args.seed + 100 * i)
        for i, (name, (batch, length)) in enumerate(SHAPES.items())
    }
    counters = {"step": 0, "seconds": 0.0, "tokens": 0}
    if path.exists():
        saved = pickle.loads(path.read_bytes())
        params, state = jax.tree.map(jnp.asarray, saved["arrays"])
        counters = saved["counters"]
        for name, iterator in iterators.items():
            iterator.set_state(saved["data"][name])
        print(f"resumed at step {counters['step']}", flush=True)
    else:
        params = init(
            config, jax.random.key(args.seed), unigram(args.work / "tokens", config.vocab)
        )
        state = OPTIMIZER.init(params)

    log = (args.work / "train_log.jsonl").open("a")
    groups = [*DOMAINS, "repeated"]
    window: dict[str, list] = {g: [] for g in groups}
    last_save = counters["seconds"]
    while (progress := counters["seconds"] / (60 * args.minutes)) < 1:
        began = time.monotonic()
        name = shape(counters["step"], progress)
        batch = next(iterators[name])
        rate, held = schedule(counters["step"], progress), progress < HELD_UNTIL
        tokens = jnp.asarray(batch["tokens"])
        params, state, logged = train_step(
            params, state, tokens, jnp.float32(rate), held, config, mesh
        )
        losses = np.asarray(logged["nll"])
        for domain, value in zip(batch["domain"], losses, strict=True):
            window[groups[domain]].append(float(value))
        counters["step"] += 1
        counters["tokens"] += losses.size * SHAPES[name][1]
        counters["seconds"] += time.monotonic() - began
        if counters["step"] % 20 == 0:
            row = {k: round(v, 1) for k, v in counters.items()} | {"rate": round(rate, 3)}
            row |= {d: round(float(np.mean(v)), 3) for d, v in window.items() if v}
            row |= {k: round(float(logged[k]), 4) for k in AVERAGED}
            print(json.dumps(row), file=log, flush=True)
            window = {g: [] for g in groups}
        if counters["seconds"] - last_save > 60 * args.save_every:
            save(path, params, state, iterators, counters)
            last_save = counters["seconds"]
    save(path, params, state, iterators, counters)
    print(f"done: {counters}", flush=True)


if __name__ == "__main__":
    main()
