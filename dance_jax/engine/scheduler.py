"""Which sequence computes which tokens in the next step; plain Python, no arrays.

A step of a server is one compiled bucket for all of its devices: on each, `decode` rows of one
token and a slice of `slice` rows of up to block_size tokens. Every decoding sequence gets its row
in every step, so a long prompt holds the others up for one slice at a time.

A row of a slice holds tokens of one sequence and starts where a KV block starts. That is so because
a prefill begins at 0 or behind whole cached blocks, and all its rows but the last are whole.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import operator
import time
from collections.abc import Iterable

from dance_jax.config import EngineConfig, UserError
from dance_jax.engine.blocks import BlockPool
from dance_jax.engine.sequence import Sequence

#: Seconds until a sequence whose experts nobody answered for is computed again.
RETRY_S = 0.1

_by_arrival = operator.attrgetter("arrival")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """What one row of one device computes in a step.

    Its block table is sequence.blocks, which covers the row's positions.
    """

    sequence: Sequence
    #: Place in the bucket: 0..decode-1 in the decode, from there on in the slice.
    index: int
    #: Index of the slice's first row of the same sequence; decode: index.
    first: int
    #: Position of the first token. Positions before it are cached, or in the step's rows from
    #: `first` on.
    start: int
    #: One token id in the decode, 1..block_size in the slice.
    tokens: list[int]
    #: All known tokens are then computed, so the next one is sampled from the last one's logits.
    sample: bool

    @property
    def positions(self) -> int:
        """Positions that the row's tokens attend to: each token's own and all before it, summed."""
        count = len(self.tokens)
        return count * self.start + count * (count + 1) // 2


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of one server: the bucket and, per device, the rows in use.

    The bucket of a plan that computes nothing is (0, 0).
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
        """The rows of other sequences."""
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
        """Some row of the decode is in use."""
        return any(row.index < self.decode for rows in self.entries for row in rows)


@dataclasses.dataclass(slots=True)
class _Work:
    """What one device does in a step; all of it has its blocks."""

    decodes: list[Sequence] = dataclasses.field(default_factory=list)
    #: Rows of the slice that each sequence takes.
    prefills: list[tuple[Sequence, int]] = dataclasses.field(default_factory=list)

    @property
    def slice_rows(self) -> int:
        return sum(count for _, count in self.prefills)


class Scheduler:
    """Admits sequences first come, first served, and cuts their work into steps.

    The cycle: `add`; then `schedule` -> run -> `commit`, append the sampled tokens to their
    sequences, `finish` those that are done.

    Between two cycles a running sequence holds just the blocks of its computed tokens. Blocks come
    when a row is planned; where none is left, the youngest sequence of the device gives its own
    back and is computed again later. So the oldest one always advances, and all end.

    Args:
        config: its sizes of buckets, block_size, max_num_seqs and max_model_len are used.
        devices: devices of this server.
        num_blocks: KV blocks of each device.
        share_prefixes: sequences begin behind cached blocks of equal tokens. Not so where a layer
            has a recurrent state, which exists only for a sequence's last token.
        state_copies: slots for recurrent states of each running sequence, see kv_cache.py.

    Raises:
        UserError: buckets that leave some work without a step, or a KV cache that is too small for
            the longest sequence.
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
        _check_blocks(config, num_blocks)
        self.config = config
        self.devices = devices
        self.share_prefixes, self.state_copies = share_prefixes, state_copies
        #: The blocks of each device.
        self.pools = [BlockPool(num_blocks, config.block_size) for _ in range(devices)]
        #: Admitted sequences of each device, oldest first.
        self.running: list[list[Sequence]] = [[] for _ in range(devices)]
        #: Slots for recurrent states that no running sequence of the device has.
        slots = state_copies * config.max_num_seqs
        self._state_slots = [list(range(slots, 0, -1)) for _ in range(devices)]
        #: Heap of (arrival, sequence): those that were preempted go before all younger ones.
        self._waiting: list[tuple[int, Sequence]] = []
        #: Running sequences that went back to waiting since the start.
        self.preemptions = 0
        #: Sequences put off since the start, as tokens of them could not be computed.
        self.failures = 0
        #: Tokens of the sequences that began, and how many of them were cached, since the start.
        self.prefix_queries = self.prefix_hits = 0
        self._arrivals = 0
        self._uncommitted = False

    @property
    def active(self) -> bool:
        """Some sequence waits or runs."""
        return bool(self._waiting) or any(self.running)

    @property
    def num_running(self) -> int:
        return sum(map(len, self.running))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def stalled(self) -> int:
        """Sequences whose last step failed."""
        running = [sequence for device in self.running for sequence in device]
        waiting = [sequence for _, sequence in self._waiting]
        return sum(sequence.rests_until > 0 for sequence in running + waiting)

    @property
    def num_blocks(self) -> int:
        """KV blocks of all devices."""
        return sum(pool.num_blocks for pool in self.pools)

    @property
    def blocks_used(self) -> int:
        """KV blocks that running sequences hold, of all devices."""
        return sum(pool.used for pool in self.pools)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence.

        Raises:
            ValueError: it has no tokens, or no room for another one in the context.
        """
        if not 0 < sequence.num_tokens < self.config.max_model_len:
            raise ValueError(
                f"{sequence.request_id}: {sequence.num_tokens} tokens; must be at least 1, and "
                f"fewer than max_model_len, {self.config.max_model_len}"
            )
        sequence.arrival = self._arrivals
        self._arrivals += 1
        heapq.heappush(self._waiting, (sequence.arrival, sequence))

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting; nothing of it is held any more.

        Raises:
            ValueError: the scheduler does not have it.
        """
        if sequence.device >= 0:
            self._release(sequence)
        else:
            self._waiting.remove((sequence.arrival, sequence))
            heapq.heapify(self._waiting)

    def abort(self, request_id: str | None = None) -> list[Sequence]:
        """Forget the sequences of a request, or all of them; returns them, oldest first."""

        def meant(sequence: Sequence) -> bool:
            return request_id in (None, sequence.request_id)

        waiting = [sequence for _, sequence in self._waiting if meant(sequence)]
        running = [sequence for device in self.running for sequence in device if meant(sequence)]
        if waiting:
            self._waiting = [entry for entry in self._waiting if not meant(entry[1])]
            heapq.heapify(self._waiting)
        for sequence in running:
            self._release(sequence)
        return sorted(waiting + running, key=_by_arrival)

    def schedule(self, others_decode: bool = False) -> StepPlan:
        """Admit what fits and plan the next step; it is empty if nothing can be computed now.

        Args:
            others_decode: sequences decode on other servers, which wait for this one in every
                layer, as decoding sequences of this server do.

        Raises:
            RuntimeError: the last plan was not committed, or a sampled token not appended.
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
        """The step ran: its tokens are in the cache, and others may use the blocks it filled.

        Args:
            failed: sequences of which tokens could not be computed. They rest for RETRY_S and
                compute the same again, from the recurrent states before the step.
        """
        left = {id(sequence): sequence for sequence in failed}
        for row in (row for rows in plan.entries for row in rows):
            if id(row.sequence) in left:
                continue
            row.sequence.num_computed += len(row.tokens)
            row.sequence.rests_until = 0.0
            if row.index == row.first:
                read, written = row.sequence.state_slots
                row.sequence.state_slots = written, read
            if row.sequence.num_computed % self.config.block_size == 0:
                self._publish_last(row.sequence)
        for sequence in left.values():
            self._put_off(sequence)
        self._uncommitted = False

    def _put_off(self, sequence: Sequence) -> None:
        sequence.rests_until = time.monotonic() + RETRY_S
        self.failures += 1
        kept = self._blocks_for(sequence.num_computed)
        self.pools[sequence.device].release(sequence.blocks[kept:])
        sequence.blocks = sequence.blocks[:kept]

    def _most_rows(self, others_decode: bool) -> int:
        """Rows of a slice that each device may take now.

        Beside a decode a prompt takes a small slice, however long it is, so that it holds the
        others up little. Many prompts take a row each: their users wait too, and a device whose
        sequences wait for their slices computes decodes with few rows.
        """
        sizes = self.config.slice_rows
        if not (others_decode or any(not s.prefilling for device in self.running for s in device)):
            return sizes[-1]
        prompts = max(sum(s.prefilling for s in device) for device in self.running)
        return max(size for size in sizes if size <= max(prompts, sizes[0]))

    def _admit(self) -> None:
        """First come, first served: no sequence goes before an older one that does not fit yet."""
        while self._waiting:
            _, sequence = self._waiting[0]
            device = self._choose_device(sequence)
            if device is None:
                return
            heapq.heappop(self._waiting)
            slots = [self._state_slots[device].pop() for _ in range(self.state_copies)]
            sequence.device, sequence.state_slots = device, (slots[0], slots[-1])
            bisect.insort(self.running[device], sequence, key=_by_arrival)

    def _choose_device(self, sequence: Sequence) -> int | None:
        """Of the devices with room: the fewest running, where a cached block outweighs one."""
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
        # Not the longest prefix alone: one that all share would leave the other devices empty.
        return min(fitting, key=lambda device: (running[device] - cached[device], device))

    def _unclaimed(self, device: int) -> int:
        """Blocks left when all running sequences have those of their known tokens."""
        claimed = (self._blocks_for(s.num_tokens) - len(s.blocks) for s in self.running[device])
        return self.pools[device].available - sum(claimed)

    def _plan_device(self, running: list[Sequence], most_rows: int) -> _Work:
        """Oldest first, so that whoever loses its blocks to another has no row yet."""
        work, left, now = _Work(), most_rows, time.monotonic()
        for sequence in tuple(running):
            if sequence.device < 0 or sequence.rests_until > now:
                continue  # preempted for an older one, or its experts are not to be had
            if not sequence.num_pending:
                raise RuntimeError(f"{sequence.request_id}: its sampled token was not appended")
            if not sequence.prefilling:
                if self._allot(sequence, 1):
                    work.decodes.append(sequence)
            elif left and (count := self._allot(sequence, left)):
                work.prefills.append((sequence, count))
                left -= count
        return work

    def _allot(self, sequence: Sequence, most_rows: int) -> int:
        """Blocks for the sequence's next rows; returns how many rows have theirs."""
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
        """A block; the youngest running sequences of the device give theirs back if need be.

        None: that one is the sequence itself. It stays if it has a row in this step.
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
        """Back to waiting, with all tokens known so far, which will be computed again."""
        self._release(sequence)
        heapq.heappush(self._waiting, (sequence.arrival, sequence))
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.running[sequence.device].remove(sequence)
        self.pools[sequence.device].release(sequence.blocks)
        self._state_slots[sequence.device] += set(sequence.state_slots)
        sequence.device, sequence.blocks, sequence.num_computed = -1, [], 0
        sequence.state_slots = 0, 0

    def _reuse_prefix(self, sequence: Sequence) -> None:
        """Begins a sequence behind the blocks that are cached.

        Only now, not when it is admitted, because meanwhile an older one with the same prompt may
        have computed them.
        """
        blocks = self._cached_prefix(sequence, sequence.device)
        self.pools[sequence.device].take(blocks)
        sequence.blocks = blocks
        sequence.num_computed = len(blocks) * self.config.block_size
        self.prefix_queries += sequence.num_tokens * self.share_prefixes
        self.prefix_hits += sequence.num_computed

    def _cached_prefix(self, sequence: Sequence, device: int) -> list[int]:
        """Cached blocks of all known tokens but the last, whose logits are needed."""
        if not self.share_prefixes:
            return []
        return self.pools[device].lookup(sequence.tokens(0, sequence.num_tokens - 1))

    def _publish_last(self, sequence: Sequence) -> None:
        """Lets others find the block that the sequence has just filled."""
        if not self.share_prefixes:
            return
        size = self.config.block_size
        page = sequence.num_computed // size - 1
        parent = sequence.blocks[page - 1] if page else None
        tokens = sequence.tokens(page * size, size)
        self.pools[sequence.device].publish(parent, tokens, sequence.blocks[page])

    def _bucket(self, work: list[_Work]) -> tuple[int, int]:
        """The smallest that holds what the fullest device does; (0, 0) for nothing at all."""
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
        """Blocks of a sequence of so many tokens."""
        return -(-tokens // self.config.block_size)


def _check_buckets(config: EngineConfig) -> None:
    for name in ("decode_rows", "slice_rows"):
        sizes = getattr(config, name)
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
            raise UserError(f"{name}: ascending positive sizes are needed; got {sizes}")
    if config.decode_rows[-1] != config.max_num_seqs:
        raise UserError(
            f"decode_rows: the last must be max_num_seqs, {config.max_num_seqs}; "
            f"got {config.decode_rows}"
        )
    if config.block_size < 2:
        raise UserError(f"block_size: at least 2 positions are needed; got {config.block_size}")


def _check_blocks(config: EngineConfig, num_blocks: int) -> None:
    if num_blocks < config.max_blocks:
        raise UserError(
            f"max_model_len: {config.max_model_len} tokens take {config.max_blocks} KV blocks of "
            f"block_size {config.block_size}, a device has {num_blocks}; give the KV cache more "
            "memory, or a smaller max_model_len"
        )
