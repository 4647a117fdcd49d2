"""Random checkpoints in Hugging Face format, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from dance_jax.models.config import ModelConfig
from dance_jax.models.families import model_config
from dance_jax.models.formats import Matrix, WeightFormat
from dance_jax.models.tensors import TensorRule, expert_rules, trunk_rules


@dataclasses.dataclass(frozen=True)
class Held:
    """A tensor in memory that implements `tensors.Stored`."""

    values: np.ndarray

    @property
    def format(self) -> WeightFormat:
        return Matrix.of(self.values).format

    def read(self) -> np.ndarray:
        return self.values

    def matrix(self, inputs_first: bool = False) -> Matrix:
        return Matrix.of(self.values if inputs_first else self.values.T)


def random_trunk_tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """The trunk's tensors under their Hugging Face names, float32."""
    rng = np.random.default_rng([seed, 0])
    for rule in trunk_rules(config):
        yield rule.source, random_tensor(rng, rule, config)


def random_expert_tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """All routed experts' tensors under their Hugging Face names, float32."""
    for layer in config.moe_layers:
        rng = np.random.default_rng([seed, 1, layer])
        for expert in range(config.num_experts):
            for rule in expert_rules(config, layer, expert):
                yield rule.source, random_tensor(rng, rule, config)


def random_tensor(rng: np.random.Generator, rule: TensorRule, config: ModelConfig) -> np.ndarray:
    """A random tensor for a rule.

    Norms and scales are near 1, biases near 0, embeddings have unit variance, and projections keep
    the variance of their input.
    """
    values = rng.standard_normal(rule.shape, dtype=np.float32)
    if len(rule.shape) == 1:
        norm = rule.source.endswith("norm.weight") and not config.norm_plus_one
        factor = norm or rule.source.endswith(("scalar", "scale"))
        return factor + 0.1 * values
    if rule.source == "model.embed_tokens.weight":
        return values
    return values * np.float32(rule.shape[-1] ** -0.5)


def write_random_checkpoint(
    directory: str | pathlib.Path,
    fields: dict[str, Any],
    seed: int = 0,
    dtype: str = "float32",
    shard_bytes: int = 1 << 30,
    tokenizer: bool = True,
) -> pathlib.Path:
    """Write a random model as a Hugging Face directory.

    Args:
        directory: created if missing; files in it are replaced.
        fields: the content of config.json.
        seed: seed of the weights.
        dtype: type of the stored tensors, "float32" or "bfloat16".
        shard_bytes: bytes at which a safetensors file is full and the next one begins; with more
            than one file, an index is written.
        tokenizer: also write a byte tokenizer (needs vocab_size >= 258).

    Returns:
        The directory.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = model_config(fields)
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    if tokenizer:
        write_byte_tokenizer(directory, config)
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    stored = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    parts: list[list[str]] = []

    def flush() -> None:
        name = f"part-{len(parts)}.safetensors"
        save_file(shards[0], directory / name, metadata={"format": "pt"})
        parts.append(list(shards[0]))
        shards[0] = {}

    experts = random_expert_tensors(config, seed)
    if config.names.experts_as != "single":
        experts = _joined(config, experts)
    for source in (random_trunk_tensors(config, seed), experts):
        for name, tensor in source:
            shards[0][name] = np.ascontiguousarray(tensor.astype(stored))
            size += shards[0][name].nbytes
            if size >= shard_bytes:
                flush()
                size = 0
    if shards[0]:
        flush()
    if len(parts) == 1:
        (directory / "part-0.safetensors").rename(directory / "model.safetensors")
        return directory
    weight_map = {}
    for index, names in enumerate(parts):
        file = f"model-{index + 1:05d}-of-{len(parts):05d}.safetensors"
        (directory / f"part-{index}.safetensors").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
    (directory / "model.safetensors.index.json").write_text(text + "\n")
    return directory


def _joined(
    config: ModelConfig, tensors: Iterator[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Stack the tensors of single experts into the form given by `Names.experts_as`."""
    rules = expert_rules(config, config.moe_layers[0], 0)
    for layer in config.moe_layers:
        prefix = f"model.layers.{layer}.{config.names.experts}."
        own = list(itertools.islice(tensors, len(rules) * config.num_experts))
        stacks = {
            name.removeprefix(f"{prefix}0."): np.stack([t for _, t in own[leaf :: len(rules)]])
            for leaf, (name, _) in enumerate(own[: len(rules)])
        }
        if config.names.experts_as == "joined":
            gate, up, down = (stacks[f"{name}.weight"] for name in config.names.projections)
            stacks = {"gate_up_proj": np.concatenate([gate, up], axis=1), "down_proj": down}
        for name, stack in stacks.items():
            yield prefix + name, stack


def write_byte_tokenizer(directory: str | pathlib.Path, config: ModelConfig) -> None:
    """Write tokenizer.json and tokenizer_config.json: <s>, </s>, then one token for each byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if config.vocab_size < 258:
        raise ValueError(f"a byte tokenizer needs vocab_size >= 258, not {config.vocab_size}")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {char: 2 + index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    directory = pathlib.Path(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "add_bos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for message in messages %}{{ message['role'] }}: "
        "{{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
