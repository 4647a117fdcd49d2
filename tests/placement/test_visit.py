"""choose_servers against brute force over all sets of servers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.config import UserError
from dance_jax.placement.visit import choose_servers, subsets, visited

TOKENS, K = 16, 4
SERVERS = [1, 2, 3, 5, 6, 8]


def brute_force(missing: list[int], num_servers: int) -> tuple[int, ...]:
    """The first smallest set, in lexicographic order, that meets every non-zero mask."""
    for size in range(num_servers + 1):
        for chosen in itertools.combinations(range(num_servers), size):
            if all(any(mask >> n & 1 for n in chosen) for mask in missing if mask):
                return chosen
    raise AssertionError("the set of all servers meets every mask")


def run(holders, needed, num_servers):
    return np.asarray(jitted(jnp.asarray(holders, jnp.int32), jnp.asarray(needed), num_servers))


jitted = jax.jit(choose_servers, static_argnums=2)


@st.composite
def tokens(draw, num_servers):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.1, 0.3, 0.6]))
    held = rng.random((TOKENS, K, num_servers)) < density
    holders = (held << np.arange(num_servers)).sum(-1)
    return holders, rng.random((TOKENS, K)) < draw(st.sampled_from([0.5, 0.9, 1.0]))


@pytest.mark.parametrize("num_servers", SERVERS)
def test_choice_is_the_first_smallest_set(num_servers):
    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(tokens(num_servers))
    def check(case):
        holders, needed = case
        result = run(holders, needed, num_servers)
        for t in range(TOKENS):
            missing = [int(h) for h, n in zip(holders[t], needed[t], strict=True) if n]
            chosen = brute_force(missing, num_servers)
            for k in range(K):
                able = [n for n in chosen if holders[t, k] >> n & 1]
                assert result[t, k] == (able[0] if needed[t, k] and able else -1)

    check()


@pytest.mark.parametrize("num_servers", [9, 16, 31])
def test_greedy_covers_and_is_near_the_smallest(num_servers):
    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(tokens(num_servers))
    def check(case):
        holders, needed = case
        result = run(holders, needed, num_servers)
        held = needed & (holders != 0)
        assert ((result >= 0) == held).all()
        assert (holders[held] >> result[held] & 1).all()
        # Greedy set cover of K elements is within H(K) = 1 + 1/2 + 1/3 + 1/4 of the smallest.
        for t in range(TOKENS):
            missing = [int(h) for h, n in zip(holders[t], needed[t], strict=True) if n]
            smallest = len(brute_force(missing, num_servers))
            assert len(set(result[t][result[t] >= 0])) <= smallest * 25 / 12

    check()


def test_preference_order():
    masks = subsets(4)
    assert sorted(masks.tolist()) == list(range(16))
    members = [[n for n in range(4) if mask >> n & 1] for mask in masks]
    assert members == sorted(members, key=lambda m: (len(m), m))
    # {0, 3} comes before {1, 2} although its bitmask is the larger number.
    assert masks.tolist().index(0b1001) < masks.tolist().index(0b0110)


def test_ties_go_to_the_lowest_servers():
    both = run([[0b110, 0b110]], [[True, True]], 3)
    assert both.tolist() == [[1, 1]]
    pairs = run([[0b0011, 0b1100, 0b0101, 0b1010]], [[True] * 4], 4)
    assert pairs.tolist() == [[0, 3, 0, 3]]


def test_worked_example_and_visited():
    result = run(
        [[0b010, 0b110, 0b100], [0b010, 0b110, 0b001]], [[True] * 3, [True, True, False]], 3
    )
    assert result.tolist() == [[1, 1, 2], [1, 1, -1]]
    assert visited(jnp.asarray(result)).tolist() == [0b110, 0b010]


def test_nothing_needed_and_nobody_holds():
    assert run([[3, 0]], [[False, False]], 2).tolist() == [[-1, -1]]
    assert run([[2, 0]], [[True, True]], 2).tolist() == [[1, -1]]


@pytest.mark.parametrize("num_servers", [0, 32])
def test_number_of_servers_out_of_range(num_servers):
    with pytest.raises(UserError, match="servers"):
        choose_servers(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool), num_servers)
