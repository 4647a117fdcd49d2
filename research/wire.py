"""Measure how the wire type affects a model: bits per byte, and greedy tokens.

    python research/wire.py                    # the demo model, held-out texts of examples/tasks
    python research/wire.py --model DIR --texts A.jsonl B.jsonl

Each file has the prompts of one server's users. Each server holds a third of the experts, placed by
the activation counts of these texts (policy `dance`). The texts run like prompts. Rows for the
server's own experts and for those of other servers are rounded as between servers
(`models.lock_step_messages`). Results are compared with float32, which rounds nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import sys
import tempfile

# A script's import path has only its own folder; add the repository root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.table import Table

from dance_jax.bench.terminal import exit_code, terminal
from dance_jax.config import EngineConfig
from dance_jax.launch.planning.costs import exchanged_bytes
from dance_jax.models import native
from dance_jax.models.attention import Rows
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import ensure_converted
from dance_jax.models.directory import demo_dir
from dance_jax.models.kernels_cpu import NativePool
from dance_jax.models.lock_step_messages import decode, encode, rounded
from dance_jax.models.router import Routed
from dance_jax.models.tokenizer import Tokenizer
from dance_jax.models.trunk import rope_of
from dance_jax.placement.policies import place

TEXTS = sorted((pathlib.Path(__file__).parents[1] / "examples/tasks").glob("*.heldout.jsonl"))
WIRES = ("float32", "bfloat16", "int8")
#: Tokens of one forward pass; share of the model's experts that a server holds.
WINDOW, SHARE = 512, 1 / 3


@dataclasses.dataclass(frozen=True)
class Passed:
    """Results for all tokens of a text except the first of each window."""

    #: Total bits of the tokens.
    bits: float
    #: int [tokens], the most likely token at each position.
    greedy: np.ndarray
    #: int [layers, experts], how often each expert was chosen; the first tokens are included.
    counts: np.ndarray


class Model:
    """A checkpoint's model with all experts in one pool, run one window at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = config = checkpoint.config
        self._form = form = checkpoint.form("float32")
        pairs = [*itertools.product(range(len(config.moe_layers)), range(config.num_experts))]
        read = checkpoint.experts(pairs, form)
        if native.usable():
            forms = (form.gate, form.up, form.down)
            # Kept as an attribute, so that the pool lives as long as the model.
            self._native = NativePool(form.d, form.f, form.activation, forms, form.bias, len(pairs))
            for slot, weights in read:
                self._native.put(slot, slot, weights)
            self._pool = jnp.int32(self._native.number)
        else:
            self._pool = tuple(map(jnp.asarray, form.stacked(len(pairs), read)))
        self._graph, self._state = nnx.split(checkpoint.trunk("float32"))
        self._run = jax.jit(self._window, static_argnums=4)

    def _window(self, state, pool, tokens_t, here_le, wire):
        """Return the nats of tokens 1.., the most likely tokens there, and the chosen experts."""
        trunk, config, dtype = nnx.merge(self._graph, state), self.config, jnp.dtype(wire)
        window = Rows.whole(WINDOW)
        hidden, rotations = trunk.embed(tokens_t, window.positions_t, WINDOW)
        choices = []
        for index, layer in enumerate(trunk.layers):

            def moe(routed: Routed, number: int = len(choices)):
                first, here_tk = number * config.num_experts, here_le[number][routed.expert]
                own_td = rounded(routed.x, dtype)
                away_td = decode(encode(own_td, dtype), jnp.dtype(jnp.float32))
                sums_td = jnp.zeros((WINDOW, config.hidden_size), jnp.float32)
                for x_td, wanted_tk in ((own_td, here_tk), (away_td, ~here_tk)):
                    slot_tk = jnp.where(wanted_tk, first + routed.expert, -1)
                    layers = len(config.moe_layers)
                    sums_td += self._form.ffn(pool, x_td, slot_tk, routed.weight, layers)
                return sums_td, routed.expert

            rope = rope_of(config, index)
            cache = jnp.zeros((1, WINDOW, config.layers[index].mixer.cache_width))
            rotation = None if rope is None else rotations[rope]
            hidden, _, chosen = layer(hidden, rotation, [window], cache, moe)
            choices += [] if chosen is None else [chosen]
        logits_tv = trunk.logits(hidden[:-1])
        right_t = jnp.take_along_axis(logits_tv, tokens_t[1:, None], 1)[:, 0]
        nats_t = jax.nn.logsumexp(logits_tv, 1) - right_t
        return nats_t, logits_tv.argmax(1), jnp.stack(choices)

    def read(self, ids: list[int], here_le: np.ndarray, wire: str) -> Passed:
        """Run a text as on a server that holds the experts `here_le`, bool [layers, experts]."""
        bits, greedy, counts = 0.0, [], np.zeros(here_le.shape, np.int64)
        for begin in range(0, len(ids), WINDOW):
            part = ids[begin : begin + WINDOW]
            tokens = np.zeros(WINDOW, np.int32)
            tokens[: len(part)] = part
            found = self._run(self._state, self._pool, tokens, here_le, wire)
            nats, best, choices = map(np.asarray, found)
            bits += float(nats[: len(part) - 1].sum(dtype=np.float64)) / math.log(2)
            greedy.append(best[: len(part) - 1])
            for counts_e, chosen in zip(counts, choices[:, : len(part)], strict=True):
                counts_e += np.bincount(chosen.ravel(), minlength=len(counts_e))
        return Passed(bits, np.concatenate(greedy), counts)


def text_of(path: pathlib.Path) -> str:
    """Return all prompts of a file, joined."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n\n".join(json.loads(line)["prompt"] for line in lines)


def measure(model: Model, tokenizer: Tokenizer, texts: list[str]) -> Table:
    """Measure all wire types and return a table with a row for each."""
    config = model.config
    ids = [tokenizer.encode(text) for text in texts]
    everything = np.ones((len(config.moe_layers), config.num_experts), bool)
    counts = np.stack([model.read(each, everything, "float32").counts for each in ids])
    slots = math.ceil(SHARE * everything.size)
    placement = place("dance", counts, [slots] * len(texts))
    size = sum(len(text.encode()) for text in texts)
    table = Table(
        title=f"{size:,} bytes, {sum(map(len, ids)):,} tokens, {len(texts)} servers, "
        f"{1 - placement.local_share(counts):.2f} of expert calls are remote",
    )
    for column in ("wire", "bits per byte", "greedy tokens unchanged", "bytes per row and sum"):
        table.add_column(column, justify="right")
    exact: list[Passed] = []
    for wire in WIRES:
        found = [
            model.read(each, here_le, wire)
            for each, here_le in zip(ids, placement.resident, strict=True)
        ]
        exact = exact or found
        same = [one.greedy == other.greedy for one, other in zip(found, exact, strict=True)]
        row = exchanged_bytes(config.hidden_size, EngineConfig(WINDOW, wire_dtype=wire))
        bits = sum(each.bits for each in found) / size
        table.add_row(wire, f"{bits:.5f}", f"{np.concatenate(same).mean():.2%}", str(row))
    return table


def run(options: argparse.Namespace) -> int:
    """Measure all wire types and print the table."""
    source = options.model or demo_dir()
    with tempfile.TemporaryDirectory(prefix="dance-jax-wire-") as folder:
        native.load(pathlib.Path(folder))
        model = Model(Checkpoint.open(ensure_converted(source, pathlib.Path(folder) / "models")))
    terminal(100).print(measure(model, Tokenizer.load(source), [*map(text_of, options.texts)]))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python research/wire.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", type=pathlib.Path, metavar="DIR", help="model to measure (the demo model)"
    )
    parser.add_argument(
        "--texts",
        type=pathlib.Path,
        nargs="+",
        default=TEXTS,
        metavar="FILE",
        help="JSON Lines of prompts, a file per server (examples/tasks/*.heldout.jsonl)",
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
