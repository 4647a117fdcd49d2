"""Measure an exported model on held-out text: bits per byte, expert skew, local share.

python evaluate.py --work W --model ../../dance_jax/demo [--bytes 1000000] [--out evaluation.json]

--experts and --trunk round the weights first, like the same options of dance_jax.launch.
"""

import argparse
import json
import lzma
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizer import BOS, DOMAINS, documents
from tokenizers import Tokenizer

from dance_jax.config import EXPERT_CHOICES, TRUNK_CHOICES, Rounding
from dance_jax.models import native
from dance_jax.models.attention import Rows
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import convert
from dance_jax.models.experts import Pool
from dance_jax.models.kernels_cpu import NativePool
from dance_jax.models.trunk import rope_of
from dance_jax.placement.policies import place

# three unequal servers: the share of all routed experts that each can hold, and its users' domain
SERVERS = {"alpha": (0.45, "code"), "beta": (0.35, "english"), "gamma": (0.60, "german")}
POLICIES = ("uniform", "dance")
KNOWN_LINE = 40
#: tokens [1, T] -> (nats of tokens 1..T-1 [T-1], experts chosen [layers, T, K])
RunWindow = Callable[[np.ndarray], tuple[jax.Array, jax.Array]]


def heldout(work: Path, domain: str, size: int) -> bytes:
    """Return the first `size` bytes of the domain's held-out documents."""
    return "\n\n".join(documents(work / "corpus", domain, "heldout")).encode()[:size]


def known_share(work: Path, domain: str, text: bytes) -> float:
    """Return the share of the text's lines over KNOWN_LINE characters that were trained on.

    The share is by characters.
    """

    def lines(body: str) -> list[str]:
        return [s for s in map(str.strip, body.split("\n")) if len(s) > KNOWN_LINE]

    known = {s for body in documents(work / "corpus", domain, "train") for s in lines(body)}
    held = lines(text.decode(errors="ignore"))
    return sum(len(s) for s in held if s in known) / max(1, sum(map(len, held)))


def expert_pairs(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """Return (MoE layer, expert) of every routed expert, layer by layer."""
    c = checkpoint.config
    return [(layer, e) for layer in range(len(c.moe_layers)) for e in range(c.num_experts)]


def window_runner(checkpoint: Checkpoint) -> RunWindow:
    """Return a function that runs the engine's own model on a window, without dropping tokens."""
    c, form = checkpoint.config, checkpoint.form("float32")
    pairs = expert_pairs(checkpoint)
    read = checkpoint.experts(pairs, form)
    native_pool: NativePool | None = None
    pool: Pool
    if native.usable():
        forms = (form.gate, form.up, form.down)
        native_pool = NativePool(form.d, form.f, form.activation, forms, form.bias, len(pairs))
        for slot, weights in read:
            native_pool.put(slot, slot, weights)
        pool = jnp.int32(native_pool.number)
    else:
        pool = tuple(map(jnp.asarray, form.stacked(len(pairs), read)))
    graph, state = nnx.split(checkpoint.trunk("float32"))

    @jax.jit
    def run(state, pool, tokens):
        model = nnx.merge(graph, state)
        # One KV block for the whole window.
        empty = [jnp.zeros((1, tokens.shape[1], layer.mixer.cache_width)) for layer in c.layers]
        window = Rows.whole(tokens.shape[1])
        hidden, rotations = model.embed(tokens[0], window.positions_t, tokens.shape[1])
        choices = []
        for number, layer in enumerate(model.layers):
            rope = rope_of(c, number)
            rotation = None if rope is None else rotations[rope]
            first = len(choices) * c.num_experts

            def moe(routed, first=first):
                slot = first + routed.expert
                sums = form.ffn(pool, routed.x, slot, routed.weight, len(c.moe_layers))
                return sums, routed.expert

            hidden, _, choice = layer(hidden, rotation, [window], empty[number], moe)
            choices += [] if choice is None else [choice]
        logits = model.logits(hidden[:-1])
        chosen = jnp.take_along_axis(logits, tokens[0, 1:, None], 1)[:, 0]
        return jax.nn.logsumexp(logits, 1) - chosen, jnp.stack(choices)

    def window(tokens: np.ndarray) -> tuple[jax.Array, jax.Array]:
        assert native_pool is None or native_pool.number == pool  # keeps the pool alive
        return run(state, pool, tokens)

    return window


def measure(
    run: RunWindow, ids: list[int], begin: int, window: int, stride: int, experts: int
) -> tuple[float, np.ndarray]:
    """Return (bits of all tokens, activation counts [window, layer, expert]).

    Windows of BOS and `window` - 1 tokens start `stride` tokens apart. A token counts in the first
    window that has it.
    """
    length = window - 1
    bits, counts, scored = 0.0, [], 0
    for start in range(0, max(1, len(ids) - length + stride), stride):
        part = ids[start : start + length]
        tokens = np.zeros((1, window), np.int32)
        tokens[0, : len(part) + 1] = [begin, *part]
        losses, choice = run(tokens)
        new = slice(scored - start, len(part))
        bits += float(np.asarray(losses, np.float64)[new].sum()) / math.log(2)
        layers = np.asarray(choice)[:, new]
        counts.append([np.bincount(layer.ravel(), minlength=experts) for layer in layers])
        scored = start + len(part)
    return bits, np.array(counts)


def skew(counts: np.ndarray) -> dict[str, list[float]]:
    """Measure how unevenly each layer's experts are used. counts: [layer, expert]."""
    share = counts / counts.sum(1, keepdims=True)
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(1) / math.log(share.shape[1])
    top = np.sort(share, 1)[:, -share.shape[1] // 4 :].sum(1)
    return {"entropy": entropy.round(3).tolist(), "top_quarter": top.round(3).tolist()}


def local_share(counts: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the local share of expert calls on the odd windows, placed by the even windows.

    counts: [window, layer, expert] by domain.
    """
    layers, experts = next(iter(counts.values())).shape[1:]
    rooms = [int(share * layers * experts) for share, _ in SERVERS.values()]
    fit, test = (
        np.stack([counts[domain][first::2].sum(0) for _, domain in SERVERS.values()])
        for first in (0, 1)
    )
    shares = {policy: place(policy, fit, rooms).local_shares(test) for policy in POLICIES}
    result = {name: round(float(s), 3) for name, s in zip(SERVERS, shares["dance"], strict=True)}
    return result | {
        "mean": round(float(shares["dance"].mean()), 3),
        "uniform": round(float(shares["uniform"].mean()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of corpus.py")
    parser.add_argument(
        "--model", type=Path, required=True, help="Hugging Face folder of the model"
    )
    parser.add_argument(
        "--bytes", type=int, default=1_000_000, help="of text per domain (%(default)s)"
    )
    parser.add_argument("--window", type=int, default=2048, help="tokens per forward pass")
    parser.add_argument("--stride", type=int, help="tokens between windows (default: no overlap)")
    parser.add_argument(
        "--experts", choices=EXPERT_CHOICES, default="keep", help="weight format (%(default)s)"
    )
    parser.add_argument(
        "--trunk", choices=TRUNK_CHOICES, default="keep", help="weight format (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as converted:
        native.load(Path(converted))
        rounding = Rounding(args.experts, args.trunk)
        model = convert(args.model, Path(converted) / "model", rounding=rounding)
        checkpoint = Checkpoint.open(model)
        run = window_runner(checkpoint)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    report: dict[str, dict] = {}
    counts: dict[str, np.ndarray] = {}
    for domain in DOMAINS:
        text = heldout(args.work, domain, args.bytes)
        ids = tokenizer.encode(text.decode(errors="ignore"), add_special_tokens=False).ids
        begin = tokenizer.token_to_id(BOS)
        stride = args.stride or args.window - 1
        bits, counts[domain] = measure(
            run, ids, begin, args.window, stride, checkpoint.config.num_experts
        )
        row = {
            "bytes": len(text),
            "tokens": len(ids),
            "known_lines": round(known_share(args.work, domain, text), 3),
            "model_bits_per_byte": round(bits / len(text), 3),
            "xz_bits_per_byte": round(8 * len(lzma.compress(text, preset=9)) / len(text), 3),
        }
        report[domain] = row | skew(counts[domain].sum(0))
        print(domain, json.dumps(report[domain]), flush=True)
    report["local_share"] = local_share(counts)
    print(json.dumps(report["local_share"]))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
