"""What a model is: frozen descriptions read from a checkpoint's config.json (see hf_config)."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: how a position becomes angles."""

    #: Rotated floats of each head (even).
    dim: int
    #: Base of the geometric series of wavelengths.
    theta: float
    #: True: floats 2i and 2i+1 form a pair (DeepSeek); False: i and i + dim/2 (Mixtral).
    interleaved: bool
    #: "default", "linear" or "yarn".
    kind: str = "default"
    #: Context extension: extended length / trained length.
    factor: float = 1.0
    #: YaRN: tokens of the trained context.
    original_max_position: int = 0
    #: YaRN: rotations over the trained context above which a wavelength is kept as trained.
    beta_fast: float = 32.0
    #: YaRN: rotations below which a wavelength is stretched by the whole factor.
    beta_slow: float = 1.0
    #: YaRN: round the borders of the ramp to whole dimensions.
    truncate: bool = True
    #: Multiplies cosine and sine.
    attention_factor: float = 1.0
    #: Multiplies the softmax scale (DeepSeek's mscale_all_dim, squared).
    softmax_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (MLA, DeepSeek-V2); widths in floats."""

    num_heads: int
    #: Width of the compressed queries; None: queries are projected in one step.
    q_lora_rank: int | None
    #: Width of the compressed keys and values, the part of a token that is cached.
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclasses.dataclass(frozen=True)
class GroupedAttention:
    """Grouped-query attention (GQA, Mixtral); widths in floats."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    #: Positions a token sees, itself included; None: all before it.
    sliding_window: int | None


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How a token chooses its experts; scores are a softmax over all experts."""

    num_experts: int
    top_k: int
    #: "greedy", or "group_limited_greedy": experts only from the best `topk_group` groups.
    method: str = "greedy"
    num_groups: int = 1
    topk_group: int = 1
    #: Divide the chosen scores by their sum (plus `norm_epsilon`).
    normalise: bool = False
    norm_epsilon: float = 0.0
    #: Multiplies the weights after that.
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One model; widths in floats. Made by `ModelConfig.from_hf`."""

    #: Key of dance_jax.models.FAMILIES.
    family: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    #: Longest sequence in tokens.
    max_position: int
    norm_eps: float
    #: Width of the feed-forward layers without experts; 0 where there are none.
    dense_width: int
    #: Width of one routed expert.
    expert_width: int
    #: Width of all shared experts of a layer together; 0: none.
    shared_width: int
    #: Absolute indices of the layers with experts, ascending.
    moe_layers: tuple[int, ...]
    attention: LatentAttention | GroupedAttention
    rope: RopeConfig
    router: RouterConfig
    #: The output projection is the embedding.
    tie_embeddings: bool
    #: Tokens that end a sequence.
    eos_token_ids: tuple[int, ...]
    #: Token that begins a sequence, if the model has one.
    bos_token_id: int | None = None

    @property
    def num_experts(self) -> int:
        """Routed experts of each MoE layer."""
        return self.router.num_experts

    @property
    def top_k(self) -> int:
        """Routed experts each token uses in each MoE layer."""
        return self.router.top_k

    @property
    def cache_width(self) -> int:
        """Floats cached per token and layer."""
        if isinstance(self.attention, LatentAttention):
            return self.attention.kv_lora_rank + self.attention.qk_rope_head_dim
        return 2 * self.attention.num_kv_heads * self.attention.head_dim

    @staticmethod
    def from_hf(
        fields: dict[str, Any],
        generation: dict[str, Any] | None = None,
        where: str = "config.json",
    ) -> ModelConfig:
        """Reads the content of config.json and, where there is one, generation_config.json.

        Args:
            fields: config.json as a dict, in transformers' older spelling or in that of version 5.
            generation: generation_config.json as a dict; its eos_token_id goes first.
            where: the file's name for messages.

        Raises:
            UserError: a field is missing, contradicts another, or would change the result and is
                not supported; the message names it.
        """
        from dance_jax.models.hf_config import model_config

        return model_config(fields, generation, where)
