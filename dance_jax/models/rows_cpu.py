"""Per-token operations on CPUs, in C++ (native/rows.cc).

A token's result is bit-identical regardless of the other tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dance_jax.models import native
from dance_jax.models.config import RouterConfig

#: Values of `RouterConfig.score`, in the order of their numbers in C++.
_SCORES = ("softmax", "sigmoid", "logits")


def norm(values: Array, weight_d: Array, eps: float, plus_one: bool) -> Array:
    """`layers.rms_norm` for values [..., d] and a weight of the same dtype."""
    rows = values.reshape(-1, values.shape[-1])
    call = jax.ffi.ffi_call(
        native.target(f"Norm{values.dtype.name.capitalize()}"),
        jax.ShapeDtypeStruct(rows.shape, rows.dtype),
    )
    return call(rows, weight_d, eps=np.float32(eps), plus_one=plus_one).reshape(values.shape)


def choose_experts(
    router: RouterConfig, logits_te: Array, correction_e: Array | None
) -> tuple[Array, Array]:
    """`router.choose_experts` in C++."""
    shape = (len(logits_te), router.top_k)
    call = jax.ffi.ffi_call(
        native.target("ChooseExperts"),
        (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)),
    )
    expert_tk, weight_tk = call(
        logits_te,
        *([] if correction_e is None else [correction_e]),
        score=np.int32(_SCORES.index(router.score)),
        groups=np.int64(router.num_groups),
        topk_group=np.int64(router.topk_group),
        group_best=np.int64(router.group_best),
        normalise=router.normalise,
        norm_epsilon=np.float32(router.norm_epsilon),
        scale=np.float32(router.scale),
    )
    return expert_tk, weight_tk
