"""Show the start of the servers and the growing completions on the terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dance_jax.engine.sequence import OutputDelta
from dance_jax.launch.cli.prompts import Prompt

_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "red")
#: Characters after which a line is broken at a space.
_WIDTH = 88


def printable(text: str) -> str:
    """Replace characters that control a terminal; line feeds and tabs stay.

    >>> printable("a" + chr(27) + "[2Jb")
    'a\ufffd[2Jb'
    """
    return "".join(
        char
        if char in "\n\t" or char.isprintable() or (char.isspace() and char not in "\r\v\f\x85")
        else "\ufffd"
        for char in text
    )


class Startup:
    """Progress of the start: on a terminal one growing line per server, else one line per stage.

    A context manager; `update` fits `Cluster.start`.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._console = console
        self._names = list(names)
        self._state = dict.fromkeys(self._names, "starting")
        self._began = time.monotonic()
        live = Live(self._view(), console=console, refresh_per_second=8, transient=False)
        self._live = live if console.is_terminal else None

    def __enter__(self) -> Startup:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self._view())
            self._live.stop()

    def update(self, name: str, stage: str, done: int, total: int) -> None:
        """Show that a server has done `done` of `total` parts of a stage."""
        seconds = time.monotonic() - self._began
        text = f"{stage} {done} of {total}" if total else stage
        changed = self._state[name] != text
        self._state[name] = f"{text} ({seconds:.1f} s)" if stage == "ready" else text
        if self._live is not None:
            self._live.update(self._view())
        elif changed:
            line = f"{seconds:6.1f} s  {name}: {text}"
            self._console.print(Text(line), soft_wrap=True)

    def _view(self) -> Group:
        width = max(map(len, self._names), default=0)
        return Group(
            *(
                Text(f"{name:<{width}}  {self._state[name]}", style=_colour(number))
                for number, name in enumerate(self._names)
            )
        )


class Stream:
    """Show completions line by line, each line with its server and prompt number.

    Lines of concurrent requests interleave as whole lines; on a terminal, unfinished lines grow
    below them. A context manager; `update` fits `run_prompts`.
    """

    def __init__(self, console: Console, names: Sequence[str], prompts: Sequence[Prompt]) -> None:
        self._console = console
        self._names = names
        self._name_width = max(map(len, names), default=0)
        self._number_width = len(str(max((p.index for p in prompts), default=0)))
        #: Prompt and text not printed yet of running requests, by prompt number.
        self._open: dict[int, tuple[Prompt, str]] = {}
        self._live = (
            Live(console=console, refresh_per_second=8, transient=True, get_renderable=self._view)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Stream:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        for prompt, text in self._open.values():
            self._print(prompt, text)
        self._open.clear()

    def update(self, prompt: Prompt, delta: OutputDelta) -> None:
        """Show that a completion has grown or ended."""
        _, text = self._open.get(prompt.index, (prompt, ""))
        lines, rest = _cut(text + printable(delta.text))
        for line in lines:
            self._print(prompt, line)
        self._open[prompt.index] = (prompt, rest)
        if delta.finish_reason is None:
            return
        del self._open[prompt.index]
        if rest:
            self._print(prompt, rest)
        if delta.finish_reason == "error":
            self._print(prompt, f"error: {printable(str(delta.stop_reason))}", "bold red")
        elif delta.finish_reason != "stop":
            self._print(prompt, f"[{delta.finish_reason}]", "dim")

    def _print(self, prompt: Prompt, text: str, style: str = "") -> None:
        self._console.print(self._line(prompt, text, style), soft_wrap=True)

    def _line(self, prompt: Prompt, text: str, style: str = "") -> Text:
        head = (
            f"{self._names[prompt.rank]:<{self._name_width}} {prompt.index:>{self._number_width}}"
        )
        return Text.assemble((head, _colour(prompt.rank)), (" | ", "dim"), (text, style))

    def _view(self) -> Group:
        # The newest requests, as many as fit; Live must not outgrow the screen.
        room = max(1, self._console.size.height - 2)
        running = list(self._open.values())[-room:]
        lines = [self._line(prompt, text, "italic") for prompt, text in running]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(*lines)


def _cut(text: str) -> tuple[list[str], str]:
    """Split text into whole lines (long lines broken at a space) and the unfinished rest."""
    *lines, rest = text.split("\n")
    out = []
    for line in lines:
        while len(line) > _WIDTH:
            part, line = _break(line)
            out.append(part)
        out.append(line)
    while len(rest) > _WIDTH:
        part, rest = _break(rest)
        out.append(part)
    return out, rest


def _break(line: str) -> tuple[str, str]:
    at = line.rfind(" ", 1, _WIDTH) + 1 or _WIDTH
    return line[:at].rstrip(" "), line[at:]


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


@contextlib.contextmanager
def placing(console: Console, policy: str) -> Iterator[None]:
    """Show that a placement policy is running, which may take a while."""
    text = Text(f"placing experts ({policy})")
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(text, soft_wrap=True)
        yield


def download(console: Console) -> Callable[[str, int, int], None] | None:
    """Make a progress function for `hub.resolve` that prints a line per file.

    Returns:
        None on a terminal, where the download library shows its own bars.
    """
    if console.is_terminal:
        return None
    return lambda text, number, total: console.print(
        Text(f"{text} {number} of {total}"), soft_wrap=True
    )


@contextlib.contextmanager
def conversion(console: Console) -> Iterator:
    """Yield a progress function for `ensure_converted` that shows a line while converting."""
    shown = ""

    def progress(text: str, done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // total if total else 0
        line = f"{text} the model (on first use): {percent} %"
        if console.is_terminal:
            console.print(Text(line), end="\r", soft_wrap=True)
        elif not shown or percent == 100:
            console.print(Text(line), soft_wrap=True)
        shown = line

    yield progress
    if shown and console.is_terminal:
        console.print()
