"""Device-side sampling against a numpy oracle in float64; every draw has a fixed seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dance_jax.engine.sampling import (
    SamplingState,
    kept_tokens,
    mark_seen,
    sample,
    sampling_state,
)
from dance_jax.engine.sequence import MAX_LOGPROBS, MAX_STOP_IDS, SamplingParams, Sequence

VOCAB = 700
#: Rows of most tests, so that they share one compilation.
ROWS = 16
sample_jit = jax.jit(sample, static_argnums=3)


@pytest.fixture(autouse=True)
def strict_arithmetic():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def make_state(rows: int, **fields) -> SamplingState:
    state = sampling_state({}, rows)
    return state._replace(
        **{
            name: np.broadcast_to(
                np.asarray(value, getattr(state, name).dtype), getattr(state, name).shape
            )
            for name, value in fields.items()
        }
    )


def make_logits(rows, seed=0, scale=3.0, vocab=VOCAB):
    return np.random.default_rng(seed).normal(size=(rows, vocab)).astype(np.float32) * scale


def unseen(logits):
    return np.zeros(logits.shape, bool)


def oracle(logits_v, temperature, top_k, top_p, min_p):
    """(probabilities, kept, undecidable: at the rounding error of the border) of one row."""
    scaled = logits_v.astype(np.float64) / temperature
    weight = np.exp(scaled - scaled.max())
    kept = weight >= min_p
    border = np.abs(weight - min_p) < 1e-5 * weight
    if top_k > 0:
        order = np.sort(scaled[kept])[::-1]
        kept &= scaled >= order[int(min(top_k, len(order))) - 1]
    if top_p < 1:
        above = np.array([weight[kept & (scaled > s)].sum() for s in scaled]) / weight[kept].sum()
        border |= np.abs(above - top_p) < 1e-5
        kept &= above < top_p
    probability = np.where(kept, weight, 0)
    return probability / probability.sum(), kept, border


@pytest.mark.parametrize("seed", range(3))
def test_masks_equal_the_oracle(seed):
    rng = np.random.default_rng(seed)
    rows = 64
    logits = make_logits(rows, seed)
    logits[::4] = np.round(logits[::4])  # many ties
    parameters = dict(
        temperature=rng.choice([0.3, 0.7, 1.0, 2.0], rows),
        top_k=rng.choice([0, 1, 5, 50, VOCAB, VOCAB + 9], rows),
        top_p=rng.choice([1.0, 0.95, 0.5, 0.1, 1e-6], rows),
        min_p=rng.choice([0.0, 0.01, 0.3, 1.0], rows),
    )
    _, kept = jax.jit(kept_tokens)(logits, make_state(rows, **parameters))
    for row in range(rows):
        values = {name: float(np.float32(value[row])) for name, value in parameters.items()}
        _, expected, border = oracle(logits[row], **values)
        same = (np.asarray(kept[row]) == expected) | border
        assert same.all(), (values, np.flatnonzero(~same))
        assert kept[row, logits[row].argmax()]


@pytest.mark.parametrize(
    "parameters",
    [
        dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
        dict(temperature=0.6, top_k=40, top_p=0.9, min_p=0.0),
        dict(temperature=1.7, top_k=0, top_p=1.0, min_p=0.05),
    ],
)
def test_draws_follow_the_distribution(parameters):
    rows = 4096
    logits = make_logits(1)
    expected, kept, _ = oracle(logits[0], **parameters)
    state = make_state(rows, seed=np.arange(rows), position=np.arange(rows) % 7, **parameters)
    tiled = np.tile(logits, (rows, 1))
    token = np.asarray(sample_jit(tiled, unseen(tiled), state).token)
    assert kept[token].all()
    often = expected * rows >= 8
    counts = np.bincount(token, minlength=VOCAB)
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum()) * rows
    wanted_some = wanted > 0
    chi2 = ((observed - wanted)[wanted_some] ** 2 / wanted[wanted_some]).sum()
    freedom = wanted_some.sum() - 1
    # The statistic's mean is `freedom`, its variance 2 `freedom`.
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


def test_a_row_does_not_depend_on_its_batch():
    rows = ROWS
    rng = np.random.default_rng(5)
    logits = make_logits(rows, 5)
    seen = rng.random(logits.shape) < 0.1
    state = make_state(
        rows,
        temperature=rng.choice([0.0, 0.5, 1.0], rows),
        top_k=rng.choice([0, 20], rows),
        top_p=rng.choice([1.0, 0.8], rows),
        min_p=rng.choice([0.0, 0.02], rows),
        repetition_penalty=rng.choice([1.0, 1.3], rows),
        seed=rng.integers(0, 2**32, rows, np.uint32),
        position=rng.integers(0, 100, rows),
    )
    together = sample_jit(logits, seen, state)
    for row in range(rows):
        alone = sample_jit(
            logits[row : row + 1],
            seen[row : row + 1],
            SamplingState(*(field[row : row + 1] for field in state)),
        )
        assert alone.token[0] == together.token[row]
        np.testing.assert_allclose(alone.logprob[0], together.logprob[row], atol=1e-6)
    order = rng.permutation(rows)
    shuffled = sample_jit(
        logits[order], seen[order], SamplingState(*(field[order] for field in state))
    )
    np.testing.assert_array_equal(shuffled.token, np.asarray(together.token)[order])


def test_seed_and_position_change_the_draw():
    logits = np.zeros((ROWS, VOCAB), np.float32)

    def draw(**fields):
        state = make_state(ROWS, temperature=1.0, **fields)
        return np.asarray(sample_jit(logits, unseen(logits), state).token)

    by_position = draw(seed=7, position=np.arange(ROWS))
    by_seed = draw(seed=np.arange(ROWS), position=7)
    assert len(set(by_position)) >= ROWS - 2 and len(set(by_seed)) >= ROWS - 2
    np.testing.assert_array_equal(by_position, draw(seed=7, position=np.arange(ROWS)))


def test_greedy_rows_are_argmax_beside_sampled_ones():
    logits = make_logits(ROWS)
    state = make_state(ROWS, temperature=[0, 1] * 8, seed=np.arange(ROWS))
    token = np.asarray(sample_jit(logits, unseen(logits), state).token)
    np.testing.assert_array_equal(token[::2], logits[::2].argmax(-1))


def test_extreme_parameters_are_greedy():
    logits = make_logits(ROWS)
    for fields in [dict(top_k=1), dict(top_p=1e-9), dict(min_p=1.0), dict(temperature=1e-4)]:
        state = make_state(ROWS, **{"temperature": 1.0, "seed": np.arange(ROWS), **fields})
        token = sample_jit(logits, unseen(logits), state).token
        np.testing.assert_array_equal(token, logits.argmax(-1))


def test_logprobs_are_of_the_raw_distribution():
    logits = make_logits(ROWS)
    raw = logits.astype(np.float64)
    raw -= np.log(np.exp(raw).sum(-1, keepdims=True))
    state = make_state(
        ROWS,
        temperature=0.5,
        top_k=5,
        repetition_penalty=1.5,
        seed=np.arange(ROWS),
        top=[True] + (ROWS - 1) * [False],
    )
    result = sample_jit(logits, logits > 3, state)
    token = np.asarray(result.token)
    rows = np.arange(ROWS)
    np.testing.assert_allclose(result.logprob, raw[rows, token], atol=1e-5)
    np.testing.assert_array_equal(result.rank, 1 + (raw > raw[rows, token][:, None]).sum(-1))
    best = np.argsort(-raw, axis=-1)[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(result.top_token, best)
    np.testing.assert_allclose(result.top_logprob, np.take_along_axis(raw, best, -1), atol=1e-5)
    nobody = sample_jit(logits, unseen(logits), state._replace(top=np.zeros(ROWS, bool)))
    assert not np.any(nobody.rank) and not np.any(nobody.top_token)


def test_repetition_penalty_moves_seen_tokens_down():
    logits = np.full((ROWS, VOCAB), -9, np.float32)
    logits[:, :4] = [2.0, 1.8, -1.0, -1.1]
    logits[3, :4] = [-1.0, -1.2, -9, -9]
    seen = unseen(logits)
    seen[0, 0] = seen[1, :2] = seen[3, 0] = True
    result = sample_jit(logits, seen, make_state(ROWS, repetition_penalty=1.5))
    assert result.token[:4].tolist() == [1, 0, 0, 1]


def test_held_back_tokens_are_never_drawn_before_min_tokens():
    logits = make_logits(ROWS)
    logits[:, [3, 9]] += 50
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[9])
    sequences = {}
    for row in range(5):
        sequence = Sequence("r", 0, [1], params, 16, 0, frozenset({3, 9}), (3, 9))
        sequence.output_token_ids = [0] * row
        sequences[row] = sequence
    result = sample_jit(logits, unseen(logits), sampling_state(sequences, ROWS))
    held = np.isin(np.asarray(result.token[:5]), [3, 9])
    np.testing.assert_array_equal(held, [False, False, True, True, True])


def test_state_of_sequences():
    params = SamplingParams(
        temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, repetition_penalty=1.2, logprobs=0
    )
    sequence = Sequence("r", 0, [1], params, 16, seed=2**32 - 1, output_token_ids=[5, 6])
    state = sampling_state({2: sequence}, 4)
    assert state.temperature.tolist() == [0, 0, 0.5, 0]
    assert (state.top_k[2], state.seed[2], state.position[2]) == (0, 2**32 - 1, 2)
    assert state.top.tolist() == [False, False, True, False]
    assert state.held_back.shape == (4, MAX_STOP_IDS)


def test_mark_seen_clears_new_sequences_and_skips_unused_rows():
    seen = np.zeros((4, 10), bool)
    seen[1, 9] = seen[2, 8] = seen[3, 7] = True
    result = jax.jit(mark_seen)(
        seen,
        np.array([1, 2, 3], np.int32),
        np.array([0, 5, 0], np.int32),
        np.array([2, 1, 0], np.int32),
        np.array([[4, 5, 6], [1, 6, 6], [2, 2, 2]], np.int32),
    )
    expected = [[], [4, 5], [1, 8], [7]]
    assert [np.flatnonzero(row).tolist() for row in np.asarray(result)] == expected


def test_runs_under_shard_map():
    mesh = jax.make_mesh((1,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    logits = make_logits(ROWS)
    state = make_state(ROWS, temperature=1.0, top_p=0.9, top_k=9, seed=np.arange(ROWS))
    spec = PartitionSpec("device")
    sharded = jax.jit(jax.shard_map(sample, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec))
    result = sharded(logits, unseen(logits), state)
    np.testing.assert_array_equal(
        result.token, sample_jit(jnp.asarray(logits), unseen(logits), state).token
    )
