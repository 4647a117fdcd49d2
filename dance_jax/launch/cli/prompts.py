"""Read prompt files (JSON Lines), and check where results go before a run."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

from dance_jax.config import ClusterSpec, UserError
from dance_jax.engine.sequence import MAX_TOKENS

KEYS = ("prompt", "server", "max_tokens", "temperature")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One line of a prompts file."""

    #: Position among the prompts, from 0.
    index: int
    text: str
    #: Rank of the server that answers.
    rank: int
    max_tokens: int
    #: 0 is greedy.
    temperature: float = 0.0


def read_prompts(path: str | os.PathLike[str], spec: ClusterSpec, max_tokens: int) -> list[Prompt]:
    """Read a file with one prompt per line.

    A line is `{"prompt", "server"?, "max_tokens"?, "temperature"?}`; blank lines are skipped.
    Prompts without a server go to the servers in turn, in the order of both files.

    Args:
        path: the file.
        spec: the servers.
        max_tokens: output tokens of lines without max_tokens.

    Raises:
        UserError: the file cannot be read, has no prompt, or a line is wrong; the message names
            the file, line and field.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the prompts cannot be read: {error}") from error
    prompts: list[Prompt] = []
    turn = 0
    # Not splitlines(): JSON strings may hold other line separators as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        fields = _fields(line, where)
        if "server" in fields:
            rank = _rank(fields["server"], spec, where)
        else:
            rank, turn = turn % len(spec.servers), turn + 1
        prompts.append(
            Prompt(
                index=len(prompts),
                text=_text(fields, where),
                rank=rank,
                max_tokens=_max_tokens(fields.get("max_tokens", max_tokens), where),
                temperature=_temperature(fields.get("temperature", 0.0), where),
            )
        )
    if not prompts:
        raise UserError(
            f'{path}: has no prompts; write one prompt per line, e.g. {{"prompt": "..."}}'
        )
    return prompts


def _fields(line: str, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            raise UserError(f"{where}: {twice}: given twice")
        return found

    try:
        fields = json.loads(line, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: a number is too long: {error}") from error
    except RecursionError as error:
        raise UserError(f"{where}: not a prompt: nested too deeply") from error
    if not isinstance(fields, dict):
        raise UserError(f'{where}: must be an object, e.g. {{"prompt": "..."}}')
    for key in fields:
        if key not in KEYS:
            raise UserError(f"{where}: {key}: unknown key; the keys are {', '.join(KEYS)}")
    return fields


def _text(fields: dict[str, Any], where: str) -> str:
    if "prompt" not in fields:
        raise UserError(f"{where}: prompt: missing")
    text = fields["prompt"]
    if not isinstance(text, str):
        raise UserError(f"{where}: prompt: must be a string, not {text!r}")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise UserError(f"{where}: prompt: contains half of a surrogate pair (not a character)")
    return text


def _rank(name: Any, spec: ClusterSpec, where: str) -> int:
    if not isinstance(name, str) or name not in spec.names:
        raise UserError(
            f"{where}: server: {name!r} is unknown; the servers are {', '.join(spec.names)}"
        )
    return spec.names.index(name)


def _max_tokens(value: Any, where: str) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 1 <= value <= MAX_TOKENS:
        raise UserError(
            f"{where}: max_tokens: must be a whole number from 1 to {MAX_TOKENS}, not {value!r}"
        )
    return value


def _temperature(value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= sys.float_info.max:
        raise UserError(f"{where}: temperature: must be a number of at least 0, not {value!r}")
    return float(value)


def check_writable(path: str | os.PathLike[str], option: str) -> None:
    """Check before a run that its result can be written.

    Raises:
        UserError: the path is a directory, or its folder is missing or not writable.
    """
    path = pathlib.Path(path)
    folder = path.absolute().parent
    if path.is_dir():
        raise UserError(f"{option} {path}: is a directory; name a file")
    if is_special(path):  # written to in place, not replaced
        if not os.access(path, os.W_OK):
            raise UserError(f"{option} {path}: is not writable")
        return
    if not folder.is_dir():
        raise UserError(f"{option} {path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{option} {path}: the folder {folder} is not writable")


def check_directory(path: pathlib.Path, option: str) -> None:
    """Make a directory for results, and check that files can be written there.

    Raises:
        UserError: they cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Trying is the only check that is right on every file system, and for root.
        with tempfile.NamedTemporaryFile(dir=path, prefix=".dance-jax-"):
            pass
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise UserError(
            f"{option} {path}: no file can be written there: {why}; name another directory, or "
            "change its owner or permissions"
        ) from error


def is_special(path: pathlib.Path) -> bool:
    """Whether the path is a device or a pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def same_file(path: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether both paths name one file; two results may go to the same device or pipe."""
    return not is_special(path) and path.resolve() == other.resolve()
