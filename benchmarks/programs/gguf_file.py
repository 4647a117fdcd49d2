"""Write random models as GGUF files, for llama.cpp. Needs the package `gguf`.

Names and metadata are those of llama.cpp's own conversion. The tokenizer is a stub, because prompts
are token ids.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dance_jax.models.config import ModelConfig
from dance_jax.models.families import model_config
from dance_jax.models.hf import Tensor
from dance_jax.models.tensors import expert_rules, trunk_rules

#: llama.cpp's architecture by model_type.
ARCHITECTURES = {"deepseek_v2": "deepseek2", "olmoe": "olmoe", "qwen3_moe": "qwen3moe"}
#: Bytes of a block of 32 weights, including its float16 scale.
_BLOCKS = {"Q8_0": 34, "Q4_0": 18}
#: Standard deviation of uniformly random codes.
_CODE_DEVIATION = {"Q8_0": 73.9, "Q4_0": 4.6}
_NORMAL, _CONTROL = 1, 3

#: Tensors of a Hugging Face directory by name.
Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor of the file."""

    name: str
    #: The last axis is that of the inputs.
    shape: tuple[int, ...]
    kind: str
    #: Source tensors; stacked if there are several.
    sources: tuple[str, ...]
    #: Part of DeepSeek's joined keys and values: "k" or "v"; empty for other tensors.
    part: str = ""


def write(path: pathlib.Path, fields: dict[str, Any], kind: str, tensors: Tensors | None) -> None:
    """Write a model, one tensor at a time.

    Args:
        path: of the file.
        fields: the content of config.json; model_type must be one of ARCHITECTURES.
        kind: format of the matrices: "F32", "F16", "Q8_0" or "Q4_0". Norms and routers are F32.
        tensors: the weights, which are rounded to `kind`. If None, random weights are drawn
            directly in that format.
    """
    gguf = importlib.import_module("gguf")
    writer = gguf.GGUFWriter(path, ARCHITECTURES[fields["model_type"]])
    _metadata(writer, fields)
    _tokenizer(writer, fields["vocab_size"])
    entries = list(_entries(gguf, model_config(fields), fields, kind))
    for entry in entries:
        shape, dtype = _stored(entry)
        size = int(np.prod(shape)) * dtype.itemsize
        raw = gguf.GGMLQuantizationType[entry.kind]
        writer.add_tensor_info(entry.name, shape, dtype, size, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for entry in entries:
        if tensors is None:
            data = _random(rng, entry)
        else:
            values = _values(tensors, entry, fields)
            data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[entry.kind])
        writer.write_tensor_data(data)
    writer.close()


def token_name(token: int) -> str:
    """Return a token's text, a made-up word."""
    return f"<{token}>"


def _metadata(writer: Any, fields: dict[str, Any]) -> None:
    heads = fields["num_attention_heads"]
    latent = "kv_lora_rank" in fields
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_vocab_size(fields["vocab_size"])
    writer.add_head_count(heads)
    # llama.cpp computes latent attention with a single key head.
    writer.add_head_count_kv(1 if latent else fields["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(float(fields.get("rope_theta", 1e4)))
    width = fields.get("moe_intermediate_size")
    writer.add_feed_forward_length(fields.get("intermediate_size", width))
    writer.add_expert_used_count(fields["num_experts_per_tok"])
    writer.add_expert_count(fields.get("num_experts", fields.get("n_routed_experts")))
    if width:
        writer.add_expert_feed_forward_length(width)
    if latent:
        _latent(writer, fields)
    else:
        head_dim = fields.get("head_dim", fields["hidden_size"] // heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)


def _latent(writer: Any, fields: dict[str, Any]) -> None:
    """Add the fields that only DeepSeek-V2 has."""
    rank, rope = fields["kv_lora_rank"], fields["qk_rope_head_dim"]
    # The loader requires this field; 0 means that queries are projected in one step.
    writer.add_q_lora_rank(fields["q_lora_rank"] or 0)
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(fields["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(fields["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(fields["first_k_dense_replace"])
    writer.add_expert_shared_count(fields["n_shared_experts"])
    writer.add_expert_weights_scale(fields["routed_scaling_factor"])


def _tokenizer(writer: Any, size: int) -> None:
    """Add a vocabulary of made-up words, and one merge, which the loader requires."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token_name(token) for token in range(size)])
    writer.add_token_types([_CONTROL] * 2 + [_NORMAL] * (size - 2))
    writer.add_token_merges(["< 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)


def _entries(gguf: Any, config: ModelConfig, fields: dict[str, Any], kind: str) -> Iterator[_Entry]:
    """Yield the file's tensors: the trunk layer by layer, then the experts layer by layer."""
    arch = ARCHITECTURES[fields["model_type"]]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_layers)

    def named(source: str) -> str:
        name = names.get_name(source, try_suffixes=(".weight",))
        if name is None:
            raise ValueError(f"the package gguf has no name for tensor {source} of {arch}")
        return name

    for rule in trunk_rules(config):
        if "kv_b_proj" in rule.source:
            heads, rank = fields["num_attention_heads"], fields["kv_lora_rank"]
            shapes = {
                "k": (heads, rank, fields["qk_nope_head_dim"]),
                "v": (heads, fields["v_head_dim"], rank),
            }
            for part, shape in shapes.items():
                name = named(rule.source.replace("kv_b", f"{part}_b"))
                yield _Entry(name, shape, kind, (rule.source,), part)
            continue
        plain = len(rule.shape) == 1 or rule.source.endswith("mlp.gate.weight")
        yield _Entry(named(rule.source), rule.shape, "F32" if plain else kind, (rule.source,))
    for layer in config.moe_layers:
        own = [expert_rules(config, layer, expert) for expert in range(config.num_experts)]
        for same in zip(*own, strict=True):
            name = named(same[0].source.replace(".experts.0.", ".experts."))
            sources = tuple(rule.source for rule in same)
            yield _Entry(name, (len(same), *same[0].shape), kind, sources)


def _stored(entry: _Entry) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and type of a tensor as stored in the file."""
    if entry.kind in _BLOCKS:
        blocks = entry.shape[-1] // 32
        return (*entry.shape[:-1], blocks * _BLOCKS[entry.kind]), np.dtype(np.uint8)
    return entry.shape, np.dtype({"F32": np.float32, "F16": np.float16}[entry.kind])


def _values(tensors: Tensors, entry: _Entry, fields: dict[str, Any]) -> np.ndarray:
    """Return a tensor's weights in float32."""
    read = [tensors[name].read().astype(np.float32) for name in entry.sources]
    if entry.part:
        nope = fields["qk_nope_head_dim"]
        by_head = read[0].reshape(fields["num_attention_heads"], -1, fields["kv_lora_rank"])
        keys = by_head[:, :nope].transpose(0, 2, 1)
        return np.ascontiguousarray(keys if entry.part == "k" else by_head[:, nope:])
    return np.stack(read) if len(read) > 1 else read[0]


def _random(rng: np.random.Generator, entry: _Entry) -> np.ndarray:
    """Draw random weights as stored, scaled so that a product is about as large as its input."""
    shape, dtype = _stored(entry)
    size = entry.shape[-1] ** -0.5
    if entry.kind not in _BLOCKS:
        if len(shape) == 1:
            return np.ones(shape, dtype)
        return (rng.standard_normal(shape, np.float32) * np.float32(size)).astype(dtype)
    blocks = np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8).copy()
    blocks = blocks.reshape(-1, _BLOCKS[entry.kind])
    scale = np.float16(size / _CODE_DEVIATION[entry.kind])
    blocks[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(shape)
