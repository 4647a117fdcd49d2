"""Cuts requests into steps, by the rule of engine/scheduler.

The rule is written a second time because `placement` cannot import `engine`, and because the
engine's scheduler also handles tokens, KV blocks and cached prefixes and takes ten times as long.
Here KV blocks never run out. A test compares the plans with the engine's, step by step.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import NamedTuple

from dance_jax.config import EngineConfig
from research.simulator.scenario import Bucket


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """A request under way; `prompt` to `sampled` are numbers of tokens."""

    #: The number of the request.
    request: int
    prompt: int
    output: int
    computed: int = 0
    sampled: int = 0
    #: -1 while it waits.
    device: int = -1

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt


class Plan(NamedTuple):
    """One step of one server."""

    #: (0, 0) if there is nothing to do.
    bucket: Bucket
    #: Sequences, each with the number of its next tokens that the step computes.
    work: list[tuple[Sequence, int]]
    #: Some sequence decodes.
    decoding: bool
    #: For each device, the positions that its tokens attend to: each token's own and all before it.
    positions: tuple[int, ...]


NOTHING = Plan((0, 0), [], False, ())


class Batches:
    """The requests of one server; the cycle is `add`, then `schedule` and `commit`."""

    def __init__(self, config: EngineConfig, devices: int) -> None:
        self.config = config
        self._waiting: collections.deque[Sequence] = collections.deque()
        #: The sequences of each device, oldest first.
        self._running: list[list[Sequence]] = [[] for _ in range(devices)]

    @property
    def active(self) -> bool:
        """Whether some sequence waits or runs."""
        return bool(self._waiting) or any(self._running)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def schedule(self, others_decode: bool = False) -> Plan:
        """Plans the next step; `NOTHING` if no sequence waits or runs.

        Args:
            others_decode: sequences decode on other servers, which wait for this server.
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
        """Notes that the step ran; returns the sequences that got a token, finished or not."""
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
        """Rows of a slice that each device may take; few if any sequence decodes."""
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
