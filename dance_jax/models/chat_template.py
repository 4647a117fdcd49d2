"""A model's chat template, rendered in a process with limited memory and CPU time."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import weakref
from typing import Any, BinaryIO, cast

import jinja2

from dance_jax.config import UserError
from dance_jax.models import chat_renderer
from dance_jax.models.chat_renderer import CPU_S, read_frame, write_frame
from dance_jax.models.directory import check_no_pointer


def read_template(path: str | os.PathLike[str] | None) -> tuple[str, str] | None:
    """Read a file with a chat template.

    Args:
        path: of the file; None: there is none.

    Returns:
        The template, and where it is from.

    Raises:
        UserError: the file cannot be read, or the template has a syntax error.
    """
    if path is None:
        return None
    where = f"--chat-template {os.fspath(path)}"
    try:
        content = pathlib.Path(path).read_bytes()
        check_no_pointer(content, pathlib.Path(path))
        source = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read: {error}") from error
    ChatTemplate(source, where)
    return source, where


class TemplateFailure(UserError):
    """A template gave no text; `reason` says why, without the template's file."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: chat template: {reason}")
        self.reason = reason


class TemplateRefusal(TemplateFailure):
    """A template refuses the messages, or cannot handle them."""


class TemplateTooCostly(TemplateFailure):
    """A template needs more memory or time than it may have."""


class ChatTemplate:
    """A chat template. The first rendering starts the process, which serves the next ones too.

    Args:
        source: the template.
        where: the file that it is from, for messages.

    Raises:
        UserError: the template has a syntax error.
    """

    def __init__(self, source: str, where: str) -> None:
        self._source, self.where = source, where
        self._lock = threading.Lock()
        self._renderer: _Renderer | None = None
        try:
            chat_renderer.environment().parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{where}: chat template, line {error.lineno}: {error.message}"
            ) from error
        except Exception as error:  # e.g. brackets in brackets, a number of many digits
            raise UserError(f"{where}: chat template: cannot be parsed: {error}") from error

    def mentions(self, role: str) -> bool:
        """Whether the template compares something with this role."""
        return f"'{role}'" in self._source or f'"{role}"' in self._source

    def render(self, names: dict[str, Any]) -> str:
        """Render a text; several threads may call this, and one waits for the other.

        Args:
            names: the template's variables, of types that JSON has.

        Raises:
            TemplateRefusal: the template refuses the variables.
            TemplateTooCostly: the template exceeds a limit.
            UserError: the variables are not JSON.
        """
        try:
            with self._lock:
                if self._renderer is None or self._renderer.ended:
                    self._renderer = _Renderer()
                    self._ask(self._source)
                return self._ask(names)
        except TypeError as error:
            raise UserError(f"messages: must be text, numbers, lists and dicts: {error}") from error

    def _ask(self, content: Any) -> str:
        """The text that the process answers; the process is given up if there is none."""
        assert self._renderer is not None
        renderer, self._renderer = self._renderer, None
        answer = renderer.ask(content)
        if "exceeded" in answer:
            raise TemplateTooCostly(self.where, answer["exceeded"])
        if "refused" in answer and content is self._source:
            raise TemplateRefusal(self.where, answer["refused"])
        self._renderer = renderer
        if "refused" in answer:
            raise TemplateRefusal(self.where, answer["refused"])
        return answer["text"]


class _Renderer:
    """A process of `chat_renderer`; it ends with this object, or with this process."""

    def __init__(self) -> None:
        # -P: the directory of the file must not be searched for modules.
        self._process = subprocess.Popen(
            [sys.executable, "-P", chat_renderer.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        weakref.finalize(self, _end, self._process)

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def ask(self, content: Any) -> dict[str, str]:
        """The answer to a frame.

        Raises:
            TypeError: the content cannot be JSON.
        """
        try:
            write_frame(cast("BinaryIO", self._process.stdin), content)
            answer = read_frame(cast("BinaryIO", self._process.stdout))
        except BrokenPipeError:
            answer = None
        if answer is not None:
            return answer
        if self._process.wait() == -signal.SIGXCPU:
            return {"exceeded": f"it needs more than {CPU_S} s of CPU time"}
        return {"exceeded": f"its process ended with status {self._process.returncode}"}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError), process:
        pass  # closes the pipes and waits
