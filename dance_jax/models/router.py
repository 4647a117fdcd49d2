"""Which experts a token uses and with what weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dance_jax.models.config import RouterConfig


def choose_experts(router: RouterConfig, logits_te: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Top-k experts of each token by softmax score.

    DeepSeek-V2 (arXiv 2405.04434, section 2.2; modeling_deepseek.py `MoEGate`) and Mixtral (arXiv
    2401.04088, section 2.1). `group_limited_greedy` keeps the experts of the `topk_group` groups
    with the highest best score. Ties go to the lowest index.

    Args:
        router: the model's rule.
        logits_te: float32 [tokens, experts].

    Returns:
        experts int32 [tokens, k] by falling score, and their weights float32 [tokens, k], final:
        normalised or scaled as the model wants.
    """
    scores_te = jax.nn.softmax(logits_te.astype(jnp.float32), axis=-1)
    if router.method == "group_limited_greedy":
        scores_te = _best_groups(router, scores_te)
    weight_tk, expert_tk = jax.lax.top_k(scores_te, router.top_k)
    if router.normalise:
        weight_tk /= weight_tk.sum(axis=-1, keepdims=True) + router.norm_epsilon
    if router.scale != 1.0:
        weight_tk *= router.scale
    return expert_tk, weight_tk


def _best_groups(router: RouterConfig, scores_te: jax.Array) -> jax.Array:
    """Scores with 0 for every expert outside its token's best groups."""
    tokens, experts = scores_te.shape
    groups = scores_te.reshape(tokens, router.num_groups, experts // router.num_groups)
    _, best = jax.lax.top_k(groups.max(axis=-1), router.topk_group)
    kept = (best[:, :, None] == jnp.arange(router.num_groups)).any(axis=1)
    return jnp.where(kept[:, :, None], groups, 0.0).reshape(tokens, experts)
