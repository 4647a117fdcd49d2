"""Sampling on the device against a numpy oracle in float64; every draw has a fixed seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dance_jax.engine.allowed import Masks, words_of
from dance_jax.engine.sampling import (
    Adjustments,
    SamplingState,
    adjusted,
    adjustments,
    kept_tokens,
    sample,
    sampling_state,
)
from dance_jax.engine.sequence import MAX_LOGPROBS, SamplingParams, Sequence

VOCAB = 700
#: Number of rows in most tests, so that they share one compilation.
ROWS = 16
sample_masked_jit = jax.jit(sample)


def everything(rows=ROWS, vocab=VOCAB):
    """A mask that allows all tokens."""
    return Masks(vocab).none(rows)


def sample_jit(logits, state, changes):
    return sample_masked_jit(logits, state, changes, everything(*logits.shape))


adjusted_jit = jax.jit(adjusted)


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


#: Maximum number of known tokens of a row.
HISTORY = 40


def unchanged(rows=ROWS) -> Adjustments:
    return adjustments({}, rows, HISTORY)


def changes_of(rows=ROWS, **params) -> Adjustments:
    """Adjustments of rows with prompt 0, 1, output 2, 2, 3 and these parameters."""
    sequence = Sequence("r", 0, [0, 1], SamplingParams(**params), 16, 0)
    sequence.output_token_ids = [2, 2, 3]
    return adjustments(dict.fromkeys(range(rows), sequence), rows, HISTORY)


def oracle(logits_v, temperature, top_k, top_p, min_p):
    """(probabilities, kept, undecidable: within rounding of a threshold) of one row."""
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
    token = np.asarray(sample_jit(tiled, state, unchanged(rows)).token)
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
    state = make_state(
        rows,
        temperature=rng.choice([0.0, 0.5, 1.0], rows),
        top_k=rng.choice([0, 20], rows),
        top_p=rng.choice([1.0, 0.8], rows),
        min_p=rng.choice([0.0, 0.02], rows),
        seed=rng.integers(0, 2**32, rows, np.uint32),
        position=rng.integers(0, 100, rows),
    )
    params = SamplingParams(
        repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, logit_bias={7: 2.0}
    )
    known = {
        row: Sequence("r", 0, rng.integers(0, VOCAB, 9).tolist(), params, 16, 0)
        for row in range(0, rows, 2)
    }
    changes = adjustments(known, rows, HISTORY)
    together = sample_jit(logits, state, changes)
    for row in range(rows):
        alone = sample_jit(
            logits[row : row + 1],
            SamplingState(*(field[row : row + 1] for field in state)),
            Adjustments(*(field[row : row + 1] for field in changes)),
        )
        assert alone.token[0] == together.token[row]
        np.testing.assert_allclose(alone.logprob[0], together.logprob[row], atol=1e-6)
    order = rng.permutation(rows)
    shuffled = sample_jit(
        logits[order],
        SamplingState(*(field[order] for field in state)),
        Adjustments(*(field[order] for field in changes)),
    )
    np.testing.assert_array_equal(shuffled.token, np.asarray(together.token)[order])


def test_noise_of_other_batches_seldom_changes_the_draw():
    """A difference of 1e-5 in the logits changes the token about that rarely: no boundary moves."""
    rows = 4096
    logits = np.tile(make_logits(1, vocab=VOCAB), (rows, 1))
    noise = np.random.default_rng(0).normal(size=logits.shape).astype(np.float32) * 1e-5
    state = make_state(rows, temperature=1.0, seed=np.arange(rows))
    calm = sample_jit(logits, state, unchanged(rows)).token
    noisy = sample_jit(logits + noise, state, unchanged(rows)).token
    assert np.sum(np.asarray(calm) != np.asarray(noisy)) <= 1


def test_seed_and_position_change_the_draw():
    logits = np.zeros((ROWS, VOCAB), np.float32)

    def draw(**fields):
        state = make_state(ROWS, temperature=1.0, **fields)
        return np.asarray(sample_jit(logits, state, unchanged()).token)

    by_position = draw(seed=7, position=np.arange(ROWS))
    by_seed = draw(seed=np.arange(ROWS), position=7)
    assert len(set(by_position)) >= ROWS - 2 and len(set(by_seed)) >= ROWS - 2
    np.testing.assert_array_equal(by_position, draw(seed=7, position=np.arange(ROWS)))


def test_greedy_rows_are_argmax_beside_sampled_ones():
    logits = make_logits(ROWS)
    state = make_state(ROWS, temperature=[0, 1] * 8, seed=np.arange(ROWS))
    token = np.asarray(sample_jit(logits, state, unchanged()).token)
    np.testing.assert_array_equal(token[::2], logits[::2].argmax(-1))


def test_extreme_parameters_are_greedy():
    logits = make_logits(ROWS)
    for fields in [dict(top_k=1), dict(top_p=1e-9), dict(min_p=1.0), dict(temperature=1e-4)]:
        state = make_state(ROWS, **{"temperature": 1.0, "seed": np.arange(ROWS), **fields})
        token = sample_jit(logits, state, unchanged()).token
        np.testing.assert_array_equal(token, logits.argmax(-1))


def test_logprobs_are_of_the_raw_distribution():
    logits = make_logits(ROWS)
    raw = logits.astype(np.float64)
    raw -= np.log(np.exp(raw).sum(-1, keepdims=True))
    state = make_state(
        ROWS,
        temperature=0.5,
        top_k=5,
        seed=np.arange(ROWS),
        top=[True] + (ROWS - 1) * [False],
    )
    result = sample_jit(logits, state, changes_of(repetition_penalty=1.5))
    token = np.asarray(result.token)
    rows = np.arange(ROWS)
    np.testing.assert_allclose(result.logprob, raw[rows, token], atol=1e-5)
    np.testing.assert_array_equal(result.rank, 1 + (raw > raw[rows, token][:, None]).sum(-1))
    best = np.argsort(-raw, axis=-1)[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(result.top_token, best)
    np.testing.assert_allclose(result.top_logprob, np.take_along_axis(raw, best, -1), atol=1e-5)
    nobody = sample_jit(logits, state._replace(top=np.zeros(ROWS, bool)), unchanged())
    assert not np.any(nobody.rank) and not np.any(nobody.top_token)


def changed_logits(**params) -> np.ndarray:
    """The logits [2, -2, 2, 2, 2, 2] after `changes_of`."""
    logits = np.full((ROWS, VOCAB), 2, np.float32)
    logits[:, 1] = -2
    return np.asarray(adjusted_jit(logits, changes_of(**params)))[0, :6]


def test_penalties_follow_their_definitions():
    """The prompt is 0, 1 and the output 2, 2, 3; tokens 4 and 5 have not occurred."""
    plain = [2, -2, 2, 2, 2, 2]
    expected = {
        (("repetition_penalty", 1.25),): [1.6, -2.5, 1.6, 1.6, 2, 2],
        (("presence_penalty", 0.5),): [2, -2, 1.5, 1.5, 2, 2],
        (("frequency_penalty", 0.5),): [2, -2, 1, 1.5, 2, 2],
        (("presence_penalty", -1.0), ("frequency_penalty", 0.25)): [2, -2, 2.5, 2.75, 2, 2],
    }
    assert np.allclose(changed_logits(), plain, atol=1e-6)
    for params, wanted in expected.items():
        np.testing.assert_allclose(changed_logits(**dict(params)), wanted, atol=1e-6)


def test_a_bias_comes_before_the_penalties():
    found = changed_logits(logit_bias={2: 1.0, 4: -0.5}, repetition_penalty=2.0)
    np.testing.assert_allclose(found, [1, -4, 1.5, 1, 1.5, 2], atol=1e-6)


def test_tokens_that_are_not_allowed_are_never_drawn():
    logits = make_logits(ROWS)
    logits[:, [3, 9]] += 50
    allowed = everything()
    allowed[:3] = ~words_of([3, 9], VOCAB)
    for temperature in (0.0, 1.0):
        state = make_state(ROWS, temperature=temperature, seed=np.arange(ROWS))
        result = sample_masked_jit(logits, state, unchanged(), allowed)
        held = np.isin(np.asarray(result.token), [3, 9])
        np.testing.assert_array_equal(held, np.arange(ROWS) >= 3)


def test_state_of_sequences():
    params = SamplingParams(
        temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, repetition_penalty=1.2, logprobs=0
    )
    sequence = Sequence("r", 0, [1], params, 16, seed=2**32 - 1, output_token_ids=[5, 6])
    state = sampling_state({2: sequence}, 4)
    assert state.temperature.tolist() == [0, 0, 0.5, 0]
    assert (state.top_k[2], state.seed[2], state.position[2]) == (0, 2**32 - 1, 2)
    assert state.top.tolist() == [False, False, True, False]


def test_adjustments_of_sequences():
    plain = Sequence("r", 0, [1], SamplingParams(repetition_penalty=1), 16, 0)
    params = SamplingParams(presence_penalty=1, logit_bias={5: -1.5})
    sequence = Sequence("r", 0, [8, 7], params, 16, 0, output_token_ids=[6])
    changes = adjustments({0: plain, 2: sequence}, 4, 5)
    assert changes.history.tolist() == [[-1] * 5, [-1] * 5, [8, 7, 6, -1, -1], [-1] * 5]
    assert changes.prompt_length.tolist() == [0, 0, 2, 0]
    assert changes.presence_penalty.tolist() == [0, 0, 1, 0]
    assert (changes.bias_token[2, 0], changes.bias[2, 0]) == (5, -1.5)
    assert (changes.bias_token >= 0).sum() == 1


def test_runs_under_shard_map():
    mesh = jax.make_mesh((1,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    logits = make_logits(ROWS)
    state = make_state(ROWS, temperature=1.0, top_p=0.9, top_k=9, seed=np.arange(ROWS))
    spec = PartitionSpec("device")
    sharded = jax.jit(jax.shard_map(sample, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec))
    result = sharded(logits, state, unchanged(), everything())
    np.testing.assert_array_equal(
        result.token, sample_jit(jnp.asarray(logits), state, unchanged()).token
    )
