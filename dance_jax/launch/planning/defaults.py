"""Defaults for what the user does not set: platform and engine configuration."""

from __future__ import annotations

import dataclasses
import os

from dance_jax.config import (
    DEFAULT_MODEL_LEN,
    EXCHANGES,
    INTEGER_KINDS,
    WIRE_DTYPES,
    EngineConfig,
    EngineOptions,
    UserError,
)
from dance_jax.engine.kv_cache import num_blocks
from dance_jax.models.config import ModelConfig
from dance_jax.models.formats import Formats

#: Rows of smaller decodes, for servers with few users or none.
FEW_ROWS = (1, 4)
#: Slices of prefill in blocks. The first runs beside a decode and should take about as long as it.
CPU_SLICES, SLICES = (1, 4), (8, 32)


def default_platform() -> str:
    """Platform of the servers: "cuda" if JAX_PLATFORMS asks for it, else "cpu"."""
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    return "cuda" if wanted in ("cuda", "gpu") else "cpu"


def own_wire_dtype(dtype: str, formats: Formats | None) -> str:
    """Default format that hidden states are rounded to before routed experts.

    Weights of 16 bits or less were trained with activations of 16 bits, whatever format they are
    kept in. The matrices of the routed experts decide, because the hidden states are for them.

    Args:
        dtype: of activations.
        formats: of the checkpoint's weights; None: all are float32.
    """
    wide = formats is None or any(form.kind == "float32" for form in formats.experts.values())
    return "float32" if wide and dtype == "float32" else "bfloat16"


def _check_whole(options: EngineOptions) -> None:
    """Check that the options that count something are whole numbers, also if set from Python."""
    for field in dataclasses.fields(EngineOptions):
        value = getattr(options, field.name)
        if field.metadata["kind"] not in INTEGER_KINDS or value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{field.name}={value!r}: must be a whole number")


def engine_config(
    model: ModelConfig,
    options: EngineOptions = EngineOptions(),  # noqa: B008 (frozen)
    *,
    platform: str = "cpu",
    formats: Formats | None = None,
) -> EngineConfig:
    """Make the configuration of a model's engines.

    Args:
        model: the model.
        options: the user's options.
        platform: "cpu", "cuda", or "mixed".
        formats: formats of the checkpoint's weights; None: float32.

    Raises:
        UserError: a value is wrong, or more than the model supports.
    """
    _check_whole(options)
    longest, max_model_len = model.max_position, options.max_model_len
    if max_model_len is None:
        max_model_len = min(longest, DEFAULT_MODEL_LEN)
    if not 2 <= max_model_len <= longest:
        raise UserError(
            f"max_model_len={max_model_len}: must be from 2 to {longest}, the model's longest "
            "context"
        )
    max_num_seqs = options.max_num_seqs
    if max_num_seqs < 1:
        raise UserError(f"max_num_seqs={max_num_seqs}: must be at least 1")
    dtype = options.dtype or ("bfloat16" if platform == "cuda" else "float32")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f'dtype={dtype!r}: must be "float32" or "bfloat16"')
    for name, choices in (("wire_dtype", WIRE_DTYPES), ("exchange", EXCHANGES)):
        if (value := getattr(options, name)) not in choices:
            raise UserError(f"{name}={value!r}: must be one of {', '.join(choices)}")
    auto = options.wire_dtype == "auto"
    own = {
        "max_model_len": max_model_len,
        "dtype": dtype,
        "wire_dtype": own_wire_dtype(dtype, formats) if auto else options.wire_dtype,
    }
    config = EngineConfig(
        **(vars(options) | own),
        decode_rows=(*(rows for rows in FEW_ROWS if rows < max_num_seqs), max_num_seqs),
        slice_rows=SLICES if platform == "cuda" else CPU_SLICES,
    )
    num_blocks(model, config)  # raises if the KV cache cannot hold a whole context
    return config
