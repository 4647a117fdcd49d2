"""choose_servers against its definition, and the fewest servers by brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.config import UserError
from dance_jax.placement.visit import (
    WORD,
    choose_servers,
    has,
    masks,
    places,
    preferences,
)
from tests.placement.cases import plain_servers

TOKENS, K = 16, 4
SERVERS = [1, 2, 3, 8, 9, 16, 33, 100, 256]


def run(held, needed, order=None):
    """`choose_servers` of who holds each expert, bool [t, k, servers]."""
    held = np.asarray(held)
    holders = masks(np.moveaxis(held, -1, 0), order)
    return np.asarray(jitted(jnp.asarray(holders), jnp.asarray(needed), held.shape[-1]))


def bits(bitmasks, num_servers):
    """bool [..., servers]."""
    return np.asarray(bitmasks)[..., None] >> np.arange(num_servers) & 1 != 0


jitted = jax.jit(choose_servers, static_argnums=2)


@st.composite
def tokens(draw, num_servers, densities=(0.1, 0.3, 0.6)):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    held = rng.random((TOKENS, K, num_servers)) < draw(st.sampled_from(densities))
    return held, rng.random((TOKENS, K)) < draw(st.sampled_from([0.5, 0.9, 1.0]))


@pytest.mark.parametrize("num_servers", SERVERS)
def test_choice_is_the_plain_one_and_near_the_fewest(num_servers):
    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(tokens(num_servers), st.randoms(use_true_random=False))
    def check(case, random):
        held, needed = case
        order = random.sample(range(num_servers), num_servers)
        result = run(held, needed, np.array(order))
        for t in range(TOKENS):
            expected = plain_servers(held[t], needed[t], order)
            assert [order[place] if place >= 0 else -1 for place in result[t]] == expected
            # Greedy set cover of K elements is within H(K) = 1 + 1/2 + 1/3 + 1/4 of the fewest.
            if num_servers <= 9:
                fewest = fewest_servers(held[t][needed[t]])
                assert len(set(expected) - {-1}) <= fewest * 25 / 12

    check()


def fewest_servers(missing: np.ndarray) -> int:
    """The size of the smallest set that meets every set, bool [k, servers], by trying all."""
    open_k = missing[missing.any(1)]
    return next(
        size
        for size in range(missing.shape[1] + 1)
        for chosen in itertools.combinations(range(missing.shape[1]), size)
        if open_k[:, chosen].any(1).all()
    )


def test_ties_go_to_the_lowest_places():
    both = run(bits([[0b110, 0b110]], 3), [[True, True]])
    assert both.tolist() == [[1, 1]]
    pairs = run(bits([[0b0011, 0b1100, 0b0101, 0b1010]], 4), [[True] * 4])
    assert pairs.tolist() == [[0, 3, 0, 3]]


def test_worked_example():
    held = bits([[0b010, 0b110, 0b100], [0b010, 0b110, 0b001]], 3)
    assert run(held, [[True] * 3, [True, True, False]]).tolist() == [[1, 1, 2], [1, 1, -1]]


def test_nothing_needed_and_nobody_holds():
    assert run(bits([[3, 0]], 2), [[False, False]]).tolist() == [[-1, -1]]
    assert run(bits([[2, 0]], 2), [[True, True]]).tolist() == [[1, -1]]


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_preferences_are_by_seconds_then_around_the_ring(data):
    servers = data.draw(st.integers(1, 6))
    rows = st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=servers, max_size=servers)
    seconds = np.array(data.draw(st.lists(rows, min_size=servers, max_size=servers)))
    # What differs by rounding alone is equal.
    noise = np.random.default_rng(0).uniform(-1e-12, 1e-12, seconds.shape)
    found = preferences(seconds * (1 + noise))
    assert found.dtype == np.int32
    for n in range(servers):
        ring = [(n + step) % servers for step in range(1, servers)]
        assert found[n].tolist() == [*sorted(ring, key=lambda m: seconds[n, m]), n]
        assert found[n, places(found[n])].tolist() == list(range(servers))


def test_a_server_s_own_seconds_make_no_others_equal():
    """Servers 1 and 2 differ by more than EQUAL, and what server 0 takes lies between them."""
    assert preferences(np.array([[1.04, 1.08, 1.0]] * 3))[0].tolist() == [2, 1, 0]


@pytest.mark.parametrize("order", [[0, 0], [1, 2], [-1, 0]])
def test_an_order_lists_each_server_once(order):
    with pytest.raises(ValueError, match="lists each once"):
        places(np.array(order))


@pytest.mark.parametrize("num_servers", [1, 8, 9, 16, 17, 32, 33, 256])
def test_masks_have_a_bit_for_each_server(num_servers):
    resident = np.random.default_rng(num_servers).random((num_servers, 5, 3)) < 0.3
    found = masks(resident)
    bits_of_word = min(8 * found.itemsize, WORD)
    assert found.size * bits_of_word < 15 * (num_servers + WORD)
    for n in range(num_servers):
        assert (np.asarray(has(jnp.asarray(found), n)) == resident[n]).all()


@pytest.mark.parametrize("num_servers", [0, 257])
def test_number_of_servers_out_of_range(num_servers):
    with pytest.raises(UserError, match=f"{num_servers} servers"):
        masks(np.zeros((num_servers, 1, 1), bool))
