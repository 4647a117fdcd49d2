"""The process that renders chat templates, `python -P chat_renderer.py`; see `chat_template`.

A template is a program of a stranger, which may loop without end or ask for any amount of memory.
So it runs in a process with limits of its own. This file imports only jinja2 and the standard
library, because a process that imports more takes longer to start.

Standard input has one frame with the template, then one for each text to render; standard output
has one answer to each frame. A frame is 8 bytes little-endian length and JSON.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

#: Limits of one rendering: seconds of CPU time (one more may be granted, because the kernel counts
#: whole seconds), bytes of address space of the process, and characters of the text.
CPU_S, MEMORY, MAX_TEXT = 5, 1 << 29, 1 << 23


class Generation(jinja2.ext.Extension):
    """Supports {% generation %} ... {% endgeneration %}, a mark for training: renders the body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        next(parser.stream)
        # What is set inside ends with the block, as in transformers.
        return jinja2.nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True)
        )


def environment() -> jinja2.Environment:
    """A sandbox with the names that Hugging Face's templates rely on."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = _strftime_now
    return made


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # The filter of jinja2 would escape for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def read_frame(file: BinaryIO) -> Any:
    """The next frame's content; None if there is none, or only a part of one."""
    head = file.read(8)
    length = int.from_bytes(head, "little")
    content = file.read(length) if len(head) == 8 else b""
    return json.loads(content) if content and len(content) == length else None


def write_frame(file: BinaryIO, content: Any) -> None:
    """Write a frame."""
    data = json.dumps(content).encode()
    file.write(len(data).to_bytes(8, "little") + data)
    file.flush()


def main() -> None:
    """Answer frames until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    bound = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (bound, most))
    for answer in _answers(sys.stdin.buffer):
        write_frame(sys.stdout.buffer, answer)
        if "exceeded" in answer:
            break  # the memory may be in pieces: the parent starts another process


def _answers(frames: BinaryIO) -> Iterator[dict[str, str]]:
    """The answers: "text", or why there is none, in "refused" or "exceeded"."""
    template = None
    while (frame := read_frame(frames)) is not None:
        _limit_cpu()
        try:
            if template is None:
                # The compiler computes constant expressions.
                template = environment().from_string(frame)
                yield {"text": ""}
            else:
                yield _rendered(template, frame)
        except MemoryError:
            yield {"exceeded": f"it needs more than {MEMORY >> 20} MiB of memory"}
        except Exception as error:  # a template is a program, which can raise anything
            yield {"refused": str(error) or type(error).__name__}


class _Arguments(dict):
    """Arguments of a call. A template that takes them for text gets JSON, as models write it."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)


def _with_arguments(messages: list[dict[str, Any]]) -> None:
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
                function["arguments"] = _Arguments(function["arguments"])


def _rendered(template: jinja2.Template, names: dict[str, Any]) -> dict[str, str]:
    _with_arguments(names.get("messages") or [])
    parts, length = [], 0
    for part in template.generate(names):
        parts.append(part)
        length += len(part)
        if length > MAX_TEXT:
            return {"exceeded": f"its text is longer than {MAX_TEXT} characters"}
    return {"text": "".join(parts)}


def _limit_cpu() -> None:
    """Let the kernel kill this process if it uses CPU_S more seconds of CPU time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_S + 1, most))


if __name__ == "__main__":
    main()
    # Exit at once: to free a large object may take long.
    sys.stdout.flush()
    os._exit(0)
