"""The registry of model families: config.json to `ModelConfig`.

A family is one file with a function that reads its fields, and one line here
(docs/add-a-model.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from dance_jax.config import UserError
from dance_jax.models.config import ModelConfig
from dance_jax.models.families import (
    deepseek_v2,
    deepseek_v3,
    gemma4,
    glm4_moe,
    gpt_oss,
    minimax_m2,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    qwen3_next,
)
from dance_jax.models.families.fields import Fields
from dance_jax.models.families.quantization import quantization

#: By model_type of config.json: a function of the fields and of the `ModelConfig` arguments that
#: `model_config` reads.
FAMILIES: dict[str, Callable[..., ModelConfig]] = {
    "deepseek_v2": deepseek_v2.read,
    "deepseek_v3": deepseek_v3.read,
    "gemma4_text": gemma4.read,
    "glm4_moe": glm4_moe.read,
    "glm4_moe_lite": deepseek_v3.read,
    "gpt_oss": gpt_oss.read,
    "kimi_k2": deepseek_v3.read,
    "minimax_m2": minimax_m2.read,
    "mixtral": mixtral.read,
    "olmoe": olmoe.read,
    "qwen2_moe": qwen2_moe.read,
    "qwen3_5_moe_text": qwen3_next.read,
    "qwen3_moe": qwen3_moe.read,
    "qwen3_next": qwen3_next.read,
}

#: Multimodal models. Only their text model, described by `text_config`, is served.
MULTIMODAL = ("gemma4", "kimi_k25", "qwen3_5_moe")
#: Fields of multimodal models that do not affect text.
_MEDIA_FIELDS = (
    "audio_config",
    "audio_token_id",
    "boa_token_id",
    "boi_token_id",
    "eoa_token_id",
    "eoa_token_index",
    "eoi_token_id",
    "ignore_index",
    "image_token_id",
    "media_placeholder_token_id",
    "use_unified_vision_chunk",
    "video_placeholder",
    "video_token_id",
    "vision_config",
    "vision_end_token_id",
    "vision_soft_tokens_per_image",
    "vision_start_token_id",
)
#: Spellings of the text model's tensor names in multimodal models.
_MEDIA_SPELLINGS = (
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.", ""),
)
#: Tensors of multimodal models that text does not need.
_MEDIA_TENSORS = (
    r"(model\.)?(visual|vision_tower|vision_model|audio_tower|embed_vision|embed_audio)\.",
    r"(model\.)?(mm_projector|multi_modal_projector)\.",
)


def model_config(
    values: dict[str, Any],
    generation: dict[str, Any] | None = None,
    where: str = "config.json",
) -> ModelConfig:
    """Reads the content of config.json and, if given, generation_config.json.

    Args:
        values: config.json as a dict, in transformers' older spelling or in that of version 5.
        generation: generation_config.json as a dict. Its eos_token_id takes precedence.
        where: name of the config file, for messages.

    Raises:
        UserError: a field is missing, contradicts another, or would change the result and is not
            supported; the message names it.
    """
    outside = Fields(values, where)
    wrapped = outside.raw("model_type") in MULTIMODAL and outside.has("text_config")
    fields = _text(outside) if wrapped else outside
    kind = fields.raw("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        supported = ", ".join(sorted({*FAMILIES, *MULTIMODAL}))
        raise UserError(f"{fields.where}: model_type is {kind!r}; supported: {supported}")
    given = {
        "family": kind,
        "dtype": _dtype(outside, fields),
        "quantization": quantization(fields),
        "eos_token_ids": _eos_token_ids(fields, generation),
        "bos_token_id": _token(fields, "bos_token_id"),
    }
    fields.reject("pruned_heads", "not supported")
    for name in ("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"):
        fields.constant(name, False)
    fields.choice("is_decoder", False, (False, True))
    config = FAMILIES[kind](fields, **given)
    fields.finish()
    if not wrapped:
        return config
    names = dataclasses.replace(
        config.names,
        spellings=(*_MEDIA_SPELLINGS, *config.names.spellings),
        ignored=(*config.names.ignored, *_MEDIA_TENSORS),
    )
    return dataclasses.replace(config, names=names)


def _text(outside: Fields) -> Fields:
    """The text fields of a multimodal model, with the fields that only the outer object has."""
    fields = outside.inner("text_config")
    outside.ignore(*_MEDIA_FIELDS)
    moved = (
        *("tie_word_embeddings", "eos_token_id", "bos_token_id"),
        *("quantization_config", "compression_config"),
    )
    for name in moved:
        outside.ignore(name)
        if outside.has(name) and not fields.has(name):
            fields.values = fields.values | {name: outside.values[name]}
    outside.agrees("tie_word_embeddings", fields.raw("tie_word_embeddings"))
    outside.finish()
    return fields


def _dtype(*levels: Fields) -> str:
    """The type of the checkpoint's floats according to the config, which may be wrong."""
    for fields in levels:
        for name in ("dtype", "torch_dtype"):
            value = str(fields.raw(name)).removeprefix("torch.")
            if value in ("float32", "bfloat16", "float16"):
                return value
    return "float32"


def _token(fields: Fields, name: str) -> int | None:
    value = fields.raw(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _eos_token_ids(fields: Fields, generation: dict[str, Any] | None) -> tuple[int, ...]:
    """eos_token_id of generation_config.json if the field is there, else of config.json."""
    value, where = fields.raw("eos_token_id"), f"{fields.where}: eos_token_id"
    if generation and generation.get("eos_token_id") is not None:
        value, where = generation["eos_token_id"], "generation_config.json: eos_token_id"
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in items):
        raise UserError(f"{where} is {value!r}; expected a token id or a list of token ids")
    vocab = fields.integer("vocab_size")
    if max(items, default=0) >= vocab:
        raise UserError(f"{where} is {value!r}; token ids are below vocab_size, {vocab}")
    return tuple(dict.fromkeys(items))
