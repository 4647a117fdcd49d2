"""Traffic for engines, and a slow reference for their outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from dance_jax.config import EngineConfig
from dance_jax.engine import scheduler
from dance_jax.engine.compile_cache import CompileCache
from dance_jax.engine.engine import Engine, StepResult
from dance_jax.engine.kv_cache import block_bytes, layer_cache, state_bytes, state_copies
from dance_jax.engine.sequence import Request, RequestOutput, SamplingParams, Sequence
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.models.attention import Rows
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import ensure_converted
from dance_jax.models.random_weights import write_random_checkpoint
from dance_jax.models.tokenizer import Tokenizer
from dance_jax.placement.core import Placement
from dance_jax.placement.devices import spread
from tests.forward import forward
from tests.quick import OPTIMISED
from tests.stacks import stacked

#: Tokens, prompt plus output, of the longest request below; 12 blocks of 8 positions.
CONTEXT = 96
#: Number of KV blocks: less than half of what four long requests need.
BLOCKS = 18
#: Logits closer than this may swap ranks, because sums run in another order.
MARGIN = 1e-3
ENGINE = EngineConfig(
    max_model_len=CONTEXT, max_num_seqs=4, decode_rows=(2, 4), slice_rows=(1, 3), block_size=8
)


def make_checkpoint(folder: pathlib.Path, fields: dict[str, Any]) -> Checkpoint:
    """A converted random model."""
    model = write_random_checkpoint(folder / "model", fields)
    return Checkpoint.open(ensure_converted(model, folder / "cache"))


def make_engine(checkpoint: Checkpoint, servers: int = 1) -> Engine:
    """A warm engine that is short of blocks; with several servers, the one with all experts."""
    model = checkpoint.config
    memory = BLOCKS * block_bytes(model, ENGINE)
    memory += state_bytes(model, ENGINE, state_copies(servers, calls=True))
    config = dataclasses.replace(ENGINE, kv_memory=memory)
    tokenizer, steps = Tokenizer.load(checkpoint.path), CompileCache(None)
    spec = parse_hosts("\n".join(f"s{n} address=localhost experts=1" for n in range(servers)))
    resident = np.zeros((servers, len(model.moe_layers), model.num_experts), bool)
    resident[0] = True
    slots = [resident[0].size] * servers
    layout = spread(Placement(resident), spec.devices, slots)
    engine = Engine(checkpoint, tokenizer, spec, 0, layout, config, compile_cache=steps)
    engine.warmup()
    return engine


@contextlib.contextmanager
def failures(engine: Engine, rng: np.random.Generator) -> Iterator[list[Sequence]]:
    """Within the context, some experts are unavailable in about every other step.

    Yields:
        The list of failed sequences, which grows.
    """
    calls, failed = engine.runner.calls, []
    assert calls is not None
    everything = engine.layout.device_of >= 0

    def step() -> StepResult:
        calls.use(0, everything & (rng.random(everything.shape) < rng.choice([1.0, 0.9])))
        return Engine.step(engine)

    def note(*step: Any) -> list[Sequence]:
        failed.extend(found := Engine._failed(engine, *step))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "step", step)
        patch.setattr(engine, "_failed", note)
        patch.setattr(scheduler, "RETRY_S", 0.0)
        yield failed
    calls.use(0, everything)


any_traffic = settings(
    deadline=None,
    max_examples=25,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


class Naive:
    """Greedy decoding that computes the whole sequence in every step, without cache or batch."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        experts = range(config.num_experts)
        pairs = [(layer, e) for layer in range(len(config.moe_layers)) for e in experts]
        pool = tuple(map(jnp.asarray, stacked(checkpoint, pairs)))
        form = checkpoint.form("float32")
        graph, state = nnx.split(checkpoint.trunk("float32"))
        one_block = dataclasses.replace(ENGINE, block_size=CONTEXT)
        nothing = [layer_cache(layer.mixer, one_block, 0) for layer in config.layers]
        nothing = jax.tree.map(jnp.asarray, nothing)

        def moe(layer, x_td, expert_tk, weight_tk):
            slot_tk = layer * config.num_experts + expert_tk
            return form.ffn(pool, x_td, slot_tk, weight_tk, config.num_experts)

        # It runs hundreds of times, so optimising it pays.
        @functools.partial(jax.jit, compiler_options=OPTIMISED)
        def logits(state, tokens_t, last):
            trunk = nnx.merge(graph, state)
            whole = Rows.whole(len(tokens_t))
            hidden, _ = forward(trunk, tokens_t, [whole], nothing, moe, CONTEXT)
            return trunk.logits(hidden[last][None])[0]

        self._logits = functools.partial(logits, state)

    def logits(self, tokens: tuple[int, ...]) -> np.ndarray:
        """Logits after these tokens, float32 [v]."""
        padded = np.zeros(CONTEXT, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(self._logits(padded, len(tokens) - 1))

    @functools.cache  # noqa: B019
    def step(self, tokens: tuple[int, ...]) -> tuple[int, float]:
        """The most likely next token, and the margin of its logit over the second."""
        logits = self.logits(tokens)
        second, best = np.sort(logits)[-2:]
        return int(logits.argmax()), float(best - second)

    def check(self, prompt: list[int], output: list[int]) -> None:
        """Check the output against this model, up to a first difference at a small margin."""
        known = tuple(prompt)
        for token in output:
            best, margin = self.step(known)
            if token != best:
                assert margin < MARGIN, (len(known) - len(prompt), margin)
                return
            known += (token,)


#: Prefixes that prompts share.
SHARED = [np.random.default_rng(seed).integers(2, 258, 60).tolist() for seed in range(3)]


@dataclasses.dataclass(frozen=True)
class Job:
    """A request with its times of arrival and abort."""

    prompt: tuple[int, ...]
    max_tokens: int
    #: Steps between the previous request and this one.
    gap: int
    #: Steps from arrival until the request is aborted; None if it is not aborted.
    patience: int | None

    def request(self, name: str, **params) -> Request:
        params = {"temperature": 0, **params}
        sampling = SamplingParams(max_tokens=self.max_tokens, ignore_eos=True, **params)
        return Request(name, None, list(self.prompt), sampling)


@st.composite
def jobs(draw) -> Job:
    shared = draw(st.sampled_from(SHARED))[: draw(st.integers(0, 60))]
    own = draw(st.lists(st.integers(2, 257), min_size=1, max_size=6))
    patience = draw(st.none() | st.none() | st.integers(0, 12))
    return Job((*shared, *own), draw(st.integers(1, 28)), draw(st.integers(0, 6)), patience)


def run(engine: Engine, given: list[tuple[Job, Request]]) -> dict[str, RequestOutput]:
    """Run all requests at their times, until none is left."""
    outputs = {request.request_id: RequestOutput.of(request) for _, request in given}
    waiting, leaving, clock = list(given), [], 0
    due = given[0][0].gap if given else 0
    while waiting or engine.has_work:
        while waiting and clock >= due:
            job, request = waiting.pop(0)
            engine.add(request)
            if job.patience is not None:
                leaving.append((clock + job.patience, request.request_id))
            due += waiting[0][0].gap if waiting else 0
        for when, name in leaving:
            if when == clock:
                engine.abort(name)
        for delta in engine.step().outputs:
            outputs[delta.request_id].add(delta)
        clock += 1
    return outputs
