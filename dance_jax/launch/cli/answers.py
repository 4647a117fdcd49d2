"""The answers of a batch as JSON Lines (`--output`)."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import IO, Any, Self

from dance_jax.config import UserError
from dance_jax.engine.sequence import RequestOutput
from dance_jax.files import whole_file
from dance_jax.launch.cli.prompts import Prompt, is_special


def answer_line(name: str, prompt: Prompt, output: RequestOutput) -> dict[str, Any]:
    """An answer as a line of --output; it has "error" only if the prompt failed.

    Args:
        name: of the server.
    """
    sample = output.outputs[0]
    line = {
        "index": prompt.index,
        "server": name,
        "prompt": prompt.text,
        "text": sample.text,
        "token_ids": sample.token_ids,
        "finish_reason": sample.finish_reason,
        "metrics": {"ttft_s": output.metrics.ttft_s, "e2e_s": output.metrics.e2e_s},
    }
    if sample.finish_reason == "error":
        line["error"] = str(sample.stop_reason)
    return line


class AnswerFile:
    """Keeps answers as they end, and writes them in the order of the prompts once all have ended.

    Until then the answers are in PATH.partial, in the order in which they ended. That file stays if
    the batch ends early, whatever ends it. A device or a pipe gets the answers at the end only. A
    context manager.

    Args:
        path: the file; None: answers are not kept.
        names: of the servers, by rank.
        notice: called with a message if the batch ends early.

    Raises:
        UserError: PATH.partial cannot be written.
    """

    def __init__(
        self, path: pathlib.Path | None, names: Sequence[str], notice: Callable[[str], object]
    ) -> None:
        self._path, self._names, self._notice = path, names, notice
        self._lines: dict[int, bytes] = {}
        self._whole = path is None
        self._partial: pathlib.Path | None = None
        self._file: IO[bytes] | None = None
        if path is not None and not is_special(path):
            self._partial = path.with_name(f"{path.name}.partial")
            try:
                self._file = self._partial.open("wb", buffering=0)
            except OSError as error:
                raise UserError(f"--output: {self._partial} cannot be written: {error}") from error

    def add(self, prompt: Prompt, output: RequestOutput) -> None:
        """Keep an answer."""
        line = answer_line(self._names[prompt.rank], prompt, output)
        content = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        if self._path is not None:
            self._lines[prompt.index] = content
        if self._file is not None:
            try:
                self._file.write(content)
            except OSError as error:  # the batch goes on: there may be room at its end
                self._notice(f"{self._partial} is incomplete, it cannot be written: {error}")
                self._file.close()
                self._file = None

    def write(self) -> None:
        """Write all answers; the file appears whole or not at all."""
        if self._path is not None:
            with whole_file(self._path) as file:
                file.writelines(self._lines[index] for index in sorted(self._lines))
        self._whole = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._partial is None:
            return
        if self._file is not None:
            self._file.close()
        if self._whole or not self._lines:
            self._partial.unlink(missing_ok=True)
        else:
            count = len(self._lines)
            self._notice(f"complete answers: {count}, in {self._partial}")
