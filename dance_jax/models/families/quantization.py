"""Reads quantization_config of config.json, strictly.

Which modules are quantised is not read from there: quantised tensors have names that float weights
do not have (packed/).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dance_jax.config import UserError
from dance_jax.models.config import Quantization
from dance_jax.models.families.fields import Fields

#: The inputs of a group are a multiple of this, because four-bit codes are read as words.
_WORD = 8

#: Fields that say how the weights were found, or which kernels multiply them. None of them changes
#: the value of a stored code. Activations are floats here, whatever the checkpoint rounds them to.
_HARMLESS = {
    "fp8": ("dequantize",),
    "mxfp4": ("dequantize",),
    # GPTQ's desc_act is checked through the tensors: g_idx shows the order.
    "integers": (
        # transformers and AutoGPTQ
        *("batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_percent", "dataset"),
        *("desc_act", "disable_exllama", "exllama_config", "lm_head", "max_input_length"),
        *("model_file_base_name", "model_name_or_path", "model_seqlen", "pad_token_id"),
        *("module_name_preceding_first_block", "modules_in_block_to_quantize", "static_groups"),
        *("tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama"),
        # AutoAWQ
        *("do_fuse", "fuse_max_seq_len", "modules_to_fuse"),
        # GPTQModel
        *("act_group_aware", "damp_auto_increment", "hyb_act", "meta", "method", "mse"),
        *("offload_to_disk", "offload_to_disk_path", "quantizer"),
        # AutoRound
        *("amp", "autoround_version", "data_type", "enable_minmax_tuning"),
        *("enable_norm_bias_tuning", "enable_quanted_input", "gradient_accumulate_steps", "iters"),
        *("low_gpu_mem_usage", "lr", "minmax_lr", "nsamples", "provider", "scale_dtype", "seqlen"),
        *("to_quant_block_names", "train_bs"),
    ),
    "compressed-tensors": ("global_compression_ratio", "run_compressed", "version"),
}


def quantization(fields: Fields) -> Quantization | None:
    """How the weights are quantised, from quantization_config or compression_config.

    Returns:
        None if the weights are not quantised.

    Raises:
        UserError: the quantisation is not supported; the message names the field and its value.
    """
    names = ("quantization_config", "compression_config")
    given = [name for name in names if fields.raw(name)]
    if not given:
        return None
    if len(given) > 1 and fields.values[given[0]] != fields.values[given[1]]:
        raise UserError(f"{fields.where}: {names[0]} and {names[1]} contradict each other")
    inner = fields.inner(given[0])
    # Older compressed-tensors files have no quant_method.
    older = "compressed-tensors" if given[0] == "compression_config" else None
    method = inner.choice("quant_method", older, tuple(_METHODS))
    found = _METHODS[method](inner)
    for name in ("modules_to_not_convert", "ignored_layers", "ignore"):
        _names(inner, name)
    inner.ignore(*_HARMLESS.get(method, _HARMLESS["integers"]))
    inner.finish()
    return found


def _fp8(fields: Fields) -> Quantization:
    """transformers' finegrained_fp8, as in DeepSeek-V3: scales per block, or per tensor."""
    fields.choice("fmt", "e4m3", ("e4m3", "float8_e4m3fn"))
    fields.choice("scale_fmt", "float", ("float", "ue8m0"))
    fields.choice("activation_scheme", "dynamic", ("dynamic", "static"))
    return Quantization("fp8", 8, block=_block(fields, "weight_block_size"))


def _mxfp4(fields: Fields) -> Quantization:
    """gpt-oss's MXFP4."""
    return Quantization("mxfp4", 4, group=32)


def _gptq(fields: Fields) -> Quantization:
    """GPTQModel's and AutoGPTQ's formats. Version 1 stores each zero point minus one."""
    bits = fields.choice("bits", None, (4, 8))
    layout = _layout(fields, ("gptq", "gptq_v2"))
    fields.choice("is_marlin_format", False, (False,))
    group = _group(fields, "group_size")
    return Quantization("gptq", bits, group, fields.boolean("sym", True), layout=layout)


def _awq(fields: Fields) -> Quantization:
    """AutoAWQ's format, in either spelling of its fields, and GPTQModel's AWQ format."""
    fields.choice(_either(fields, "bits", "w_bit"), None, (4,))
    fields.choice("backend", "autoawq", ("autoawq",))
    _layout(fields, ("gemm",))
    version = fields.raw("version")
    if str(version or "gemm").lower() != "gemm":
        raise UserError(f"{fields.where}: version is {version!r}; supported: 'gemm'")
    group = _group(fields, _either(fields, "group_size", "q_group_size"))
    symmetric = fields.boolean("sym", False)
    return Quantization("awq", 4, group, not fields.boolean("zero_point", not symmetric))


def _layout(fields: Fields, supported: tuple[str, ...]) -> str:
    """GPTQModel's format, which also has an older name. Also checks GPTQModel's other settings."""
    layout = fields.choice("checkpoint_format", supported[0], supported)
    layout = fields.choice("format", layout, supported)
    fields.agrees("checkpoint_format", layout)
    fields.choice("pack_dtype", "int32", ("int32",))
    for name in ("adapter", "rotation"):
        fields.reject(name, "not supported")
    # Modules with settings of their own. "-:" before a pattern leaves the modules as floats.
    changed = fields.raw("dynamic") or {}
    if not isinstance(changed, dict) or not all(str(key).startswith("-:") for key in changed):
        raise UserError(
            f"{fields.where}: dynamic is {changed!r}; only modules that are left as floats, whose "
            'patterns begin with "-:", are supported'
        )
    return layout


def _compressed(fields: Fields) -> Quantization:
    """compressed-tensors, if all of config_groups quantise in the same way."""
    fields.choice("quantization_status", "compressed", ("compressed",))
    for name in ("kv_cache_scheme", "moe_sparsity_config", "transform_config"):
        fields.reject(name, "not supported")
    sparsity = Fields(fields.raw("sparsity_config") or {}, f"{fields.where}: sparsity_config")
    sparsity.constant("format", "dense")
    layout = fields.choice("format", None, (*_FORMATS,))
    groups = fields.inner("config_groups")
    found = {_weights(groups.inner(name), layout) for name in groups.values}
    if len(found) != 1:
        kinds = " and ".join(sorted(str(each) for each in found)) or "nothing"
        raise UserError(f"{groups.where}: has {kinds}; expected one way of quantising all modules")
    return found.pop()


#: compressed-tensors' formats: type of the codes, numbers of bits, what shares a scale.
_FORMATS = {
    "pack-quantized": ("int", (4, 8), ("group", "channel")),
    "int-quantized": ("int", (8,), ("channel", "tensor")),
    "float-quantized": ("float", (8,), ("channel", "tensor", "block")),
    "mxfp4-pack-quantized": ("float", (4,), ("group",)),
}


def _weights(group: Fields, layout: str) -> Quantization:
    """One of config_groups. The rounding of activations is not imitated."""
    group.choice("format", layout, (layout,))
    group.ignore("targets", "input_activations", "output_activations")
    weights = group.inner("weights")
    kind, widths, ways = _FORMATS[layout]
    weights.choice("type", kind, (kind,))
    bits = weights.choice("num_bits", None, widths)
    weights.constant("dynamic", False)
    # These describe how the codes were found. An order of inputs shows in weight_g_idx.
    weights.ignore("observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype")
    way = weights.choice("strategy", "group" if weights.has("group_size") else None, ways)
    block = _block(weights, "block_structure") if way == "block" else None
    weights.ignore("block_structure", "group_size")
    size = _group(weights, "group_size") if way == "group" else 0
    if layout.startswith("mxfp4"):
        weights.choice("group_size", None, (32,))
    symmetric = weights.boolean("symmetric", True)
    if kind == "float" and not symmetric:
        raise UserError(f"{weights.where}: symmetric is False; supported: True")
    weights.finish()
    group.finish()
    return Quantization("compressed-tensors", bits, size, symmetric, block, layout)


def _either(fields: Fields, *names: str) -> str:
    """Of several spellings, the name that is present; the first name if none is."""
    return next((name for name in names if fields.has(name)), names[0])


def _group(fields: Fields, name: str) -> int:
    """Inputs per group. 0 for -1, which means that all inputs share a scale."""
    size = fields.integer(name, minimum=-1)
    if size == -1:
        return 0
    if size == 0 or size % _WORD:
        raise UserError(
            f"{fields.where}: {name} is {size}; expected -1 or a multiple of {_WORD} inputs"
        )
    return size


def _block(fields: Fields, name: str) -> tuple[int, int] | None:
    """Outputs and inputs per block, from [128, 128] or "128x128". None if absent."""
    value = fields.raw(name)
    if value is None:
        return None
    sides = value.split("x") if isinstance(value, str) else value
    if isinstance(sides, list) and len(sides) == 2:
        sides = [int(side) if str(side).isdecimal() else 0 for side in sides]
        if min(sides) > 0:
            return sides[0], sides[1]
    raise UserError(
        f"{fields.where}: {name} is {value!r}; expected the outputs and inputs of a block, such as "
        "[128, 128]"
    )


def _names(fields: Fields, name: str) -> None:
    """Raises UserError unless the field is a list of modules or patterns, or absent."""
    value: Any = fields.raw(name)
    if value is not None and not (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    ):
        raise UserError(f"{fields.where}: {name} is {value!r}; expected a list of modules")


_METHODS: dict[str, Callable[[Fields], Quantization]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}
