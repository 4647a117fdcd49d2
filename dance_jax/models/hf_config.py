"""Reads Hugging Face config.json into a ModelConfig; nothing that changes the result is ignored."""

from __future__ import annotations

import math
from typing import Any

from dance_jax.config import UserError
from dance_jax.models.config import (
    GroupedAttention,
    LatentAttention,
    ModelConfig,
    RopeConfig,
    RouterConfig,
)

#: Fields that change no logit of inference: bookkeeping, training, other programs' defaults of
#: sampling (here these are SamplingParams), labels of other heads.
HARMLESS = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "aux_loss_alpha",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "ep_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "sep_token_id",
        "seq_aux",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    ]
)

_ABSENT = object()


class Fields:
    """A dict of config fields that remembers which ones were read."""

    def __init__(self, values: Any, where: str):
        if not isinstance(values, dict):
            raise UserError(
                f"{where}: expected an object with fields, found {type(values).__name__}"
            )
        self.values = values
        self.where = where
        self.seen: set[str] = set()

    def has(self, name: str) -> bool:
        """True if the field is there and not null."""
        return self.values.get(name) is not None

    def raw(self, name: str, default: Any = None) -> Any:
        """The field as it stands, or `default` where absent."""
        self.seen.add(name)
        return self.values.get(name, default)

    def number(self, name: str, default: Any = _ABSENT) -> float:
        """A finite number; `default` where absent or null."""
        value = self.raw(name)
        if value is None:
            if default is _ABSENT:
                raise UserError(f"{self.where}: {name} is missing")
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise UserError(f"{self.where}: {name} is {value!r}; expected a number")
        return float(value)

    def positive(self, name: str, default: Any = _ABSENT) -> float:
        """A finite number above 0; `default` where absent or null."""
        value = self.number(name, default)
        if value <= 0:
            raise UserError(f"{self.where}: {name} is {value:g}; expected a number above 0")
        return value

    def integer(self, name: str, default: Any = _ABSENT, minimum: int = 1) -> int:
        """A whole number of at least `minimum`; `default` where absent or null."""
        value = self.raw(name)
        if value is None:
            if default is _ABSENT:
                raise UserError(f"{self.where}: {name} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise UserError(
                f"{self.where}: {name} is {value!r}; expected a whole number >= {minimum}"
            )
        return value

    def boolean(self, name: str, default: bool) -> bool:
        """True or false; `default` where absent or null."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {name} is {value!r}; expected true or false")
        return value

    def choice(self, name: str, default: Any, supported: tuple[Any, ...]) -> Any:
        """A value among `supported`; `default` where absent or null."""
        value = self.raw(name)
        value = default if value is None else value
        if value not in supported or isinstance(value, bool) != isinstance(supported[0], bool):
            names = ", ".join(repr(item) for item in supported)
            raise UserError(f"{self.where}: {name} is {value!r}; supported: {names}")
        return value

    def reject(self, name: str, reason: str) -> None:
        """Raises UserError where the field is there and neither null nor empty."""
        if self.raw(name):
            raise UserError(f"{self.where}: {name} is set: {reason}")

    def finish(self) -> None:
        """Raises UserError naming every field that nobody read and that may change the result."""
        unknown = sorted(set(self.values) - self.seen - HARMLESS)
        if unknown:
            raise UserError(
                f"{self.where}: unknown field{'s' * (len(unknown) > 1)} {', '.join(unknown)}: "
                "may change what the model computes, so the model is not run without it"
            )


def model_config(
    values: dict[str, Any], generation: dict[str, Any] | None, where: str
) -> ModelConfig:
    """See `ModelConfig.from_hf`."""
    fields = Fields(values, where)
    family = fields.raw("model_type")
    readers = {"deepseek_v2": _deepseek_v2, "mixtral": _mixtral}
    if family not in readers:
        raise UserError(
            f"{where}: model_type is {family!r}; supported: {', '.join(sorted(readers))}"
        )
    fields.reject("quantization_config", "quantised checkpoints are not supported")
    fields.reject("compression_config", "compressed checkpoints are not supported")
    fields.reject("pruned_heads", "pruned heads are not supported")
    fields.choice("is_encoder_decoder", False, (False,))
    fields.choice("is_decoder", False, (False, True))
    fields.choice("add_cross_attention", False, (False,))
    fields.choice("tie_encoder_decoder", False, (False,))
    fields.choice("hidden_act", "silu", ("silu",))
    eos = _eos_token_ids(fields, generation)
    config = readers[family](fields, eos)
    fields.finish()
    return config


def _common(fields: Fields, eos: tuple[int, ...]) -> dict[str, Any]:
    bos = fields.raw("bos_token_id")
    return {
        "hidden_size": fields.integer("hidden_size"),
        "num_layers": fields.integer("num_hidden_layers"),
        "vocab_size": fields.integer("vocab_size"),
        "max_position": fields.integer("max_position_embeddings"),
        "tie_embeddings": fields.boolean("tie_word_embeddings", False),
        "eos_token_ids": eos,
        "bos_token_id": bos if isinstance(bos, int) else None,
    }


def _deepseek_v2(fields: Fields, eos: tuple[int, ...]) -> ModelConfig:
    common = _common(fields, eos)
    fields.choice("attention_bias", False, (False,))
    fields.choice("mlp_bias", False, (False,))
    fields.choice("moe_layer_freq", 1, (1,))
    fields.choice("scoring_func", "softmax", ("softmax",))
    heads = fields.integer("num_attention_heads")
    if "q_lora_rank" not in fields.values:
        raise UserError(
            f"{fields.where}: q_lora_rank is missing (null: queries are not compressed)"
        )
    attention = LatentAttention(
        num_heads=heads,
        q_lora_rank=fields.integer("q_lora_rank", None),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
    )
    fields.choice("num_key_value_heads", heads, (heads,))
    # transformers 5 repeats these; they are not used there either
    fields.choice("head_dim", attention.qk_rope_head_dim, (attention.qk_rope_head_dim,))
    width = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    fields.choice("qk_head_dim", width, (width,))
    rope = _rope(fields, attention.qk_rope_head_dim, True, 10000.0, common["max_position"])

    experts = fields.integer("n_routed_experts")
    # "gready" is how DeepSeek's own configuration class spells its default
    method = fields.choice("topk_method", "greedy", ("greedy", "group_limited_greedy", "gready"))
    groups, topk_group = 1, 1
    if method == "group_limited_greedy":
        groups, topk_group = fields.integer("n_group"), fields.integer("topk_group")
        if experts % groups:
            raise UserError(
                f"{fields.where}: n_routed_experts {experts} is not a multiple of n_group {groups}"
            )
        if topk_group > groups:
            raise UserError(f"{fields.where}: topk_group {topk_group} exceeds n_group {groups}")
    else:
        fields.seen |= {"n_group", "topk_group"}  # only group_limited_greedy reads them
    top_k = fields.integer("num_experts_per_tok")
    if top_k > experts // groups * topk_group:
        raise UserError(
            f"{fields.where}: num_experts_per_tok {top_k} exceeds the "
            f"{experts // groups * topk_group} experts a token can choose from"
        )
    # DeepSeek's definition: normalised weights are not scaled, the others are
    normalise = fields.boolean("norm_topk_prob", False) and top_k > 1
    scaling = fields.number("routed_scaling_factor", 1.0)
    router = RouterConfig(
        num_experts=experts,
        top_k=top_k,
        method="greedy" if method == "gready" else method,
        num_groups=groups,
        topk_group=topk_group,
        normalise=normalise,
        norm_epsilon=1e-20,
        scale=1.0 if normalise else scaling,
    )
    first = fields.integer("first_k_dense_replace", 0, minimum=0)
    if first >= common["num_layers"]:
        raise UserError(
            f"{fields.where}: first_k_dense_replace {first} leaves no layer with experts"
        )
    width = fields.integer("moe_intermediate_size")
    if "n_shared_experts" not in fields.values:
        raise UserError(f"{fields.where}: n_shared_experts is missing (0 or null: none)")
    return ModelConfig(
        family="deepseek_v2",
        norm_eps=fields.positive("rms_norm_eps", 1e-6),
        dense_width=fields.integer("intermediate_size"),
        expert_width=width,
        shared_width=fields.integer("n_shared_experts", 0, minimum=0) * width,
        moe_layers=tuple(range(first, common["num_layers"])),
        attention=attention,
        rope=rope,
        router=router,
        **common,
    )


def _mixtral(fields: Fields, eos: tuple[int, ...]) -> ModelConfig:
    common = _common(fields, eos)
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads")
    if heads % kv_heads:
        raise UserError(
            f"{fields.where}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    if not fields.has("head_dim") and common["hidden_size"] % heads:
        raise UserError(
            f"{fields.where}: hidden_size {common['hidden_size']} is not a multiple of "
            f"num_attention_heads {heads} and head_dim is missing"
        )
    attention = GroupedAttention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields.integer("head_dim", common["hidden_size"] // heads),
        sliding_window=fields.integer("sliding_window", None),
    )
    fields.choice("attention_bias", False, (False,))
    experts = fields.integer("num_local_experts")
    top_k = fields.integer("num_experts_per_tok")
    if top_k > experts:
        raise UserError(
            f"{fields.where}: num_experts_per_tok {top_k} exceeds num_local_experts {experts}"
        )
    return ModelConfig(
        family="mixtral",
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
        dense_width=0,
        expert_width=fields.integer("intermediate_size"),
        shared_width=0,
        moe_layers=tuple(range(common["num_layers"])),
        attention=attention,
        rope=_rope(fields, attention.head_dim, False, 1e6, common["max_position"]),
        router=RouterConfig(num_experts=experts, top_k=top_k, normalise=True),
        **common,
    )


def _rope(
    fields: Fields, dim: int, interleaved: bool, theta: float, max_position: int
) -> RopeConfig:
    """Reads `rope_scaling` + `rope_theta` (older) or `rope_parameters` (transformers 5)."""
    if dim % 2:
        raise UserError(f"{fields.where}: rotary position embedding needs an even width, not {dim}")
    spellings = [name for name in ("rope_parameters", "rope_scaling") if fields.has(name)]
    fields.seen |= {"rope_parameters", "rope_scaling", "rope_theta"}
    readings = [
        _rope_dict(fields, name, dim, interleaved, theta, max_position) for name in spellings
    ]
    if not readings:
        return RopeConfig(dim, fields.positive("rope_theta", theta), interleaved)
    if len(readings) == 2 and readings[0] != readings[1]:
        raise UserError(f"{fields.where}: rope_parameters and rope_scaling contradict each other")
    return readings[0]


def _rope_dict(
    fields: Fields, name: str, dim: int, interleaved: bool, theta: float, max_position: int
) -> RopeConfig:
    where = f"{fields.where}: {name}"
    inner = Fields(fields.values[name], where)
    kinds = {inner.raw(key) for key in ("rope_type", "type") if inner.has(key)} or {"default"}
    if len(kinds) > 1:
        raise UserError(f"{where}: type and rope_type contradict each other: {sorted(kinds)}")
    kind = kinds.pop()
    if kind not in ("default", "linear", "yarn"):
        raise UserError(f"{where}: rope type is {kind!r}; supported: 'default', 'linear', 'yarn'")
    given = [source for source in (inner, fields) if source.has("rope_theta")]
    thetas = {source.positive("rope_theta") for source in given}
    if len(thetas) > 1:
        raise UserError(f"{where}: rope_theta differs from the one outside it: {sorted(thetas)}")
    theta = thetas.pop() if thetas else theta
    inner.seen |= {"rope_type", "type", "rope_theta"}
    inner.choice("partial_rotary_factor", 1.0, (1.0,))
    rope = RopeConfig(dim, theta, interleaved, kind=kind)
    if kind == "linear":
        rope = RopeConfig(dim, theta, interleaved, kind, factor=inner.positive("factor"))
    elif kind == "yarn":
        rope = _yarn(inner, rope, max_position)
    unknown = sorted(set(inner.values) - inner.seen)
    if unknown:
        raise UserError(f"{where}: not supported for rope type {kind!r}: {', '.join(unknown)}")
    return rope


def _yarn(inner: Fields, rope: RopeConfig, max_position: int) -> RopeConfig:
    """YaRN (arXiv 2309.00071) with DeepSeek's mscale and mscale_all_dim, as transformers does it:
    their ratio scales the rotation where both are given, otherwise the default does."""
    original = inner.integer("original_max_position_embeddings", max_position)
    factor = inner.positive("factor", max_position / original)
    mscale, all_dim = inner.number("mscale", 0.0), inner.number("mscale_all_dim", 0.0)

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    ratio = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
    # only DeepSeek, the family with interleaved pairs, scales its scores too
    softmax = magnitude(all_dim) ** 2 if all_dim and rope.interleaved else 1.0
    return RopeConfig(
        rope.dim,
        rope.theta,
        rope.interleaved,
        kind="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=inner.number("beta_fast", 0.0) or 32.0,
        beta_slow=inner.number("beta_slow", 0.0) or 1.0,
        truncate=inner.boolean("truncate", True),
        attention_factor=inner.number("attention_factor", ratio),
        softmax_factor=softmax,
    )


def _eos_token_ids(fields: Fields, generation: dict[str, Any] | None) -> tuple[int, ...]:
    """generation_config.json's eos_token_id where it has one, else config.json's."""
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
