"""Which sequence computes which tokens in the next step; plain Python, no arrays.

Every device has `max_num_seqs` slots; a sequence keeps one slot from admission to its end. A step
is one compiled bucket (rows, chunk) for all devices of the server.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq

from dance_jax.config import EngineConfig, UserError
from dance_jax.engine.sequence import Sequence

#: Prefill steps in a row while decoding sequences wait; then they get one step.
MAX_PREFILL_STREAK = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """What one row of one device computes in a step."""

    sequence: Sequence
    #: Place in the bucket, 0..rows-1.
    index: int
    #: Slot of the sequence on its device, 0..max_num_seqs-1.
    slot: int
    #: Position of the first token; positions before it are in the slot's cache.
    start: int
    #: 1..chunk token ids.
    tokens: list[int]
    #: All known tokens are then computed, so the next one is sampled from the last one's logits.
    sample: bool


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of one server: the bucket and, per device, the rows in use.

    Chunk 1 is decode, more is prefill; an empty plan (rows 0) computes nothing. In a decode with
    rows == max_num_seqs every row's index is its slot.
    """

    rows: int
    chunk: int
    entries: tuple[tuple[Row, ...], ...]

    @property
    def empty(self) -> bool:
        return self.rows == 0

    @property
    def num_tokens(self) -> int:
        """Tokens computed, without padding."""
        return sum(len(row.tokens) for rows in self.entries for row in rows)


class Scheduler:
    """Admits sequences first come, first served, and cuts their work into steps.

    The cycle: `add`; then `schedule` -> run -> `commit`, append the sampled tokens to their
    sequences, `finish` those that are done.

    Args:
        config: its max_num_seqs, decode_rows and prefill are used.
        devices: devices of this server.

    Raises:
        UserError: buckets that leave some work without a step.
    """

    def __init__(self, config: EngineConfig, devices: int) -> None:
        _check_buckets(config)
        self.config = config
        self.devices = devices
        self.waiting: collections.deque[Sequence] = collections.deque()
        #: Admitted sequences of each device, oldest first.
        self.running: list[list[Sequence]] = [[] for _ in range(devices)]
        #: Free slots of each device, as heaps: the lowest is taken first.
        self._free = [list(range(config.max_num_seqs)) for _ in range(devices)]
        self._prefill_streak = 0
        self._uncommitted = False

    @property
    def active(self) -> bool:
        """Some sequence waits or runs."""
        return bool(self.waiting) or any(self.running)

    @property
    def num_running(self) -> int:
        return sum(map(len, self.running))

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; its prompt is not empty and fits the context."""
        self.waiting.append(sequence)

    def schedule(self) -> StepPlan:
        """Admit what fits and plan the next step.

        Prompts come before decoding, because a fuller batch decodes at the same cost; but after
        MAX_PREFILL_STREAK such steps sequences that can decode get one.
        """
        if self._uncommitted:
            raise RuntimeError("schedule() before commit() of the last plan")
        self._admit()
        prefilling = [[s for s in device if s.prefilling] for device in self.running]
        decoding = [[s for s in device if not s.prefilling] for device in self.running]
        rested = any(decoding) and self._prefill_streak >= MAX_PREFILL_STREAK
        if any(prefilling) and not rested:
            self._prefill_streak += 1
            plan = self._plan_prefill(prefilling)
        else:
            self._prefill_streak = 0
            plan = self._plan_decode(decoding)
        self._uncommitted = not plan.empty
        return plan

    def commit(self, plan: StepPlan) -> None:
        """The step ran: its tokens are in the cache."""
        for rows in plan.entries:
            for row in rows:
                row.sequence.num_computed += len(row.tokens)
        self._uncommitted = False

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting; its slot is free at once."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
            return
        self.running[sequence.device].remove(sequence)
        heapq.heappush(self._free[sequence.device], sequence.slot)
        sequence.device = sequence.slot = -1

    def abort(self, request_id: str | None = None) -> list[Sequence]:
        """Forget the sequences of a request, or all of them; returns them."""
        everything = [*self.waiting, *(s for device in self.running for s in device)]
        gone = [s for s in everything if request_id in (None, s.request_id)]
        for sequence in gone:
            self.finish(sequence)
        return gone

    def _admit(self) -> None:
        """First come, first served, to the device with the most free slots (the lowest of them)."""
        while self.waiting:
            device = max(range(self.devices), key=lambda d: len(self._free[d]))
            if not self._free[device]:
                return
            sequence = self.waiting.popleft()
            sequence.device = device
            sequence.slot = heapq.heappop(self._free[device])
            self.running[device].append(sequence)

    def _plan_prefill(self, work: list[list[Sequence]]) -> StepPlan:
        """The bucket that gets most done, the smallest of them; the oldest sequences first."""

        def useful(bucket: tuple[int, int]) -> int:
            rows, chunk = bucket
            return sum(min(s.num_pending, chunk) for device in work for s in device[:rows])

        rows, chunk = max(self.config.prefill, key=lambda b: (useful(b), -b[0] * b[1]))
        entries = tuple(
            tuple(_row(sequence, index, chunk) for index, sequence in enumerate(device[:rows]))
            for device in work
        )
        return StepPlan(rows, chunk, entries)

    def _plan_decode(self, work: list[list[Sequence]]) -> StepPlan:
        """One token of every decoding sequence; the smallest bucket for the busiest device."""
        busiest = max(map(len, work), default=0)
        if not busiest:
            return StepPlan(0, 0, ((),) * self.devices)
        rows = next(rows for rows in self.config.decode_rows if rows >= busiest)
        full = rows == self.config.max_num_seqs
        entries = tuple(
            tuple(
                _row(sequence, sequence.slot if full else index, 1)
                for index, sequence in enumerate(sorted(device, key=lambda s: s.slot))
            )
            for device in work
        )
        return StepPlan(rows, 1, entries)


def _row(sequence: Sequence, index: int, chunk: int) -> Row:
    start = sequence.num_computed
    tokens = sequence.tokens(start, chunk)
    if not tokens:
        raise RuntimeError(f"{sequence.request_id}: its sampled token was not appended")
    sample = start + len(tokens) == sequence.num_tokens
    return Row(sequence, index, sequence.slot, start, tokens, sample)


def _check_buckets(config: EngineConfig) -> None:
    rows = config.decode_rows
    if not rows or list(rows) != sorted(set(rows)) or rows[0] < 1:
        raise UserError(f"decode_rows: ascending positive sizes are needed; got {rows}")
    if rows[-1] != config.max_num_seqs:
        raise UserError(
            f"decode_rows: the last must be max_num_seqs, {config.max_num_seqs}; got {rows}"
        )
    if not config.prefill or any(r < 1 or c < 2 for r, c in config.prefill):
        raise UserError(
            f"prefill: (rows, chunk) pairs of at least (1, 2) are needed; got {config.prefill}"
        )
    if any(r > config.max_num_seqs for r, _ in config.prefill):
        raise UserError(
            f"prefill: more rows than max_num_seqs, {config.max_num_seqs}; got {config.prefill}"
        )
