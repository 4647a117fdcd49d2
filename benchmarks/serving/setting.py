"""The servers, texts and progress bars that all sections share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import numpy as np
from rich.console import Console

from dance_jax.bench.client import Api
from dance_jax.bench.terminal import progress
from dance_jax.bench.texts import Texts
from dance_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Setting:
    """The measured servers, and the texts for requests."""

    api: Api
    #: Names of the servers.
    names: tuple[str, ...]
    #: Sequences that each server runs at once.
    rows: tuple[int, ...]
    #: Sequences of each server in a static batch.
    batch_rows: tuple[int, ...]
    texts: Texts
    seed: int
    #: Console for progress bars.
    console: Console
    #: Process id of the launcher; None if this process did not start the servers.
    pid: int | None = None

    @property
    def servers(self) -> range:
        return range(len(self.names))

    def rng(self, purpose: str) -> np.random.Generator:
        """Return a random generator that depends on the seed and the purpose."""
        return np.random.default_rng([self.seed, *purpose.encode()])

    @property
    def context(self) -> int:
        """Maximum tokens of a prompt with its answer.

        Raises:
            UserError: the servers do not say.
        """
        if (found := self.api.max_model_len) is None:
            raise UserError(
                "the sections need servers that name max_model_len in the answer to "
                "GET /v1/models: leave out --sections and --check"
            )
        return found

    def need(self, tokens: int, section: str) -> None:
        """Check that the servers' context has at least `tokens` tokens, for a section.

        Raises:
            UserError: the context is shorter.
        """
        if self.context < tokens:
            raise UserError(
                f"section {section} needs a context of {tokens} tokens; the servers have only "
                f"{self.context}: choose other --sections, or start the servers with a "
                "longer --max-model-len"
            )

    def progress(
        self, title: str, total: int
    ) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Show a progress bar for the block; yield a function that advances it."""
        return progress(self.console, title, total)
