"""The scheduler: which sequence computes which tokens in the next step. Plain Python, no arrays.

A step of a server is one compiled bucket for all of its devices: on each device, `decode` rows of
one token and a slice of `slice` rows of up to block_size tokens. Every decoding sequence gets its
row in every step, so a long prompt delays other sequences by only one slice at a time.

A row of a slice has tokens of one sequence and starts at the start of a KV block. This holds
because a prefill begins at 0 or behind full cached blocks, and all its rows but the last are full.
"""

from __future__ import annotations

import bisect
import dataclasses
import operator
import time
from collections.abc import Iterable

from dance_jax.config import EngineConfig, UserError
from dance_jax.engine.blocks import BlockPool
from dance_jax.engine.sequence import Sequence
from dance_jax.engine.waiting import WaitingQueue

#: Seconds before a sequence is retried whose experts were unavailable.
RETRY_S = 0.1

_by_arrival = operator.attrgetter("arrival")
_by_turn = operator.attrgetter("turn")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """The tokens that one row of one device computes in a step.

    The row's block table is sequence.blocks, which covers the row's positions.
    """

    sequence: Sequence
    #: Index in the bucket: 0..decode-1 for decode rows, decode and above for slice rows.
    index: int
    #: Index of the first row of the same sequence in the slice; for decode rows, `index`.
    first: int
    #: Position of the first token. Earlier positions are cached or in the step's rows from `first`
    #: on.
    start: int
    #: One token id for a decode row, 1..block_size for a slice row.
    tokens: list[int]
    #: Whether a token is sampled: true if the row ends with the sequence's last known token.
    sample: bool

    @property
    def positions(self) -> int:
        """Positions attended to, summed over the row's tokens: a token's own and all before it."""
        count = len(self.tokens)
        return count * self.start + count * (count + 1) // 2


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of one server: the bucket and, per device, the rows in use.

    An empty plan has the bucket (0, 0).
    """

    #: Rows of one token on each device.
    decode: int
    #: Rows of block_size tokens on each device.
    slice: int
    entries: tuple[tuple[Row, ...], ...]

    @property
    def empty(self) -> bool:
        return self.bucket == (0, 0)

    @property
    def bucket(self) -> tuple[int, int]:
        return self.decode, self.slice

    def without(self, sequences: Iterable[Sequence]) -> StepPlan:
        """The plan without the rows of these sequences."""
        gone = {id(sequence) for sequence in sequences}
        entries = (
            tuple(row for row in rows if id(row.sequence) not in gone) for rows in self.entries
        )
        return dataclasses.replace(self, entries=tuple(entries))

    @property
    def num_tokens(self) -> int:
        """Tokens computed, without padding."""
        return sum(len(row.tokens) for rows in self.entries for row in rows)

    @property
    def decoding(self) -> bool:
        """Whether any decode row is in use."""
        return any(row.index < self.decode for rows in self.entries for row in rows)


@dataclasses.dataclass(slots=True)
class _Work:
    """The work of one device in a step; its blocks are allocated already."""

    decodes: list[Sequence] = dataclasses.field(default_factory=list)
    #: (sequence, number of slice rows it takes).
    prefills: list[tuple[Sequence, int]] = dataclasses.field(default_factory=list)

    @property
    def slice_rows(self) -> int:
        return sum(count for _, count in self.prefills)


class Scheduler:
    """Admits sequences, round robin between clients, and divides their work into steps.

    The cycle is: `add`; then `schedule`, run the plan, `commit`, append the sampled tokens to their
    sequences, and `finish` the sequences that are done.

    Between two cycles, a running sequence holds exactly the blocks of its computed tokens. Blocks
    are allocated when a row is planned. If no block is left, the youngest sequence of the device is
    preempted: it gives up its blocks and is computed again later. So the oldest sequence always
    advances, and all sequences end. The oldest is the one that was admitted first (`turn`).

    Args:
        config: provides bucket sizes, block_size, max_num_seqs and max_model_len.
        devices: number of devices of this server.
        num_blocks: KV blocks of each device, at least `config.max_blocks` (`kv_cache.num_blocks`
            checks).
        share_prefixes: whether sequences may start behind cached blocks of equal tokens. Must be
            False if a layer has a recurrent state, which exists only for a sequence's last token.
        state_copies: slots for recurrent states per running sequence, see kv_cache.py.

    Raises:
        UserError: the buckets leave some work without a step.
    """

    def __init__(
        self,
        config: EngineConfig,
        devices: int,
        num_blocks: int,
        share_prefixes: bool = True,
        state_copies: int = 1,
    ) -> None:
        _check_buckets(config)
        self.config = config
        self.devices = devices
        self.share_prefixes, self.state_copies = share_prefixes, state_copies
        #: The blocks of each device.
        self.pools = [BlockPool(num_blocks, config.block_size) for _ in range(devices)]
        #: Admitted sequences of each device, oldest first.
        self.running: list[list[Sequence]] = [[] for _ in range(devices)]
        #: Free slots for recurrent states, per device.
        slots = state_copies * config.max_num_seqs
        self._state_slots = [list(range(slots, 0, -1)) for _ in range(devices)]
        self._waiting = WaitingQueue()
        #: Preemptions since the start.
        self.preemptions = 0
        #: Failed sequences since the start, counting repeats.
        self.failures = 0
        #: Tokens looked up in the prefix cache, and tokens found there, since the start.
        self.prefix_queries = self.prefix_hits = 0
        self._arrivals = 0
        self._uncommitted = False

    @property
    def active(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting) or any(self.running)

    @property
    def num_running(self) -> int:
        return sum(map(len, self.running))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def stalled(self) -> int:
        """Number of sequences whose last step failed."""
        running = [sequence for device in self.running for sequence in device]
        return sum(sequence.rests_until > 0 for sequence in [*running, *self._waiting])

    @property
    def num_blocks(self) -> int:
        """Number of KV blocks of all devices."""
        return sum(pool.num_blocks for pool in self.pools)

    @property
    def blocks_used(self) -> int:
        """Number of KV blocks that running sequences hold, on all devices."""
        return sum(pool.used for pool in self.pools)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, of 1 to max_model_len - 1 tokens (`RequestTracker.open` checks)."""
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._waiting.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence, running or waiting, and free its blocks and state slots.

        Raises:
            ValueError: the scheduler does not have the sequence.
        """
        if sequence.device >= 0:
            self._release(sequence)
        else:
            self._waiting.remove(sequence)

    def abort(self, request_id: str | None = None) -> list[Sequence]:
        """Remove the sequences of a request, or all sequences; return them, oldest first."""

        def matches(sequence: Sequence) -> bool:
            return request_id in (None, sequence.request_id)

        waiting = [sequence for sequence in self._waiting if matches(sequence)]
        running = [sequence for device in self.running for sequence in device if matches(sequence)]
        for sequence in waiting:
            self._waiting.remove(sequence)
        for sequence in running:
            self._release(sequence)
        return sorted(waiting + running, key=_by_arrival)

    def schedule(self, others_decode: bool = False) -> StepPlan:
        """Admit sequences that fit and plan the next step.

        Args:
            others_decode: whether sequences decode on other servers, which wait for this one in
                every layer just like this server's own decoding sequences.

        Returns:
            The plan; it is empty if nothing can be computed now.

        Raises:
            RuntimeError: the last plan was not committed, or a sampled token was not appended.
        """
        if self._uncommitted:
            raise RuntimeError("schedule() before commit() of the last plan")
        self._admit()
        most_rows = self._most_rows(others_decode)
        work = [self._plan_device(device, most_rows) for device in self.running]
        bucket = self._bucket(work)
        plan = StepPlan(*bucket, tuple(self._rows(part, bucket[0]) for part in work))
        self._uncommitted = not plan.empty
        return plan

    def commit(self, plan: StepPlan, failed: Iterable[Sequence] = ()) -> None:
        """Record that the step ran: its tokens are cached, and full blocks can be shared.

        Args:
            plan: the plan that ran.
            failed: sequences with tokens that could not be computed. They pause for RETRY_S and
                then compute the same tokens again, from the recurrent states before the step.
        """
        failing = {id(sequence): sequence for sequence in failed}
        for row in (row for rows in plan.entries for row in rows):
            if id(row.sequence) in failing:
                continue
            row.sequence.num_computed += len(row.tokens)
            row.sequence.rests_until = 0.0
            if row.index == row.first:
                read, written = row.sequence.state_slots
                row.sequence.state_slots = written, read
            if row.sequence.num_computed % self.config.block_size == 0:
                self._publish_last(row.sequence)
        for sequence in failing.values():
            self._put_off(sequence)
        self._uncommitted = False

    def _put_off(self, sequence: Sequence) -> None:
        sequence.rests_until = time.monotonic() + RETRY_S
        self.failures += 1
        kept = self._blocks_for(sequence.num_computed)
        self.pools[sequence.device].release(sequence.blocks[kept:])
        sequence.blocks = sequence.blocks[:kept]

    def _most_rows(self, others_decode: bool) -> int:
        """Slice rows that each device may take now.

        While other sequences decode, a prompt gets a small slice, however long the prompt is, so
        that it delays them little. Several prompts get one row each: their users wait too, and a
        device whose sequences still wait for their slices decodes with few rows.
        """
        sizes = self.config.slice_rows
        if not (others_decode or any(not s.prefilling for device in self.running for s in device)):
            return sizes[-1]
        prompts = max(sum(s.prefilling for s in device) for device in self.running)
        return max(size for size in sizes if size <= max(prompts, sizes[0]))

    def _admit(self) -> None:
        """Admit waiting sequences in their order; stop at the first that does not fit yet."""
        while self._waiting:
            sequence = self._waiting.first()
            device = self._choose_device(sequence)
            if device is None:
                return
            self._waiting.take_first()
            slots = [self._state_slots[device].pop() for _ in range(self.state_copies)]
            sequence.device, sequence.state_slots = device, (slots[0], slots[-1])
            bisect.insort(self.running[device], sequence, key=_by_turn)

    def _choose_device(self, sequence: Sequence) -> int | None:
        """The device with room that has the fewest running sequences minus cached blocks."""
        needed = self._blocks_for(sequence.num_tokens + 1)
        fitting = [
            device
            for device, running in enumerate(self.running)
            if len(running) < self.config.max_num_seqs and self._unclaimed(device) >= needed
        ]
        if len(fitting) < 2:
            return fitting[0] if fitting else None
        cached = {device: len(self._cached_prefix(sequence, device)) for device in fitting}
        running = {device: len(self.running[device]) for device in fitting}
        # Do not go by the longest prefix alone: if all sequences share it, the other devices would
        # stay empty.
        return min(fitting, key=lambda device: (running[device] - cached[device], device))

    def _unclaimed(self, device: int) -> int:
        """Blocks left after all running sequences get the blocks of their known tokens."""
        claimed = (self._blocks_for(s.num_tokens) - len(s.blocks) for s in self.running[device])
        return self.pools[device].available - sum(claimed)

    def _plan_device(self, running: list[Sequence], most_rows: int) -> _Work:
        """Plan the work of one device, oldest sequence first.

        The order ensures that a sequence that is preempted for another has no row yet.
        """
        work, left, now = _Work(), most_rows, time.monotonic()
        for sequence in tuple(running):
            if sequence.device < 0 or sequence.rests_until > now or not sequence.ready:
                continue  # preempted for an older one, pausing after a failure, or in preparation
            if not sequence.num_pending:
                raise RuntimeError(f"{sequence.request_id}: the sampled token was not appended")
            if not sequence.prefilling:
                if self._allot(sequence, 1):
                    work.decodes.append(sequence)
            elif left and (count := self._allot(sequence, left)):
                work.prefills.append((sequence, count))
                left -= count
        return work

    def _allot(self, sequence: Sequence, most_rows: int) -> int:
        """Allocate blocks for the sequence's next rows; return how many rows have blocks."""
        if not sequence.blocks:
            self._reuse_prefix(sequence)
        done = sequence.num_computed // self.config.block_size
        wanted = min(done + most_rows, self._blocks_for(sequence.num_tokens))
        while len(sequence.blocks) < wanted:
            block = self._allocate_for(sequence, has_row=len(sequence.blocks) > done)
            if block is None:
                break
            sequence.blocks.append(block)
        return 0 if sequence.device < 0 else len(sequence.blocks) - done

    def _allocate_for(self, sequence: Sequence, has_row: bool) -> int | None:
        """Allocate a block, preempting the device's youngest running sequences if necessary.

        Returns:
            The block; None if the sequence itself is the youngest. The sequence is then preempted,
            unless it has a row in this step.
        """
        running, pool = self.running[sequence.device], self.pools[sequence.device]
        while (block := pool.allocate()) is None:
            youngest = running[-1]
            if youngest is sequence and has_row:
                return None
            self._preempt(youngest)
            if youngest is sequence:
                return None
        return block

    def _preempt(self, sequence: Sequence) -> None:
        """Move a sequence back to waiting; all its known tokens will be computed again."""
        self._release(sequence)
        self._waiting.put_back(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.running[sequence.device].remove(sequence)
        self.pools[sequence.device].release(sequence.blocks)
        self._state_slots[sequence.device] += set(sequence.state_slots)
        sequence.device, sequence.blocks, sequence.num_computed = -1, [], 0
        sequence.state_slots = 0, 0

    def _reuse_prefix(self, sequence: Sequence) -> None:
        """Start a sequence behind its cached prefix.

        This happens at the first step and not on admission, because an older sequence with the same
        prompt may have computed the prefix in the meantime.
        """
        blocks = self._cached_prefix(sequence, sequence.device)
        self.pools[sequence.device].take(blocks)
        sequence.blocks = blocks
        sequence.num_computed = len(blocks) * self.config.block_size
        self.prefix_queries += sequence.num_tokens * self.share_prefixes
        self.prefix_hits += sequence.num_computed

    def _cached_prefix(self, sequence: Sequence, device: int) -> list[int]:
        """Cached blocks of the known tokens, without the last token, whose logits are needed."""
        if not self.share_prefixes or sequence.prompt_logprobs is not None:
            return []
        return self.pools[device].lookup(sequence.tokens(0, sequence.num_tokens - 1))

    def _publish_last(self, sequence: Sequence) -> None:
        """Publish the block that the sequence has just filled."""
        if not self.share_prefixes:
            return
        size = self.config.block_size
        page = sequence.num_computed // size - 1
        parent = sequence.blocks[page - 1] if page else None
        tokens = sequence.tokens(page * size, size)
        self.pools[sequence.device].publish(parent, tokens, sequence.blocks[page])

    def _bucket(self, work: list[_Work]) -> tuple[int, int]:
        """The smallest bucket for the device with the most work; (0, 0) if there is no work."""
        decodes = max((len(part.decodes) for part in work), default=0)
        rows = max((part.slice_rows for part in work), default=0)
        if not decodes and not rows:
            return 0, 0
        return next(
            (decode, size)
            for decode, size in self.config.buckets
            if decode >= decodes and size >= rows
        )

    def _rows(self, work: _Work, decode: int) -> tuple[Row, ...]:
        """The rows of one device, in order of their indices."""
        size = self.config.block_size
        rows = [
            self._row(sequence, index, index, sequence.num_computed)
            for index, sequence in enumerate(work.decodes)
        ]
        first = decode
        for sequence, count in work.prefills:
            begin = sequence.num_computed
            rows += [self._row(sequence, first + i, first, begin + i * size) for i in range(count)]
            first += count
        return tuple(rows)

    def _row(self, sequence: Sequence, index: int, first: int, start: int) -> Row:
        tokens = sequence.tokens(start, self.config.block_size)
        return Row(
            sequence, index, first, start, tokens, start + len(tokens) == sequence.num_tokens
        )

    def _blocks_for(self, tokens: int) -> int:
        """Number of blocks for this many tokens."""
        return -(-tokens // self.config.block_size)


def _check_buckets(config: EngineConfig) -> None:
    for name in ("decode_rows", "slice_rows"):
        sizes = getattr(config, name)
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
            raise UserError(f"{name}: must be positive sizes in ascending order; got {sizes}")
    if config.decode_rows[-1] != config.max_num_seqs:
        raise UserError(
            f"decode_rows: the last size must be max_num_seqs, {config.max_num_seqs}; "
            f"got {config.decode_rows}"
        )
    if config.block_size < 2:
        raise UserError(f"block_size: must be at least 2; got {config.block_size}")
