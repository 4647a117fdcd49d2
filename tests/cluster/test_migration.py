"""Experts move between three real processes while sequences are decoded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.engine.runner import Runner
from dance_jax.placement.core import Layout
from dance_jax.placement.devices import spread
from dance_jax.placement.migration import batches
from tests.cluster import tiny
from tests.cluster.fixture import DEVICES, TestCluster
from tests.cluster.test_exactness import (
    SLOTS,
    SPARE,
    check_row,
    check_traffic,
    cluster_settings,
    placed,
    random_resident,
    sequence,
)
from tests.cluster.tiny import DECODE, SLICE, Tokens

EVERYONE = range(len(DEVICES))


class Sequences:
    """One sequence per device with known tokens; all grow by one token in every step."""

    PROMPT = 24

    def __init__(self, three_servers: TestCluster, single) -> None:
        self._cluster, self._single = three_servers, single
        # On the single device, each sequence has a different number.
        self._tokens = [sequence(seed, 120) for seed in range(sum(DEVICES))]
        self._length = 0
        self._grow(SLICE, self.PROMPT)

    def step(self) -> list[list[dict]]:
        return self._grow(DECODE, 1)

    def _grow(self, bucket: tuple[int, int], count: int) -> list[list[dict]]:
        """Run a step and check its logits against one device; returns all replies."""
        begin, self._length = self._length, self._length + count
        rows = [tokens[begin : self._length] for tokens in self._tokens]
        device = iter(rows)
        replies = self._cluster.step(
            [
                (bucket, [Tokens(((0, begin, next(device)),)) for _ in range(devices)])
                for devices in DEVICES
            ]
        )
        found = [reply for server in replies for reply in server]
        for number, (row, reply) in enumerate(zip(rows, found, strict=True)):
            alone = (bucket, [Tokens(((number, begin, row),))])
            check_row(reply, 0, tiny.run(self._single, alone)[0])
        return replies


def loaded(replies: list[list[dict]]) -> int:
    """The batch that came into force, which must be the same on all devices of all servers."""
    (number,) = {reply["loaded"] for server in replies for reply in server}
    return number


def check_pools(three_servers: TestCluster, layout: Layout, model: str = "latent") -> None:
    """Check that every slot in the tables holds its expert."""
    for rank, found in enumerate(three_servers.send("pool")):
        wanted = tiny.weights_of(layout, rank, model)
        assert set(found) == set(wanted)
        for place, weights in wanted.items():
            for ours, theirs in zip(found[place], weights, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def check_migration(
    three_servers: TestCluster,
    single: Runner,
    change: Change,
    seed: int,
    replicas: tuple[float, float],
    most: int,
    model: str = "latent",
) -> None:
    rng = np.random.default_rng(seed)
    residents = [random_resident(seed + i, frozenset(), share) for i, share in enumerate(replicas)]
    old = placed(residents[0])[1]
    new = spread(placed(residents[1])[0], DEVICES, SLOTS, previous=old, spare=SPARE)
    three_servers.place(old)
    sequences = Sequences(three_servers, single)
    sequence_of = batches(old, new, most)
    assert sequence_of
    for number, (_, layout) in enumerate(sequence_of, 1):
        change(three_servers, sequences, number, layout, rng)
        if number in (1, len(sequence_of)):
            check_pools(three_servers, layout, model)
    check_traffic(sequences.step(), residents[1])


Change = Callable[[TestCluster, Sequences, int, Layout, np.random.Generator], None]


def together(
    three_servers: TestCluster,
    sequences: Sequences,
    number: int,
    layout: Layout,
    rng: np.random.Generator,
) -> None:
    """A batch comes into force in the first step in which all know that all have loaded it."""
    three_servers.stage(number, layout, *EVERYONE)
    *others, last = rng.permutation(len(DEVICES)).tolist()
    three_servers.commit(number, *others)
    assert loaded(sequences.step()) == 0, "not all know that all have loaded it"
    three_servers.commit(number, last)
    assert loaded(sequences.step()) == number


def one_by_one(
    three_servers: TestCluster,
    sequences: Sequences,
    number: int,
    layout: Layout,
    rng: np.random.Generator,
) -> None:
    """One server after another loads and applies a batch, with steps in between."""
    for rank in rng.permutation(len(DEVICES)).tolist():
        three_servers.stage(number, layout, rank)
        sequences.step()
    for rank in rng.permutation(len(DEVICES)).tolist():
        three_servers.commit(number, rank)
        sequences.step()


@pytest.mark.parametrize("transport", ["calls", "mixed"])
@settings(cluster_settings, max_examples=2)
@given(
    seed=st.integers(0, 2**31 - 2),
    replicas=st.tuples(*[st.sampled_from([0.0, 0.3, 1.0])] * 2),
    most=st.sampled_from([6, 20]),
)
def test_steps_during_a_migration_give_what_one_device_gives(
    three_servers: TestCluster,
    single: Runner,
    transport: str,
    seed,
    replicas,
    most,
):
    three_servers.use(transport)
    check_migration(three_servers, single, one_by_one, seed, replicas, most)


@pytest.mark.parametrize("exchange", ["calls", "mixed"])
def test_a_late_server_follows_what_it_has_staged(
    three_servers: TestCluster, single: Runner, exchange: str
):
    """The late server has not applied a batch when other servers already overwrite slots."""
    three_servers.use(exchange)
    old, new = (placed(random_resident(seed, frozenset(), 0.0))[1] for seed in (7, 8))
    three_servers.place(old)
    sequences = Sequences(three_servers, single)
    late, in_time = 0, (1, 2)
    layouts = [layout for _, layout in batches(old, new, 4)]
    three_servers.stage(1, layouts[0], *EVERYONE)
    for number, following in enumerate(layouts[1:], 1):
        three_servers.commit(number, *in_time)
        three_servers.stage(number + 1, following, *in_time)
        for server in sequences.step():
            assert not any(reply["failed"] for reply in server)
        three_servers.commit(number, late)
        three_servers.stage(number + 1, following, late)
    refusals = [sum(p.refusals for p in each.peers) for each in three_servers.send("counters")]
    assert refusals[late] > 0 and not any(refusals[rank] for rank in in_time)


def test_collectives_agree_on_a_step(three_servers: TestCluster, single: Runner):
    three_servers.use("collectives")
    check_migration(three_servers, single, together, 3, (0.0, 0.3), 20)


def test_experts_in_codes_move_too(three_servers: TestCluster, single_of):
    three_servers.use("calls", model="quantised")
    one = single_of("quantised")
    check_migration(three_servers, one, one_by_one, 5, (0.0, 0.3), 20, "quantised")


@pytest.mark.parametrize(
    ("transport", "change"), [("calls", one_by_one), ("collectives", together)]
)
def test_a_dropped_batch_never_comes_into_force(
    three_servers: TestCluster, single: Runner, transport: str, change: Change
):
    """One server cannot load the batch; the next batch uses the same slots."""
    old, first, second = (placed(random_resident(seed, frozenset(), 0.3))[1] for seed in range(3))
    (_, first), (_, second) = (batches(old, each, 20)[0] for each in (first, second))
    three_servers.use(transport)
    three_servers.place(old)
    sequences = Sequences(three_servers, single)
    three_servers.stage(1, first, 0, 2)
    assert loaded(sequences.step()) == 0
    assert three_servers.send("drop", 1, EVERYONE) == [True, False, True]
    assert loaded(sequences.step()) == 0
    check_pools(three_servers, old)
    change(three_servers, sequences, 2, second, np.random.default_rng(0))
    check_pools(three_servers, second)
    assert three_servers.send("drop", 2, EVERYONE) == [False] * 3, "it is in force"
    assert loaded(sequences.step()) == 0
