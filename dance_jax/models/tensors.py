"""The table between a checkpoint's tensors (Hugging Face names and shapes) and our weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from dance_jax.models.config import (
    DeltaNet,
    GroupedAttention,
    LatentAttention,
    LayerConfig,
    ModelConfig,
)


@dataclasses.dataclass(frozen=True)
class Target:
    """One of our weights and how it is cut from the checkpoint's tensor."""

    #: Dotted path in the module, e.g. "layers.0.mixer.kv_a.weight".
    path: str
    cut: Callable[[np.ndarray], np.ndarray] = lambda tensor: tensor


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """One tensor of the checkpoint: its name, the shape it must have, and what it becomes."""

    source: str
    shape: tuple[int, ...]
    targets: tuple[Target, ...]


def same(source: str, shape: tuple[int, ...], path: str) -> TensorRule:
    """A tensor taken as it is."""
    return TensorRule(source, shape, (Target(path),))


def transposed(source: str, shape: tuple[int, int], path: str) -> TensorRule:
    """A projection [out, in] that becomes [in, out]."""
    return TensorRule(source, shape, (Target(path, np.transpose),))


def linear(source: str, d_in: int, d_out: int, path: str, bias: bool = False) -> list[TensorRule]:
    """A `layers.Linear`."""
    rules = [transposed(f"{source}.weight", (d_out, d_in), f"{path}.weight")]
    return [*rules, same(f"{source}.bias", (d_out,), f"{path}.bias")] if bias else rules


def mlp(source: str, d: int, width: int, path: str) -> list[TensorRule]:
    """A `layers.GatedMLP`."""
    return [
        *linear(f"{source}.gate_proj", d, width, f"{path}.gate"),
        *linear(f"{source}.up_proj", d, width, f"{path}.up"),
        *linear(f"{source}.down_proj", width, d, f"{path}.down"),
    ]


def trunk_rules(config: ModelConfig) -> list[TensorRule]:
    """The checkpoint's tensors of the trunk, layer by layer."""
    shape = (config.vocab_size, config.hidden_size)
    rules = [
        same("model.embed_tokens.weight", shape, "embedding"),
        same("model.norm.weight", (config.hidden_size,), "norm.weight"),
    ]
    if not config.tie_embeddings:
        rules.append(same("lm_head.weight", shape, "head"))
    for index, layer in enumerate(config.layers):
        rules += _layer(config, layer, f"model.layers.{index}", f"layers.{index}")
    return rules


def _layer(config: ModelConfig, layer: LayerConfig, source: str, ours: str) -> Iterator[TensorRule]:
    d, names = config.hidden_size, config.names
    norms = [
        same(f"{source}.{theirs}.weight", (d,), f"{ours}.{norm}.weight")
        for theirs, norm in (_SANDWICH_NORMS if config.sandwich else _NORMS).items()
    ]
    yield norms[0]
    if isinstance(layer.mixer, DeltaNet):
        yield from _delta(config, layer.mixer, f"{source}.linear_attn", f"{ours}.mixer")
    elif isinstance(layer.mixer, LatentAttention):
        yield from _latent(config, layer.mixer, f"{source}.self_attn", f"{ours}.mixer")
    else:
        yield from _grouped(config, layer.mixer, f"{source}.self_attn", f"{ours}.mixer")
    yield from norms[1:]
    if layer.dense_width:
        yield from mlp(f"{source}.mlp", d, layer.dense_width, f"{ours}.mlp")
    if config.sandwich:
        yield same(f"{source}.layer_scalar", (1,), f"{ours}.scale")
    if layer.routed:
        yield from _router(config, source, f"{ours}.router")
    if layer.routed and config.shared:
        yield from mlp(f"{source}.{names.shared}", d, config.shared.width, f"{ours}.shared.mlp")
        if config.shared.gated:
            yield from linear(f"{source}.{names.shared_gate}", d, 1, f"{ours}.shared.gate")


_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
_SANDWICH_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mixed_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm_1": "mlp_out_norm",
    "pre_feedforward_layernorm_2": "expert_norm",
    "post_feedforward_layernorm_2": "expert_out_norm",
    "post_feedforward_layernorm": "out_norm",
}


def _router(config: ModelConfig, source: str, ours: str) -> Iterator[TensorRule]:
    router, names, experts = config.router, config.names, config.num_experts
    name = f"{source}.{names.router}"
    yield transposed(f"{name}.weight", (experts, config.hidden_size), f"{ours}.weight")
    if router.bias:
        yield same(f"{name}.bias", (experts,), f"{ours}.bias")
    if router.correction:
        yield same(f"{source}.{names.correction}", (experts,), f"{ours}.correction")
    if router.scaled:
        yield same(f"{source}.router.scale", (config.hidden_size,), f"{ours}.input_scale")
        yield same(f"{source}.router.per_expert_scale", (experts,), f"{ours}.expert_scale")


def _grouped(
    config: ModelConfig, shape: GroupedAttention, source: str, ours: str
) -> Iterator[TensorRule]:
    d, width = config.hidden_size, shape.head_dim
    queries, keys = shape.num_heads * width, shape.num_kv_heads * width
    joined, bias = queries * (2 if shape.gated else 1), shape.qkv_bias
    yield from linear(f"{source}.q_proj", d, joined, f"{ours}.q", bias)
    yield from linear(f"{source}.k_proj", d, keys, f"{ours}.k", bias)
    if not shape.values_are_keys:
        yield from linear(f"{source}.v_proj", d, keys, f"{ours}.v", bias)
    yield from linear(f"{source}.o_proj", queries, d, f"{ours}.out", shape.out_bias)
    if shape.qk_norm != "none":
        flat = shape.qk_norm == "flat"
        yield same(
            f"{source}.q_norm.weight", (queries if flat else width,), f"{ours}.q_norm.weight"
        )
        yield same(f"{source}.k_norm.weight", (keys if flat else width,), f"{ours}.k_norm.weight")
    if shape.sinks:
        yield same(f"{source}.sinks", (shape.num_heads,), f"{ours}.sinks")


def _latent(
    config: ModelConfig, shape: LatentAttention, source: str, ours: str
) -> Iterator[TensorRule]:
    d, heads, rank, bias = config.hidden_size, shape.num_heads, shape.kv_lora_rank, shape.bias
    nope, value = shape.qk_nope_head_dim, shape.v_head_dim
    queries = heads * (nope + shape.qk_rope_head_dim)
    if shape.q_lora_rank is None:
        yield from linear(f"{source}.q_proj", d, queries, f"{ours}.q")
    else:
        low = shape.q_lora_rank
        yield from linear(f"{source}.q_a_proj", d, low, f"{ours}.q_a", bias)
        yield same(f"{source}.q_a_layernorm.weight", (low,), f"{ours}.q_norm.weight")
        yield from linear(f"{source}.q_b_proj", low, queries, f"{ours}.q_b")
    yield from linear(f"{source}.kv_a_proj_with_mqa", d, shape.cache_width, f"{ours}.kv_a", bias)
    yield same(f"{source}.kv_a_layernorm.weight", (rank,), f"{ours}.kv_norm.weight")

    def by_head(tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(heads, nope + value, rank)

    yield TensorRule(
        f"{source}.kv_b_proj.weight",
        (heads * (nope + value), rank),
        (
            Target(f"{ours}.w_uk", lambda w: by_head(w)[:, :nope]),
            Target(f"{ours}.w_uv", lambda w: by_head(w)[:, nope:].transpose(0, 2, 1)),
        ),
    )
    yield from linear(f"{source}.o_proj", heads * value, d, f"{ours}.out", bias)


def _delta(config: ModelConfig, shape: DeltaNet, source: str, ours: str) -> Iterator[TensorRule]:
    d, heads = config.hidden_size, shape.num_value_heads
    inner = heads * shape.value_dim
    if config.names.joined_delta:
        yield from _joined_delta(config, shape, source, ours)
    else:
        yield from linear(f"{source}.in_proj_qkv", d, shape.channels, f"{ours}.qkv")
        yield from linear(f"{source}.in_proj_z", d, inner, f"{ours}.gate")
        yield from linear(f"{source}.in_proj_b", d, heads, f"{ours}.strength")
        yield from linear(f"{source}.in_proj_a", d, heads, f"{ours}.decay")
    yield TensorRule(
        f"{source}.conv1d.weight",
        (shape.channels, 1, shape.conv_width),
        (Target(f"{ours}.conv", lambda tensor: tensor[:, 0].T),),
    )
    yield same(f"{source}.A_log", (heads,), f"{ours}.a_log")
    yield same(f"{source}.dt_bias", (heads,), f"{ours}.dt_bias")
    yield same(f"{source}.norm.weight", (shape.value_dim,), f"{ours}.norm.weight")
    yield from linear(f"{source}.out_proj", inner, d, f"{ours}.out")


def _joined_delta(
    config: ModelConfig, shape: DeltaNet, source: str, ours: str
) -> Iterator[TensorRule]:
    """Projections whose rows are grouped by key head: its query, its key, the values of its value
    heads and their gates; and the strengths and the decays of its value heads."""
    d, groups, key = config.hidden_size, shape.num_key_heads, shape.key_dim
    each = shape.num_value_heads // groups
    value = each * shape.value_dim

    def rows(tensor: np.ndarray, begin: int, end: int) -> np.ndarray:
        """Rows begin..end of every group, one group's after the other's."""
        return tensor.reshape(groups, -1, d)[:, begin:end].reshape(-1, d)

    def qkv(tensor: np.ndarray) -> np.ndarray:
        parts = ((0, key), (key, 2 * key), (2 * key, 2 * key + value))
        return np.concatenate([rows(tensor, *part) for part in parts]).T

    yield TensorRule(
        f"{source}.in_proj_qkvz.weight",
        (groups * 2 * (key + value), d),
        (
            Target(f"{ours}.qkv.weight", qkv),
            Target(
                f"{ours}.gate.weight",
                lambda tensor: rows(tensor, 2 * key + value, 2 * (key + value)).T,
            ),
        ),
    )
    yield TensorRule(
        f"{source}.in_proj_ba.weight",
        (2 * shape.num_value_heads, d),
        (
            Target(f"{ours}.strength.weight", lambda tensor: rows(tensor, 0, each).T),
            Target(f"{ours}.decay.weight", lambda tensor: rows(tensor, each, 2 * each).T),
        ),
    )


def expert_rules(config: ModelConfig, layer: int, expert: int) -> list[TensorRule]:
    """The checkpoint's tensors of one routed expert, whose targets are leaves of its format.

    Args:
        layer: counts from 0 over all layers.
    """
    d, f, names = config.hidden_size, config.expert.width, config.names
    source = f"model.layers.{layer}.{names.experts}.{expert}"
    if names.experts_as == "interleaved":
        return _interleaved_expert(config, source)
    gate, up, down = names.projections
    rules = [
        transposed(f"{source}.{gate}.weight", (f, d), "w_gate"),
        transposed(f"{source}.{up}.weight", (f, d), "w_up"),
        transposed(f"{source}.{down}.weight", (d, f), "w_down"),
    ]
    if config.expert.bias:
        rules += [
            same(f"{source}.{gate}.bias", (f,), "b_gate"),
            same(f"{source}.{up}.bias", (f,), "b_up"),
            same(f"{source}.{down}.bias", (d,), "b_down"),
        ]
    return rules


def _interleaved_expert(config: ModelConfig, source: str) -> list[TensorRule]:
    """gpt-oss's: [in, out], the columns of gate and up taking turns."""
    d, f = config.hidden_size, config.expert.width

    def pair(kind: str) -> tuple[Target, Target]:
        return (
            Target(f"{kind}_gate", lambda tensor: tensor[..., 0::2]),
            Target(f"{kind}_up", lambda tensor: tensor[..., 1::2]),
        )

    return [
        TensorRule(f"{source}.gate_up_proj", (d, 2 * f), pair("w")),
        TensorRule(f"{source}.gate_up_proj_bias", (2 * f,), pair("b")),
        same(f"{source}.down_proj", (f, d), "w_down"),
        same(f"{source}.down_proj_bias", (d,), "b_down"),
    ]
