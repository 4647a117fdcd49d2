"""Requests cut into steps, by the rule of engine/scheduler.

A second writing of that rule: `placement` cannot import `engine`, and the engine's scheduler also
handles tokens, KV blocks and cached prefixes, at ten times the time per step. Here blocks never run
out. A test holds this to the engine's plans, step by step.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import NamedTuple

from dance_jax.config import EngineConfig
from research.simulator.scenario import Bucket


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """A request under way; numbers are tokens."""

    #: Its number.
    request: int
    prompt: int
    output: int
    computed: int = 0
    sampled: int = 0
    #: -1: it waits.
    device: int = -1

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt


class Plan(NamedTuple):
    """One step of one server."""

    #: (0, 0): nothing to do.
    bucket: Bucket
    #: Each sequence with the number of its next tokens that are computed.
    work: list[tuple[Sequence, int]]
    #: Some of it is a decode.
    decoding: bool
    #: Positions that the tokens of each device attend to, each its own and all before it.
    positions: tuple[int, ...]


NOTHING = Plan((0, 0), [], False, ())


class Batches:
    """The requests of one server; the cycle is `add`, then `schedule` and `commit`."""

    def __init__(self, config: EngineConfig, devices: int) -> None:
        self.config = config
        self._waiting: collections.deque[Sequence] = collections.deque()
        #: Of each device, oldest first.
        self._running: list[list[Sequence]] = [[] for _ in range(devices)]

    @property
    def active(self) -> bool:
        """Some sequence waits or runs."""
        return bool(self._waiting) or any(self._running)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def schedule(self, others_decode: bool = False) -> Plan:
        """The next step; `NOTHING` where nothing waits or runs.

        Args:
            others_decode: sequences decode on other servers, which wait for this one.
        """
        if not self.active:
            return NOTHING
        self._admit()
        most_rows = self._most_rows(others_decode)
        work, decodes, rows, positions = [], 0, 0, []
        for running in self._running:
            own_decodes, left, begin = 0, most_rows, len(work)
            for sequence in running:
                if not sequence.prefilling:
                    own_decodes += 1
                    work.append((sequence, 1))
                elif left:
                    pending, size = sequence.prompt - sequence.computed, self.config.block_size
                    count = min(left, -(-pending // size))
                    work.append((sequence, min(count * size, pending)))
                    left -= count
            decodes, rows = max(decodes, own_decodes), max(rows, most_rows - left)
            positions.append(
                sum(n * sequence.computed + n * (n + 1) // 2 for sequence, n in work[begin:])
            )
        return Plan(self._bucket(decodes, rows), work, decodes > 0, tuple(positions))

    def commit(self, plan: Plan) -> list[Sequence]:
        """The step ran; returns the sequences that got a token, among them those that are done."""
        got = []
        for sequence, count in plan.work:
            sequence.computed += count
            if sequence.computed == sequence.prompt + sequence.sampled:
                sequence.sampled += 1
                got.append(sequence)
                if sequence.sampled == sequence.output:
                    self._running[sequence.device].remove(sequence)
        return got

    def _admit(self) -> None:
        while self._waiting:
            device = min(range(len(self._running)), key=lambda d: len(self._running[d]))
            if len(self._running[device]) >= self.config.max_num_seqs:
                return
            sequence = self._waiting.popleft()
            sequence.device = device
            self._running[device].append(sequence)

    def _most_rows(self, others_decode: bool) -> int:
        """Rows of a slice that each device may take: few beside a decode."""
        sizes = self.config.slice_rows
        prompts = [sum(s.prefilling for s in running) for running in self._running]
        decoding = any(
            len(running) > count for running, count in zip(self._running, prompts, strict=True)
        )
        if not (others_decode or decoding):
            return sizes[-1]
        return max(size for size in sizes if size <= max(*prompts, sizes[0]))

    def _bucket(self, decodes: int, rows: int) -> Bucket:
        return next(
            (decode, size)
            for decode, size in self.config.buckets
            if decode >= decodes and size >= rows
        )
