"""Choice of experts against plain loops that follow the definition."""

import jax
import numpy as np
import pytest

from dance_jax.models import model_config
from dance_jax.models.router import choose_experts


def deepseek_oracle(logits, top_k, normalise, scaling, groups=1, topk_group=1):
    """MoEGate of DeepSeek's modeling_deepseek.py, one token at a time in float64."""
    experts, weights = [], []
    for row in np.asarray(logits, np.float64):
        scores = np.exp(row - row.max())
        scores /= scores.sum()
        size = len(row) // groups
        best = sorted(range(groups), key=lambda g: -scores[g * size : (g + 1) * size].max())
        allowed = [e for e in range(len(row)) if e // size in best[:topk_group]]
        chosen = sorted(allowed, key=lambda e: -scores[e])[:top_k]
        weight = scores[chosen]
        either = weight / (weight.sum() + 1e-20) if top_k > 1 and normalise else weight * scaling
        experts.append(chosen)
        weights.append(either)
    return np.array(experts), np.array(weights)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("groups", [None, (4, 2)])
@pytest.mark.parametrize("top_k", [1, 3])
def test_deepseek_router(deepseek_fields, normalise, groups, top_k):
    fields = deepseek_fields | {
        "norm_topk_prob": normalise,
        "routed_scaling_factor": 2.5,
        "num_experts_per_tok": top_k,
    }
    if groups:
        fields |= {
            "topk_method": "group_limited_greedy",
            "n_group": groups[0],
            "topk_group": groups[1],
        }
    logits = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    router = model_config(fields).router
    expert, weight = jax.jit(lambda x: choose_experts(router, x))(logits)
    experts, weights = deepseek_oracle(logits, top_k, normalise, 2.5, *(groups or (1, 1)))
    np.testing.assert_array_equal(expert, experts)
    np.testing.assert_allclose(weight, weights, rtol=1e-5)
    assert weight.dtype == np.float32 and expert.dtype == np.int32


def test_mixtral_weights_sum_to_one(mixtral_fields):
    logits = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    expert, weight = choose_experts(model_config(mixtral_fields).router, logits)
    np.testing.assert_allclose(weight.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(expert, np.argsort(-logits, axis=-1)[:, :2])


def test_ties_go_to_the_lowest_expert(mixtral_fields):
    expert, _ = choose_experts(model_config(mixtral_fields).router, np.zeros((1, 4)))
    assert expert.tolist() == [[0, 1]]
