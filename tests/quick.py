"""Quick compilation for tests: nothing is optimised, and nothing is compiled twice."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable

import jax
import pytest

from dance_jax.engine.compile_cache import CompileCache

#: XLA's options in all processes of the tests. Code runs for milliseconds, so optimising it does
#: not pay.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
#: Options for `compile` of lowered code: those without `XLA_FLAGS`.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder for files that all processes of the test session share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def cache_directory(folder: pathlib.Path, expert_library: pathlib.Path | None) -> pathlib.Path:
    """A cache directory for launches that already contains the session's C++ library."""
    compiled = folder / "cache" / "compiled"
    compiled.mkdir(mode=0o700, parents=True)
    if expert_library is not None:
        shutil.copy(expert_library, compiled)
    return compiled.parent


class OptimisingCache(CompileCache):
    """For engines whose code is examined: compiles with a server's options."""

    def compile(self, key: object, lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
        return super().compile(key, lambda: _Optimised(lower()))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class _Optimised:
    lowered: jax.stages.Lowered

    def compile(self) -> jax.stages.Compiled:
        return self.lowered.compile(compiler_options=OPTIMISED)


class SharedCache(CompileCache):
    """For engines of similar models: compiles each lowered text only once.

    Args:
        compiled: what the other engines have compiled; shared.
        scope: as for `CompileCache`. Equal scopes and keys are not even lowered twice.
    """

    def __init__(self, compiled: dict[str, jax.stages.Compiled], scope: object) -> None:
        super().__init__(None, scope)
        self._compiled = compiled

    def compile(self, key: object, lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
        known = repr((self.scope, key))
        if known not in self._compiled:
            lowered = lower()
            # The text does not contain unused arguments.
            text = repr(lowered.args_info) + lowered.as_text()
            if text not in self._compiled:
                self._compiled[text] = super().compile(key, lambda: lowered)
            self._compiled[known] = self._compiled[text]
        return self._compiled[known]
