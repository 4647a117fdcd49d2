"""What each token passes on its own, on CPU, in C++: rows_cpu.cc.

A token's result does not depend, in any bit, on the tokens beside it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dance_jax.models import kernels_cpu
from dance_jax.models.config import RouterConfig

#: `RouterConfig.score` by its number in C++.
_SCORES = ("softmax", "sigmoid", "logits")


def norm(values: Array, weight_d: Array, eps: float, plus_one: bool) -> Array:
    """What `layers.RMSNorm` computes of [..., d] and a weight of the same dtype."""
    rows = values.reshape(-1, values.shape[-1])
    call = jax.ffi.ffi_call(
        kernels_cpu.target(f"Norm{values.dtype.name.capitalize()}"),
        jax.ShapeDtypeStruct(rows.shape, rows.dtype),
    )
    return call(rows, weight_d, eps=np.float32(eps), plus_one=plus_one).reshape(values.shape)


def choose_experts(
    router: RouterConfig, logits_te: Array, correction_e: Array | None
) -> tuple[Array, Array]:
    """What `router.choose_experts` gives."""
    shape = (len(logits_te), router.top_k)
    call = jax.ffi.ffi_call(
        kernels_cpu.target("ChooseExperts"),
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


def head_products(x_thn: Array, w_hnk: Array) -> Array:
    """x @ w, head by head, summed in float32: float32 [t, h, k]."""
    call = jax.ffi.ffi_call(
        kernels_cpu.target(f"Heads{w_hnk.dtype.name.capitalize()}"),
        jax.ShapeDtypeStruct((*x_thn.shape[:2], w_hnk.shape[2]), jnp.float32),
    )
    return call(x_thn.astype(jnp.float32), w_hnk)
