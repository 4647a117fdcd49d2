"""Programs that run the same model: this project's engine, transformers and llama.cpp.

Each is a `Peer`, which opens a model in a format of weights as a `Side` that can be measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

if TYPE_CHECKING:
    from benchmarks.programs.models import Model

#: Formats of weights, by the names that options give.
FORMATS = ("float32", "bf16", "int8", "int4")


class Unsupported(Exception):
    """The program has no such figure."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Tokens that are to be computed, of random prompts."""

    #: "decode": `tokens` more of each prompt, one a step; "prefill": prompts of `tokens`.
    kind: str
    rows: int
    tokens: int
    #: Tokens of the prompts that a decode follows.
    prompt: int = 32

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """Token ids [rows][length], the same for all sides."""
        length = self.tokens if self.kind == "prefill" else self.prompt
        rng = np.random.default_rng([self.rows, length])
        return rng.integers(2, vocabulary, (self.rows, length)).tolist()


class Side(Protocol):
    """A program with a model, whose figures are measured; what it lacks raises `Unsupported`."""

    def speed(self, work: Work) -> float:
        """Tokens per second."""
        ...

    def processor_time(self, work: Work) -> float:
        """Seconds of processor time, of all threads, for a token."""
        ...

    def greedy(self, work: Work) -> list[list[int]]:
        """The tokens that follow each prompt."""
        ...

    def first_token(self, cold: bool) -> float:
        """Seconds from the start of another process to its first token.

        Args:
            cold: nothing that an earlier start left is used.
        """
        ...

    def resident(self) -> float:
        """Resident bytes of another process, without its weights and its KV cache."""
        ...

    def close(self) -> None: ...


class Peer(Protocol):
    """A program that is measured."""

    name: ClassVar[str]
    #: What the program calls each format it has.
    formats: ClassVar[Mapping[str, str]]

    def open(self, model: Model, form: str) -> Side:
        """The model's weights in a format of `formats`."""
        ...

    def version(self) -> str: ...
