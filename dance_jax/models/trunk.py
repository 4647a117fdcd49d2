"""The trunk: everything of a model but its routed experts, as its `ModelConfig` says."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dance_jax.models.attention import Angles, GroupedAttentionLayer, LatentAttentionLayer, Rows
from dance_jax.models.config import DeltaNet, GroupedAttention, LatentAttention, Mixer, ModelConfig
from dance_jax.models.delta import DeltaNetLayer, State
from dance_jax.models.layers import GatedMLP, Linear, RMSNorm, Weight, parameter
from dance_jax.models.rope import rotation
from dance_jax.models.router import Routed, Router

#: moe(l, x_td, expert_tk, weight_tk) -> (float32 [t, d], record): the routed experts' weighted sum
#: in MoE layer l, a traced int32 0..len(moe_layers) - 1, and any pytree to stack over the layers.
#: Supplied by whoever holds the experts.
MoE = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]

_MIXERS: dict[type[Mixer], Callable[..., nnx.Module]] = {
    GroupedAttention: GroupedAttentionLayer,
    LatentAttention: LatentAttentionLayer,
    DeltaNet: DeltaNetLayer,
}


class SharedExperts(nnx.Module):
    """The experts that every token of a layer uses, all in one; float32 [t, d]."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        assert config.shared is not None
        d = config.hidden_size
        self.mlp = GatedMLP(d, config.shared.width, dtype, config.expert.activation)
        self.gate = Linear(d, 1, dtype) if config.shared.gated else None

    def __call__(self, x_td: jax.Array) -> jax.Array:
        output = self.mlp(x_td)
        if self.gate is None:
            return output
        return output * jax.nn.sigmoid(self.gate(x_td).astype(jnp.float32))


class Layer(nnx.Module):
    """One decoder layer: a mixer, then a dense feed-forward, or shared and routed experts.

    Calling it computes all up to the routed experts; `finish` adds their sums.
    """

    def __init__(self, config: ModelConfig, index: int, dtype: jnp.dtype):
        layer = config.layers[index]
        norm = functools.partial(
            RMSNorm, config.hidden_size, config.norm_eps, dtype, config.norm_plus_one
        )
        self.routed = layer.routed
        self.attention_norm = norm()
        self.mixer = _MIXERS[type(layer.mixer)](config, layer.mixer, dtype)
        self.mlp_norm = norm()
        if layer.dense_width:
            self.mlp = GatedMLP(
                config.hidden_size, layer.dense_width, dtype, config.expert.activation
            )
        if layer.routed:
            self.router = Router(config.router, config.hidden_size, config.norm_eps)
            self.shared = SharedExperts(config, dtype) if config.shared else None

    def __call__(
        self, hidden_td: jax.Array, angles: Angles, batch: Sequence[Rows], cached: Any
    ) -> tuple[Any, Routed | None, Any]:
        """Runs the tokens of a step.

        Returns:
            what `finish` needs, float32; or in a layer without routed experts the layer's output
            [t, d];
            what goes to the routed experts, or None;
            what is to be cached: the tokens' entries [t, w], or the rows' states.
        """
        mixed, fresh = self.mixer(self.attention_norm(hidden_td), angles, batch, cached)
        hidden_td = hidden_td + mixed
        x_td = self.mlp_norm(hidden_td)
        residual_td = hidden_td.astype(jnp.float32)
        if not self.routed:
            return (residual_td + self.mlp(x_td)).astype(hidden_td.dtype), None, fresh
        routed = Routed(x_td, *self.router(x_td))
        if self.shared is not None:
            residual_td += self.shared(x_td)
        return residual_td, routed, fresh

    @staticmethod
    def finish(kept: jax.Array, sums_td: jax.Array) -> jax.Array:
        """The layer's output, float32 [t, d], from what calling it left and the experts' sums."""
        return kept + sums_td


class SandwichLayer(nnx.Module):
    """Gemma 4's layer: norms before and behind each part, experts beside a dense feed-forward.

    The experts' sums are normed, so nothing can be added before they are complete.
    """

    def __init__(self, config: ModelConfig, index: int, dtype: jnp.dtype):
        layer, d = config.layers[index], config.hidden_size
        norm = functools.partial(RMSNorm, d, config.norm_eps, dtype, config.norm_plus_one)
        self.attention_norm = norm()
        self.mixer = _MIXERS[type(layer.mixer)](config, layer.mixer, dtype)
        self.mixed_norm = norm()
        self.mlp_norm = norm()
        self.mlp = GatedMLP(d, layer.dense_width, dtype, config.expert.activation)
        self.mlp_out_norm = norm()
        self.router = Router(config.router, d, config.norm_eps)
        self.expert_norm = norm()
        self.expert_out_norm = norm()
        self.out_norm = norm()
        self.scale = parameter((1,), jnp.dtype("float32"))

    def __call__(
        self, hidden_td: jax.Array, angles: Angles, batch: Sequence[Rows], cached: Any
    ) -> tuple[Any, Routed | None, Any]:
        """See `Layer.__call__`."""
        mixed, fresh = self.mixer(self.attention_norm(hidden_td), angles, batch, cached)
        hidden_td = hidden_td + self.mixed_norm(mixed)
        dense_td = self.mlp_out_norm(self.mlp(self.mlp_norm(hidden_td)))
        routed = Routed(self.expert_norm(hidden_td), *self.router(hidden_td))
        return (hidden_td.astype(jnp.float32), dense_td), routed, fresh

    def finish(self, kept: tuple[jax.Array, jax.Array], sums_td: jax.Array) -> jax.Array:
        """See `Layer.finish`."""
        residual_td, dense_td = kept
        behind = self.out_norm(dense_td + self.expert_out_norm(sums_td))
        return (residual_td + behind.astype(jnp.float32)) * self.scale[...]


class Trunk(nnx.Module):
    """Everything but the routed experts: embedding, layers, final norm, output projection."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        layer = SandwichLayer if config.sandwich else Layer
        self.config, self.dtype = config, dtype
        self.embedding = Weight(config.hidden_size, config.vocab_size, dtype)
        self.layers = nnx.List([layer(config, index, dtype) for index in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype, config.norm_plus_one)
        if not config.tie_embeddings:
            self.head = Weight(config.hidden_size, config.vocab_size, dtype)

    def __call__(
        self,
        tokens_t: jax.Array,
        positions_t: jax.Array,
        batch: Sequence[Rows],
        cached: Sequence[Any],
        moe: MoE,
        context: int,
    ) -> tuple[jax.Array, tuple[Any, ...], Any]:
        """Runs the tokens of a step.

        The MoE layers are one loop: experts and exchange are compiled once, and each turn branches
        to its layer's own weights (stacked ones would be copied in every turn). A turn begins with
        the layers without experts that lie before its MoE layer.

        Args:
            tokens_t: int32 [t]; positions_t: int32 [t], where they stand.
            batch: the rows they are.
            cached: per layer [blocks, positions, cache_width], or `delta.State`. It is read, never
                written.
            moe: the routed experts.
            context: longest sequence served, in tokens.

        Returns:
            hidden [t, hidden_size] after the final norm; per layer what the caller is to cache,
            the tokens' entries [t, cache_width] or the rows' states; the records of `moe`, stacked
            over the MoE layers.
        """
        hidden = self.embedding.columns(tokens_t).astype(self.dtype)
        if self.config.embedding_scale != 1.0:
            hidden = (hidden * np.float32(self.config.embedding_scale)).astype(hidden.dtype)
        angles = self._angles(positions_t, context)

        def run(index: int, hidden: jax.Array) -> tuple[Any, Routed | None, Any]:
            with jax.named_scope("layer"):
                return self.layers[index](hidden, angles, batch, cached[index])

        moe_layers = self.config.moe_layers
        fresh: dict[int, Any] = {}
        for index in range(moe_layers[0]):
            hidden, _, fresh[index] = run(index, hidden)
        turns = [range(moe_layers[0], moe_layers[0] + 1)]
        turns += [range(a + 1, b + 1) for a, b in itertools.pairwise(moe_layers)]
        rows = sum(each.count for each in batch)
        entries = _Entries(
            turns,
            [entry_like(layer.mixer, rows, hidden) for layer in self.config.layers],
        )

        def up_to_experts(turn: range, hidden: jax.Array) -> tuple[Any, Routed, list[Any]]:
            made: dict[int, Any] = {}
            for index in turn[:-1]:
                hidden, _, made[index] = run(index, hidden)
            kept, routed, made[turn[-1]] = run(turn[-1], hidden)
            assert routed is not None
            return kept, routed, entries.pad(made)

        branches = [functools.partial(up_to_experts, turn) for turn in turns]
        finishes = [self.layers[index].finish for index in moe_layers]

        def moe_layer(carry: tuple[jax.Array, list[Any]], layer: jax.Array):
            hidden, stacks = carry
            kept, routed, made = jax.lax.switch(layer, branches, hidden)
            sums, record = moe(layer, *routed)
            if self.config.sandwich:
                hidden = jax.lax.switch(layer, finishes, kept, sums).astype(hidden.dtype)
            else:
                hidden = Layer.finish(kept, sums).astype(hidden.dtype)
            return (hidden, entries.put(stacks, made, layer)), record

        (hidden, stacks), records = jax.lax.scan(
            moe_layer, (hidden, entries.empty()), jnp.arange(len(turns), dtype=jnp.int32)
        )
        fresh |= entries.take(stacks)
        for index in range(moe_layers[-1] + 1, self.config.num_layers):
            hidden, _, fresh[index] = run(index, hidden)
        ordered = tuple(fresh[index] for index in range(self.config.num_layers))
        return self.norm(hidden), ordered, records

    def _angles(self, positions_t: jax.Array, context: int) -> Angles:
        mixers = {layer.mixer for layer in self.config.layers}
        ropes = {mixer.rope for mixer in mixers if not isinstance(mixer, DeltaNet)}
        return {rope: rotation(rope, positions_t, context) for rope in ropes}

    @jax.named_scope("logits")
    def logits(self, hidden_nd: jax.Array) -> jax.Array:
        """Scores of every token of the vocabulary, float32 [n, vocab_size]."""
        weight = self.embedding if self.config.tie_embeddings else self.head
        logits = weight(hidden_nd)
        cap = self.config.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def entry_like(mixer: Mixer, rows: int, hidden_td: jax.Array) -> Any:
    """Shapes of what a layer wants cached of a step of so many rows."""
    if isinstance(mixer, DeltaNet):
        shapes = [(rows, *shape) for shape in mixer.state_shapes]
        return State(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    return jax.ShapeDtypeStruct((len(hidden_td), mixer.cache_width), hidden_td.dtype)


class _Entries:
    """Collects the cache entries of a loop's layers, whose shapes may differ from layer to layer.

    Entries of equal shape form one stack. All turns of a loop must return the same arrays, so a
    turn with fewer entries of a shape than others adds zeros, which go to a spare last place of the
    stack.

    Args:
        turns: the layers of each turn.
        likes: of each layer of the model, the shapes of its entry; equal ones are stacked.
    """

    def __init__(self, turns: Sequence[range], likes: Sequence[Any]):
        layers = [index for turn in turns for index in turn]
        self._kinds = _distinct([likes[index] for index in layers])
        self._kind_of = {index: self._kinds.index(likes[index]) for index in layers}
        #: Of each kind, its layers in order.
        self._layers = [
            [index for index in layers if self._kind_of[index] == kind]
            for kind in range(len(self._kinds))
        ]
        #: Of each kind, int32 [turns, entries of a turn]: places in the stack.
        self._places = [self._place(turns, kind) for kind in range(len(self._kinds))]

    def _place(self, turns: Sequence[range], kind: int) -> np.ndarray:
        layers = self._layers[kind]
        own = [[layers.index(index) for index in turn if index in layers] for turn in turns]
        places = np.full((len(turns), max(map(len, own))), len(layers), np.int32)
        for row, found in zip(places, own, strict=True):
            row[: len(found)] = found
        return places

    def empty(self) -> list[Any]:
        """A stack of each kind."""
        return [
            _zeros(kind, places.max() + 1)
            for kind, places in zip(self._kinds, self._places, strict=True)
        ]

    def pad(self, made: dict[int, Any]) -> list[list[Any]]:
        """Of each kind, the entries of a turn's layers, with zeros where others have more."""
        padded = []
        for number, (kind, places) in enumerate(zip(self._kinds, self._places, strict=True)):
            found = [entry for index, entry in made.items() if self._kind_of[index] == number]
            padded.append(found + [_zeros(kind)] * (places.shape[1] - len(found)))
        return padded

    def put(self, stacks: list[Any], made: list[list[Any]], turn: jax.Array) -> list[Any]:
        """The stacks with a turn's entries."""
        updated = []
        for stack, entries, places in zip(stacks, made, self._places, strict=True):
            for number, entry in enumerate(entries):
                place = _at(places[:, number], turn)
                put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=place, axis=0)
                stack = jax.tree.map(put, stack, entry)
            updated.append(stack)
        return updated

    def take(self, stacks: list[Any]) -> dict[int, Any]:
        """Each layer's entry."""
        return {
            index: jax.tree.map(operator.itemgetter(place), stack)
            for stack, layers in zip(stacks, self._layers, strict=True)
            for place, index in enumerate(layers)
        }


def _at(places: np.ndarray, turn: jax.Array) -> jax.Array:
    """places[turn], without a look-up where they ascend one by one, as in most models."""
    if (places == places[0] + np.arange(len(places))).all():
        return turn + places[0]
    return jnp.asarray(places)[turn]


def _distinct(items: Sequence[Any]) -> list[Any]:
    return [item for number, item in enumerate(items) if item not in items[:number]]


def _zeros(like: Any, *leading: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros((*leading, *leaf.shape), leaf.dtype), like)
