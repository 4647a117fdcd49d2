"""Programs that run the same model: this project's engine, transformers and llama.cpp.

Each program is a `Peer`, which opens a model in a weight format as a `Side`, which is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

if TYPE_CHECKING:
    from benchmarks.programs.models import Model

#: Weight formats, by the names that --formats takes.
FORMATS = ("float32", "bf16", "int8", "int4")


class Unsupported(Exception):
    """The program does not support a measurement."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Work to measure, on random prompts."""

    #: "decode" generates `tokens` tokens after each prompt, one per step; "prefill" computes
    #: prompts of `tokens` tokens.
    kind: str
    #: Number of prompts, which form one batch.
    rows: int
    tokens: int
    #: Length of the prompts before a decode.
    prompt: int = 32

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """Return token ids [rows][length], the same for all sides."""
        length = self.tokens if self.kind == "prefill" else self.prompt
        rng = np.random.default_rng([self.rows, length])
        return rng.integers(2, vocabulary, (self.rows, length)).tolist()


class Side(Protocol):
    """A program with an open model; measurements that the program lacks raise `Unsupported`."""

    def speed(self, work: Work) -> float:
        """Measure tokens per second."""
        ...

    def processor_time(self, work: Work) -> float:
        """Measure seconds of processor time per token, of all threads."""
        ...

    def greedy(self, work: Work) -> list[list[int]]:
        """Return the greedy tokens after each prompt."""
        ...

    def first_token(self, cold: bool) -> float:
        """Measure the seconds from the start of a new process to its first token.

        Args:
            cold: whether the process starts without caches of an earlier process.
        """
        ...

    def resident(self) -> float:
        """Measure the resident bytes of a new process, without its weights and KV cache."""
        ...

    def close(self) -> None: ...


class Peer(Protocol):
    """A program to measure."""

    name: ClassVar[str]
    #: The program's own name of each format that it supports.
    formats: ClassVar[Mapping[str, str]]

    def open(self, model: Model, form: str) -> Side:
        """Open the model with its weights in a format of `formats`."""
        ...

    def version(self) -> str: ...
