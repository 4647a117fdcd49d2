"""This project's engine as a side to measure: one process with all experts."""

from __future__ import annotations

import contextlib
import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from benchmarks.programs import FORMATS, Side, Work
from benchmarks.programs.child import Child, memory
from benchmarks.programs.models import Model


class Ours:
    """Opens models in this project's engine."""

    name: ClassVar = "dance_jax"
    formats: ClassVar[Mapping[str, str]] = dict(zip(FORMATS, FORMATS, strict=True))

    def open(self, model: Model, form: str) -> OurSide:
        kept = "keep" if form == "float32" else form
        return OurSide(model, model.converted(experts=kept, trunk=kept))

    def version(self) -> str:
        return self.name


class OurSide(Side):
    """An engine in its own process, which starts when the first step is measured."""

    def __init__(self, model: Model, path: pathlib.Path) -> None:
        self._model, self._path = model, path
        self._engine: Child | None = None
        self._warm = tempfile.TemporaryDirectory(prefix="dance-jax-warm-")
        self._started_warm = False

    def speed(self, work: Work) -> float:
        return self._ask("measure", work)["tokens_per_s"]

    def processor_time(self, work: Work) -> float:
        return self._ask("measure", work)["processor_s_per_token"]

    def greedy(self, work: Work) -> list[list[int]]:
        return self._ask("measure", work)["tokens"]

    def first_token(self, cold: bool) -> float:
        if cold:
            with tempfile.TemporaryDirectory(prefix="dance-jax-cold-") as cache:
                return self._start(cache)[0]
        if not self._started_warm:
            self._start(self._warm.name)
            self._started_warm = True
        return self._start(self._warm.name)[0]

    def resident(self) -> float:
        return self._start(self._warm.name)[1]

    def profile(self, rows: int) -> dict[str, Any]:
        """Profile a decode step of `rows` rows: see `engine_side.EngineSide.profile`."""
        return self._child().ask({"do": "profile", "rows": rows})

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._warm.cleanup()

    def _ask(self, what: str, work: Work) -> dict[str, Any]:
        prompts = work.prompts(self._model.vocabulary)
        request = {"do": what, "kind": work.kind, "prompts": prompts, "tokens": work.tokens}
        return self._child().ask(request)

    def _child(self) -> Child:
        if self._engine is None:
            module = "benchmarks.programs.engine_side"
            kernels = str(self._model.work)
            self._engine = Child([sys.executable, "-m", module, str(self._path), kernels])
            self._engine.read()
        return self._engine

    def _start(self, cache: str) -> tuple[float, float]:
        """Return a new process's seconds to the first token, and its resident bytes then.

        The bytes are without the arrays of weights and KV cache.
        """
        module = "benchmarks.programs.first_token"
        began = time.perf_counter()
        child = Child([sys.executable, "-m", module, str(self._path), cache])
        with contextlib.closing(child):
            arrays = child.read()["array_bytes"]
            return time.perf_counter() - began, memory(child.pid)["Rss"] - arrays
