"""What a model is, as data: frozen parts that one trunk (trunk.py) interprets.

A family (families/) reads a checkpoint's config.json into a `ModelConfig`; nothing behind it asks
for the family's name.
"""

from __future__ import annotations

import dataclasses
import functools
import math


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: how a position becomes angles."""

    #: Rotated floats of each head, the first ones (even).
    dim: int
    #: Base of the geometric series of wavelengths.
    theta: float
    #: True: floats 2i and 2i+1 form a pair (DeepSeek); False: i and i + dim/2 (all others).
    interleaved: bool = False
    #: "default", "linear", "yarn", "llama3", "longrope" or "proportional".
    kind: str = "default"
    #: Context extension: extended length / trained length.
    factor: float = 1.0
    #: YaRN, llama3, longrope: tokens of the trained context.
    original_max_position: int = 0
    #: YaRN: rotations over the trained context above which a wavelength is kept as trained.
    beta_fast: float = 32.0
    #: YaRN: rotations below which a wavelength is stretched by the whole factor.
    beta_slow: float = 1.0
    #: YaRN: round the borders of the ramp to whole dimensions.
    truncate: bool = True
    #: llama3: rotations over the trained context below and above which a wavelength is stretched
    #: wholly and not at all.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    #: longrope: divisor of each pair's frequency within the trained context, and beyond it.
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    #: proportional: pairs that turn, the first ones; the others stand still.
    turning_pairs: int = 0
    #: Multiplies cosine and sine.
    attention_factor: float = 1.0
    #: Multiplies the softmax scale (DeepSeek's mscale_all_dim, squared).
    softmax_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (MLA, arXiv 2405.04434, section 2.1); widths in floats."""

    num_heads: int
    #: Width of the compressed queries; None: queries are projected in one step.
    q_lora_rank: int | None
    #: Width of the compressed keys and values, the part of a token that is cached.
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: RopeConfig
    #: The projections down to the latents and the one out of the heads add biases.
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
    #: Positions a token sees, itself included; None: all before it.
    window: int | None = None
    #: RMS norm of queries and keys before the rotation: "none", of each head ("head") or of the
    #: whole projection ("flat").
    qk_norm: str = "none"
    #: Values are divided by their root mean square, head by head.
    value_norm: bool = False
    #: Values are the projected keys, before norm and rotation; the layer has no value projection.
    values_are_keys: bool = False
    #: Biases of the projections of queries, keys and values, and of the output.
    qkv_bias: bool = False
    out_bias: bool = False
    #: Limit that queries, keys and values are clamped to, plus and minus; None: no limit.
    clip: float | None = None
    #: Each head has one more score with value 0 (gpt-oss).
    sinks: bool = False
    #: The query projection yields a gate as well, whose sigmoid multiplies the output.
    gated: bool = False
    #: Multiplies the scores; None: head_dim ** -0.5.
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
    """Gated delta net (arXiv 2412.06464): a recurrent state instead of cached positions."""

    num_key_heads: int
    #: A multiple of num_key_heads; consecutive value heads share a key head.
    num_value_heads: int
    key_dim: int
    value_dim: int
    #: Positions of the causal convolution over queries, keys and values.
    conv_width: int = 4
    #: Nothing of a token is cached.
    cache_width: int = 0

    @property
    def channels(self) -> int:
        """Width of queries, keys and values together."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """float32 arrays kept for each sequence: inputs of the convolution, and the state."""
        return (
            (self.conv_width - 1, self.channels),
            (self.num_value_heads, self.key_dim, self.value_dim),
        )


Mixer = GroupedAttention | LatentAttention | DeltaNet


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One decoder layer: what mixes tokens, then what each token passes on its own."""

    mixer: Mixer
    #: It has routed experts.
    routed: bool
    #: Width of its feed-forward without experts; 0: it has none.
    dense_width: int = 0


@dataclasses.dataclass(frozen=True)
class Activation:
    """What an expert computes between its projections, from gate and up."""

    #: "silu": silu(gate) * up; "gelu": tanh's approximation of gelu(gate) * up; "clamped"
    #: (gpt-oss): g * sigmoid(alpha * g) * (u + 1), g = min(gate, limit), u = clamp(up, limit).
    kind: str = "silu"
    alpha: float = 1.0
    limit: float = float("inf")


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """A routed expert: down(activation(gate(x), up(x)))."""

    width: int
    activation: Activation = Activation()
    #: All three projections add biases.
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class SharedConfig:
    """The shared experts of a layer, all in one."""

    width: int
    #: A sigmoid of one more projection multiplies their output.
    gated: bool = False


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How a token chooses its experts, and their weights.

    Scores come from logits; the choice is by scores (plus a correction), the weights are of the
    scores without it.
    """

    num_experts: int
    top_k: int
    #: Scores: "softmax" over all experts, "sigmoid", or "logits" as they are, whose weights are a
    #: softmax over the chosen ones.
    score: str = "softmax"
    #: The logits have a bias.
    bias: bool = False
    #: The choice adds a learned number to each expert's score.
    correction: bool = False
    #: Only experts of the best `topk_group` of `num_groups` groups are chosen. A group counts by
    #: the sum of its best `group_best` choices.
    num_groups: int = 1
    topk_group: int = 1
    group_best: int = 1
    #: Divide the chosen scores by their sum (plus `norm_epsilon`).
    normalise: bool = False
    norm_epsilon: float = 0.0
    #: Multiplies the weights after that.
    scale: float = 1.0
    #: Gemma: the router sees the residual, divided by its root mean square and times learned
    #: scales, and each expert's weight has a learned factor.
    scaled: bool = False


@dataclasses.dataclass(frozen=True)
class Names:
    """Where a family's checkpoints keep tensors; the defaults are what most families use.

    Names are relative to a layer, "model.layers.N.".
    """

    router: str = "mlp.gate"
    #: The router's correction, a tensor of its own name.
    correction: str = "mlp.gate.e_score_correction_bias"
    experts: str = "mlp.experts"
    #: Gate, up and down of an expert.
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "mlp.shared_experts"
    shared_gate: str = "mlp.shared_expert_gate"
    #: How experts are published. "single": one by one. "joined": all of a layer in gate_up_proj
    #: [e, 2f, d] and down_proj [e, d, f]. "interleaved" (gpt-oss): [e, d, 2f], columns of gate
    #: and up taking turns, and [e, f, d]. A checkpoint may use either of the first two forms.
    experts_as: str = "single"
    #: The delta net's projections are joined, grouped by key heads (qwen3_next).
    joined_delta: bool = False
    #: Other spellings of names: (pattern, replacement), applied to every tensor in turn.
    spellings: tuple[tuple[str, str], ...] = ()
    #: Patterns of tensors that are known and not needed.
    ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a checkpoint's weights are quantised. Made by `families.quantization`."""

    #: config.json's quant_method: "fp8", "mxfp4", "gptq", "awq" or "compressed-tensors".
    method: str
    #: Bits of a weight's code.
    bits: int
    #: Inputs that share a scale, integers only; 0: all inputs of an output do.
    group: int = 0
    #: Integers have no zero points but the middle code.
    symmetric: bool = True
    #: Outputs and inputs that share a scale; None: `group`, or for fp8 an output or the tensor.
    block: tuple[int, int] | None = None
    #: "gptq" or "gptq_v2" of that method; the format of compressed-tensors.
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
    """One model; widths in floats. Made by `families.model_config`."""

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
    #: Layers have norms behind attention and feed-forward too, and experts beside a dense
    #: feed-forward (Gemma).
    sandwich: bool = False
    #: Multiplies the embeddings.
    embedding_scale: float = 1.0
    #: Logits become cap * tanh(logits / cap); None: logits are not capped.
    logit_cap: float | None = None
    names: Names = Names()
    #: Type of the checkpoint's floats by config.json, which need not be so: the files decide.
    dtype: str = "float32"
    #: How the checkpoint's weights are quantised, by config.json; None: they are not.
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
        """Routed experts of each MoE layer."""
        return self.router.num_experts

    @property
    def top_k(self) -> int:
        """Routed experts each token uses in each MoE layer."""
        return self.router.top_k

    @property
    def cache_width(self) -> int:
        """Floats cached per token, over all layers."""
        return sum(layer.mixer.cache_width for layer in self.layers)

    @property
    def trained_contexts(self) -> set[int]:
        """Tokens above which longrope's other frequencies hold; empty without longrope."""
        mixers = {layer.mixer for layer in self.layers}
        ropes = {mixer.rope for mixer in mixers if not isinstance(mixer, DeltaNet)}
        return {rope.original_max_position for rope in ropes if rope.kind == "longrope"}

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrent states of one sequence, over all layers; 0: there are none."""
        return 4 * sum(
            math.prod(shape)
            for layer in self.layers
            if isinstance(layer.mixer, DeltaNet)
            for shape in layer.mixer.state_shapes
        )
