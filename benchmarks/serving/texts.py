"""Real text as prompts, by server: as it is, or cut to a length."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from dance_jax.config import UserError
from dance_jax.models.tokenizer import Tokenizer

#: First tokens of a cut prompt, drawn at random: no two begin alike, nothing of them is cached.
FRESH = 3


class Texts:
    """Tokens of prompts.

    Args:
        prompts: of each server, tokens of each prompt; none is empty.
    """

    def __init__(self, prompts: Sequence[Sequence[list[int]]]) -> None:
        self._prompts = prompts
        self._tokens = [np.concatenate([np.array(p) for p in own]) for own in prompts]

    def whole(self, server: int, rng: np.random.Generator) -> list[int]:
        """One of the server's prompts."""
        own = self._prompts[server]
        return own[int(rng.integers(len(own)))]

    def cut(self, server: int, length: int, rng: np.random.Generator) -> list[int]:
        """`length` tokens from anywhere in the server's prompts, with a beginning of their own."""
        tokens = self._tokens[server]
        start = int(rng.integers(len(tokens)))
        found = tokens.take(range(start, start + length), mode="wrap")
        fresh = min(FRESH, length)
        found[:fresh] = rng.choice(tokens, fresh)
        return found.tolist()


def task_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """
    Raises:
        UserError: there are none.
    """
    files = sorted(directory.glob("*.jsonl"))
    if not files:
        raise UserError(f"--tasks {directory}: no *.jsonl there")
    return files


def read_texts(files: Sequence[pathlib.Path], servers: int, tokenizer: Tokenizer) -> Texts:
    """Task files, dealt to the servers in turn; few files go round several times.

    Args:
        files: JSON Lines with a "prompt" in each.

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
            raise UserError(f'{path}:{number}: a line is {{"prompt": "..."}}: {error}') from error
        if not tokens:
            raise UserError(f"{path}:{number}: prompt: it has no tokens")
        found.append(tokens)
    if not found:
        raise UserError(f"{path}: no prompts")
    return found
