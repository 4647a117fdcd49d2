"""On CPUs a row's result is bit-identical regardless of other rows and of how prefill is split."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dance_jax.engine.kv_cache import layer_cache
from dance_jax.models import model_config, native, rows_cpu
from dance_jax.models.attention import Heads, Rows, write_and_attend
from dance_jax.models.config import RopeConfig, RouterConfig
from dance_jax.models.layers import rms_norm
from dance_jax.models.rope import rotate, rotation
from dance_jax.models.router import choose_experts
from tests.engine.traffic import ENGINE
from tests.forward import forward
from tests.random_models import init_random
from tests.tiny_models import DEEPSEEK, MIXTRAL, OSS

pytestmark = pytest.mark.usefixtures("compiled")
#: Without shrinking, which would compile for minutes because every shape is compiled.
quick = settings(deadline=None, max_examples=4, phases=[Phase.explicit, Phase.generate])
dtypes = st.sampled_from(["float32", "bfloat16"])


def same_alone(function, *arrays):
    """Check that a function gives each row the same result as for that row alone."""
    function = jax.jit(function)
    together = function(*arrays)
    for row in range(len(arrays[0])):
        alone = function(*(array[row : row + 1] for array in arrays))
        for one, all_ in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_array_equal(one[0], all_[row])


def normal(seed: int, *shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@quick
@given(rows=st.integers(2, 40), width=st.integers(1, 70), plus_one=st.booleans(), dtype=dtypes)
def test_norm(rows, width, plus_one, dtype):
    weight = normal(1, width, dtype=dtype)
    x_nd = normal(0, rows, width, dtype=dtype)
    same_alone(lambda x_nd: rms_norm(x_nd, weight, 1e-5, plus_one), x_nd)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "usable", lambda: False)
        expected = rms_norm(x_nd, weight, 1e-5, plus_one)
    found = rms_norm(x_nd, weight, 1e-5, plus_one)
    assert found.dtype == expected.dtype
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(
        found.astype("float32"), expected.astype("float32"), rtol=tolerance, atol=1e-6
    )


@st.composite
def routers(draw) -> RouterConfig:
    groups = draw(st.sampled_from([1, 2, 4]))
    size = draw(st.integers(3, 20))
    kept = draw(st.integers(1, groups))
    return RouterConfig(
        num_experts=groups * size,
        top_k=draw(st.integers(1, min(8, kept * size))),
        score=draw(st.sampled_from(["softmax", "sigmoid", "logits"])),
        num_groups=groups,
        topk_group=kept,
        group_best=draw(st.integers(1, 2)),
        normalise=draw(st.booleans()),
        norm_epsilon=draw(st.sampled_from([0.0, 1e-20])),
        scale=draw(st.sampled_from([1.0, 2.5])),
    )


@pytest.mark.slow
@settings(quick, max_examples=20)
@given(rule=routers(), rows=st.integers(1, 6), corrected=st.booleans(), seed=st.integers(0, 99))
def test_choice_of_experts(rule, rows, corrected, seed):
    # Few different values, so that there are ties; no -0.0, which JAX orders before 0.
    logits_te = jnp.round(2 * normal(seed, rows, rule.num_experts)) / 2 + 0.0
    correction_e = normal(seed + 1, rule.num_experts) if corrected else None
    expert_tk, weight_tk = choose_experts(rule, logits_te, correction_e)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "usable", lambda: False)
        wanted_tk, weights_tk = choose_experts(rule, logits_te, correction_e)
    np.testing.assert_array_equal(expert_tk, wanted_tk)
    np.testing.assert_allclose(weight_tk, weights_tk, rtol=2e-6, atol=1e-30)
    same_alone(lambda logits_te: choose_experts(rule, logits_te, correction_e), logits_te)


def test_what_is_no_number_chooses_experts_all_the_same():
    rule = RouterConfig(num_experts=5, top_k=3)
    expert_tk, _ = rows_cpu.choose_experts(rule, jnp.full((2, 5), jnp.nan), None)
    assert ((np.asarray(expert_tk) >= 0) & (np.asarray(expert_tk) < 5)).all()


@quick
@given(rows=st.integers(2, 40), interleaved=st.booleans(), dtype=dtypes)
def test_rotation(rows, interleaved, dtype):
    rope = RopeConfig(dim=24, theta=10000.0, interleaved=interleaved)
    positions = jnp.asarray(np.random.default_rng(0).integers(0, 5000, rows), jnp.int32)

    def rotated(x_thk, positions):
        return rotate(rope, x_thk, rotation(rope, positions, 5000))

    same_alone(rotated, normal(0, rows, 3, 32, dtype=dtype), positions)


def one_sequence(start: int, length: int, table: np.ndarray, chunk: int) -> Rows:
    """Rows of `chunk` tokens that begin at `start` and have `length` real tokens in total."""
    count = -(-length // chunk)
    starts = start + chunk * np.arange(count)
    lengths = np.clip(start + length - starts, 0, chunk)
    zero = np.zeros(count, np.int32)
    tables = np.tile(table, (count, 1))
    return Rows(starts.astype(np.int32), lengths.astype(np.int32), zero, tables, zero, chunk)


@quick
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    block=st.sampled_from([4, 8, 32]),
    window=st.sampled_from([None, 1, 9, 40]),
    groups=st.integers(1, 2),
    queries=st.integers(1, 9),
    width=st.sampled_from([5, 16, 40]),
    sinks=st.booleans(),
    dtype=dtypes,
)
def test_attention(lengths, block, window, groups, queries, width, sinks, dtype):
    """All prompts at once, in rows of one block, against each prompt alone, token by token."""
    heads = Heads(groups, width, groups * width, width + 1)
    entry = groups * (2 * width + 1)
    pages = -(-60 // block)
    order = np.random.default_rng(0).permutation(len(lengths) * pages) + 1
    tables = order.reshape(len(lengths), pages).astype(np.int32)
    # Cache entries that were not written must not be read: they are NaN.
    empty = np.full((1 + order.size, block, entry), np.nan).astype(jnp.dtype(dtype))
    sink = normal(7, groups, queries) if sinks else None

    @functools.partial(jax.jit, static_argnums=4)
    def attend(query, fresh, batch, cached, window):
        return write_and_attend(query, fresh, batch, cached, heads, 0.3, window, sink)

    sequences = [
        (
            normal(n, length, groups, queries, width, dtype=dtype),
            normal(n + 50, length, entry, dtype=dtype),
        )
        for n, length in enumerate(lengths)
    ]
    batch = [
        one_sequence(0, length, table, block) for length, table in zip(lengths, tables, strict=True)
    ]

    def padded(part: int) -> jax.Array:
        return jnp.concatenate(
            [
                jnp.pad(
                    sequence[part],
                    [(0, rows.tokens - len(sequence[part]))] + [(0, 0)] * (sequence[part].ndim - 1),
                    constant_values=np.nan,
                )
                for sequence, rows in zip(sequences, batch, strict=True)
            ]
        )

    together, cached = attend(padded(0), padded(1), batch, empty, window)
    begin = 0
    for (query, fresh), rows, table, length in zip(sequences, batch, tables, lengths, strict=True):
        alone = empty
        for position in range(length):
            token = slice(position, position + 1)
            one = [one_sequence(position, 1, table, 1)]
            found, alone = attend(query[token], fresh[token], one, alone, window)
            np.testing.assert_array_equal(found[0], together[begin + position])
        # Compare bytes, because NaN is not equal to itself.
        assert np.asarray(alone[table]).tobytes() == np.asarray(cached[table]).tobytes()
        begin += rows.tokens


@pytest.mark.parametrize(
    "fields",
    [DEEPSEEK, DEEPSEEK | {"q_lora_rank": 8}, MIXTRAL | {"sliding_window": 7}, OSS],
    ids=["latent", "latent queries", "window", "sinks"],
)
def test_layers(fields, compiled: pathlib.Path):
    """Whole trunks: prompts in slices, side by side, against single tokens."""
    config = model_config(fields)
    graph, state = nnx.split(init_random(config, 0))
    empty = [jnp.asarray(layer_cache(layer.mixer, ENGINE, 12)) for layer in config.layers]

    def moe(layer, x_td, expert_tk, weight_tk):
        # Stand-in for experts: a function of the row, its experts and their weights.
        return x_td * (weight_tk * (1 + expert_tk)).sum(-1, keepdims=True)

    @jax.jit
    def step(state, tokens, batch, cached):
        return forward(nnx.merge(graph, state), tokens, batch, cached, moe, 96)

    tokens = np.random.default_rng(0).integers(2, config.vocab_size, (2, 21))
    tables = np.arange(1, 13, dtype=np.int32).reshape(2, 6)
    batch = [one_sequence(0, 16, table, 8) for table in tables]
    together, cached = step(state, tokens[:, :16].reshape(-1), batch, empty)
    rest = [one_sequence(16, 5, table, 8) for table in tables]
    last = np.pad(tokens[:, 16:], ((0, 0), (0, 3))).reshape(-1)
    behind, _ = step(state, last, rest, cached)
    for row, table in enumerate(tables):
        wanted = [*together.reshape(2, 16, -1)[row], *behind.reshape(2, 8, -1)[row, :5]]
        alone = empty
        for position in range(21):
            one = [one_sequence(position, 1, table, 1)]
            found, alone = step(state, tokens[row, position][None], one, alone)
            np.testing.assert_array_equal(found[0], wanted[position])
