"""One server's engine under changing traffic: what it answers depends on the request alone."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dance_jax.config import EngineConfig
from dance_jax.engine.engine import Engine
from dance_jax.engine.kv_cache import block_bytes
from dance_jax.engine.output import OutputCollector
from dance_jax.engine.sequence import Request, SamplingParams
from dance_jax.models.attention import Rows
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import ensure_converted
from dance_jax.models.tokenizer import Tokenizer
from tests.launch.tiny import write_model
from tests.quick import QuickCache

#: Prompt and output of the longest request below; 12 blocks of 8 positions.
CONTEXT = 96
#: Blocks: less than half of what four long requests want.
BLOCKS = 18
#: Logits closer than this may change places: sums run in another order.
MARGIN = 1e-3

any_traffic = settings(
    deadline=None,
    max_examples=25,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, expert_library: pathlib.Path | None
) -> Checkpoint:
    folder = tmp_path_factory.mktemp("engine")
    return Checkpoint.open(ensure_converted(write_model(folder / "model"), folder / "cache"))


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Engine:
    config = EngineConfig(
        max_model_len=CONTEXT, max_num_seqs=4, decode_rows=(2, 4), slice_rows=(1, 3), block_size=8
    )
    memory = BLOCKS * block_bytes(checkpoint.config, config)
    config = dataclasses.replace(config, kv_memory=memory)
    tokenizer, steps = Tokenizer.load(checkpoint.path), QuickCache(None)
    engine = Engine(checkpoint, tokenizer, None, 0, None, config, compile_cache=steps)
    engine.warmup()
    return engine


class Naive:
    """Greedy decoding with the whole sequence in every step: no cache, no batch."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        experts = range(config.num_experts)
        pairs = [(layer, e) for layer in range(len(config.moe_layers)) for e in experts]
        pool = tuple(map(jnp.asarray, checkpoint.experts(pairs, checkpoint.form("float32"))))
        form = checkpoint.form("float32")
        graph, state = nnx.split(checkpoint.trunk("float32"))
        nothing = [jnp.zeros((1, 1, layer.mixer.cache_width)) for layer in config.layers]

        def moe(layer, x_td, expert_tk, weight_tk):
            slot_tk = layer * config.num_experts + expert_tk
            return form.ffn(pool, x_td, slot_tk, weight_tk, config.num_experts), None

        @jax.jit
        def logits(state, tokens_t, last):
            trunk = nnx.merge(graph, state)
            whole = Rows.whole(len(tokens_t))
            hidden, _, _ = trunk(tokens_t, whole.positions_t, [whole], nothing, moe, CONTEXT)
            return trunk.logits(hidden[last][None])[0]

        self._logits = functools.partial(logits, state)

    @functools.cache  # noqa: B019
    def step(self, tokens: tuple[int, ...]) -> tuple[int, float]:
        """The most likely next token, and how far the next one is behind."""
        padded = np.zeros(CONTEXT, np.int32)
        padded[: len(tokens)] = tokens
        logits = np.asarray(self._logits(padded, len(tokens) - 1))
        second, best = np.sort(logits)[-2:]
        return int(logits.argmax()), float(best - second)

    def check(self, prompt: list[int], output: list[int]) -> None:
        """The output is this model's, up to a first difference at a small margin."""
        known = tuple(prompt)
        for token in output:
            best, margin = self.step(known)
            if token != best:
                assert margin < MARGIN, (len(known) - len(prompt), margin)
                return
            known += (token,)


@pytest.fixture(scope="module")
def naive(checkpoint: Checkpoint) -> Naive:
    return Naive(checkpoint)


#: Beginnings that prompts share.
SHARED = [np.random.default_rng(seed).integers(2, 258, 60).tolist() for seed in range(3)]


@dataclasses.dataclass(frozen=True)
class Job:
    """A request, and when it comes and goes."""

    prompt: tuple[int, ...]
    max_tokens: int
    #: Steps between the request before it and this one.
    gap: int
    #: It is aborted after so many steps from its coming; None: never.
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


def run(engine: Engine, given: list[tuple[Job, Request]]) -> dict[str, OutputCollector]:
    """All requests at their times, until none is left."""
    collectors = {request.request_id: OutputCollector(request) for _, request in given}
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
            collectors[delta.request_id].apply(delta)
        clock += 1
    return collectors


@any_traffic
@given(st.lists(jobs(), min_size=1, max_size=9))
def test_greedy_outputs_are_those_of_a_naive_loop(engine: Engine, naive: Naive, given):
    collectors = run(engine, [(job, job.request(str(n))) for n, job in enumerate(given)])
    for number, job in enumerate(given):
        (sample,) = collectors[str(number)].output.outputs
        naive.check(list(job.prompt), sample.token_ids)
        assert sample.finish_reason in ("length", "abort")
        if job.patience is None:
            assert (sample.finish_reason, len(sample.token_ids)) == ("length", job.max_tokens)
    report = engine.report()
    assert (report.running, report.waiting, report.kv_blocks_used) == (0, 0, 0)


def test_the_traffic_above_preempts_and_shares(engine: Engine, naive: Naive):
    """Four long requests want 44 blocks of 18; afterwards their beginnings are known."""
    long = [Job((*SHARED[n % 2], n + 2), 30, 0, None) for n in range(4)]
    before = engine.report()
    collectors = run(engine, [(job, job.request(str(n))) for n, job in enumerate(long)])
    after = engine.report()
    assert after.preemptions > before.preemptions
    assert after.prefix_hits > before.prefix_hits
    for number, job in enumerate(long):
        naive.check(list(job.prompt), collectors[str(number)].output.outputs[0].token_ids)


def test_a_seed_draws_the_same_whatever_else_runs(engine: Engine):
    sampled = Job(tuple(SHARED[0][:20]), 20, 2, None)
    params = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "frequency_penalty": 0.5}
    alone = run(engine, [(sampled, sampled.request("alone", **params))])["alone"]
    crowd = [
        (job, job.request(str(n), temperature=1.0, seed=n, n=2))
        for n, job in enumerate([Job(tuple(SHARED[1][: 9 * n + 1]), 25, 1, None) for n in range(6)])
    ]
    among = run(engine, [*crowd[:3], (sampled, sampled.request("x", **params)), *crowd[3:]])["x"]
    assert among.output.outputs[0].token_ids == alone.output.outputs[0].token_ids
    assert len(set(alone.output.outputs[0].token_ids)) > 5


def test_nothing_is_compiled_once_it_is_warm(engine: Engine):
    compiled = []
    listener = lambda event, _, **__: compiled.append(event) if "compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        jax.jit(lambda x: x + 41)(jnp.ones(3))
        assert compiled, "the listener hears nothing"
        compiled.clear()
        kinds = [
            {},
            {"temperature": 1.0, "n": 3, "logprobs": 4},
            {"temperature": 0.5, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2},
            {"logit_bias": {5: 3.0}, "presence_penalty": 1.0, "min_tokens": 3},
        ]
        traffic = [
            (job, job.request(str(n), **kinds[n % 4]))
            for n, job in enumerate(
                Job(tuple(SHARED[n % 3][: 1 + 5 * n]), 1 + 3 * n, n % 3, 9 if n == 5 else None)
                for n in range(10)
            )
        ]
        collectors = run(engine, traffic)
        engine.report()
        assert all(collector.output.finished for collector in collectors.values())
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_reports_add_up(engine: Engine):
    job = Job(tuple(range(2, 40)), 7, 0, None)
    before = engine.report()
    run(engine, [(job, job.request("r"))])
    after = engine.report()
    assert after.generation_tokens - before.generation_tokens == 7
    assert after.prompt_tokens - before.prompt_tokens + after.prefix_hits - before.prefix_hits == 38
    computed = after.prompt_tokens - before.prompt_tokens + 6
    calls = after.calls_local - before.calls_local
    layers, top_k = 2, 4
    assert calls == computed * layers * top_k and after.calls_remote == 0
    assert after.experts_resident == layers * 16
    assert set(after.step_seconds) == {
        "schedule",
        "compute",
        "experts",
        "wait",
        "exchange",
        "output",
    }
    assert after.step_seconds["compute"] > before.step_seconds["compute"]
    assert after.cpu_seconds > before.cpu_seconds > 0
