"""Experts move between three real processes while sequences go on."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.engine.runner import Runner
from dance_jax.placement.core import Layout, spread
from dance_jax.placement.migration import batches
from tests.cluster import tiny
from tests.cluster.fixture import DEVICES, TestCluster
from tests.cluster.test_exactness import (
    SLOTS,
    SPARE,
    both_transports,
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
    """One on every device, known before; all grow by a token in every step."""

    PROMPT = 24

    def __init__(self, three_servers: TestCluster, single) -> None:
        self._cluster, self._single = three_servers, single
        # On the single device each has a number of its own.
        self._tokens = [sequence(seed, 120) for seed in range(sum(DEVICES))]
        self._length = 0
        self._grow(SLICE, self.PROMPT)

    def step(self) -> list[list[dict]]:
        return self._grow(DECODE, 1)

    def _grow(self, bucket: tuple[int, int], count: int) -> list[list[dict]]:
        """All replies, whose logits are those of one device."""
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
    """The batch that came into force; all devices of all servers know the same."""
    (number,) = {reply["loaded"] for server in replies for reply in server}
    return number


def check_pools(three_servers: TestCluster, layout: Layout, model: str = "latent") -> None:
    """Every slot that the tables name holds its expert."""
    for rank, found in enumerate(three_servers.send("pool")):
        wanted = tiny.weights_of(layout, rank, model)
        assert set(found) == set(wanted)
        for place, weights in wanted.items():
            for ours, theirs in zip(found[place], weights, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def check_migration(
    three_servers: TestCluster,
    single: Runner,
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
        *others, last = rng.permutation(len(DEVICES)).tolist()
        three_servers.stage(number, layout, *others)
        assert loaded(sequences.step()) == 0, "not all have loaded it"
        three_servers.stage(number, layout, last)
        assert loaded(sequences.step()) == number
        if number in (1, len(sequence_of)):
            check_pools(three_servers, layout, model)
    check_traffic(sequences.step(), residents[1])


@settings(cluster_settings, max_examples=2)
@given(
    seed=st.integers(0, 2**31 - 2),
    replicas=st.tuples(*[st.sampled_from([0.0, 0.3, 1.0])] * 2),
    most=st.sampled_from([6, 20]),
)
def test_steps_during_a_migration_give_what_one_device_gives(
    three_servers: TestCluster,
    single: Runner,
    seed,
    replicas,
    most,
):
    three_servers.use("sockets")
    check_migration(three_servers, single, seed, replicas, most)


def test_collectives_agree_too(three_servers: TestCluster, single: Runner):
    three_servers.use("collectives")
    check_migration(three_servers, single, 3, (0.0, 0.3), 20)


def test_experts_in_codes_move_too(three_servers: TestCluster, single_of):
    three_servers.use("sockets", model="quantised")
    check_migration(three_servers, single_of("quantised"), 5, (0.0, 0.3), 20, "quantised")


@both_transports
def test_a_dropped_batch_never_comes_into_force(
    three_servers: TestCluster,
    single: Runner,
    transport: str,
):
    """One server cannot load it; those that have not heard of that cannot mix it with the next."""
    old, first, second = (placed(random_resident(seed, frozenset(), 0.3))[1] for seed in range(3))
    three_servers.use(transport)
    three_servers.place(old)
    sequences = Sequences(three_servers, single)
    three_servers.stage(1, first, 0, 2)
    assert loaded(sequences.step()) == 0
    three_servers.send("drop", 1, [0, 1])
    three_servers.stage(2, second, 0, 1)
    assert loaded(sequences.step()) == 0, "server 2 is still at the first"
    assert three_servers.send("drop", 1, [2]) == [None, None, True]
    assert loaded(sequences.step()) == 0
    check_pools(three_servers, old)
    three_servers.stage(2, second, 2)
    assert loaded(sequences.step()) == 2
    check_pools(three_servers, second)
    assert three_servers.send("drop", 2, EVERYONE) == [False] * 3, "it is in force"
    assert loaded(sequences.step()) == 0
