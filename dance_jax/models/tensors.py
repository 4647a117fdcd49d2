"""Mapping from a checkpoint's tensors (Hugging Face names and shapes) to the engine's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from dance_jax.models.config import (
    DeltaNet,
    GroupedAttention,
    LatentAttention,
    LayerConfig,
    ModelConfig,
)
from dance_jax.models.formats import Matrix, WeightFormat


def _as_it_is(tensor: np.ndarray) -> np.ndarray:
    return tensor


@dataclasses.dataclass(frozen=True)
class Target:
    """One of the engine's weights, and how it is derived from the checkpoint's tensor."""

    #: Dotted path in the module, for example "layers.0.mixer.kv_a.weight".
    path: str
    #: Derives the floats of the weight from those of the tensor: an array, or a matrix [in, out]
    #: or [heads, in, out].
    cut: Callable[[np.ndarray], np.ndarray] = _as_it_is
    #: The weight is a matrix, which may have any format.
    matrix: bool = False
    #: For a matrix, instead of `cut`: the outputs to take, in the stored format, without loss.
    outputs: slice | np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """One tensor of the checkpoint: its name, its required shape, and the weights it becomes."""

    source: str
    shape: tuple[int, ...]
    targets: tuple[Target, ...]
    #: A tensor of two axes is [in, out], not [out, in].
    inputs_first: bool = False

    @property
    def d_in(self) -> int:
        """Number of inputs of a tensor that is a matrix."""
        return self.shape[0 if self.inputs_first else 1]


class Stored(Protocol):
    """A tensor of a checkpoint, in any stored format."""

    @property
    def format(self) -> WeightFormat: ...

    def read(self) -> np.ndarray: ...

    def matrix(self, inputs_first: bool = False) -> Matrix: ...


def matrix_form(target: Target, tensor: Stored) -> WeightFormat:
    """Format of a target matrix without rounding; bfloat16 if a quantised tensor is rearranged."""
    if target.outputs is None and tensor.format.group:
        return WeightFormat("bfloat16")
    return tensor.format


#: A weight on the host: an array, a matrix, or one matrix per head.
Part = np.ndarray | Matrix | list[Matrix]


def arrays_of(path: str, part: Part, form: WeightFormat | None) -> dict[str, np.ndarray]:
    """Arrays of a weight by name.

    Args:
        form: format of the matrix; not used for other weights.
    """
    if isinstance(part, np.ndarray):
        return {path: part}
    assert form is not None
    if isinstance(part, Matrix):
        return {f"{path}.{name}": array for name, array in part.to(form).arrays.items()}
    heads = [head.to(form).arrays for head in part]
    return {f"{path}.{name}": np.stack([head[name] for head in heads]) for name in heads[0]}


def parts_of(rule: TensorRule, tensor: Stored) -> Iterator[tuple[str, Part]]:
    """Yield the weights that a tensor becomes, with their paths."""
    floats: np.ndarray | None = None
    kept: Matrix | None = None
    for target in rule.targets:
        if target.outputs is not None:
            kept = tensor.matrix(rule.inputs_first) if kept is None else kept
            yield target.path, kept.outputs(target.outputs)
            continue
        floats = tensor.read() if floats is None else floats
        array = target.cut(floats)
        if not target.matrix:
            yield target.path, array
        elif array.ndim == 3:
            yield target.path, [Matrix.of(head) for head in array]
        else:
            yield target.path, Matrix.of(array)


def same(source: str, shape: tuple[int, ...], path: str) -> TensorRule:
    """Rule for a tensor that becomes an array unchanged."""
    return TensorRule(source, shape, (Target(path),))


def matrix(
    source: str, shape: tuple[int, int], path: str, inputs_first: bool = False
) -> TensorRule:
    """Rule for a tensor that becomes a matrix."""
    whole = Target(path, matrix=True, outputs=slice(None))
    return TensorRule(source, shape, (whole,), inputs_first)


def linear(source: str, d_in: int, d_out: int, path: str, bias: bool = False) -> list[TensorRule]:
    """Rules for a `layers.Linear`."""
    rules = [matrix(f"{source}.weight", (d_out, d_in), f"{path}.weight")]
    return [*rules, same(f"{source}.bias", (d_out,), f"{path}.bias")] if bias else rules


def mlp(source: str, d: int, width: int, path: str) -> list[TensorRule]:
    """Rules for a `layers.GatedMLP`."""
    return [
        *linear(f"{source}.gate_proj", d, width, f"{path}.gate"),
        *linear(f"{source}.up_proj", d, width, f"{path}.up"),
        *linear(f"{source}.down_proj", width, d, f"{path}.down"),
    ]


def trunk_rules(config: ModelConfig) -> list[TensorRule]:
    """Rules for all tensors of the trunk, layer by layer."""
    shape = (config.vocab_size, config.hidden_size)
    rules = [
        matrix("model.embed_tokens.weight", shape, "embedding"),
        same("model.norm.weight", (config.hidden_size,), "norm.weight"),
    ]
    if not config.tie_embeddings:
        rules.append(matrix("lm_head.weight", shape, "head"))
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
    yield matrix(f"{name}.weight", (experts, config.hidden_size), f"{ours}.weight")
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
            Target(f"{ours}.w_uk", lambda w: by_head(w)[:, :nope], matrix=True),
            Target(f"{ours}.w_uv", lambda w: by_head(w)[:, nope:].transpose(0, 2, 1), matrix=True),
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
    """Rules for joined projections, whose rows are grouped by key head.

    In in_proj_qkvz, a group is the head's query, its key, and the values and gates of its value
    heads. In in_proj_ba, a group is the strengths and the decays of its value heads.
    """
    d, groups, key = config.hidden_size, shape.num_key_heads, shape.key_dim
    each = shape.num_value_heads // groups
    value = each * shape.value_dim

    def rows(name: str, width: int, *parts: tuple[int, int]) -> Target:
        """Target with rows begin..end of every group of `width` rows, part after part."""
        number = np.arange(groups * width).reshape(groups, width)
        chosen = [number[:, begin:end].reshape(-1) for begin, end in parts]
        return Target(f"{ours}.{name}.weight", matrix=True, outputs=np.concatenate(chosen))

    wide, last = 2 * (key + value), 2 * key + value
    yield TensorRule(
        f"{source}.in_proj_qkvz.weight",
        (groups * wide, d),
        (
            rows("qkv", wide, (0, key), (key, 2 * key), (2 * key, last)),
            rows("gate", wide, (last, wide)),
        ),
    )
    yield TensorRule(
        f"{source}.in_proj_ba.weight",
        (2 * shape.num_value_heads, d),
        (rows("strength", 2 * each, (0, each)), rows("decay", 2 * each, (each, 2 * each))),
    )


def expert_rules(config: ModelConfig, layer: int, expert: int) -> list[TensorRule]:
    """Rules for the tensors of one routed expert; targets are leaves of the expert's format.

    Args:
        layer: index among all layers, from 0.
    """
    d, f, names = config.hidden_size, config.expert.width, config.names
    source = f"model.layers.{layer}.{names.experts}.{expert}"
    if names.experts_as == "interleaved":
        return _interleaved_expert(config, source)
    gate, up, down = names.projections
    rules = [
        matrix(f"{source}.{gate}.weight", (f, d), "w_gate"),
        matrix(f"{source}.{up}.weight", (f, d), "w_up"),
        matrix(f"{source}.{down}.weight", (d, f), "w_down"),
    ]
    if config.expert.bias:
        rules += [
            same(f"{source}.{gate}.bias", (f,), "b_gate"),
            same(f"{source}.{up}.bias", (f,), "b_up"),
            same(f"{source}.{down}.bias", (d,), "b_down"),
        ]
    return rules


def _interleaved_expert(config: ModelConfig, source: str) -> list[TensorRule]:
    """Rules for gpt-oss: tensors are [in, out], with alternating columns of gate and up."""
    d, f = config.hidden_size, config.expert.width
    turns = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}

    def biases(part: slice) -> Callable[[np.ndarray], np.ndarray]:
        return lambda tensor: tensor[part]

    return [
        TensorRule(
            f"{source}.gate_up_proj",
            (d, 2 * f),
            tuple(Target(f"w_{name}", matrix=True, outputs=part) for name, part in turns.items()),
            inputs_first=True,
        ),
        TensorRule(
            f"{source}.gate_up_proj_bias",
            (2 * f,),
            tuple(Target(f"b_{name}", biases(part)) for name, part in turns.items()),
        ),
        matrix(f"{source}.down_proj", (f, d), "w_down", inputs_first=True),
        same(f"{source}.down_proj_bias", (d,), "b_down"),
    ]
