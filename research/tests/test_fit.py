"""Speeds found again in what servers of known speed did."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest

from dance_jax.config import UserError
from research.simulation.fit import fit
from research.simulator import Model, Requests, Server, Speed, Work, simulate
from research.tests.simulator.cases import CONFIG, held, scenario

MODEL = Model(layers=3, experts=8, top_k=2, state_bytes=100)
#: Seconds of a step in each: in no proportion to its tokens.
BUCKETS = dict(zip(CONFIG.buckets, (0.3, 0.4, 0.8, 1.3), strict=True))
SPEED = Speed(
    buckets=BUCKETS, position=0.001, call=0.02, message=0.03, row=0.01, quota=0.5, burst=0.2
)
SERVERS = (
    Server(1, 24, SPEED, bandwidth=8e4, beside=True),
    Server(2, 24, dataclasses.replace(SPEED, call=0.01, message=0.05), bandwidth=4e4),
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
        resident = held((0, 1, 2, 3, 4), (3, 4, 5, 6, 7))
        case = scenario((1, 2), resident, routes, requests, lock_step=False)
        found.append(simulate(dataclasses.replace(case, servers=SERVERS)).work)
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_known_speeds_are_found_again(rank: int) -> None:
    """Though a quota stops the servers: speeds are those between stops."""
    server = SERVERS[rank]
    work = [each[rank] for seed in range(2) for each in windows(seed)]
    # A window without work, in which the clock went back.
    work.append(Work(processor_s=-0.007))
    assert sum(w.computing_s for w in work) > sum(w.processor_s for w in work) / server.devices
    fitted = fit(work, server.devices, CONFIG.block_size)
    assert fitted.speed.buckets == pytest.approx(BUCKETS)
    for name in ("position", "call", "message", "row"):
        assert getattr(fitted.speed, name) == pytest.approx(getattr(server.speed, name)), name
    assert fitted.error < 1e-9
    # A bucket that was not seen costs by its tokens, less than the greatest that was.
    assert 0 < fitted.speed.token * CONFIG.block_size < max(BUCKETS.values())


def test_noise_moves_what_is_found_a_little() -> None:
    rng = np.random.default_rng(1)
    noisy = [
        dataclasses.replace(work, processor_s=work.processor_s * rng.normal(1, 0.02))
        for seed in range(8)
        for work in (each[0] for each in windows(seed))
    ]
    fitted = fit(noisy, 1, CONFIG.block_size)
    assert fitted.speed.call == pytest.approx(SPEED.call, rel=0.3)
    assert fitted.speed.message == pytest.approx(SPEED.message, rel=0.3)
    assert fitted.speed.buckets[2, 0] == pytest.approx(BUCKETS[2, 0], rel=0.2)
    assert 1e-4 < fitted.error < 0.05


def test_nothing_costs_less_than_nothing() -> None:
    # Seconds fall with messages: they are left out, and calls alone are fitted.
    done = [(10, 1, 1.0), (10, 2, 0.9), (20, 1, 2.0)]
    counter: collections.Counter[tuple[int, int]] = collections.Counter({(2, 0): 1})
    found = [Work(buckets=counter, calls=c, messages=m, processor_s=s) for c, m, s in done]
    speed = fit(found, 1, CONFIG.block_size).speed
    assert speed.message == 0.0 and speed.call > 0.08


def test_windows_that_tell_nothing() -> None:
    with pytest.raises(UserError, match="no steps were measured"):
        fit([Work()], 1, CONFIG.block_size)
    buckets = collections.Counter({(2, 0): 3, (4, 0): 1})
    same = Work(steps=4, buckets=buckets, processor_s=1.0)
    with pytest.raises(
        UserError, match=r"2 windows do not tell bucket \(2, 0\), bucket \(4, 0\) apart"
    ):
        fit([same, same], 1, CONFIG.block_size)
