"""The block pool against a naive model, and tests of its guarantees one by one."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dance_jax.engine.blocks import BlockPool


def take_new(pool: BlockPool, count: int) -> list[int]:
    blocks = [pool.allocate() for _ in range(count)]
    return [block for block in blocks if block is not None]


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Blocks of a sequence with these tokens: cached blocks first, then allocated ones.

    Full blocks are published. If blocks run out, the sequence gets fewer.
    """
    size = pool.block_size
    blocks = pool.lookup(tokens)
    pool.take(blocks)
    while len(blocks) * size < len(tokens) and (block := pool.allocate()) is not None:
        part = tokens[len(blocks) * size :][:size]
        if len(part) == size:
            pool.publish(blocks[-1] if blocks else None, part, block)
        blocks.append(block)
    return blocks


class AnyUse(RuleBasedStateMachine):
    """Sequences of few different tokens take, fill and release blocks."""

    @initialize(num_blocks=st.integers(1, 8), block_size=st.integers(1, 3))
    def start(self, num_blocks, block_size):
        self.pool = BlockPool(num_blocks, block_size)
        self.held = []
        #: Block -> all tokens up to the block's end.
        self.written = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def begin(self, tokens):
        size, pool = self.pool.block_size, self.pool
        found = pool.lookup(tokens)
        for page, block in enumerate(found):
            assert self.written[block] == tokens[: (page + 1) * size], "a false hit"
            assert pool.is_published(block)
        available = pool.available
        unheld = sum(pool._refs[block] == 0 for block in found)
        blocks = fill(pool, tokens)
        assert blocks[: len(found)] == found
        fresh = blocks[len(found) :]
        assert len(set(blocks)) == len(blocks)
        assert not any(set(fresh) & set(held) for held in self.held), "someone holds it"
        assert len(fresh) == min(-(-len(tokens) // size) - len(found), available - unheld)
        for page, block in enumerate(fresh, start=len(found)):
            self.written[block] = tokens[: (page + 1) * size]
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data):
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(blocks)

    @invariant()
    def all_blocks_are_accounted_for(self):
        pool = self.pool
        holders = [block for blocks in self.held for block in blocks]
        for block in range(1, pool.num_blocks + 1):
            assert pool._refs[block] == holders.count(block)
        assert pool.used == len(set(holders))
        assert pool.free + pool.cached == pool.available == pool.num_blocks - pool.used

    def teardown(self):
        for blocks in getattr(self, "held", []):
            self.pool.release(blocks)
        if hasattr(self, "pool"):
            blocks = take_new(self.pool, self.pool.num_blocks)
            assert sorted(blocks) == list(range(1, self.pool.num_blocks + 1))
            assert self.pool.allocate() is None


AnyUse.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_any_use = AnyUse.TestCase


def test_scratch_is_never_handed_out():
    pool = BlockPool(3, 4)
    assert [pool.allocate() for _ in range(4)] == [1, 2, 3, None]
    assert (pool.free, pool.cached, pool.used) == (0, 0, 3)


def test_only_full_published_blocks_stay_cached():
    pool = BlockPool(4, 2)
    blocks = fill(pool, [1, 2, 3, 4, 5])
    assert (pool.free, pool.cached, pool.used) == (1, 0, 3)
    pool.release(blocks)
    assert (pool.free, pool.cached, pool.used) == (2, 2, 0)
    assert pool.lookup([1, 2, 3, 4, 5]) == blocks[:2]
    assert pool.lookup([1, 2, 3]) == blocks[:1]
    assert pool.lookup([1]) == pool.lookup([]) == []


def test_a_block_is_found_behind_its_own_prefix_alone():
    pool = BlockPool(8, 2)
    first = fill(pool, [1, 2, 3, 4])
    second = fill(pool, [5, 6, 3, 4])
    assert first[1] != second[1]
    assert pool.lookup([3, 4]) == []
    assert pool.lookup([5, 6, 3, 4]) == second
    assert pool.lookup([5, 6, 1, 2]) == second[:1]


def test_shared_blocks_live_until_the_last_holder():
    pool = BlockPool(2, 2)
    blocks = fill(pool, [1, 2])
    assert fill(pool, [1, 2]) == blocks and pool._refs[blocks[0]] == 2
    pool.release(blocks)
    assert (pool.used, pool.cached) == (1, 0)
    pool.release(blocks)
    assert (pool.used, pool.cached) == (0, 1)
    with pytest.raises(RuntimeError, match="no sequence holds"):
        pool.release(blocks)


def test_the_longest_unused_is_evicted_and_ends_before_beginnings():
    pool = BlockPool(4, 2)
    old, new = fill(pool, [1, 2, 3, 4]), fill(pool, [5, 6, 7, 8])
    pool.release(old)
    pool.release(new)
    assert pool.allocate() == old[1]
    assert pool.lookup([1, 2, 3, 4]) == old[:1]
    pool.take(old[:1])
    pool.release(old[:1])
    assert pool.allocate() == new[1]
    assert (pool.lookup([5, 6, 7, 8]), pool.lookup([1, 2])) == (new[:1], old[:1])
    assert [pool.allocate(), pool.allocate(), pool.allocate()] == [new[0], old[0], None]
    assert pool.lookup([1, 2]) == pool.lookup([5, 6]) == []


def test_of_equal_blocks_one_is_published():
    pool = BlockPool(4, 2)
    blocks = take_new(pool, 4)
    pool.publish(None, [1, 2], blocks[0])
    pool.publish(None, [1, 2], blocks[1])
    assert [pool.is_published(block) for block in blocks] == [True, False, False, False]
    # A block after either copy is found behind the published copy.
    pool.publish(blocks[1], [3, 4], blocks[2])
    assert pool.lookup([1, 2, 3, 4]) == [blocks[0], blocks[2]]
    pool.release([blocks[1]])
    assert (pool.free, pool.cached) == (1, 0)
    assert pool.lookup([1, 2]) == [blocks[0]]


def test_a_block_is_found_again_when_its_prefix_returns():
    pool = BlockPool(3, 2)
    blocks = take_new(pool, 3)
    pool.publish(None, [1, 2], blocks[0])
    pool.publish(None, [1, 2], blocks[1])
    pool.publish(blocks[1], [3, 4], blocks[2])
    pool.release([blocks[0]])
    assert pool.allocate() == blocks[0]
    assert pool.lookup([1, 2, 3, 4]) == []
    pool.publish(None, [1, 2], blocks[0])
    assert pool.lookup([1, 2, 3, 4]) == [blocks[0], blocks[2]]
