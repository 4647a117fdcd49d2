"""What every section works with."""

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

#: A bar is drawn so often a second: it shares the machine with the servers.
REFRESHES_PER_S = 2


@dataclasses.dataclass(frozen=True)
class Setting:
    """Servers, and what they are asked with."""

    api: Api
    #: Names of the servers.
    names: tuple[str, ...]
    #: Sequences that each server runs at once.
    rows: tuple[int, ...]
    #: Those of a static batch.
    batch_rows: tuple[int, ...]
    texts: Texts
    seed: int
    #: For progress.
    console: Console
    #: Of the launcher; None: somebody else started it.
    pid: int | None = None

    @property
    def servers(self) -> range:
        return range(len(self.names))

    def rng(self, purpose: str) -> np.random.Generator:
        """For each purpose another one; by the seed."""
        return np.random.default_rng([self.seed, *purpose.encode()])

    def need(self, tokens: int, section: str) -> None:
        """
        Raises:
            UserError: the context of the servers is shorter.
        """
        if self.api.max_model_len < tokens:
            raise UserError(
                f"section {section} needs a context of {tokens} tokens; the servers have "
                f"{self.api.max_model_len}"
            )

    def progress(
        self, title: str, total: int
    ) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """A bar that the caller advances."""
        return progress(self.console, title, total)


@contextlib.contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar that the caller advances; only where there is a terminal."""
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
    """Why answers are not whole, of those whose user waited for them."""
    return [answer.error for answer in answers if answer.error is not None]
