"""Measure an exported model on held-out text: bits per byte, expert skew, local share.

python evaluate.py --work W --model ../../dance_jax/demo [--bytes 1000000] [--out evaluation.json]
"""

import argparse
import json
import lzma
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from export import CONTEXT, load
from model import Config, Params, token_losses
from tokenizer import BOS, DOMAINS, documents
from tokenizers import Tokenizer

# three unequal servers: share of all routed experts each can hold, and the domain of its users
SERVERS = {"alpha": (0.45, "code"), "beta": (0.35, "english"), "gamma": (0.60, "german")}


def heldout(work: Path, domain: str, size: int) -> bytes:
    """The first `size` bytes of the domain's held-out documents."""
    return "\n\n".join(documents(work / "corpus", domain, "heldout")).encode()[:size]


@partial(jax.jit, static_argnums=2)
def run_window(params: Params, tokens: jax.Array, config: Config):
    """tokens [1, T+1] -> (losses [T], experts chosen [layers, T, K], share dropped)."""
    losses, stats = token_losses(params, tokens, config)
    choice = jax.numpy.stack([s["choice"] for s in stats])
    return losses[0], choice, jax.numpy.stack([s["dropped"] for s in stats]).max()


def measure(
    params: Params, ids: list[int], begin: int, c: Config, window: int, stride: int
) -> tuple[float, np.ndarray]:
    """(bits of all tokens, activation counts [window, layer, expert]).

    Windows of BOS and `window` - 1 tokens start `stride` tokens apart; a token counts in the first
    one it is in. No token is dropped: a window that overflows the experts' rows is run again with
    more of them.
    """
    length = window - 1
    bits, counts, scored = 0.0, [], 0
    for start in range(0, max(1, len(ids) - length + stride), stride):
        part = ids[start : start + length]
        tokens = np.zeros((1, window), np.int32)
        tokens[0, : len(part) + 1] = [begin, *part]
        for capacity in (3, 6, 0):
            losses, choice, dropped = run_window(params, tokens, replace(c, capacity=capacity))
            if dropped == 0:
                break
        new = slice(scored - start, len(part))
        bits += float(np.asarray(losses, np.float64)[new].sum()) / math.log(2)
        layers = np.asarray(choice)[:, new].reshape(c.layers - 1, -1)
        counts.append([np.bincount(row, minlength=c.experts) for row in layers])
        scored = start + len(part)
    return bits, np.array(counts)


def skew(counts: np.ndarray) -> dict[str, list[float]]:
    """How unevenly each layer's experts are used. counts: [layer, expert]."""
    share = counts / counts.sum(1, keepdims=True)
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(1) / math.log(share.shape[1])
    top = np.sort(share, 1)[:, -share.shape[1] // 4 :].sum(1)
    return {"entropy": entropy.round(3).tolist(), "top_quarter": top.round(3).tolist()}


def place(counts: np.ndarray, capacity: list[int]) -> np.ndarray:
    """Each server's most used experts, then a place for every expert that nobody took.

    counts: [server, experts of all layers]; returns resident [server, experts], bool.
    """
    resident = np.zeros(counts.shape, bool)
    for server, room in enumerate(capacity):
        resident[server, np.argsort(-counts[server], kind="stable")[:room]] = True
    for expert in np.flatnonzero(~resident.any(0)):
        best = None
        for server in range(len(capacity)):
            spare = resident[server] & (resident.sum(0) > 1)
            if spare.any():
                victim = np.flatnonzero(spare)[counts[server, spare].argmin()]
                loss = counts[server, victim] - counts[server, expert]
                best = min(best or (loss, server, victim), (loss, server, victim))
        if best is None:
            raise ValueError("the servers together cannot hold every expert")
        resident[best[1], best[2]], resident[best[1], expert] = False, True
    return resident


def local_share(counts: dict[str, np.ndarray]) -> dict[str, float]:
    """Share of expert calls served at home on the odd windows, placed by the even windows.

    counts: per domain [window, layer, expert]; `uniform` places without looking at them.
    """
    total = next(iter(counts.values())).shape[1] * next(iter(counts.values())).shape[2]
    rooms = [int(share * total) for share, _ in SERVERS.values()]

    def half(first: int) -> np.ndarray:
        rows = [counts[d][first::2].sum(0).reshape(-1) for _, d in SERVERS.values()]
        return np.array([row / row.sum() for row in rows])

    fit, test = half(0), half(1)
    shares = (test * place(fit, rooms)).sum(1)
    result = {name: round(float(s), 3) for name, s in zip(SERVERS, shares, strict=True)}
    return result | {
        "mean": round(float(shares.mean()), 3),
        "uniform": round(float(np.mean(rooms)) / total, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--bytes", type=int, default=1_000_000)
    parser.add_argument("--window", type=int, default=CONTEXT, help="tokens a forward pass sees")
    parser.add_argument("--stride", type=int, help="tokens between windows (default: no overlap)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = Config()
    params = load(args.model, config)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    report: dict[str, dict] = {}
    counts: dict[str, np.ndarray] = {}
    for domain in DOMAINS:
        text = heldout(args.work, domain, args.bytes)
        ids = tokenizer.encode(text.decode(errors="ignore"), add_special_tokens=False).ids
        begin = tokenizer.token_to_id(BOS)
        stride = args.stride or args.window - 1
        bits, counts[domain] = measure(params, ids, begin, config, args.window, stride)
        row = {
            "bytes": len(text),
            "tokens": len(ids),
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
