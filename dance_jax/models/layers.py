"""Building blocks of every model: projection, norm, gated feed-forward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dance_jax.models import kernels_cpu, rows_cpu
from dance_jax.models.config import Activation

SILU = Activation()


def parameter(shape: tuple[int, ...], dtype: jnp.dtype) -> nnx.Param:
    """A weight that is filled later (under nnx.eval_shape it takes no memory)."""
    return nnx.Param(jnp.zeros(shape, dtype))


def contract(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """einsum with float32 sums and result, for operands of equal dtype."""
    if jax.default_backend() == "cpu":
        # XLA:CPU has no bfloat16 x bfloat16 -> float32 product
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def matmul(values: jax.Array, weight_io: jax.Array) -> jax.Array:
    """values [..., i] @ weight for operands of equal dtype, summed in float32: [..., o]."""
    if not kernels_cpu.usable():
        return contract("...i,io->...o", values, weight_io)
    rows = values.reshape(-1, values.shape[-1])
    return kernels_cpu.linear(rows, weight_io).reshape(*values.shape[:-1], -1)


def activate(activation: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    """What a gated feed-forward computes from its two inner projections, see `Activation`."""
    if activation.kind == "silu":
        return jax.nn.silu(gate) * up
    if activation.kind == "gelu":
        return jax.nn.gelu(gate, approximate=True) * up
    gate = jnp.minimum(gate, activation.limit)
    up = jnp.clip(up, -activation.limit, activation.limit)
    return gate * jax.nn.sigmoid(activation.alpha * gate) * (up + 1)


def rms_norm(
    values: jax.Array, weight_d: jax.Array, eps: float, plus_one: bool = False
) -> jax.Array:
    """x / sqrt(mean(x^2) + eps), in float32, times a weight [d], or times 1 + weight.

    Args:
        values: [..., d] in any dtype, which the result has too.
    """
    weight_d = weight_d.astype(values.dtype)
    if kernels_cpu.usable():
        return rows_cpu.norm(values, weight_d, eps, plus_one)
    wide = values.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if plus_one:
        return (wide * (1 + weight_d.astype(jnp.float32))).astype(values.dtype)
    return wide.astype(values.dtype) * weight_d


class Linear(nnx.Module):
    """Projection; weight [in, out]. The sum is float32, the result in the weights' dtype."""

    def __init__(self, d_in: int, d_out: int, dtype: jnp.dtype, bias: bool = False):
        self.weight = parameter((d_in, d_out), dtype)
        self.bias = parameter((d_out,), dtype) if bias else None

    def __call__(self, values: jax.Array) -> jax.Array:
        product = matmul(values, self.weight[...])
        if self.bias is not None:
            product += self.bias[...].astype(jnp.float32)
        return product.astype(values.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with a weight [d]."""

    def __init__(self, width: int, eps: float, dtype: jnp.dtype, plus_one: bool = False):
        self.weight = parameter((width,), dtype)
        self.eps, self.plus_one = eps, plus_one

    def __call__(self, values: jax.Array) -> jax.Array:
        return rms_norm(values, self.weight[...], self.eps, self.plus_one)


class GatedMLP(nnx.Module):
    """down(activation(gate(x), up(x))), float32, as it is summed with the experts' output."""

    def __init__(self, d: int, width: int, dtype: jnp.dtype, activation: Activation = SILU):
        self.gate = Linear(d, width, dtype)
        self.up = Linear(d, width, dtype)
        self.down = Linear(width, d, dtype)
        self.activation = activation

    def __call__(self, values: jax.Array) -> jax.Array:
        if kernels_cpu.usable():
            rows = values.reshape(-1, values.shape[-1])
            gate, up, down = (part.weight[...] for part in (self.gate, self.up, self.down))
            found = kernels_cpu.gated_mlp(self.activation, gate, up, down, rows)
            return found.reshape(values.shape)
        inner = activate(self.activation, self.gate(values), self.up(values))
        return matmul(inner, self.down.weight[...])
