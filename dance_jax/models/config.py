"""Model definitions as data: frozen dataclasses that a single trunk (trunk.py) interprets.

A family (families/) reads a checkpoint's config.json into a `ModelConfig`; no later code depends
on the family's name.
"""

from __future__ import annotations

import dataclasses
import functools
import math


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: how a position becomes angles."""

    #: Number of rotated floats, the first ones of each head; even.
    dim: int
    #: Base of the geometric series of wavelengths.
    theta: float
    #: True if floats 2i and 2i+1 form a pair (DeepSeek), False if i and i + dim/2 do (all others).
    interleaved: bool = False
    #: "default", "linear", "yarn", "llama3", "longrope" or "proportional".
    kind: str = "default"
    #: Context extension: extended length / trained length.
    factor: float = 1.0
    #: YaRN, llama3, longrope: length of the trained context, in tokens.
    original_max_position: int = 0
    #: YaRN: a wavelength with more rotations than this over the trained context is kept.
    beta_fast: float = 32.0
    #: YaRN: a wavelength with fewer rotations than this is stretched by the full factor.
    beta_slow: float = 1.0
    #: YaRN: round the bounds of the ramp to whole dimensions.
    truncate: bool = True
    #: llama3: a wavelength with fewer rotations than the low factor over the trained context is
    #: stretched by the full factor; one with more rotations than the high factor is kept.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    #: longrope: divisors of the pairs' frequencies for contexts up to the trained length, and for
    #: longer contexts.
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    #: proportional: number of pairs that are rotated, the first ones.
    turning_pairs: int = 0
    #: Multiplies cosine and sine.
    attention_factor: float = 1.0
    #: Multiplies the softmax scale (DeepSeek's mscale_all_dim, squared).
    softmax_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (MLA, arXiv 2405.04434, section 2.1); widths in floats."""

    num_heads: int
    #: Width of the compressed queries; None if queries are projected in one step.
    q_lora_rank: int | None
    #: Width of the compressed keys and values, which are cached.
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: RopeConfig
    #: The projections to the latents and the output projection have biases.
    bias: bool = False

    @property
    def scale(self) -> float:
        """Multiplies the scores."""
        width = self.qk_nope_head_dim + self.qk_rope_head_dim
        return width**-0.5 * self.rope.softmax_factor

    @property
    def cache_width(self) -> int:
        """Floats cached per token."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True)
class GroupedAttention:
    """Grouped-query attention (GQA, arXiv 2305.13245); widths in floats."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    #: Positions a token sees, including its own; None for no limit.
    window: int | None = None
    #: RMS norm of queries and keys before the rotation: "none", "head" (of each head) or "flat"
    #: (of the whole projection).
    qk_norm: str = "none"
    #: The values of each head are divided by their root mean square.
    value_norm: bool = False
    #: Values are the projected keys, before norm and rotation; the layer has no value projection.
    values_are_keys: bool = False
    #: The query, key and value projections have biases; the output projection has a bias.
    qkv_bias: bool = False
    out_bias: bool = False
    #: Queries, keys and values are clamped to [-clip, clip]; None for no limit.
    clip: float | None = None
    #: Each head has an additional score whose value is 0 (gpt-oss).
    sinks: bool = False
    #: The query projection also yields a gate, whose sigmoid multiplies the output.
    gated: bool = False
    #: Multiplies the scores; None for head_dim ** -0.5.
    fixed_scale: float | None = None

    @property
    def scale(self) -> float:
        """Multiplies the scores."""
        return self.head_dim**-0.5 if self.fixed_scale is None else self.fixed_scale

    @property
    def cache_width(self) -> int:
        """Floats cached per token."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class DeltaNet:
    """Gated delta net (arXiv 2412.06464): a recurrent state in place of a KV cache."""

    num_key_heads: int
    #: A multiple of num_key_heads; consecutive value heads share a key head.
    num_value_heads: int
    key_dim: int
    value_dim: int
    #: Width in positions of the causal convolution over queries, keys and values.
    conv_width: int = 4
    #: Floats cached per token: none.
    cache_width: int = 0

    @property
    def channels(self) -> int:
        """Width of queries, keys and values together."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of a sequence's float32 arrays: last inputs of the convolution, and the state."""
        return (
            (self.conv_width - 1, self.channels),
            (self.num_value_heads, self.key_dim, self.value_dim),
        )


Mixer = GroupedAttention | LatentAttention | DeltaNet


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One decoder layer: a mixer of tokens, then a feed-forward."""

    mixer: Mixer
    #: The layer has routed experts.
    routed: bool
    #: Width of the dense feed-forward; 0 if the layer has none.
    dense_width: int = 0


@dataclasses.dataclass(frozen=True)
class Activation:
    """Activation of a gated feed-forward, from the projections gate and up."""

    #: "silu": silu(gate) * up; "gelu": gelu(gate) * up with the tanh approximation; "clamped"
    #: (gpt-oss): g * sigmoid(alpha * g) * (u + 1), g = min(gate, limit), u = clamp(up, limit).
    kind: str = "silu"
    alpha: float = 1.0
    limit: float = float("inf")


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """A routed expert: down(activation(gate(x), up(x)))."""

    width: int
    activation: Activation = Activation()
    #: All three projections have biases.
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class SharedConfig:
    """The shared experts of a layer, combined into one feed-forward."""

    width: int
    #: The output is multiplied by the sigmoid of an additional projection.
    gated: bool = False


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How a token's experts and their weights are chosen.

    Scores are computed from logits. Experts are chosen by score (plus a correction); weights are
    computed from the scores without the correction.
    """

    num_experts: int
    top_k: int
    #: Scores: "softmax" over all experts, "sigmoid", or "logits". With "logits" the weights are a
    #: softmax over the chosen experts.
    score: str = "softmax"
    #: The logits have a bias.
    bias: bool = False
    #: For the choice, a learned correction is added to each expert's score.
    correction: bool = False
    #: Only experts in the best `topk_group` of `num_groups` groups are chosen. Groups are ranked
    #: by the sum of their `group_best` best scores (with correction).
    num_groups: int = 1
    topk_group: int = 1
    group_best: int = 1
    #: Divide the chosen scores by their sum (plus `norm_epsilon`).
    normalise: bool = False
    norm_epsilon: float = 0.0
    #: Multiplies the weights after the normalisation.
    scale: float = 1.0
    #: Gemma: the router's input is the residual, divided by its root mean square and multiplied by
    #: learned scales, and each expert's weight is multiplied by a learned factor.
    scaled: bool = False


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of tensors in a family's checkpoints; the defaults are those of most families.

    Names are relative to a layer, "model.layers.N.".
    """

    router: str = "mlp.gate"
    #: Name of the tensor with the router's correction, without the prefix `router`.
    correction: str = "mlp.gate.e_score_correction_bias"
    experts: str = "mlp.experts"
    #: Gate, up and down projection of an expert.
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "mlp.shared_experts"
    shared_gate: str = "mlp.shared_expert_gate"
    #: How experts are stored. "single": one tensor per expert and projection. "joined": all
    #: experts of a layer in gate_up_proj [e, 2f, d] and down_proj [e, d, f]. "interleaved"
    #: (gpt-oss): [e, d, 2f], with alternating columns of gate and up, and [e, f, d]. A checkpoint
    #: may use either of the first two forms.
    experts_as: str = "single"
    #: The delta net's projections are stored joined, grouped by key heads (qwen3_next).
    joined_delta: bool = False
    #: Alternative spellings: (pattern, replacement) pairs, applied in order to every tensor name.
    spellings: tuple[tuple[str, str], ...] = ()
    #: Patterns of names of tensors that are known but not needed.
    ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a checkpoint's weights are quantised; read by `families.quantization`."""

    #: config.json's quant_method: "fp8", "mxfp4", "gptq", "awq" or "compressed-tensors".
    method: str
    #: Bits per weight.
    bits: int
    #: Number of inputs that share a scale (integers only); 0 if all inputs of an output do.
    group: int = 0
    #: The zero point of integers is the middle code.
    symmetric: bool = True
    #: Numbers of outputs and inputs that share a scale. None if `group` applies or, with fp8, if
    #: there is a scale per output or per tensor.
    block: tuple[int, int] | None = None
    #: With method "gptq": "gptq" or "gptq_v2"; with "compressed-tensors": its format.
    layout: str = ""

    def __str__(self) -> str:
        if self.method == "mxfp4":
            return self.method
        text = f"{self.method} {self.layout}" if "-" in self.layout else self.method
        text += "" if self.method == "fp8" else f", {self.bits} bits"
        if self.block:
            return f"{text}, blocks of {self.block[0]} x {self.block[1]}"
        return f"{text}, groups of {self.group}" if self.group else text


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One model; widths in floats. Created by `families.model_config`."""

    #: config.json's model_type.
    family: str
    hidden_size: int
    vocab_size: int
    #: Longest sequence in tokens.
    max_position: int
    norm_eps: float
    layers: tuple[LayerConfig, ...]
    router: RouterConfig
    expert: ExpertConfig
    #: The output projection is the embedding.
    tie_embeddings: bool
    #: Tokens that end a sequence.
    eos_token_ids: tuple[int, ...]
    #: Token that begins a sequence, if the model has one.
    bos_token_id: int | None = None
    shared: SharedConfig | None = None
    #: Norms multiply by 1 + weight.
    norm_plus_one: bool = False
    #: Layers also have norms after attention and feed-forward, and have experts in addition to a
    #: dense feed-forward (Gemma).
    sandwich: bool = False
    #: Multiplies the embeddings.
    embedding_scale: float = 1.0
    #: Logits become cap * tanh(logits / cap); None if logits are not capped.
    logit_cap: float | None = None
    names: Names = Names()
    #: Type of the checkpoint's floats according to config.json; the files may differ, and decide.
    dtype: str = "float32"
    #: How the checkpoint's weights are quantised according to config.json; None if they are not.
    quantization: Quantization | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @functools.cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Absolute indices of the layers with routed experts, ascending."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.routed)

    @property
    def num_experts(self) -> int:
        """Number of routed experts in each MoE layer."""
        return self.router.num_experts

    @property
    def top_k(self) -> int:
        """Number of routed experts that a token uses in each MoE layer."""
        return self.router.top_k

    @property
    def cache_width(self) -> int:
        """Floats cached per token, over all layers."""
        return sum(layer.mixer.cache_width for layer in self.layers)

    @property
    def trained_contexts(self) -> set[int]:
        """Trained context lengths of longrope, in tokens; empty without longrope.

        Other frequencies apply to longer contexts.
        """
        mixers = {layer.mixer for layer in self.layers}
        ropes = {mixer.rope for mixer in mixers if not isinstance(mixer, DeltaNet)}
        return {rope.original_max_position for rope in ropes if rope.kind == "longrope"}

    @property
    def state_bytes(self) -> int:
        """Bytes of a sequence's recurrent states over all layers; 0 if no layer has any."""
        return 4 * sum(
            math.prod(shape)
            for layer in self.layers
            if isinstance(layer.mixer, DeltaNet)
            for shape in layer.mixer.state_shapes
        )
