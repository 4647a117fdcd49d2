"""One server's engine under changing traffic: outputs depend on the request alone."""

from __future__ import annotations

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dance_jax.engine.engine import Engine
from dance_jax.engine.structured import StructuredOutputsParams
from dance_jax.models.checkpoint import Checkpoint
from tests.engine.traffic import (
    SHARED,
    Job,
    Naive,
    any_traffic,
    failures,
    jobs,
    make_checkpoint,
    make_engine,
    run,
)
from tests.tiny_models import SERVED


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, expert_library: pathlib.Path | None
) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("engine"), SERVED)


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Engine:
    return make_engine(checkpoint)


@pytest.fixture(scope="module")
def naive(checkpoint: Checkpoint) -> Naive:
    return Naive(checkpoint)


@any_traffic
@given(st.lists(jobs(), min_size=1, max_size=9))
def test_greedy_outputs_are_those_of_a_naive_loop(engine: Engine, naive: Naive, given):
    outputs = run(engine, [(job, job.request(str(n))) for n, job in enumerate(given)])
    for number, job in enumerate(given):
        (sample,) = outputs[str(number)].outputs
        naive.check(list(job.prompt), sample.token_ids)
        assert sample.finish_reason in ("length", "abort")
        if job.patience is None:
            assert (sample.finish_reason, len(sample.token_ids)) == ("length", job.max_tokens)
    report = engine.report()
    assert (report.running, report.waiting, report.kv_blocks_used) == (0, 0, 0)


def test_the_traffic_above_preempts_and_shares(engine: Engine, naive: Naive):
    """Four long requests need 44 blocks but only 18 exist; afterwards their prefixes are cached."""
    long = [Job((*SHARED[n % 2], n + 2), 30, 0, None) for n in range(4)]
    before = engine.report()
    outputs = run(engine, [(job, job.request(str(n))) for n, job in enumerate(long)])
    after = engine.report()
    assert after.preemptions > before.preemptions
    assert after.prefix_hits > before.prefix_hits
    for number, job in enumerate(long):
        naive.check(list(job.prompt), outputs[str(number)].outputs[0].token_ids)


def test_failed_rows_change_no_answer(engine: Engine, naive: Naive):
    """Failed rows are computed again, into the same blocks, and count once."""
    long = [Job((*SHARED[n % 2], n + 2), 24, n, None) for n in range(4)]
    for seed in range(2):
        before = engine.report()
        with failures(engine, np.random.default_rng(seed)) as failed:
            outputs = run(engine, [(job, job.request(str(n))) for n, job in enumerate(long)])
        assert len(failed) > 10
        for number, job in enumerate(long):
            naive.check(list(job.prompt), outputs[str(number)].outputs[0].token_ids)
        after = engine.report()
        assert after.generation_tokens - before.generation_tokens == sum(j.max_tokens for j in long)
        assert after.kv_blocks_used == 0


def test_logprobs_of_prompts(engine: Engine, naive: Naive):
    """Of prompts in several slices, with cached prefixes, and among failed requests."""
    asked = [Job((*SHARED[n % 2], n + 2), 24 * (n % 2), n, None) for n in range(4)]
    with failures(engine, np.random.default_rng(0)):
        outputs = run(
            engine, [(job, job.request(str(n), prompt_logprobs=2)) for n, job in enumerate(asked)]
        )
    for number, job in enumerate(asked):
        first, *others = outputs[str(number)].prompt_logprobs
        assert first is None and len(others) == len(job.prompt) - 1
        assert len(outputs[str(number)].outputs[0].token_ids) == job.max_tokens
        for position, found in enumerate(others, 1):
            logits = naive.logits(job.prompt[:position])
            logprobs = logits - np.logaddexp.reduce(logits)
            token = job.prompt[position]
            assert abs(found[token].logprob - logprobs[token]) < 1e-3
            assert abs(found[token].rank - (1 + (logits > logits[token]).sum())) <= 1
            best = {each.rank: each.logprob for each in found.values()}
            np.testing.assert_allclose([best[1], best[2]], np.sort(logprobs)[:-3:-1], atol=1e-3)


def test_structured_outputs_hold_under_preemption_and_failures(engine: Engine):
    """Others in the same steps are not touched, and the same seed gives the same text."""
    structures = [
        dict(regex="[a-c]{30}"),
        dict(json={"type": "array", "items": {"type": "boolean"}}),
    ]
    long = [Job((*SHARED[n % 2], n + 2), 30, n, None) for n in range(4)]

    def requests():
        for n, job in enumerate(long):
            structure = StructuredOutputsParams(**structures[n // 2]) if n % 2 else None
            params = {"temperature": 1.0, "seed": n, "structured_outputs": structure}
            yield job, job.request(str(n), **params)

    quiet = {}
    for pair in requests():
        quiet |= run(engine, [pair])
    before = engine.report()
    with failures(engine, np.random.default_rng(1)) as failed:
        outputs = run(engine, [*requests()])
    after = engine.report()
    assert after.preemptions > before.preemptions and failed
    assert after.masks - before.masks >= 31 and after.mask_seconds > before.mask_seconds
    for name, output in outputs.items():
        assert output.outputs[0].text == quiet[name].outputs[0].text
    assert re.fullmatch("[a-c]{30}", outputs["1"].outputs[0].text)
    assert outputs["3"].outputs[0].text.startswith("[")


def test_a_seed_draws_the_same_whatever_else_runs(engine: Engine):
    sampled = Job(tuple(SHARED[0][:20]), 20, 2, None)
    params = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "frequency_penalty": 0.5}
    alone = run(engine, [(sampled, sampled.request("alone", **params))])["alone"]
    crowd = [
        (job, job.request(str(n), temperature=1.0, seed=n, n=2))
        for n, job in enumerate([Job(tuple(SHARED[1][: 9 * n + 1]), 25, 1, None) for n in range(6)])
    ]
    among = run(engine, [*crowd[:3], (sampled, sampled.request("x", **params)), *crowd[3:]])["x"]
    assert among.outputs[0].token_ids == alone.outputs[0].token_ids
    assert len(set(alone.outputs[0].token_ids)) > 5


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
        outputs = run(engine, traffic)
        engine.report()
        assert all(each.finished for each in outputs.values())
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_reports_add_up(engine: Engine):
    job = Job(tuple(range(2, 40)), 7, 0, None)
    before, steps_before = engine.report(), np.array(engine.stats().step_rows)
    run(engine, [(job, job.request("r"))])
    after, steps = engine.report(), np.array(engine.stats().step_rows) - steps_before
    assert after.generation_tokens - before.generation_tokens == 7
    known = after.prefix_hits - before.prefix_hits
    assert after.prompt_tokens - before.prompt_tokens + known == 38
    # The last sampled token is never an input.
    assert after.positions - before.positions == sum(range(known + 1, 38 + 7))
    computed = after.prompt_tokens - before.prompt_tokens + 6
    # Slices of the prompt, and then six steps of one row.
    (one, alone), *larger = steps.tolist()
    assert (one, alone) == (6, 6) and sum(rows for _, rows in larger) == computed - 6
    for size, (number, rows) in enumerate(larger, 1):
        assert 2 ** (size - 1) * number < rows <= 2**size * number or number == rows == 0
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
