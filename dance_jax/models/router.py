"""The router: chooses the experts of each token and their weights."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dance_jax.models import native, rows_cpu
from dance_jax.models.config import RouterConfig
from dance_jax.models.layers import Weight, parameter, rms_norm


class Routed(NamedTuple):
    """Inputs of the routed experts of a layer."""

    #: Hidden states [t, d] in the engine's dtype.
    x: jax.Array
    #: int32 [t, k] and float32 [t, k].
    expert: jax.Array
    weight: jax.Array


class Router(nnx.Module):
    """The router of one layer; its weights are float32 regardless of the trunk's dtype."""

    def __init__(self, config: RouterConfig, d: int, eps: float):
        wide, experts = jnp.dtype("float32"), config.num_experts
        self.config, self.eps = config, eps
        self.weight = Weight(d, experts, wide)
        if config.bias:
            self.bias = parameter((experts,), wide)
        if config.correction:
            self.correction = parameter((experts,), wide)
        if config.scaled:
            self.input_scale = parameter((d,), wide)
            self.expert_scale = parameter((experts,), wide)

    def __call__(self, x_td: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Experts of each token, int32 [t, k], and their weights, float32 [t, k]."""
        wide = x_td.astype(jnp.float32)
        if self.config.scaled:
            scale = self.input_scale[...] * wide.shape[-1] ** -0.5
            wide = rms_norm(wide, scale, self.eps)
        logits = self.weight(wide)
        if self.config.bias:
            logits += self.bias[...]
        correction = self.correction[...] if self.config.correction else None
        expert, weight = choose_experts(self.config, logits, correction)
        if self.config.scaled:
            weight *= self.expert_scale[...][expert]
        return expert, weight


def choose_experts(
    router: RouterConfig, logits_te: jax.Array, correction_e: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Choose the top-k experts of each token.

    Softmax scores: Mixtral (arXiv 2401.04088, section 2.1), DeepSeek-V2 (arXiv 2405.04434, section
    2.2). Sigmoid scores with a correction that affects only the choice, and groups ranked by their
    two best experts: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). Ties go to the lowest index.

    Args:
        router: the model's router.
        logits_te: float32 [tokens, experts].
        correction_e: float32 [experts], added to the scores for the choice.

    Returns:
        Experts int32 [tokens, k], best first, and their final weights float32 [tokens, k],
        normalised and scaled as the model requires.
    """
    # CPUs run native/rows.cc here. The code below runs on GPUs and TPUs, and without the library.
    # Both must be equal: tests/models/test_rows_alone.py compares them.
    if native.usable():
        return rows_cpu.choose_experts(router, logits_te, correction_e)
    scores_te = {
        "softmax": lambda: jax.nn.softmax(logits_te, axis=-1),
        "sigmoid": lambda: jax.nn.sigmoid(logits_te),
        "logits": lambda: logits_te,
    }[router.score]()
    choice_te = scores_te if correction_e is None else scores_te + correction_e
    if router.num_groups > 1:
        choice_te = _best_groups(router, choice_te)
    weight_tk, expert_tk = jax.lax.top_k(choice_te, router.top_k)
    if correction_e is not None:
        weight_tk = jnp.take_along_axis(scores_te, expert_tk, axis=-1)
    if router.score == "logits":
        weight_tk = jax.nn.softmax(weight_tk, axis=-1)
    if router.normalise:
        weight_tk /= weight_tk.sum(axis=-1, keepdims=True) + router.norm_epsilon
    if router.scale != 1.0:
        weight_tk *= router.scale
    return expert_tk, weight_tk


def _best_groups(router: RouterConfig, choice_te: jax.Array) -> jax.Array:
    """Replace the scores of experts outside a token's best groups by -inf."""
    tokens, experts = choice_te.shape
    groups = choice_te.reshape(tokens, router.num_groups, experts // router.num_groups)
    best, _ = jax.lax.top_k(groups, router.group_best)
    _, kept = jax.lax.top_k(best.sum(axis=-1), router.topk_group)
    kept = (kept[:, :, None] == jnp.arange(router.num_groups)).any(axis=1)
    return jnp.where(kept[:, :, None], groups, -jnp.inf).reshape(tokens, experts)
