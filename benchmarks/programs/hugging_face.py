"""transformers as a side to measure, in a child process under a Python that has torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, ClassVar

from benchmarks.programs import Side, Unsupported, Work
from benchmarks.programs.child import ROOT, Child
from benchmarks.programs.models import Model

#: Batches of prompts in a measurement of prefill, one after the other.
PREFILLS = 3


class Transformers:
    """Opens models with transformers.

    Args:
        python: path of a Python interpreter that has torch and transformers.
        threads: of torch.
    """

    name: ClassVar = "transformers"
    formats: ClassVar[Mapping[str, str]] = {"float32": "float32"}

    def __init__(self, python: str, threads: int) -> None:
        self._command = [python, str(ROOT / "benchmarks" / "transformers_side.py")]
        self._threads = threads
        self._version = self.name

    def open(self, model: Model, form: str) -> TransformersSide:
        side = TransformersSide([*self._command, str(model.source()), str(self._threads)], model)
        self._version = side.version
        return side

    def version(self) -> str:
        return self._version


class TransformersSide(Side):
    """The forward pass alone, with the experts implementation that is fastest for each work."""

    def __init__(self, command: list[str], model: Model) -> None:
        self._model = model
        self._child = Child(command)
        self.version: str = self._child.read()["versions"]
        self._fastest: dict[Work, str] = {}

    def speed(self, work: Work) -> float:
        if work not in self._fastest:
            names = _implementations(work)
            self._fastest[work] = max(names, key=lambda name: self._speed(work, name))
        return self._speed(work, self._fastest[work])

    def greedy(self, work: Work) -> list[list[int]]:
        return self._measure(work, "eager")["tokens"]

    def processor_time(self, work: Work) -> float:
        raise Unsupported

    def first_token(self, cold: bool) -> float:
        raise Unsupported

    def resident(self) -> float:
        raise Unsupported

    def close(self) -> None:
        self._child.close()

    def _speed(self, work: Work, implementation: str) -> float:
        step = work.rows * (work.tokens if work.kind == "prefill" else 1)
        return step / statistics.median(self._measure(work, implementation)["seconds"])

    def _measure(self, work: Work, implementation: str) -> dict[str, Any]:
        return self._child.ask(
            {
                "kind": work.kind,
                "tokens": work.prompts(self._model.vocabulary),
                "steps": PREFILLS if work.kind == "prefill" else work.tokens,
                "implementation": implementation,
            }
        )


def _implementations(work: Work) -> tuple[str, ...]:
    """Return the experts implementations that may be the fastest."""
    # In prefill, batched_mm copies the weights of every assignment: 10 GB for 8 x 128 tokens.
    return ("grouped_mm", "eager", *(["batched_mm"] if work.kind == "decode" else []))
