"""The gated delta net against its recurrence, token by token in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.models.delta import _advance, _Tokens

HEADS, KEY, VALUE = 2, 4, 3


def recurrence(memory, tokens):
    """Outputs [h, c, dv] and the state [h, dk, dv] after all tokens."""
    memory, outputs = np.array(memory, np.float64), []
    query, key, value, decay, strength = (np.asarray(part, np.float64) for part in tokens)
    for i in range(query.shape[1]):
        memory = memory * np.exp(decay[:, i])[:, None, None]
        known = np.einsum("hkv,hk->hv", memory, key[:, i])
        update = strength[:, i, None] * (value[:, i] - known)
        memory = memory + np.einsum("hk,hv->hkv", key[:, i], update)
        outputs.append(np.einsum("hkv,hk->hv", memory, query[:, i]))
    return np.stack(outputs, 1), memory


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.sampled_from([1, 2, 5, 32]),
    # From no decay to a state that vanishes after one token.
    decay=st.sampled_from([0.0, 0.01, 1.0, 100.0]),
)
def test_some_tokens_at_once_are_those_tokens_one_by_one(seed, count, decay):
    rng = np.random.default_rng(seed)
    key = rng.normal(size=(HEADS, count, KEY))
    tokens = _Tokens(
        rng.normal(size=(HEADS, count, KEY)),
        key / np.linalg.norm(key, axis=-1, keepdims=True),
        rng.normal(size=(HEADS, count, VALUE)),
        -decay * rng.random((HEADS, count)),
        rng.random((HEADS, count)),
    )
    memory = rng.normal(size=(HEADS, KEY, VALUE))
    found = _advance(*jax.tree.map(lambda part: jnp.asarray(part, jnp.float32), (memory, tokens)))
    for ours, expected in zip(found, recurrence(memory, tokens), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4)
