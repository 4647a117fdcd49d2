"""Train the demo model's tokenizer: byte-level BPE on an even mix of the domains."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

DOMAINS = ["code", "english", "german", "french", "math"]
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
BYTES_PER_DOMAIN = 3_000_000
# words with one leading space, runs of spaces, punctuation; every digit separately
PIECES = r"[ ]?\p{L}+|\p{N}|[ ]?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|[ ]+(?=[ ]\S)|\s+"


def documents(corpus: Path, domain: str, part: str) -> Iterator[str]:
    """Yield the texts of a domain's "train" or "heldout" part."""
    with (corpus / f"{domain}.{part}.jsonl").open() as file:
        for line in file:
            yield json.loads(line)["text"]


def sample(corpus: Path) -> Iterator[str]:
    """Yield about BYTES_PER_DOMAIN of training text per domain (a tenth of that for arithmetic)."""
    for domain in DOMAINS:
        left = BYTES_PER_DOMAIN // (10 if domain == "math" else 1)
        for body in documents(corpus, domain, "train"):
            yield body[:20_000]
            left -= len(body[:20_000])
            if left <= 0:
                break


def train(corpus: Path, vocab_size: int) -> Tokenizer:
    """Train the tokenizer, whose post-processor puts BOS in front of a text."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
    )
    tokenizer.train_from_iterator(sample(corpus), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args()
    tokenizer = train(args.work / "corpus", args.vocab_size)
    tokenizer.save(str(args.work / "tokenizer.json"))
    for domain in DOMAINS:
        body = "\n\n".join(documents(args.work / "corpus", domain, "heldout"))[:100_000]
        count = len(tokenizer.encode(body).ids)
        print(f"{domain:8} {len(body.encode()) / count:.2f} bytes per token")


if __name__ == "__main__":
    main()
