"""A fake engine that runs the scheduler's plans on a paged cache and checks each plan."""

from __future__ import annotations

import itertools

from dance_jax.config import EngineConfig
from dance_jax.engine.scheduler import Row, Scheduler, StepPlan
from dance_jax.engine.sequence import SamplingParams, Sequence


def make_config(
    decode_rows: tuple[int, ...] = (4,),
    slice_rows: tuple[int, ...] = (1, 4),
    block_size: int = 4,
    max_model_len: int = 64,
) -> EngineConfig:
    return EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=decode_rows[-1] if decode_rows else 1,
        decode_rows=decode_rows,
        slice_rows=slice_rows,
        block_size=block_size,
    )


def next_token(known: list[int]) -> int:
    """The fake model: depends on every token and position; few values, so that outputs repeat."""
    return (len(known) + sum((place + 1) * token for place, token in enumerate(known))) % 7


def outputs_of(prompt: list[int], count: int) -> list[int]:
    """The fake model's next `count` tokens after a prompt."""
    known = list(prompt)
    for _ in range(count):
        known.append(next_token(known))
    return known[len(prompt) :]


def known_tokens(sequence: Sequence) -> list[int]:
    return sequence.prompt_token_ids + sequence.output_token_ids


class FakeEngine:
    """Adds, steps and finishes like the engine; an assertion fails at the first wrong plan."""

    def __init__(self, config: EngineConfig, devices: int = 1, num_blocks: int = 0) -> None:
        self.config = config
        self.scheduler = Scheduler(config, devices, num_blocks or 8 * config.max_blocks)
        #: (device, block, offset) -> token written there; None for padding of a partial row.
        self.cache: dict[tuple[int, int, int], int | None] = {}
        self.live: list[Sequence] = []
        self.done: list[Sequence] = []
        self._names = itertools.count()

    def add(self, prompt: list[int], outputs: int = 1, done: int = 0, client: str = "") -> Sequence:
        """Queue a request of which an earlier engine computed `done` outputs."""
        name = str(next(self._names))
        sequence = Sequence(name, 0, prompt, SamplingParams(), outputs, seed=0, client=client)
        sequence.output_token_ids += outputs_of(prompt, done)
        self.scheduler.add(sequence)
        self.live.append(sequence)
        return sequence

    def step(self, others_decode: bool = False) -> StepPlan:
        before = {sequence: sequence.device for sequence in self.live}
        turns = {sequence: sequence.turn for sequence in self.live}
        decoding = [s for s in self.live if s.device >= 0 and not s.prefilling]
        preemptions = self.scheduler.preemptions
        plan = self.scheduler.schedule(others_decode)
        preempted = [s for s in self.live if before[s] >= 0 and s.device < 0]
        assert self.scheduler.preemptions == preemptions + len(preempted)
        for sequence in preempted:
            stayed = self.scheduler.running[before[sequence]]
            assert stayed and all(s.turn < sequence.turn for s in stayed)
        self._check_admitted([s for s in self.live if before[s] < 0], turns)
        planned = {row.sequence for rows in plan.entries for row in rows}
        assert planned | set(preempted) >= set(decoding)
        # Preempted sequences may have counted when the slice size was chosen.
        most_rows = None if preempted else self._most_rows(decoding, others_decode)
        self._check_plan(plan, most_rows)
        self._run(plan)
        self.scheduler.commit(plan)
        for row in (row for rows in plan.entries for row in rows if row.sample):
            self._sample(row.sequence)
        self.check_blocks()
        return plan

    def drain(self, others_decode: bool = False) -> int:
        """Step until no sequence is left; return the number of steps."""
        work = sum(s.num_pending + s.max_tokens for s in self.live)
        # On each device the oldest sequence advances in every step, and each older sequence
        # preempts a younger one at most once.
        bound = work * (1 + len(self.live))
        for steps in range(bound + 1):
            if not self.scheduler.active:
                assert not self.live
                return steps
            self.step(others_decode)
        raise AssertionError(f"{len(self.live)} sequences are left after {bound} steps")

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self._forget(sequence)

    def abort(self, request_id: str | None = None) -> list[Sequence]:
        gone = self.scheduler.abort(request_id)
        assert gone == [s for s in self.live if request_id in (None, s.request_id)]
        for sequence in gone:
            self._forget(sequence)
        return gone

    def check_blocks(self) -> None:
        """Check that no block leaks and that sequences hold only blocks of computed tokens."""
        scheduler, size = self.scheduler, self.config.block_size
        running = [s for s in self.live if s.device >= 0]
        assert scheduler.num_running == len(running)
        assert scheduler.num_waiting == len(self.live) - len(running)
        assert scheduler.active == bool(self.live)
        for sequence in self.live:
            assert len(sequence.blocks) == -(-sequence.num_computed // size)
            assert sequence.device >= 0 or not sequence.blocks
        for device, pool in enumerate(scheduler.pools):
            here = sorted((s for s in running if s.device == device), key=lambda s: s.turn)
            assert here == scheduler.running[device], "oldest first"
            assert len(here) <= self.config.max_num_seqs
            holders = [block for s in here for block in s.blocks]
            assert 0 not in holders
            for block in range(1, pool.num_blocks + 1):
                assert pool._refs[block] == holders.count(block)
            assert pool.used == len(set(holders))
            assert pool.free + pool.cached + pool.used == pool.num_blocks
        assert scheduler.blocks_used == sum(pool.used for pool in scheduler.pools)

    def _check_admitted(self, waited: list[Sequence], turns: dict[Sequence, int]) -> None:
        """Check the order in which a step admitted sequences.

        Args:
            waited: those that waited before the step, in order of arrival.
            turns: turns before the step.
        """
        begun = sorted((s for s in waited if turns[s] >= 0), key=lambda s: turns[s])
        new = [s for s in waited if turns[s] < 0]
        clients = [[s for s in new if s.client == name] for name in {s.client for s in new}]
        for queue in (begun, *([*begun, *own] for own in clients)):
            admitted = [s.device >= 0 for s in queue]
            assert admitted == sorted(admitted, reverse=True), "first come, first served"
        counts = [sum(s.device >= 0 for s in own) for own in clients]
        left = [
            count
            for own, count in zip(clients, counts, strict=True)
            if not all(s.device >= 0 for s in own)
        ]
        assert not left or max(counts) <= min(left) + 1, "round robin"

    def _most_rows(self, decoding: list[Sequence], others_decode: bool) -> int:
        """Rows of a slice: the maximum, or, while sequences decode, the number of prompts.

        Args:
            decoding: sequences that decoded before the step. A sequence that starts behind a cached
                prefix counts as a prompt, even if the step finds only one token left to compute.
        """
        sizes = self.config.slice_rows
        if not (decoding or others_decode):
            return sizes[-1]
        prompts = [sum(s not in decoding for s in device) for device in self.scheduler.running]
        return max((size for size in sizes if size <= max(prompts)), default=sizes[0])

    def _check_plan(self, plan: StepPlan, most_rows: int | None) -> None:
        """Check that rows are in place, that none is missing, and that the bucket is minimal.

        Args:
            most_rows: maximum rows of a slice; None if unknown.
        """
        if plan.empty:
            assert plan.bucket == (0, 0) and not any(plan.entries) and not self.live
            return
        decodes, slices = [], []
        for device, rows in enumerate(plan.entries):
            decode = [row for row in rows if row.index < plan.decode]
            piece = list(rows[len(decode) :])
            assert [row.index for row in decode] == list(range(len(decode)))
            assert [row.index - plan.decode for row in piece] == list(range(len(piece)))
            assert all(len(row.tokens) == 1 and row.first == row.index for row in decode)
            assert not any(row.sequence.prefilling for row in decode)
            for _, group in itertools.groupby(piece, key=lambda row: row.sequence):
                self._check_group(list(group))
            # Unplanned work waits for room in the slice or for blocks, behind older sequences.
            full = most_rows in (None, len(piece)) or not self.scheduler.pools[device].available
            running = self.scheduler.running[device]
            complete = [any(row.sample for row in rows if row.sequence is s) for s in running]
            begun = [any(row.sequence is s for row in piece) for s in running if s.prefilling]
            assert full or all(complete)
            assert begun == sorted(begun, reverse=True)
            assert not running or any(row.sequence is running[0] for row in rows)
            decodes.append(len(decode))
            slices.append(len(piece))
        assert max(slices) <= (most_rows or self.config.slice_rows[-1])
        assert plan.decoding == any(decodes)
        fitting = [n for n in self.config.decode_rows if n >= max(decodes)]
        assert plan.decode == (max(fitting) if plan.slice else min(fitting))
        assert plan.slice == min(n for n in (0, *self.config.slice_rows) if n >= max(slices))
        assert plan.bucket in self.config.buckets
        assert plan.num_tokens == sum(len(row.tokens) for rows in plan.entries for row in rows)

    def _check_group(self, rows: list[Row]) -> None:
        """Check a sequence's slice rows: each starts a block, and all but the last are full."""
        size = self.config.block_size
        for row in rows:
            assert row.first == rows[0].index and row.start % size == 0
            assert len(row.tokens) == size or (row is rows[-1] and 0 < len(row.tokens) < size)

    def _run(self, plan: StepPlan) -> None:
        """Run a plan; like a step, it reads the cache before it writes."""
        rows = [(device, row) for device, rows in enumerate(plan.entries) for row in rows]
        for device, row in rows:
            sequence, known = row.sequence, known_tokens(row.sequence)
            assert sequence.device == device
            ahead = (row.index - row.first) * self.config.block_size
            assert row.start == sequence.num_computed + ahead
            assert self._cached(sequence, sequence.num_computed) == known[: sequence.num_computed]
            end = row.start + len(row.tokens)
            assert row.tokens == known[row.start : end] and row.sample == (end == len(known))
        for device, row in rows:
            page, offset = divmod(row.start, self.config.block_size)
            block, pool = row.sequence.blocks[page], self.scheduler.pools[device]
            assert pool._refs[block] == 1 and not pool.is_published(block), "others read it"
            # A slice row writes its whole block, even if it has fewer tokens.
            padding = 0 if row.index < plan.decode else self.config.block_size - len(row.tokens)
            for place, token in enumerate([*row.tokens, *[None] * padding], start=offset):
                self.cache[device, block, place] = token

    def _cached(self, sequence: Sequence, count: int) -> list[int | None]:
        """The first `count` cache entries that a sequence reaches through its block table."""
        places = (divmod(place, self.config.block_size) for place in range(count))
        return [self.cache[sequence.device, sequence.blocks[p], offset] for p, offset in places]

    def _sample(self, sequence: Sequence) -> None:
        known = known_tokens(sequence)
        assert self._cached(sequence, len(known)) == known
        sequence.output_token_ids.append(next_token(known))
        if len(sequence.output_token_ids) == sequence.max_tokens:
            self.finish(sequence)
            self.done.append(sequence)
            wanted = outputs_of(sequence.prompt_token_ids, sequence.max_tokens)
            assert sequence.output_token_ids == wanted, "tokens were lost"

    def _forget(self, sequence: Sequence) -> None:
        assert (sequence.device, sequence.blocks, sequence.num_computed) == (-1, [], 0)
        self.live.remove(sequence)
