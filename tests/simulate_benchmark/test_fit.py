"""Speeds found again in what servers of known speed did."""

from __future__ import annotations

import collections
import dataclasses
import math

import numpy as np
import pytest

from benchmarks.simulation.fit import fit, measured
from dance_jax.config import UserError
from dance_jax.engine.report import EngineReport
from dance_jax.models.counters import Moved, Sums
from dance_jax.placement.simulate import Model, Requests, Server, Speed, Work, simulate
from tests.placement.simulated import CONFIG, held, scenario

MODEL = Model(layers=3, experts=8, top_k=2, state_bytes=100)
#: Seconds of the trunk in each: in no proportion to its tokens.
BUCKETS = dict(zip(CONFIG.buckets, (0.3, 0.4, 0.8, 1.3), strict=True))
SPEED = Speed(step=0.05, buckets=BUCKETS, call=0.02, expert=0.15, round=0.01)
SERVERS = (
    Server(1, 24, SPEED, bandwidth=8e4),
    Server(2, 24, dataclasses.replace(SPEED, call=0.01, step=0.07, round=0.02), bandwidth=4e4),
)


def windows(seed: int) -> list[tuple[Work, ...]]:
    """What both servers did in windows of different loads, the first of each kind of prompt."""
    rng = np.random.default_rng(seed)
    found = []
    for count, prompt, output in [(1, 60, 2), (1, 2, 40), (4, 2, 30), (30, 5, 30), (9, 50, 12)]:
        requests = Requests(
            rng.exponential(5.0, count),
            rng.integers(2, size=count),
            rng.integers(1, prompt + 1, count),
            rng.integers(1, output + 1, count),
        )
        routes = tuple(np.argsort(rng.random((60, 3, 8)))[..., :2] for _ in SERVERS)
        case = scenario((1, 2), held((0, 1, 2, 3, 4), (3, 4, 5, 6, 7)), routes, requests)
        found.append(simulate(dataclasses.replace(case, servers=SERVERS)).work)
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_known_speeds_are_found_again(rank: int) -> None:
    server = SERVERS[rank]
    fitted = fit([each[rank] for each in windows(0)], CONFIG.block_size)
    assert fitted.speed.buckets == pytest.approx(BUCKETS)
    for name in ("step", "call", "expert", "round"):
        assert getattr(fitted.speed, name) == pytest.approx(getattr(server.speed, name)), name
    assert fitted.bandwidth == pytest.approx(server.bandwidth)
    assert max(fitted.errors.values()) < 1e-9
    # A bucket that was not seen costs by its tokens, less than the greatest that was.
    assert 0 < fitted.speed.token * CONFIG.block_size < max(BUCKETS.values())
    assert fitted.server(2, 5, 0.25) == Server(2, 5, fitted.speed, fitted.bandwidth, 0.25)


def test_noise_moves_what_is_found_a_little() -> None:
    rng = np.random.default_rng(1)
    noisy = [
        dataclasses.replace(
            work,
            trunk_s=work.trunk_s * rng.normal(1, 0.02),
            experts_s=work.experts_s * rng.normal(1, 0.02),
            exchange_s=work.exchange_s * rng.normal(1, 0.02),
        )
        for seed in range(8)
        for work in (each[0] for each in windows(seed))
    ]
    fitted = fit(noisy, CONFIG.block_size)
    assert fitted.speed.call == pytest.approx(SPEED.call, rel=0.3)
    assert fitted.bandwidth == pytest.approx(SERVERS[0].bandwidth, rel=0.3)
    assert fitted.speed.buckets[2, 0] == pytest.approx(BUCKETS[2, 0], rel=0.2)
    assert all(1e-4 < fitted.errors[part] < 0.05 for part in ("trunk", "experts", "exchange"))
    assert fitted.errors["step"] < 1e-9


def test_nothing_costs_less_than_nothing() -> None:
    # Seconds fall with experts: they are left out, and calls alone are fitted.
    done = [(10, 1, 1.0), (10, 2, 0.9), (20, 1, 2.0)]
    found = [
        Work(steps=1, buckets=collections.Counter({(2, 0): 1}), calls=c, experts=e, experts_s=s)
        for c, e, s in done
    ]
    fitted = fit(found, CONFIG.block_size)
    assert fitted.speed.expert == 0.0
    assert fitted.speed.call == pytest.approx((10 * 1.9 + 20 * 2.0) / 600)
    # No byte was sent: nothing is known of the link.
    assert fitted.bandwidth == math.inf and fitted.speed.round == 0.0


def test_windows_that_tell_nothing() -> None:
    with pytest.raises(UserError, match="no steps were measured"):
        fit([Work()], CONFIG.block_size)
    same = Work(steps=4, buckets=collections.Counter({(2, 0): 3, (4, 0): 1}), trunk_s=1.0)
    with pytest.raises(
        UserError, match=r"trunk_s: 2 windows do not tell bucket \(2, 0\), bucket \(4, 0\) apart"
    ):
        fit([same, same], CONFIG.block_size)


def report(factor: float, steps: int) -> EngineReport:
    parts = ("schedule", "compute", "experts", "wait", "exchange", "output")
    return EngineReport(
        **dict.fromkeys(EngineReport.__struct_fields__, 0)
        | {
            "steps": steps,
            "bytes_sent": [],
            "bytes_received": [],
            "step_seconds": {name: factor * 10**n for n, name in enumerate(parts)},
            "calls_served": int(factor * 7),
            "expert_seconds": factor * 0.5,
            "sums": Sums(moved=Moved(3 * factor, 0.25 * factor, 100 * factor, 1, 1, 1)),
        }
    )  # fmt: skip


def test_reports_of_an_engine_become_work() -> None:
    buckets = {(2, 0): 4, (2, 1): 1}
    work = measured(report(1.0, 10), report(3.0, 15), buckets)
    assert work == Work(
        steps=5, buckets=collections.Counter(buckets), calls=14, rounds=6, bytes=200,
        step_s=2 * (1 + 10**5), trunk_s=20.0, exchange_s=0.5, experts_s=1.0,
    )  # fmt: skip
    wrong = measured(report(1.0, 9), report(3.0, 15), buckets)
    with pytest.raises(UserError, match="window 1 has 6 steps, and buckets of 5"):
        fit([work, wrong], CONFIG.block_size)
