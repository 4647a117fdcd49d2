"""Requests of users who change from one task to another during a run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from dance_jax.bench.arrivals import answer_lengths, poisson
from dance_jax.bench.client import Call
from dance_jax.config import UserError
from dance_jax.models.tokenizer import Tokenizer

#: Most likely tokens to return with each token, for the margin between the best two.
LOGPROBS = 2
#: Maximum number of salt tokens before a prompt.
LONGEST_SALT = 8


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompts of one kind.

    Attributes:
        name: of the task.
        fit: prompts that placements are fitted to.
        asked: other prompts, which users send.
    """

    name: str
    fit: tuple[str, ...]
    asked: tuple[str, ...]


def read_task(path: pathlib.Path) -> Task:
    """Read a task from a JSON Lines file; every other prompt is for fitting, the first included.

    Raises:
        UserError: the file cannot be read, or has fewer than two prompts.
    """
    prompts = read_prompts(path)
    if len(prompts) < 2:
        raise UserError(f"{path}: a task needs at least two prompts")
    return Task(path.name.partition(".")[0], tuple(prompts[::2]), tuple(prompts[1::2]))


def read_prompts(path: pathlib.Path) -> list[str]:
    """Read the prompts of a JSON Lines file.

    Raises:
        UserError: the file cannot be read, or a line is not {"prompt": text}.
    """
    found = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                prompt = json.loads(line)["prompt"]
                if not isinstance(prompt, str) or not prompt:
                    raise ValueError(f"line {number} has no text")
                found.append(prompt)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not JSON Lines of prompts: {error}") from error
    return found


def write_fit(path: pathlib.Path, tasks: Sequence[Task], names: Sequence[str], most: int) -> None:
    """Write a file for `dance_jax.launch --prompts` with prompts that placements are fitted to.

    Args:
        path: of the file.
        tasks: the task of each server.
        names: of the servers.
        most: maximum number of prompts per server.
    """
    lines = [
        json.dumps({"prompt": prompt, "server": name})
        for name, task in zip(names, tasks, strict=True)
        for prompt in task.fit[:most]
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Requests of a run.

    Attributes:
        calls: in the order of their arrival.
        shift_s: second at which the users of the last server have changed to the next task.
    """

    calls: tuple[Call, ...]
    shift_s: float

    def after(self, moment_s: float) -> Plan:
        """Return the requests that arrive from `moment_s` on, which becomes second 0."""
        late = [call for call in self.calls if call.arrival_s >= moment_s]
        moved = [dataclasses.replace(c, arrival_s=c.arrival_s - moment_s) for c in late]
        return Plan(tuple(moved), max(0.0, self.shift_s - moment_s))


class Askers:
    """Users of all servers.

    Args:
        tokenizer: of the model.
        context: maximum tokens of a prompt and its answer; longer prompts are cut.
        longest: maximum tokens of an answer.
        rate: requests per second of each server.
        seed: of arrivals, choices and lengths.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: int, longest: int, rate: float, seed: int
    ) -> None:
        self._tokenizer, self._context, self._longest = tokenizer, context, longest
        self._rate, self._seed = rate, seed

    def plan(
        self, phases: Sequence[Sequence[Task]], requests: int, salt: Sequence[int] = ()
    ) -> Plan:
        """Plan `requests` requests per server and phase, one phase after the other.

        Args:
            phases: for each phase, the task of each server.
            requests: per server and phase.
            salt: tokens put before every prompt. A new salt makes the servers' prefix caches miss.
        """
        servers = len(phases[0])
        streams = [self._prompts(server, phases, requests) for server in range(servers)]
        lengths = answer_lengths(
            servers * requests * len(phases), self._longest, np.random.default_rng(self._seed)
        )
        left, seen, shift_s = servers * requests * len(phases), [0] * servers, 0.0
        calls = []
        for arrival in poisson([self._rate] * servers, self._seed):
            server = arrival.server
            if seen[server] == requests * len(phases):
                continue
            seen[server] += 1
            left -= 1
            if seen[server] == requests + 1:
                shift_s = max(shift_s, arrival.at_s)
            prompt, length = [*salt, *next(streams[server])], lengths[left]
            calls.append(Call(server, prompt, length, arrival.at_s, logprobs=LOGPROBS))
            if not left:
                break
        return Plan(tuple(calls), shift_s)

    def streams(self, tasks: Sequence[Task], count: int) -> list[Call]:
        """Return `count` requests per server, all at second 0, with answers as long as possible."""
        calls = []
        for server, task in enumerate(tasks):
            for prompt in itertools.islice(itertools.cycle(task.asked), count):
                tokens = self._cut(prompt, self._context // 4 * 3)
                calls.append(Call(server, tokens, self._context - len(tokens) - 1))
        return calls

    def _prompts(
        self, server: int, phases: Sequence[Sequence[Task]], requests: int
    ) -> Iterator[list[int]]:
        rng = np.random.default_rng([self._seed, server])
        for tasks in phases:
            asked = tasks[server].asked
            order = [
                n for _ in range(-(-requests // len(asked))) for n in rng.permutation(len(asked))
            ]
            for number in order[:requests]:
                yield self._cut(asked[number], self._longest)

    def _cut(self, prompt: str, answer: int) -> list[int]:
        return self._tokenizer.encode(prompt)[: self._context - answer - LONGEST_SALT - 1]
