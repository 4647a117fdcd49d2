"""Helpers for the model tests: tiny configs, a dense stand-in for the expert pool, a runner."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dance_jax.models.attention import Rows
from dance_jax.models.config import DeltaNet
from dance_jax.models.delta import DeltaState
from dance_jax.models.layers import activate
from tests.forward import forward
from tests.tiny_models import DEEPSEEK, MIXTRAL

REFERENCE = pathlib.Path(__file__).parent.parent / "reference"


@pytest.fixture
def deepseek_fields():
    """config.json of a tiny DeepSeek-V2, to be changed freely."""
    return dict(DEEPSEEK)


@pytest.fixture
def mixtral_fields():
    """config.json of a tiny Mixtral, to be changed freely."""
    return dict(MIXTRAL)


def dense_moe(form, pools):
    """Make moe(l, x, expert, weight), which runs every expert on every token.

    Args:
        form: format of the experts.
        pools: for each MoE layer, an array [e, *shape] for each leaf of the format.
    """

    stacks = {
        name: np.stack([np.asarray(w, np.float32) for w in part])
        for name, part in zip(form.leaves, zip(*pools, strict=True), strict=True)
    }

    def moe(layer, x_td, expert_tk, weight_tk):
        leaves = {name: jnp.asarray(stack)[layer] for name, stack in stacks.items()}

        def product(spec, rows, part):
            found = jnp.einsum(spec, rows, leaves[f"w_{part}.values"])
            return found + leaves[f"b_{part}"][:, None] if form.bias else found

        x_td = x_td.astype(jnp.float32)
        gate, up = (product("td,edf->etf", x_td, part) for part in ("gate", "up"))
        inner = activate(form.activation, gate, up)
        outputs = jnp.moveaxis(product("etf,efd->etd", inner, "down"), 0, 1)
        weight_te = jnp.zeros(outputs.shape[:2]).at[jnp.arange(len(x_td))[:, None], expert_tk]
        return jnp.einsum("te,ted->td", weight_te.add(weight_tk), outputs)

    return moe


#: Positions in a block of the runner's cache; chunks may begin and end anywhere.
BLOCK = 8


class Runner:
    """A minimal engine: a model with a cache in blocks of random order."""

    def __init__(self, model, moe, rows=1, length=256, context=256):
        graph, state = nnx.split(model)
        config, dtype = model.config, model.dtype

        @jax.jit
        def step(state, tokens, batch, cached):
            model = nnx.merge(graph, state)
            hidden, cached = forward(model, tokens.reshape(-1), batch, cached, moe, context)
            return model.logits(hidden).reshape(*tokens.shape, -1), cached

        self.step, self.state = step, state
        pages = -(-length // BLOCK)
        self.table = np.random.default_rng(0).permutation(rows * pages).reshape(rows, pages)
        # Arbitrary old content, which a new sequence must not read.
        self.cached = [
            DeltaState(
                *(np.full((1 + rows, *shape), 7, np.float32) for shape in layer.mixer.state_shapes)
            )
            if isinstance(layer.mixer, DeltaNet)
            else np.full((rows * pages, BLOCK, layer.mixer.cache_width), 7, dtype)
            for layer in config.layers
        ]

    def __call__(self, tokens_rc, start_r):
        """Run a chunk and keep its cache entries; returns logits [r, c, v]."""
        tokens = np.asarray(tokens_rc, np.int32)
        chunk = tokens.shape[1]
        # Each row is a different sequence, and an element of the batch of its own.
        batch = [
            Rows(
                np.array([first], np.int32),
                np.array([chunk], np.int32),
                np.zeros(1, np.int32),
                self.table[row : row + 1].astype(np.int32),
                np.full((1, 2), 1 + row, np.int32),
                chunk,
            )
            for row, first in enumerate(start_r)
        ]
        logits, self.cached = self.step(self.state, tokens, batch, self.cached)
        return np.asarray(logits)


@pytest.fixture
def make_runner():
    """Runner(model, moe, rows, length, context), with `make_runner.dense_moe` for the experts."""

    def make(*arguments, **more):
        return Runner(*arguments, **more)

    make.dense_moe = dense_moe
    return make


@pytest.fixture(scope="session")
def converted_references(tmp_path_factory):
    """open(name) -> Checkpoint of a reference model, converted once per session."""
    from dance_jax.models.checkpoint import Checkpoint
    from dance_jax.models.convert import convert

    cache = tmp_path_factory.mktemp("references")
    return lambda name: Checkpoint.open(convert(REFERENCE / name, cache / name))
