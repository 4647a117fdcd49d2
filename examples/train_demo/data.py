"""Make training batches with grain: all domains in every batch, in a fixed ratio, seeded order.

`python data.py --work W` turns W/corpus and W/tokenizer.json into W/tokens/<domain>.npy.
"""

import argparse
from pathlib import Path

import grain
import numpy as np
from tokenizer import BOS, DOMAINS, EOS, documents
from tokenizers import Tokenizer

WEIGHTS = {"code": 0.42, "english": 0.17, "german": 0.18, "french": 0.18, "math": 0.05}
# One in REPEAT_EVERY_SHORT windows of up to SHORT tokens is a passage repeated over and over, until
# the model has learnt to copy; of the later, longer windows one in REPEAT_EVERY.
SHORT, REPEAT_EVERY_SHORT, REPEAT_EVERY = 256, 8, 16
REPEATED = len(DOMAINS)  # the domain number of repeated passages in the log


class Windows:
    """Random access to consecutive windows of `length` + 1 tokens (inputs and targets)."""

    def __init__(self, path: Path, domain: int, length: int) -> None:
        self.tokens, self.domain, self.length = np.load(path, mmap_mode="r"), domain, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * self.length
        window = self.tokens[start : start + self.length + 1].astype(np.int32)
        if index % (REPEAT_EVERY_SHORT if self.length <= SHORT else REPEAT_EVERY):
            return {"tokens": window, "domain": np.int32(self.domain)}
        period = np.random.default_rng(index).integers(self.length // 16, self.length // 2)
        return {"tokens": np.resize(window[:period], window.shape), "domain": np.int32(REPEATED)}


def batches(folder: Path, length: int, batch: int, seed: int) -> grain.DatasetIterator:
    """Return an endless iterator of {"tokens": [batch, length + 1], "domain": [batch]}.

    The domain is only for the log; the model does not see it. get_state and set_state of the
    iterator allow resuming.
    """
    parts = []
    for number, domain in enumerate(DOMAINS):
        windows = Windows(folder / f"{domain}.npy", number, length)
        parts.append(grain.MapDataset.source(windows).seed(seed + number).shuffle().repeat())
    mixed = grain.MapDataset.mix(parts, weights=[WEIGHTS[d] for d in DOMAINS])
    return iter(mixed.batch(batch).to_iter_dataset())


def unigram(folder: Path, vocab: int) -> np.ndarray:
    """Return the share of every token in the mix of the domains, above zero: float64 [vocab]."""
    share = np.zeros(vocab)
    for domain in DOMAINS:
        counts = 1 + np.bincount(np.load(folder / f"{domain}.npy"), minlength=vocab)
        share += WEIGHTS[domain] * counts / counts.sum()
    return share


def tokenize(work: Path) -> None:
    """Write each domain's training documents as one token array, each between BOS and EOS.

    In conversations EOS follows every answer, as in the chat template.
    """
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    begin, end = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    (work / "tokens").mkdir(exist_ok=True)
    for domain in DOMAINS:
        ids: list[int] = []
        for body in documents(work / "corpus", domain, "train"):
            turns = body.split("\nUser: ") if body.startswith("User: ") else [body]
            turns = turns[:1] + ["User: " + turn for turn in turns[1:]]
            ids.append(begin)
            for encoding in tokenizer.encode_batch(turns, add_special_tokens=False):
                ids += [*encoding.ids, end]
        np.save(work / "tokens" / f"{domain}.npy", np.array(ids, np.uint16))
        print(f"{domain:8} {len(ids) / 1e6:.2f} million tokens", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    tokenize(parser.parse_args().work)
