"""The servers, texts and progress bars that all sections share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dance_jax.config import UserError

from .client import Answer, Api
from .texts import Texts

#: Redraws of a progress bar per second; few, because it shares the machine with the servers.
REFRESHES_PER_S = 2


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

    def need(self, tokens: int, section: str) -> None:
        """Check that the servers' context has at least `tokens` tokens, for a section.

        Raises:
            UserError: the context is shorter.
        """
        if self.api.max_model_len < tokens:
            raise UserError(
                f"section {section} needs a context of {tokens} tokens; the servers have only "
                f"{self.api.max_model_len}: choose other --sections, or start the servers with a "
                "longer --max-model-len"
            )

    def progress(
        self, title: str, total: int
    ) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Show a progress bar for the block; yield a function that advances it."""
        return progress(self.console, title, total)


@contextlib.contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar on a terminal for the block; yield a function that advances it."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        refresh_per_second=REFRESHES_PER_S,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def failures(answers: Sequence[Answer]) -> list[str]:
    """Return the reasons of failed answers; answers whose user disconnected do not count."""
    return [answer.error for answer in answers if answer.error is not None]
