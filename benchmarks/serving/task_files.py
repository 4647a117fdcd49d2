"""Task files: JSON Lines files of prompts, one file per kind of task."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from dance_jax.bench.texts import Texts
from dance_jax.config import UserError
from dance_jax.models.tokenizer import Tokenizer


def task_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """Return the task files (*.jsonl) of a directory, sorted.

    Raises:
        UserError: the directory has no such file.
    """
    files = sorted(directory.glob("*.jsonl"))
    if not files:
        raise UserError(f"--tasks {directory}: no *.jsonl files in this directory")
    return files


def read_texts(files: Sequence[pathlib.Path], servers: int, tokenizer: Tokenizer) -> Texts:
    """Read task files and assign them to the servers in turn; files repeat if there are too few.

    Args:
        files: JSON Lines files with a "prompt" in each line.
        servers: number of servers.
        tokenizer: of the model.

    Raises:
        UserError: a file cannot be read, or a line has no prompt.
    """
    tokens = [_read(path, tokenizer) for path in files]
    return Texts(
        [
            [
                prompt
                for n in range(max(servers, len(files)))
                if n % servers == server
                for prompt in tokens[n % len(files)]
            ]
            for server in range(servers)
        ]
    )


def _read(path: pathlib.Path, tokenizer: Tokenizer) -> list[list[int]]:
    found = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
            tokens = tokenizer.encode(prompt)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f'{path}:{number}: not {{"prompt": "..."}}: {error}') from error
        if not tokens:
            raise UserError(f"{path}:{number}: the prompt has no tokens")
        found.append(tokens)
    if not found:
        raise UserError(f"{path}: the file has no prompts")
    return found
