"""Reads fields of config.json strictly: a field that may change the result is never ignored."""

from __future__ import annotations

import math
import sys
from typing import Any

from dance_jax.config import UserError

#: Fields that change no logit of inference: bookkeeping, training, sampling defaults (replaced by
#: SamplingParams), labels of other heads, multi-token prediction layers.
HARMLESS = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_moe_implementation",
        "_name_or_path",
        "architectures",
        "_experts_implementation",
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
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "label2id",
        "length_penalty",
        "loss_type",
        "max_length",
        "min_length",
        "model_max_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "mtp_num_hidden_layers",
        "mtp_transformer_layers",
        "mtp_use_dedicated_embeddings",
        "num_beams",
        "num_mtp_layers",
        "num_mtp_modules",
        "num_nextn_predict_layers",
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
        "router_z_loss_coef",
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
        "transformers.js_config",
        "transformers_version",
        "trust_remote_code",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "use_mtp",
    ]
)

#: Fields of some families, with the value that holds for all families that do not read them.
NEUTRAL = {
    "mlp_bias": False,
    "qkv_bias": False,
    "use_sliding_window": False,
}
#: Ends of the names of probabilities with which training leaves something out.
_TRAINING = ("dropout", "_pdrop", "_drop")
#: Largest integer of a field: sizes and token ids go to the device as int32.
MAX_INTEGER = 2**31 - 1
#: Largest number of layers: a config has an entry for each.
MAX_LAYERS = 10_000

_ABSENT = object()


class Fields:
    """A dict of config fields that records which fields were read."""

    def __init__(self, values: Any, where: str):
        if not isinstance(values, dict):
            raise UserError(
                f"{where}: expected an object with fields, found {type(values).__name__}"
            )
        self.values = values
        self.where = where
        self.seen: set[str] = set()

    def has(self, name: str) -> bool:
        """True if the field is present and not null."""
        return self.values.get(name) is not None

    def raw(self, name: str, default: Any = None) -> Any:
        """The field's value without checks. `default` if absent."""
        self.seen.add(name)
        return self.values.get(name, default)

    def number(self, name: str, default: Any = _ABSENT) -> float:
        """A finite number. `default` if absent or null."""
        value = self.raw(name)
        if value is None:
            if default is _ABSENT:
                raise UserError(f"{self.where}: {name} is missing")
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not abs(value) < math.inf
            or abs(value) > sys.float_info.max
        ):
            raise UserError(f"{self.where}: {name} is {value!r}; expected a number")
        return float(value)

    def positive(self, name: str, default: Any = _ABSENT) -> float:
        """A finite number above 0. `default` if absent or null."""
        value = self.number(name, default)
        if value <= 0:
            raise UserError(f"{self.where}: {name} is {value:g}; expected a number above 0")
        return value

    def num_layers(self) -> int:
        """The number of layers."""
        return self.integer("num_hidden_layers", maximum=MAX_LAYERS)

    def integer(
        self,
        name: str,
        default: Any = _ABSENT,
        minimum: int = 1,
        maximum: int = MAX_INTEGER,
    ) -> int:
        """An integer of `minimum` to `maximum`. `default` if absent or null."""
        value = self.raw(name)
        if value is None:
            if default is _ABSENT:
                raise UserError(f"{self.where}: {name} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise UserError(
                f"{self.where}: {name} is {value!r}; expected a whole number >= {minimum}"
            )
        if value > maximum:
            raise UserError(
                f"{self.where}: {name} is larger than {maximum}: download the file again"
            )
        return value

    def boolean(self, name: str, default: bool) -> bool:
        """A boolean. `default` if absent or null."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {name} is {value!r}; expected true or false")
        return value

    def choice(self, name: str, default: Any, supported: tuple[Any, ...]) -> Any:
        """One of the `supported` values. `default` if absent or null."""
        value = self.raw(name)
        value = default if value is None else value
        if value not in supported or isinstance(value, bool) != isinstance(supported[0], bool):
            names = ", ".join(repr(item) for item in supported)
            raise UserError(f"{self.where}: {name} is {value!r}; supported: {names}")
        return value

    def constant(self, name: str, value: Any) -> None:
        """Raises UserError unless the field is `value`, absent or null."""
        self.choice(name, value, (value,))

    def agrees(self, name: str, value: Any) -> None:
        """Like `constant`, for a field that repeats what other fields say."""
        if self.raw(name) not in (None, value):
            raise UserError(
                f"{self.where}: {name} is {self.values[name]!r}, other fields say {value!r}"
            )

    def strings(self, name: str, length: int, supported: tuple[str, ...]) -> list[str] | None:
        """A list of `length` words, all of them `supported`. None if absent or null."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length:
            raise UserError(f"{self.where}: {name}: expected a list of {length} words")
        if unknown := sorted({str(word) for word in value if word not in supported}):
            names = ", ".join(repr(word) for word in supported)
            raise UserError(f"{self.where}: {name} has {unknown[0]!r}; supported: {names}")
        return value

    def ignore(self, *names: str) -> None:
        """Marks fields as read that have no effect on this model, whatever their values."""
        self.seen.update(names)

    def inner(self, name: str) -> Fields:
        """The fields of a nested object."""
        return Fields(self.raw(name), f"{self.where}: {name}")

    def reject(self, name: str, reason: str) -> None:
        """Raises UserError if the field is present and neither null nor empty."""
        if self.raw(name):
            raise UserError(f"{self.where}: {name} is set: {reason}")

    def _neutral(self, name: str) -> bool:
        """Whether a field that was not read says what holds anyway."""
        value = self.values[name]
        if name == "layer_types":
            return isinstance(value, list) and {*map(str, value)} <= {"full_attention"}
        return (
            value in (None, "", [], {})
            or (isinstance(value, int | float) and name.endswith(_TRAINING))
            or (name in NEUTRAL and value == NEUTRAL[name])
        )

    def finish(self) -> None:
        """Raises UserError naming every field that was not read and may change the result."""
        left = set(self.values) - self.seen - HARMLESS
        unknown = sorted(name for name in left if not self._neutral(name))
        if unknown:
            raise UserError(
                f"{self.where}: unknown field{'s' * (len(unknown) > 1)} {', '.join(unknown)}: "
                "may change what the model computes, so the model is refused"
            )
