"""Measure the cost of each weight format: bits per byte of held-out text, and memory.

python formats.py --model ../../dance_jax/demo [--text ../tasks] [--pairs keep/keep,int4/int8]

The text is that of the prompts in --text, joined for each domain; the model was not trained on it.
A pair gives the values of --experts and --trunk of dance_jax.launch. The other pairs are compared
with the first.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from evaluate import expert_pairs, measure, window_runner
from tokenizer import BOS, DOMAINS
from tokenizers import Tokenizer

from dance_jax.config import Rounding
from dance_jax.models import native
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import convert

PAIRS = (
    "keep/keep",
    *("int8/keep", "int4-mixed/keep", "int4/keep", "mxfp4/keep"),
    *("keep/int8", "int8/int8", "int4-mixed/int8", "int4/int8", "mxfp4/int8"),
    *("keep/int4-mixed", "int4-mixed/int4-mixed", "int4/int4-mixed"),
    *("keep/int4", "int4/int4"),
)


def texts(directory: Path) -> Iterator[str]:
    """Yield the prompts of each domain, joined to one text."""
    for domain in DOMAINS:
        lines = [
            line
            for part in ("fit", "heldout")
            for line in (directory / f"{domain}.{part}.jsonl").read_text("utf-8").splitlines()
        ]
        yield "\n\n".join(json.loads(line)["prompt"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="Hugging Face folder of the model"
    )
    parser.add_argument(
        "--text",
        type=Path,
        default=Path(__file__).parents[1] / "tasks",
        help="folder of prompts (examples/tasks)",
    )
    parser.add_argument(
        "--pairs", default=",".join(PAIRS), help="EXPERTS/TRUNK formats (%(default)s)"
    )
    parser.add_argument("--window", type=int, default=2048, help="tokens per forward pass")
    args = parser.parse_args()
    bodies = list(texts(args.text))
    size = sum(len(body.encode()) for body in bodies)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    begin = tokenizer.token_to_id(BOS)
    ids = [tokenizer.encode(body, add_special_tokens=False).ids for body in bodies]
    print(f"{size} bytes, {sum(map(len, ids))} tokens\n")
    print("| `--experts` | `--trunk` | experts MB | all MB | bits per byte | ratio |")
    print("|---|---|---|---|---|---|")
    first = None
    for pair in args.pairs.split(","):
        rounding = Rounding(*pair.split("/"))
        with tempfile.TemporaryDirectory() as converted:
            if not native.usable():
                native.load(Path(converted))
            model = convert(args.model, Path(converted) / "model", rounding=rounding)
            checkpoint = Checkpoint.open(model)
            run = window_runner(checkpoint)
        experts, stride = checkpoint.config.num_experts, args.window - 1
        found = [measure(run, each, begin, args.window, stride, experts)[0] for each in ids]
        bits = sum(found) / size
        first = first or bits
        routed = len(expert_pairs(checkpoint)) * checkpoint.expert_bytes("float32")
        total = routed + checkpoint.trunk_bytes("float32")
        print(
            f"| {rounding.experts} | {rounding.trunk} | {routed / 1e6:.2f} | {total / 1e6:.2f} "
            f"| {bits:.4f} | {bits / first:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
