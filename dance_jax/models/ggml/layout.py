"""Undoes what llama.cpp changes in a checkpoint's tensors: shapes, order of rows, values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from dance_jax.models.config import DeltaNet, GroupedAttention, ModelConfig
from dance_jax.models.ggml.tensors import GgufTensor


def unchanged(tensor: GgufTensor, leaf: str, config: ModelConfig) -> GgufTensor:
    """A layer's tensor as Hugging Face stores it.

    Args:
        leaf: the tensor's name within the layer, e.g. "attn_q.weight".
    """
    if config.family == "mixtral" and leaf in _PAIRED:
        return _paired(tensor, leaf, config)
    if leaf == "ffn_gate_inp_shexp.weight" and len(tensor.shape) == 1:
        return dataclasses.replace(tensor, shape=(1, *tensor.shape))
    if config.norm_plus_one and leaf.endswith("norm.weight") and leaf != "ssm_norm.weight":
        return dataclasses.replace(tensor, change=_less_one)
    delta = _delta(config)
    if delta is None or leaf not in _DELTA:
        return tensor
    # Qwen3.5 stores all first value heads of the key heads, then all second ones, and so on.
    # Qwen3-Next stores the value heads of a key head side by side.
    tiled = config.family == "qwen3_5_moe_text"
    return _DELTA[leaf](tensor, delta, _value_heads(delta) if tiled else _in_order(delta))


def strengths_and_decays(tensor: GgufTensor, config: ModelConfig) -> dict[str, GgufTensor]:
    """Splits Qwen3-Next's ssm_ba, whose rows are grouped by key head, into two projections.

    Returns:
        An empty dict for models without delta nets.
    """
    delta = _delta(config)
    if delta is None:
        return {}
    rows = np.arange(2 * delta.num_value_heads).reshape(delta.num_key_heads, 2, -1)
    shape = (delta.num_value_heads, *tensor.shape[1:])
    return {
        f"linear_attn.in_proj_{name}.weight": dataclasses.replace(
            tensor, shape=shape, stored=tensor.shape, rows=rows[:, index].reshape(-1)
        )
        for index, name in enumerate("ba")
    }


_PAIRED = ("attn_q.weight", "attn_k.weight")


def _paired(tensor: GgufTensor, leaf: str, config: ModelConfig) -> GgufTensor:
    """Undoes the pairing of a head's rows: rows that rotate together are stored side by side."""
    mixer = config.layers[0].mixer
    assert isinstance(mixer, GroupedAttention)
    heads = mixer.num_heads if leaf == "attn_q.weight" else mixer.num_kv_heads
    if tensor.shape[0] != heads * mixer.head_dim:  # reported later with all wrong shapes
        return tensor
    rows = np.arange(tensor.shape[0]).reshape(heads, -1, 2)
    return dataclasses.replace(tensor, rows=rows.swapaxes(1, 2).reshape(-1))


def _less_one(values: np.ndarray) -> np.ndarray:
    """w of a norm's factor: GGUF stores the factor 1 + w, the model uses w."""
    return values - np.float32(1)


def _log_of_negative(values: np.ndarray) -> np.ndarray:
    """A_log from the stored value -exp(A_log)."""
    return np.log(-values)


def _delta(config: ModelConfig) -> DeltaNet | None:
    mixers = (layer.mixer for layer in config.layers)
    return next((mixer for mixer in mixers if isinstance(mixer, DeltaNet)), None)


def _value_heads(delta: DeltaNet) -> np.ndarray:
    """Where each value head is stored: the first one of every key head, then the second ones."""
    heads = np.arange(delta.num_value_heads).reshape(-1, delta.num_key_heads)
    return heads.T.reshape(-1)


def _in_order(delta: DeltaNet) -> np.ndarray:
    return np.arange(delta.num_value_heads)


def _rows(heads: np.ndarray, width: int, before: int = 0) -> np.ndarray:
    """Row indices of `heads`, each `width` rows wide, after `before` rows that keep their place."""
    own = (heads[:, None] * width + np.arange(width)).reshape(-1)
    return np.concatenate([np.arange(before), before + own])


def _qkv(tensor: GgufTensor, delta: DeltaNet, heads: np.ndarray) -> GgufTensor:
    before = 2 * delta.num_key_heads * delta.key_dim
    return dataclasses.replace(tensor, rows=_rows(heads, delta.value_dim, before))


def _conv(tensor: GgufTensor, delta: DeltaNet, heads: np.ndarray) -> GgufTensor:
    channels, positions = tensor.shape[0], tensor.shape[-1]
    found = _qkv(tensor, delta, heads)
    return dataclasses.replace(found, shape=(channels, 1, positions), stored=tensor.shape)


def _gate(tensor: GgufTensor, delta: DeltaNet, heads: np.ndarray) -> GgufTensor:
    return dataclasses.replace(tensor, rows=_rows(heads, delta.value_dim))


def _out(tensor: GgufTensor, delta: DeltaNet, heads: np.ndarray) -> GgufTensor:
    return dataclasses.replace(tensor, inputs=_rows(heads, delta.value_dim))


def _each(tensor: GgufTensor, delta: DeltaNet, heads: np.ndarray) -> GgufTensor:
    return dataclasses.replace(tensor, rows=heads)


def _decay(tensor: GgufTensor, delta: DeltaNet, heads: np.ndarray) -> GgufTensor:
    return dataclasses.replace(tensor, rows=heads, change=_log_of_negative)


#: How to restore each delta net tensor whose value heads may be stored in another order.
_DELTA: dict[str, Callable[[GgufTensor, DeltaNet, np.ndarray], GgufTensor]] = {
    "attn_qkv.weight": _qkv,
    "attn_gate.weight": _gate,
    "ssm_conv1d.weight": _conv,
    "ssm_out.weight": _out,
    "ssm_beta.weight": _each,
    "ssm_alpha.weight": _each,
    "ssm_dt.bias": _each,
    "ssm_a": _decay,
}
