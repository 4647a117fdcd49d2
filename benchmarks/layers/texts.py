"""What rounding on the wire does to a model: its logits, and bits per byte of real text.

Every text is decoded token by token with what it really says (teacher forcing), on all servers in
lock step, once per wire dtype with the same placement; the dtypes take turns in each step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from dance_jax.config import EngineConfig, UserError
from dance_jax.models.messages import Transport
from dance_jax.placement.core import Layout

WIRE_DTYPES = ("compute", "bfloat16", "int8")
#: Tokens of a text at most; longer ones are left out.
CONTEXT = 1024


@dataclasses.dataclass
class Score:
    """Of one wire dtype, over all predictions of some texts; sums, so that servers add up."""

    predictions: int = 0
    #: -log2 of what the model gave to the next token.
    bits: float = 0.0
    #: |logit - exact logit|: the largest, and the sum of means over the vocabulary.
    largest_change: float = 0.0
    mean_change: float = 0.0
    #: Predictions whose most likely token is that of the exact ones.
    same_token: int = 0

    def add(self, logits_nv: np.ndarray, exact_nv: np.ndarray, next_n: np.ndarray) -> None:
        change_nv = np.abs(logits_nv - exact_nv)
        top_n1 = logits_nv.max(1, keepdims=True)
        total_n = np.log(np.exp((logits_nv - top_n1).astype(np.float64)).sum(1)) + top_n1[:, 0]
        self.predictions += len(next_n)
        self.bits += float(
            (total_n - logits_nv[np.arange(len(next_n)), next_n]).sum() / math.log(2)
        )
        self.largest_change = max(self.largest_change, float(change_nv.max()))
        self.mean_change += float(change_nv.mean(1).sum())
        self.same_token += int((logits_nv.argmax(1) == exact_nv.argmax(1)).sum())

    @classmethod
    def total(cls, scores: Iterable[Score]) -> Score:
        parts = list(scores)
        return cls(
            predictions=sum(part.predictions for part in parts),
            bits=sum(part.bits for part in parts),
            largest_change=max(part.largest_change for part in parts),
            mean_change=sum(part.mean_change for part in parts),
            same_token=sum(part.same_token for part in parts),
        )


def read_texts(paths: Sequence[pathlib.Path], most_bytes: int) -> list[str]:
    """Prompts of task files, of each in turn, until there are so many bytes.

    Raises:
        UserError: a file is no such one, or there is none.
    """
    try:
        files = [
            [json.loads(line)["prompt"] for line in path.read_text("utf-8").split("\n") if line]
            for path in paths
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--tasks: JSON Lines with a prompt are needed: {error}") from error
    texts, size = [], 0
    for turn in range(max(map(len, files), default=0)):
        for prompts in files:
            if turn < len(prompts) and size < most_bytes:
                texts.append(prompts[turn])
                size += len(prompts[turn].encode())
    if not texts:
        raise UserError("--tasks: there is no text")
    return texts


def score(
    model: pathlib.Path,
    layout: Layout,
    rank: int,
    waves: list[list[list[list[int]]]],
    rows: int,
    transport: Transport,
) -> dict[str, Score]:
    """This server's part of the texts, under every wire dtype.

    Args:
        model: converted.
        waves: as `routes.deal` makes them, for rows x devices texts of a server at once; token ids
            with the beginning of text.
        rows: texts a device runs at once.
    """
    from dance_jax.engine.compile_cache import CompileCache
    from dance_jax.engine.runner import Runner
    from dance_jax.models.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model)
    form = checkpoint.form("float32")
    runners = {}
    for wire_dtype in WIRE_DTYPES:
        config = EngineConfig(
            max_model_len=CONTEXT,
            max_num_seqs=rows,
            decode_rows=(rows,),
            slice_rows=(1,),
            wire_dtype=wire_dtype,
        )
        runners[wire_dtype] = Runner(
            checkpoint.config,
            checkpoint.trunk(config.dtype),
            form,
            lambda pairs: checkpoint.experts(pairs, form),
            layout,
            rank,
            config,
            rows * config.max_blocks,
            CompileCache(None),
            transport,
        )
    scores = {wire_dtype: Score() for wire_dtype in runners}
    for wave in waves:
        longest = max(len(text) for server in wave for text in server)
        for position in range(longest - 1):
            found = {
                wire_dtype: _decode(runner, wave[rank], position, rows)
                for wire_dtype, runner in runners.items()
            }
            exact_nv = found[WIRE_DTYPES[0]]
            going = [text for text in wave[rank] if position + 1 < len(text)]
            next_n = np.array([text[position + 1] for text in going], np.int64)
            for wire_dtype, logits_nv in found.items():
                if going:
                    scores[wire_dtype].add(logits_nv, exact_nv, next_n)
    return scores


def _decode(runner, texts: list[list[int]], position: int, rows: int) -> np.ndarray:
    """Logits after the token at `position` of each text that goes on: float32 [n, v]."""
    from dance_jax.engine.scheduler import Row, StepPlan
    from dance_jax.engine.sequence import SamplingParams, Sequence
    from dance_jax.engine.step import BUSY

    greedy = SamplingParams(temperature=0)
    blocks = runner.config.max_blocks
    entries = []
    for first in range(0, rows * len(runner.devices), rows):
        device = []
        for number, text in enumerate(texts[first : first + rows]):
            if position + 1 >= len(text):
                continue
            sequence = Sequence("", 0, text, greedy, 1, 0)
            sequence.blocks = list(range(1 + number * blocks, 1 + (number + 1) * blocks))
            device.append(Row(sequence, number, number, position, [text[position]], True))
        entries.append(tuple(device))
    _, extras = runner.run(StepPlan(rows, 0, tuple(entries)), work=BUSY)
    logits = runner.read(extras.logits)
    return np.concatenate(
        [each[: len(device)] for each, device in zip(logits, entries, strict=True)]
    )
