"""Tiny random models for cluster tests: their runners, and single steps with raw token rows.

All models have the same numbers of MoE layers and experts, so one layout fits all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np

from dance_jax.config import EngineConfig
from dance_jax.engine.compile_cache import CompileCache
from dance_jax.engine.runner import Runner
from dance_jax.engine.scheduler import Row, StepPlan
from dance_jax.engine.sequence import SamplingParams, Sequence
from dance_jax.engine.step import BUSY, token_slice
from dance_jax.models import model_config, native
from dance_jax.models.build import fill, matrix_shapes
from dance_jax.models.experts import ExpertFormat, expert_format
from dance_jax.models.formats import Formats, WeightFormat
from dance_jax.models.lock_step_messages import Transport
from dance_jax.models.random_weights import (
    Held,
    random_expert_tensors,
    random_trunk_tensors,
)
from dance_jax.models.rounding import ROUNDED
from dance_jax.models.tensors import arrays_of, parts_of, trunk_rules
from dance_jax.models.trunk import Trunk
from dance_jax.placement.core import Layout
from tests.quick import SharedCache
from tests.random_models import init_random, random_expert
from tests.tiny_models import HYBRID, OSS, SERVED

CONFIG = model_config(SERVED)
#: Everything that this process has compiled: most parts of a step are the same in all variants.
COMPILED: dict[str, jax.stages.Compiled] = {}
#: A model for each mixer, and a quantised model.
MODELS = {
    "latent": CONFIG,
    "grouped": model_config(OSS),
    "recurrent": model_config(HYBRID),
    "quantised": CONFIG,
}
#: Formats with four-bit experts and an eight-bit trunk.
QUANTISED = Formats(
    dict.fromkeys(("w_gate", "w_up", "w_down"), ROUNDED["int4"]),
    {path: ROUNDED["int8"] for path in matrix_shapes(CONFIG) if not path.endswith("router.weight")},
)
ENGINE = EngineConfig(
    max_model_len=128,
    max_num_seqs=4,
    decode_rows=(4,),
    slice_rows=(4,),
    block_size=16,
    route_sample=64,
)
DECODE, SLICE = ENGINE.buckets
LAYERS, EXPERTS = len(CONFIG.moe_layers), CONFIG.num_experts


def form_of(model: str) -> ExpertFormat:
    """Format of the experts in a slot."""
    return expert_format(MODELS[model], QUANTISED.experts if model == "quantised" else "float32")


def trunk_of(model: str) -> Trunk:
    """The trunk with weights of seed 0, rounded if the model is quantised."""
    config = MODELS[model]
    if model != "quantised":
        return init_random(config, seed=0)
    rules = {rule.source: rule for rule in trunk_rules(config)}
    forms = {path: WeightFormat("float32") for path in matrix_shapes(config)} | QUANTISED.trunk
    weights = (
        array
        for name, tensor in random_trunk_tensors(config, seed=0)
        for path, part in parts_of(rules[name], Held(tensor))
        for array in arrays_of(path, part, forms.get(path)).items()
    )
    return fill(config, "float32", weights, forms)


@functools.cache
def expert_tensors(model: str) -> dict[str, np.ndarray]:
    return dict(random_expert_tensors(MODELS[model], seed=0))


def read_experts(model: str, pairs: list[tuple[int, int]]):
    """Stand-in for a checkpoint: experts that belong to the weights of `trunk_of`."""
    config, form = MODELS[model], form_of(model)
    tensors = expert_tensors(model)
    return [(n, random_expert(config, tensors, *pair, form)) for n, pair in enumerate(pairs)]


def runner(
    layout: Layout,
    rank: int,
    transport: Transport | None = None,
    wire_dtype: str = "float32",
    model: str = "latent",
    compile_cache: CompileCache | None = None,
) -> Runner:
    """The runner of a server; by default its steps are compiled quickly."""
    config = dataclasses.replace(ENGINE, wire_dtype=wire_dtype)
    blocks = config.max_num_seqs * config.max_blocks
    scope = transport and type(transport).__name__, native.registered(), wire_dtype, model
    cache = compile_cache or SharedCache(COMPILED, (scope, rank, layout.devices))
    return Runner(
        MODELS[model],
        trunk_of(model),
        form_of(model),
        functools.partial(read_experts, model),
        layout,
        rank,
        config,
        blocks,
        cache,
        transport,
        order=order_of(rank, len(layout.devices)),
    )


def order_of(rank: int, servers: int) -> list[int]:
    """Order in which a server prefers to call the others: the next one first, itself last."""
    return [(rank + step) % servers for step in range(1, servers + 1)]


def weights_of(
    layout: Layout, rank: int, model: str = "latent"
) -> dict[tuple[int, int], tuple[np.ndarray, ...]]:
    """Expected weights in all used slots of a server, by (local device, slot)."""
    found = {}
    for device in range(layout.devices[rank]):
        table = layout.experts_of(rank, device)
        used = np.flatnonzero(table[:, 0] >= 0).tolist()
        experts = read_experts(model, [tuple(table[slot]) for slot in used])
        found |= {(device, used[place]): weights for place, weights in experts}
    return found


@contextlib.contextmanager
def level_router(runner: Runner) -> Iterator[None]:
    """Give all experts the same score, so that every token chooses those with lowest numbers."""
    kept = runner.state

    def level(path, leaf):
        return leaf * 0 if any(getattr(key, "key", None) == "router" for key in path) else leaf

    runner.state = jax.tree.map_with_path(level, kept)
    try:
        yield
    finally:
        runner.state = kept


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens that one device computes: (number of the sequence, start, tokens) for each sequence.

    Each number has its own blocks. A single token with start above 0 is a decode row.
    """

    rows: tuple[tuple[int, int, tuple[int, ...]], ...]


def rows_of(bucket: tuple[int, int], tokens: Tokens) -> list[list[Row]]:
    """The rows of each sequence: decode rows first, then rows of the prefill slice."""
    decode, size = 0, ENGINE.block_size
    piece = bucket[0]
    found = []
    for number, start, ids in tokens.rows:
        sequence = Sequence("r", 0, list(ids), SamplingParams(temperature=0), 1, 0)
        first = 1 + number * ENGINE.max_blocks
        sequence.blocks = list(range(first, first + ENGINE.max_blocks))
        sequence.state_slots = 1 + number, 1 + number
        if not bucket[1] or (start > 0 and len(ids) == 1):
            found.append([Row(sequence, decode, decode, start, list(ids), True)])
            decode += 1
            continue
        parts = [list(ids[at : at + size]) for at in range(0, len(ids), size)]
        last = len(parts) - 1
        found.append(
            [
                Row(sequence, piece + i, piece, start + i * size, part, i == last)
                for i, part in enumerate(parts)
            ]
        )
        piece += len(parts)
    return found


def run(
    runner: Runner, command: tuple[tuple[int, int], list[Tokens]], loaded: int = 0
) -> list[dict]:
    """Run a step; for each device, the logits and routes of its sequences and the traffic."""
    bucket, devices = command
    rows = [rows_of(bucket, tokens) for tokens in devices]
    entries = tuple(tuple(row for parts in device for row in parts) for device in rows)
    before = by_calls(runner)
    outcomes, extras = runner.run(StepPlan(*bucket, entries), work=BUSY, loaded=loaded)
    sent_ln, away = (now - then for now, then in zip(by_calls(runner), before, strict=True))
    replies = []
    for device, outcome, logits, routes in zip(
        rows, outcomes, runner.read(extras.logits), runner.read(extras.routes), strict=True
    ):
        replies.append(
            {
                "logits": logits[: len(device)],
                "token": outcome.token[: len(device)],
                "routes": [
                    np.concatenate([routes[token_slice(bucket, ENGINE, row)] for row in parts])
                    for parts in device
                ],
                "failed": bool(outcome.any_failed),
                "sent": sent_ln + outcome.crossed.rows[:, runner.topology.rank],
                "away": away + outcome.crossed.away.sum(),
                "rows": outcome.crossed.rows,
                "bytes": outcome.crossed.bytes[:, runner.topology.rank],
                "loaded": int(outcome.crossed.loaded),
            }
        )
    return replies


def by_calls(runner: Runner) -> tuple[np.ndarray | int, float]:
    """Hidden states sent by calls so far: int64 [l, n], to each server, and in total to any server.

    Zeros if the exchange does not use calls.
    """
    if runner.calls is None:
        return 0, 0.0
    counters = runner.calls.counters()
    return counters.rows, counters.sums.rows_away
