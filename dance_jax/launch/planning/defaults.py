"""What is used where the user says nothing: model, platform, engine configuration."""

from __future__ import annotations

import os
import pathlib

from dance_jax.config import EXCHANGES, EngineConfig, Rounding, UserError
from dance_jax.engine.kv_cache import num_blocks
from dance_jax.models.config import ModelConfig
from dance_jax.models.formats import Formats

#: Context when none is asked for, if the model's own is longer: every slot holds it in memory.
DEFAULT_MODEL_LEN = 2048
#: Sequences that run at once on each device.
DEFAULT_NUM_SEQS = 16
#: Rows of smaller decodes, for servers with few users or none.
FEW_ROWS = (1, 4)
#: Slices of prefill in blocks. The first, beside a decode, is to take about as long as the decode.
CPU_SLICES, SLICES = (1, 4), (8, 32)
#: What hidden states are rounded to before routed experts (`EngineConfig.wire_dtype`); "auto": the
#: checkpoint's own type (`own_wire_dtype`).
WIRE_DTYPES = ("auto", "float32", "bfloat16", "int8")


def demo_dir() -> pathlib.Path:
    """The model that is part of this package.

    Raises:
        UserError: this installation lacks it.
    """
    path = pathlib.Path(__file__).resolve().parents[2] / "demo"
    if not (path / "config.json").exists():
        raise UserError(f"{path}: the demo model is missing; name another model's directory")
    return path


def default_platform() -> str:
    """What the servers compute on: "cuda" if JAX_PLATFORMS asks for it, else "cpu"."""
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    return "cuda" if wanted in ("cuda", "gpu") else "cpu"


def own_wire_dtype(dtype: str, formats: Formats | None) -> str:
    """What hidden states are rounded to before routed experts if nobody says.

    Weights of 16 bits and less were made to be multiplied with activations of 16, whatever they are
    kept as: the matrices of routed experts decide, as the rows are for them.

    Args:
        dtype: of activations.
        formats: of the checkpoint's weights; None: all are float32.
    """
    wide = formats is None or any(form.kind == "float32" for form in formats.experts.values())
    return "float32" if wide and dtype == "float32" else "bfloat16"


def engine_config(
    model: ModelConfig,
    max_model_len: int | None = None,
    *,
    seed: int = 0,
    dtype: str | None = None,
    max_num_seqs: int = DEFAULT_NUM_SEQS,
    platform: str = "cpu",
    wire_dtype: str = "auto",
    exchange: str = "auto",
    kv_memory: int | None = None,
    rounding: Rounding | None = None,
    formats: Formats | None = None,
) -> EngineConfig:
    """Configuration of the engines of a model.

    Args:
        model: the model.
        max_model_len: context in tokens, prompt and output; None: the model's, at most
            DEFAULT_MODEL_LEN.
        seed: of sampling.
        dtype: of activations and KV cache, "float32" or "bfloat16"; None: bfloat16 where all
            servers have accelerators, else float32.
        max_num_seqs: sequences that run at once on each device.
        platform: "cpu", "cuda", or "mixed".
        wire_dtype: one of WIRE_DTYPES.
        exchange: one of EXCHANGES, see `EngineConfig.exchange`.
        kv_memory: bytes of each device's KV cache; None: see `EngineConfig.kv_memory`.
        rounding: what weights are rounded to when the model is converted.
        formats: how the checkpoint's weights are kept; None: as float32.

    Raises:
        UserError: a value is wrong or more than the model can do.
    """
    longest = model.max_position
    if max_model_len is None:
        max_model_len = min(longest, DEFAULT_MODEL_LEN)
    if not 2 <= max_model_len <= longest:
        raise UserError(
            f"max_model_len={max_model_len}: 2 tokens at least, and at most the {longest} the "
            "model was made for"
        )
    if max_num_seqs < 1:
        raise UserError(f"max_num_seqs={max_num_seqs}: at least 1 is needed")
    if dtype is None:
        dtype = "bfloat16" if platform == "cuda" else "float32"
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f'dtype={dtype!r}: "float32" or "bfloat16" is needed')
    if wire_dtype not in WIRE_DTYPES:
        raise UserError(f"wire_dtype={wire_dtype!r}: one of {', '.join(WIRE_DTYPES)} is needed")
    if exchange not in EXCHANGES:
        raise UserError(f"exchange={exchange!r}: one of {', '.join(EXCHANGES)} is needed")
    config = EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        decode_rows=(*(rows for rows in FEW_ROWS if rows < max_num_seqs), max_num_seqs),
        slice_rows=SLICES if platform == "cuda" else CPU_SLICES,
        dtype=dtype,
        seed=seed,
        wire_dtype=own_wire_dtype(dtype, formats) if wire_dtype == "auto" else wire_dtype,
        exchange=exchange,
        kv_memory=kv_memory,
        rounding=rounding or Rounding(),
    )
    num_blocks(model, config)  # refuses what cannot hold a whole context
    return config
