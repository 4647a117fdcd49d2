"""An engine whose model has recurrent states: each sequence keeps its own states."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.engine.engine import Engine
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
from tests.tiny_models import HYBRID


@pytest.fixture(scope="module")
def hybrid(
    tmp_path_factory: pytest.TempPathFactory, expert_library: pathlib.Path | None
) -> tuple[Engine, Naive]:
    """One of two servers that call each other, so it keeps two states per sequence."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("recurrent"), HYBRID)
    return make_engine(checkpoint, servers=2), Naive(checkpoint)


@settings(any_traffic, max_examples=10)
@given(st.lists(jobs(), min_size=1, max_size=9))
def test_greedy_outputs_are_those_of_a_naive_loop(hybrid, given):
    engine, naive = hybrid
    outputs = run(engine, [(job, job.request(str(n))) for n, job in enumerate(given)])
    for number, job in enumerate(given):
        naive.check(list(job.prompt), outputs[str(number)].outputs[0].token_ids)


def test_preempted_sequences_are_computed_anew_and_prefixes_are_not_shared(hybrid):
    """Four long requests need 44 blocks, but only 18 exist; then one of them is repeated."""
    engine, naive = hybrid
    long = [Job((*SHARED[n % 2], n + 2), 30, 0, None) for n in range(4)]
    before = engine.report().preemptions
    for traffic in (long, long[:1]):
        outputs = run(engine, [(job, job.request(str(n))) for n, job in enumerate(traffic)])
        for number, job in enumerate(traffic):
            naive.check(list(job.prompt), outputs[str(number)].outputs[0].token_ids)
    report = engine.report()
    assert report.preemptions > before
    assert not report.shares_prefixes and report.prefix_queries == report.prefix_hits == 0
    assert report.state_bytes_used == report.kv_blocks_used == 0


def test_failed_rows_go_on_from_the_states_before_the_step(hybrid):
    engine, naive = hybrid
    traffic = [Job((*SHARED[n % 2][:20], n + 2), 12, n, None) for n in range(3)]
    before = engine.report().preemptions
    with failures(engine, np.random.default_rng(1)) as failed:
        outputs = run(engine, [(job, job.request(str(n))) for n, job in enumerate(traffic)])
    for number, job in enumerate(traffic):
        naive.check(list(job.prompt), outputs[str(number)].outputs[0].token_ids)
    assert len(failed) > 10 and engine.report().preemptions == before
