"""Small models in the shape of large ones, with random weights, made for a run."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

from dance_jax.models.directory import demo_dir
from dance_jax.models.random_weights import write_random_checkpoint

#: Memory of all servers, in copies of all experts: as in the paper for DeepSeek-V2-Lite.
MEMORY = 1.32
#: Files of the demo model's tokenizer, and fields of its config.json about tokens and context.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_TOKENS = ("vocab_size", "bos_token_id", "eos_token_id", "max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a model.

    Attributes:
        fields: of config.json, except those that depend on the demo model's tokenizer.
        memory: of all servers, in copies of all experts.
    """

    fields: dict[str, Any]
    memory: float

    def write(self, directory: pathlib.Path) -> pathlib.Path:
        """Writes a checkpoint with the demo model's tokenizer and always the same weights.

        Args:
            directory: is created.

        Returns:
            The directory.

        Raises:
            UserError: this installation lacks the demo model.
        """
        demo = demo_dir()
        config = json.loads((demo / "config.json").read_text(encoding="utf-8"))
        fields = self.fields | {name: config[name] for name in _TOKENS}
        write_random_checkpoint(directory, fields, dtype="bfloat16", tokenizer=False)
        for name in _TOKENIZER:
            shutil.copyfile(demo / name, directory / name)
        return directory


#: Shapes by name on the command line. `mixtral` is Mixtral-8x7B at the demo model's width and with
#: a fourth of the layers; numbers of experts, and the ratios of widths and of heads, are Mixtral's.
SHAPES = {
    "mixtral": Shape(
        {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_size": 128,
            "intermediate_size": 448,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        memory=1.11,
    )
}
