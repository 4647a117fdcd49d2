"""Building blocks of all models: projection, norm, gated feed-forward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dance_jax.models import kernels_cpu, native, rows_cpu
from dance_jax.models.config import Activation
from dance_jax.models.formats import WeightFormat

SILU = Activation()


def parameter(shape: tuple[int, ...], dtype: jnp.dtype) -> nnx.Param:
    """A parameter that is filled later; under nnx.eval_shape it takes no memory."""
    return nnx.Param(jnp.zeros(shape, dtype))


def contract(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """einsum with float32 accumulation and result, for operands of equal dtype."""
    if jax.default_backend() == "cpu":
        # XLA:CPU does not support bfloat16 x bfloat16 -> float32.
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def activate(activation: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Apply an `Activation` to the gate and up projections of a gated feed-forward."""
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
    """RMS norm: x / sqrt(mean(x^2) + eps), in float32, times a weight [d] (or 1 + weight).

    Args:
        values: [..., d] in any dtype; the result has the same dtype.
    """
    weight_d = weight_d.astype(values.dtype)
    if native.usable():
        return rows_cpu.norm(values, weight_d, eps, plus_one)
    wide = values.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if plus_one:
        return (wide * (1 + weight_d.astype(jnp.float32))).astype(values.dtype)
    return wide.astype(values.dtype) * weight_d


class Weight(nnx.Module):
    """Weights of a projection [in, out], or of one projection per head, in any format.

    The parameters are the arrays of the format, with a leading axis if there are heads. After
    `pack` there is a single parameter, `panels`, uint8, in the layout of the C++ library.

    Args:
        dtype: type of the values, until `keep_as` sets another format.
    """

    def __init__(self, d_in: int, d_out: int, dtype: jnp.dtype, heads: int | None = None):
        self.d_in, self.d_out, self.heads = d_in, d_out, heads
        self.form = WeightFormat(jnp.dtype(dtype).name)
        self.packed = False
        self._fill()

    def keep_as(self, form: WeightFormat) -> None:
        """Change the format; only before the weights are filled."""
        self._clear()
        self.form = form
        self._fill()

    def _fill(self) -> None:
        leading = () if self.heads is None else (self.heads,)
        for name, array in self.form.arrays(self.d_in, self.d_out).items():
            setattr(self, name, parameter((*leading, *array.shape), array.dtype))

    def _clear(self) -> None:
        for name in self.form.arrays(self.d_in, self.d_out):
            delattr(self, name)

    def pack(self) -> None:
        """Convert the weights to the layout of the C++ library."""
        arrays = {name: np.asarray(array) for name, array in self._arrays.items()}
        each = [arrays]
        if self.heads is not None:
            each = [{name: array[h] for name, array in arrays.items()} for h in range(self.heads)]
        panels = [kernels_cpu.pack(self.form, own, self.d_in, self.d_out) for own in each]
        self._clear()
        self.packed = True
        self.panels = nnx.Param(jax.device_put(np.concatenate(panels)))

    @property
    def _arrays(self) -> dict[str, jax.Array]:
        names = self.form.arrays(self.d_in, self.d_out)
        return {name: getattr(self, name)[...] for name in names}

    @property
    def as_packed(self) -> kernels_cpu.Packed:
        """The packed weights, as arguments for the functions of `kernels_cpu`."""
        return self.form, self.panels[...]

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] @ w, or with heads x [n, heads, in] @ w per head: float32 [..., out]."""
        if self.packed:
            rows = x if self.heads else x.reshape(-1, self.d_in)
            found = kernels_cpu.linear(self.as_packed, rows, self.d_out)
            return found.reshape(*x.shape[:-1], self.d_out)
        arrays = self._arrays
        values = arrays.get("values")
        if values is None or values.dtype != x.dtype:
            values = self.form.dequantise(arrays, self.d_in).astype(x.dtype)
        return contract("nhi,hio->nho" if self.heads else "...i,io->...o", x, values)

    def columns(self, chosen_t: jax.Array) -> jax.Array:
        """Values of the weights of some outputs, float32 [t, in]; indices are clipped."""
        if self.packed:
            return kernels_cpu.columns(self.as_packed, chosen_t, self.d_in, self.d_out)
        own = {
            name: jnp.take(array, chosen_t, axis=1, mode="clip")
            for name, array in self._arrays.items()
        }
        return self.form.dequantise(own, self.d_in).T


class Linear(nnx.Module):
    """Projection with float32 accumulation; the result has the input's dtype."""

    def __init__(self, d_in: int, d_out: int, dtype: jnp.dtype, bias: bool = False):
        self.weight = Weight(d_in, d_out, dtype)
        self.bias = parameter((d_out,), dtype) if bias else None

    def __call__(self, values: jax.Array) -> jax.Array:
        product = self.weight(values)
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
    """Gated feed-forward, down(activation(gate(x), up(x))).

    The result is float32, because it is added to the experts' output.
    """

    def __init__(self, d: int, width: int, dtype: jnp.dtype, activation: Activation = SILU):
        self.gate = Linear(d, width, dtype)
        self.up = Linear(d, width, dtype)
        self.down = Linear(width, d, dtype)
        self.activation = activation

    def __call__(self, values: jax.Array) -> jax.Array:
        gate, up, down = self.gate.weight, self.up.weight, self.down.weight
        if gate.packed:
            rows = values.reshape(-1, values.shape[-1])
            weights = [gate.as_packed, up.as_packed, down.as_packed]
            found = kernels_cpu.gated_mlp(self.activation, weights, gate.d_out, rows)
            return found.reshape(values.shape)
        inner = activate(self.activation, gate(values), up(values))
        return down(inner.astype(values.dtype))
