"""A tiny random DeepSeek-V2 for cluster tests: its runner, and one step of raw token rows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from dance_jax.config import EngineConfig
from dance_jax.engine.compile_cache import CompileCache
from dance_jax.engine.runner import Runner
from dance_jax.engine.scheduler import Row, StepPlan
from dance_jax.engine.sequence import SamplingParams, Sequence
from dance_jax.models import ModelConfig
from dance_jax.models.build import init_random
from dance_jax.models.messages import Transport
from dance_jax.models.random_weights import random_expert_tensors
from dance_jax.placement.core import Layout
from tests.tiny_models import SERVED

CONFIG = ModelConfig.from_hf(SERVED)
ENGINE = EngineConfig(
    max_model_len=128, max_num_seqs=4, decode_rows=(4,), prefill=((2, 32),), route_sample=64
)
LAYERS, EXPERTS = len(CONFIG.moe_layers), CONFIG.num_experts


def read_experts(pairs: list[tuple[int, int]]):
    """Stands in for a checkpoint: the same weights as `init_random` goes with."""
    tensors = dict(random_expert_tensors(CONFIG, seed=0))
    stacks = []
    for part in ("gate_proj", "up_proj", "down_proj"):
        names = (
            f"model.layers.{CONFIG.moe_layers[layer]}.mlp.experts.{expert}.{part}.weight"
            for layer, expert in pairs
        )
        stacks.append(np.stack([tensors[name].T for name in names]))
    return tuple(stacks)


def runner(
    layout: Layout, rank: int, transport: Transport | None = None, wire_dtype: str = "compute"
) -> Runner:
    trunk = init_random(CONFIG, seed=0)
    config = dataclasses.replace(ENGINE, wire_dtype=wire_dtype)
    cache = CompileCache(None)
    return Runner(CONFIG, trunk, read_experts, layout, rank, config, cache, transport)


@contextlib.contextmanager
def level_router(runner: Runner) -> Iterator[None]:
    """Within it all experts score the same, so that every token chooses the lowest numbers."""
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
    """Rows of one device: (slot, start, tokens) each."""

    rows: tuple[tuple[int, int, tuple[int, ...]], ...]


def run(runner: Runner, command: tuple[tuple[int, int], list[Tokens]]) -> list[dict]:
    """One step in a bucket; per device the logits and routes of its rows and the traffic."""
    (rows, chunk), devices = command
    full = chunk == 1 and rows == ENGINE.max_num_seqs
    entries = tuple(
        tuple(
            Row(
                Sequence("r", 0, list(tokens), SamplingParams(temperature=0), 1, 0),
                slot if full else index,
                slot,
                start,
                list(tokens),
                True,
            )
            for index, (slot, start, tokens) in enumerate(device.rows)
        )
        for device in devices
    )
    outcomes, extras = runner.run(StepPlan(rows, chunk, entries), active=True)
    replies = []
    for device, (outcome, logits, routes) in enumerate(
        zip(outcomes, runner.read(extras.logits), runner.read(extras.routes), strict=True)
    ):
        used = [row.index for row in entries[device]]
        replies.append(
            {
                "logits": logits[used],
                "token": outcome.token[used],
                "routes": [routes[r.index, : len(r.tokens)] for r in entries[device]],
                "rows": outcome.rows,
                "sent": outcome.sent,
            }
        )
    return replies
