"""Writes GGUF files of tiny models with the `gguf` package, for tests of the reader."""

from __future__ import annotations

import collections
import json
import pathlib
import re
from typing import Any

import gguf
import numpy as np
from gguf.constants import MODEL_ARCH, ExpertGatingFuncType, RopeScalingType, TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dance_jax.models.hf import HFDirectory
from tests.tiny_models import DEEPSEEK, HYBRID, MIXTRAL, OSS

QWEN3 = {
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}
_USUAL = {
    name: MIXTRAL[name]
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
} | {"vocab_size": 320, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1}
_YARN_V2 = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 64,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
_HYBRID = {
    name: value for name, value in HYBRID.items() if name not in ("model_type", "mlp_only_layers")
} | {"vocab_size": 320, "bos_token_id": 0, "num_experts": 4, "num_experts_per_tok": 2}
#: Architecture and config.json, by the name that tests use for a model.
MODELS: dict[str, tuple[MODEL_ARCH, dict[str, Any]]] = {
    "qwen3moe": (MODEL_ARCH.QWEN3MOE, QWEN3 | _USUAL),
    "deepseek2": (
        MODEL_ARCH.DEEPSEEK2,
        DEEPSEEK
        | {"vocab_size": 320, "routed_scaling_factor": 1.5, "bos_token_id": 0}
        | {"rope_scaling": _YARN_V2, "rms_norm_eps": 1e-6},
    ),
    "deepseek3": (
        MODEL_ARCH.DEEPSEEK2,
        DEEPSEEK
        | {"model_type": "deepseek_v3", "vocab_size": 320, "q_lora_rank": 24, "bos_token_id": 0}
        | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    ),
    "gpt-oss": (
        MODEL_ARCH.GPT_OSS,
        OSS
        | {"vocab_size": 320, "rope_theta": 150000.0, "bos_token_id": 0}
        | {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "original_max_position_embeddings": 64,
                "truncate": False,
            }
        },
    ),
    "llama": (MODEL_ARCH.LLAMA, MIXTRAL | _USUAL),
    "qwen2moe": (
        MODEL_ARCH.QWEN2MOE,
        {
            "model_type": "qwen2_moe",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "tie_word_embeddings": True,
        }
        | _USUAL,
    ),
    "glm4moe": (
        MODEL_ARCH.GLM4_MOE,
        {
            "model_type": "glm4_moe",
            "head_dim": 16,
            "partial_rotary_factor": 0.5,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
        }
        | _USUAL,
    ),
    "qwen3next": (
        MODEL_ARCH.QWEN3NEXT,
        _HYBRID | {"model_type": "qwen3_next", "partial_rotary_factor": 0.25},
    ),
    "qwen35moe": (
        MODEL_ARCH.QWEN35MOE,
        {name: value for name, value in _HYBRID.items() if name != "intermediate_size"}
        | {"model_type": "qwen3_5_moe_text", "partial_rotary_factor": 0.25},
    ),
    "olmoe": (
        MODEL_ARCH.OLMOE,
        {
            "model_type": "olmoe",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 16,
            "clip_qkv": 8.0,
        }
        | _USUAL,
    ),
    "minimax-m2": (
        MODEL_ARCH.MINIMAXM2,
        {
            "model_type": "minimax_m2",
            "head_dim": 16,
            "rotary_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 16,
        }
        | _USUAL,
    ),
}

TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}</s>{% endfor %}"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(directory: pathlib.Path) -> None:
    """Write a tokenizer like Qwen2's with some merges, special tokens and a non-special one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [str(MODELS), _WORDS, TEMPLATE, "hello world, said the café"], trainer
    )
    tokenizer.add_special_tokens(["<|user|>"])
    tokenizer.add_tokens(["<think>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def write_gguf(
    path: pathlib.Path,
    directory: pathlib.Path,
    model: str,
    *,
    old_heads: bool = False,
    change: Any = None,
    kinds: dict[str, str] | None = None,
    **options: Any,
) -> pathlib.Path:
    """Write a Hugging Face directory as a GGUF file, with the layout of llama.cpp's converter.

    Args:
        directory: directory of a model in `MODELS`.
        old_heads: keep DeepSeek's keys and values in one tensor, as in files up to 2025.
        change: called with the writer after the metadata are added.
        kinds: ggml's type by the prefix of a tensor's name, with or without "blk.N."; the first
            match counts. Other tensors are F32. Types to which `gguf` cannot round get random
            blocks.
        options: options of `gguf.GGUFWriter`.
    """
    arch, _ = MODELS[model]
    fields = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], **options)
    _add_values(writer, fields, old_heads)
    _add_vocabulary(writer, directory, fields["vocab_size"])
    if change is not None:
        change(writer)
    for name, tensor in _stored(arch, directory, fields, old_heads):
        leaf = re.sub(r"^blk\.\d+\.", "", name)
        kind = next(
            (
                kind
                for start, kind in (kinds or {}).items()
                if leaf.startswith(start) or name.startswith(start)
            ),
            "F32",
        )
        quantised = gguf.GGMLQuantizationType[kind]
        data = _blocks(kind, tensor)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _blocks(kind: str, tensor: np.ndarray) -> np.ndarray:
    """Encode a tensor in the format of ggml."""
    if kind == "F32":
        return tensor
    if kind not in RANDOM:
        return gguf.quants.quantize(tensor, gguf.GGMLQuantizationType[kind])
    size, halves = RANDOM[kind]
    rng = np.random.default_rng(tensor.size)
    blocks = rng.integers(0, 256, (*tensor.shape[:-1], tensor.shape[-1] // 256, size), np.uint8)
    for at, value in halves.items():
        factor = rng.uniform(0.5, 1, blocks.shape[:-1]) * value
        blocks[..., at : at + 2] = factor.astype("<f2")[..., None].view(np.uint8)
    return blocks.reshape(*tensor.shape[:-1], -1)


#: For types that `gguf` can only read: bytes of a block of 256 weights, and the maximum of each
#: float16 in a block by its offset, for weights of about 0.05.
RANDOM = {
    "Q4_K": (144, {0: 0.05 / 150, 2: 0.05 / 20}),
    "Q6_K": (210, {208: 0.05 / 1300}),
}


def _add_values(writer: gguf.GGUFWriter, fields: dict[str, Any], old_heads: bool) -> None:
    family = fields["model_type"]
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(fields.get("rms_norm_eps", _EPS.get(family, 1e-5)))
    writer.add_expert_used_count(fields["num_experts_per_tok"])
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    writer.add_expert_count(next(fields[name] for name in names if name in fields))
    width = fields.get("moe_intermediate_size", fields.get("intermediate_size"))
    if family in ("mixtral", "olmoe"):
        writer.add_feed_forward_length(width)
    else:
        writer.add_expert_feed_forward_length(width)
        writer.add_feed_forward_length(fields.get("intermediate_size", 4 * hidden))
    writer.add_rope_freq_base(fields.get("rope_theta", _THETA.get(family, 1e4)))
    head = fields.get("head_dim", hidden // heads)
    if family.startswith("deepseek"):
        _add_latent(writer, fields, old_heads)
    else:
        writer.add_head_count_kv(fields["num_key_value_heads"])
        writer.add_key_length(head)
        writer.add_value_length(head)
    rotated = int(head * fields.get("partial_rotary_factor", 1))
    writer.add_rope_dimension_count(
        fields.get("qk_rope_head_dim", fields.get("rotary_dim", rotated))
    )
    if scaling := fields.get("rope_scaling"):
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        if all_dim := scaling.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(0.1 * all_dim)
    if family in ("qwen3_next", "qwen3_5_moe_text"):
        _add_delta(writer, fields)
    added = {
        "sliding_window": writer.add_sliding_window,
        "shared_expert_intermediate_size": writer.add_expert_shared_feed_forward_length,
        "n_shared_experts": writer.add_expert_shared_count,
        "first_k_dense_replace": writer.add_leading_dense_block_count,
        "n_group": writer.add_expert_group_count,
        "topk_group": writer.add_expert_group_used_count,
        "routed_scaling_factor": writer.add_expert_weights_scale,
        "clip_qkv": writer.add_clamp_kqv,
    }
    for name, add in added.items():
        if name in fields:
            add(fields[name])
    if family in ("deepseek_v3", "glm4_moe"):
        writer.add_expert_weights_norm(fields["norm_topk_prob"])
    if family in ("deepseek_v3", "glm4_moe", "minimax_m2"):
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


#: Defaults of families for fields that are absent from config.json.
_EPS = dict.fromkeys(
    ("deepseek_v2", "deepseek_v3", "qwen2_moe", "minimax_m2", "qwen3_next", "qwen3_5_moe_text"),
    1e-6,
)
_THETA = {"mixtral": 1e6, "minimax_m2": 5e6}


def _add_delta(writer: gguf.GGUFWriter, fields: dict[str, Any]) -> None:
    heads = fields["linear_num_value_heads"]
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(fields["linear_key_head_dim"])
    writer.add_ssm_group_count(fields["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(heads * fields["linear_value_head_dim"])
    writer.add_full_attention_interval(4)
    recurrent = [kind == "linear_attention" for kind in fields["layer_types"]]
    writer.add_array(f"{writer.arch}.attention.recurrent_layers", recurrent)


def _add_latent(writer: gguf.GGUFWriter, fields: dict[str, Any], old_heads: bool) -> None:
    rank, rope = fields["kv_lora_rank"], fields["qk_rope_head_dim"]
    key, value = fields["qk_nope_head_dim"] + rope, fields["v_head_dim"]
    writer.add_head_count_kv(fields["num_attention_heads"] if old_heads else 1)
    writer.add_kv_lora_rank(rank)
    if fields["q_lora_rank"]:
        writer.add_q_lora_rank(fields["q_lora_rank"])
    writer.add_key_length(key if old_heads else rank + rope)
    writer.add_value_length(value if old_heads else rank)
    if not old_heads:
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(value)


def _add_vocabulary(writer: gguf.GGUFWriter, directory: pathlib.Path, size: int) -> None:
    stored = json.loads((directory / "tokenizer.json").read_text())
    tokens = {number: text for text, number in stored["model"]["vocab"].items()}
    kinds = collections.defaultdict(lambda: TokenType.NORMAL)
    for token in stored["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    for number in range(size):
        if number not in tokens:
            tokens[number], kinds[number] = f"[PAD{number}]", TokenType.UNUSED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([tokens[number] for number in range(size)])
    writer.add_token_types([kinds[number] for number in range(size)])
    writer.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)


def _stored(
    arch: MODEL_ARCH, directory: pathlib.Path, fields: dict[str, Any], old_heads: bool
) -> list[tuple[str, np.ndarray]]:
    """Tensors under llama.cpp's names, according to the map of the `gguf` package."""
    mapped = gguf.get_tensor_name_map(arch, fields["num_hidden_layers"])
    stacks: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for name, tensor in HFDirectory(directory).tensors.items():
        expert = re.fullmatch(r"(.*\.experts)\.\d+\.(\w+?)(_bias|\.weight|)", name)
        values = np.asarray(tensor.read(), np.float32)
        if expert is None:
            stacks[name].append(values)
            continue
        part, end = expert[2], ".bias" if expert[3] == "_bias" else ".weight"
        if arch != MODEL_ARCH.GPT_OSS:
            stacks[f"{expert[1]}.{part}{end}"].append(values)
        elif part == "gate_up_proj":
            for index, half in enumerate(("gate_proj", "up_proj")):
                stacks[f"{expert[1]}.{half}{end}"].append(values[..., index::2].T)
        else:
            stacks[f"{expert[1]}.{part}{end}"].append(values.T)
    found = []
    for name, values in stacks.items():
        tensor = np.stack(values) if ".experts." in name else values[0]
        for theirs, one in _laid_out(name, tensor, fields, arch, old_heads):
            theirs += ".weight" if theirs.endswith("sinks") else ""
            known = mapped.get_name(theirs, try_suffixes=(".weight", ".bias"))
            assert known is not None, theirs
            found.append((known, one))
    return found


def _laid_out(
    name: str, tensor: np.ndarray, fields: dict[str, Any], arch: MODEL_ARCH, old_heads: bool
) -> list[tuple[str, np.ndarray]]:
    """Rearrange a tensor as llama.cpp does, into one or two tensors."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    part = name.split(".")[-2]
    if arch == MODEL_ARCH.LLAMA and part in heads:
        count = fields[heads[part]]
        pairs = tensor.reshape(count, 2, -1, tensor.shape[-1]).swapaxes(1, 2)
        return [(name, pairs.reshape(tensor.shape))]
    if part == "kv_b_proj" and not old_heads:
        nope, rank = fields["qk_nope_head_dim"], fields["kv_lora_rank"]
        by_head = tensor.reshape(fields["num_attention_heads"], -1, rank)
        keys, values = by_head[:, :nope].swapaxes(1, 2), by_head[:, nope:]
        return [(name.replace("kv_b", "k_b"), keys), (name.replace("kv_b", "v_b"), values)]
    if fields["model_type"].startswith(("qwen3_next", "qwen3_5")):
        return _hybrid(name, tensor, fields)
    if part == "shared_expert_gate":
        return [(name, tensor[0])]
    if name.endswith("e_score_correction_bias"):
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    return [(name, tensor)]


def _hybrid(name: str, tensor: np.ndarray, fields: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    """`_laid_out` for a model with delta nets."""
    part = name.partition("linear_attn.")[2].removesuffix(".weight")
    keys, values = fields["linear_num_key_heads"], fields["linear_num_value_heads"]
    key, value = fields["linear_key_head_dim"], fields["linear_value_head_dim"]
    if part == "in_proj_qkvz":
        ends = np.cumsum([key, key, values // keys * value])
        parts = np.split(tensor.reshape(keys, -1, tensor.shape[-1]), ends, axis=1)
        query, keyed, valued, gate = (each.reshape(-1, tensor.shape[-1]) for each in parts)
        joined = np.concatenate([query, keyed, valued])
        return [(name.replace("qkvz", "qkv"), joined), (name.replace("qkvz", "z"), gate)]
    if fields["model_type"] != "qwen3_next":
        before = 2 * keys * key if part in ("in_proj_qkv", "conv1d") else 0
        width = {"in_proj_qkv": value, "conv1d": value, "in_proj_z": value, "out_proj": value}
        if part == "out_proj":
            tensor = _tiled(tensor.T, keys, width[part]).T
        elif part and part != "norm":
            own = _tiled(tensor[before:], keys, width.get(part, 1))
            tensor = np.concatenate([tensor[:before], own])
    if part == "A_log":
        return [(name, -np.exp(tensor))]
    if part == "dt_bias":
        return [(name.replace("dt_bias", "dt_proj.bias"), tensor)]
    if part == "conv1d":
        return [(name, tensor[:, 0])]
    if name.endswith("norm.weight") and part != "norm":
        return [(name, tensor + 1)]
    return [(name, tensor[0] if "shared_expert_gate" in name else tensor)]


def _tiled(rows: np.ndarray, keys: int, width: int) -> np.ndarray:
    """Reorder value heads, from grouped by key head to taking one from each key head in turn."""
    heads = rows.reshape(keys, -1, width, *rows.shape[1:])
    return heads.swapaxes(0, 1).reshape(rows.shape)
