"""Maps llama.cpp's tensor names to Hugging Face's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from dance_jax.config import UserError
from dance_jax.models.config import ModelConfig
from dance_jax.models.ggml.layout import strengths_and_decays, unchanged
from dance_jax.models.ggml.tensors import GgufTensor, LatentHeads, Tensor

#: Tensors outside the layers.
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
#: Modules within a layer; both sides name a module's tensors .weight and .bias. Names in braces are
#: fields of `config.Names`.
_MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "{router}",
    "ffn_gate_shexp": "{shared}.gate_proj",
    "ffn_up_shexp": "{shared}.up_proj",
    "ffn_down_shexp": "{shared}.down_proj",
    "ffn_gate_inp_shexp": "{shared_gate}",
}
#: Tensors within a layer that do not follow the module naming.
_TENSORS = {
    "attn_sinks.weight": "self_attn.sinks",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "exp_probs_b.bias": "{correction}",
    "exp_probs_b": "{correction}",
}
_LAYER = re.compile(r"blk\.(?P<layer>\d+)\.(?P<leaf>.+)")
#: All experts of a layer in one tensor [e, ...], or one tensor each as in early Mixtral files.
_JOINED = re.compile(r"ffn_(?P<part>gate_up|gate|up|down)_exps\.(?P<end>weight|bias)")
_SINGLE = re.compile(r"ffn_(?P<part>gate|up|down)\.(?P<expert>\d+)\.(?P<end>weight)")
_PARTS: tuple[str, ...] = ("gate", "up", "down")


def renamed(tensors: dict[str, GgufTensor], config: ModelConfig, where: str) -> dict[str, Tensor]:
    """The tensors under the names of `ModelConfig.names`, one tensor per expert.

    Raises:
        UserError: a name is unknown.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for stored, tensor in tensors.items():
        layer = _LAYER.fullmatch(stored)
        own: list[tuple[str, Tensor]] = list(_layer(layer, tensor, config)) if layer else []
        if stored in _OUTER:
            own = [(_OUTER[stored], unchanged(tensor, stored, config))]
        if layer and layer["leaf"] in _HALVES:
            own = list(_latent_heads(layer["layer"], tensors)) or own
        if not own:
            unknown.append(stored)
        for name, each in own:
            if name in found and not isinstance(each, LatentHeads):
                raise UserError(f"{where}: {stored} and another tensor are both {name}")
            found[name] = each
    if unknown:
        listed = ", ".join(sorted(unknown)[:8]) + (", ..." if len(unknown) > 8 else "")
        raise UserError(
            f"{where}: tensors that this architecture does not have ({len(unknown)}): {listed}"
        )
    return found


#: The two tensors of DeepSeek's kv_b_proj, which files from 2025 on store separately.
_HALVES = ("attn_k_b.weight", "attn_v_b.weight")


def _latent_heads(layer: str, tensors: dict[str, GgufTensor]) -> Iterator[tuple[str, LatentHeads]]:
    """Both halves of a layer's kv_b_proj as one tensor. Yields nothing if a half is missing."""
    both = [tensors.get(f"blk.{layer}.{half}") for half in _HALVES]
    if both[0] is None or both[1] is None:
        return
    keys, values = both[0].shape, both[1].shape
    if len(keys) != 3 or len(values) != 3 or (keys[0], keys[1]) != (values[0], values[2]):
        raise UserError(
            f"{both[0].file}: blk.{layer}: {' and '.join(_HALVES)} are {list(keys)} and "
            f"{list(values)}; expected [heads, rank, keys] and [heads, values, rank]"
        )
    yield f"model.layers.{layer}.self_attn.kv_b_proj.weight", LatentHeads(both[0], both[1])


def _layer(
    place: re.Match[str], tensor: GgufTensor, config: ModelConfig
) -> Iterator[tuple[str, GgufTensor]]:
    """The tensors that one stored tensor of a layer becomes. Yields nothing for an unknown name."""
    leaf, source = place["leaf"], f"model.layers.{place['layer']}"
    if int(place["layer"]) >= config.num_layers:  # multi-token prediction layer; never read
        yield f"{source}.{leaf}", tensor
    elif match := _JOINED.fullmatch(leaf) or _SINGLE.fullmatch(leaf):
        yield from _experts(match, tensor, config, f"{source}.{config.names.experts}")
    elif leaf == "ssm_ba.weight":
        for name, half in strengths_and_decays(tensor, config).items():
            yield f"{source}.{name}", half
    else:
        module, _, end = leaf.rpartition(".")
        known = _MODULES.get(module) if end in ("weight", "bias") else None
        if template := _TENSORS.get(leaf) or (known and f"{known}.{end}"):
            name = template.format(**dataclasses.asdict(config.names))
            yield f"{source}.{name}", unchanged(tensor, leaf, config)


def _experts(
    match: re.Match[str], tensor: GgufTensor, config: ModelConfig, source: str
) -> Iterator[tuple[str, GgufTensor]]:
    """The tensors of single experts: slices of a tensor of all experts, or one expert's tensor."""
    part, end = match["part"], match["end"]
    projections = dict(zip(_PARTS, config.names.projections, strict=True))
    if match.re is _SINGLE:
        yield f"{source}.{match['expert']}.{projections[part]}.{end}", tensor
        return
    count = config.num_experts
    if tensor.shape[0] != count:
        raise UserError(
            f"{tensor.file}: {match.string} is {list(tensor.shape)}, not [{count}, ...]: the model "
            f"has {count} experts"
        )
    for expert in range(count):
        own = tensor.part(expert, count).without_first_axis()
        if part != "gate_up":
            yield f"{source}.{expert}.{projections[part]}.{end}", own
            continue
        for index, half in enumerate(("gate", "up")):
            yield f"{source}.{expert}.{projections[half]}.{end}", own.part(index, 2)
