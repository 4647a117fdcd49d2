"""The scheduler as plain Python: a fake engine checks every plan and that all work gets done."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.config import EngineConfig, UserError
from dance_jax.engine.scheduler import MAX_PREFILL_STREAK, Scheduler
from dance_jax.engine.sequence import SamplingParams, Sequence


def make_sequence(name, prompt_length, outputs=1):
    prompt = [1000 * int(name) + i for i in range(prompt_length)]
    return Sequence(str(name), 0, prompt, SamplingParams(), outputs, seed=0)


def config(max_num_seqs=4, decode_rows=(4,), prefill=((2, 8),)):
    return EngineConfig(
        max_model_len=4096, max_num_seqs=max_num_seqs, decode_rows=decode_rows, prefill=prefill
    )


class FakeEngine:
    """Runs plans without a model and checks each one."""

    def __init__(self, config, devices):
        self.config = config
        self.scheduler = Scheduler(config, devices)
        #: (device, slot) -> tokens in its cache.
        self.cache = {}
        self.done = {}
        self.waited = {}
        #: The last step decoded although prompts were there.
        self.paused = False

    def add(self, sequence):
        self.waited[sequence.request_id] = 0
        self.scheduler.add(sequence)

    def step(self):
        plan = self.scheduler.schedule()
        self.check(plan)
        self.scheduler.commit(plan)
        for row in (row for rows in plan.entries for row in rows if row.sample):
            sequence = row.sequence
            # The fake model counts: the next token depends on all before it.
            sequence.output_token_ids.append(-sequence.num_tokens)
            if len(sequence.output_token_ids) == sequence.max_tokens:
                self.done[sequence.request_id] = sequence
                del self.cache[sequence.device, sequence.slot]
                self.scheduler.finish(sequence)
        return plan

    def check(self, plan):
        if plan.empty:
            assert not self.scheduler.active
            return
        buckets = [*((rows, 1) for rows in self.config.decode_rows), *self.config.prefill]
        assert (plan.rows, plan.chunk) in buckets
        ran = set()
        for device, rows in enumerate(plan.entries):
            indices = [row.index for row in rows]
            slots = [row.slot for row in rows]
            assert len(set(indices)) == len(indices) and len(set(slots)) == len(slots)
            assert all(0 <= index < plan.rows for index in indices)
            assert all(0 <= slot < self.config.max_num_seqs for slot in slots)
            if plan.chunk == 1 and plan.rows == self.config.max_num_seqs:
                assert indices == slots
            for row in rows:
                self.check_row(device, row, plan)
                ran.add(row.sequence.request_id)
        running = [s for device in self.scheduler.running for s in device]
        places = [(s.device, s.slot) for s in running]
        assert len(set(places)) == len(places)
        for sequence in running:
            waited = 0 if sequence.request_id in ran else self.waited[sequence.request_id] + 1
            self.waited[sequence.request_id] = waited
            # Nobody starves: decoding is not put off for long,
            assert sequence.prefilling or waited <= MAX_PREFILL_STREAK
        # and prompts go oldest first, stopped by one step of decoding at a time.
        for device in self.scheduler.running:
            oldest = next((s for s in device if s.prefilling), None)
            if oldest is not None and plan.chunk > 1:
                assert oldest.request_id in ran
        pausing = plan.chunk == 1 and any(s.prefilling for s in running)
        assert not (pausing and self.paused)
        self.paused = pausing

    def check_row(self, device, row, plan):
        sequence = row.sequence
        assert (sequence.device, sequence.slot) == (device, row.slot)
        assert 1 <= len(row.tokens) <= plan.chunk
        if row.start == 0:
            assert (device, row.slot) not in self.cache
            self.cache[device, row.slot] = []
        cached = self.cache[device, row.slot]
        assert len(cached) == row.start
        cached.extend(row.tokens)
        known = sequence.prompt_token_ids + sequence.output_token_ids
        assert cached == known[: len(cached)]
        assert row.sample == (len(cached) == len(known))


def bucket_configs():
    def build(draw_rows, top, prefill):
        rows = tuple(sorted({r for r in draw_rows if r < top} | {top}))
        fitting = {(min(r, top), c) for r, c in prefill}
        return config(top, rows, tuple(sorted(fitting, key=lambda b: b[0] * b[1])))

    return st.builds(
        build,
        st.sets(st.integers(1, 6), max_size=3),
        st.integers(1, 6),
        st.lists(st.tuples(st.integers(1, 4), st.integers(2, 12)), min_size=1, max_size=3),
    )


jobs = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 8), st.integers(0, 3)), min_size=1, max_size=20
)


@settings(max_examples=150, deadline=None)
@given(bucket_configs(), st.integers(1, 3), jobs)
def test_every_token_once_in_order_and_all_finish(config, devices, jobs):
    engine = FakeEngine(config, devices)
    for name, (length, outputs, steps_before) in enumerate(jobs):
        for _ in range(steps_before):
            engine.step()
        engine.add(make_sequence(name, length, outputs))
    steps = 0
    while engine.scheduler.active:
        engine.step()
        steps += 1
        assert steps < 20 * 50
    assert len(engine.done) == len(jobs)
    for name, (length, outputs, _) in enumerate(jobs):
        sequence = engine.done[str(name)]
        assert sequence.output_token_ids == [-length - i for i in range(outputs)]
    assert engine.scheduler.schedule().empty


@settings(max_examples=100, deadline=None)
@given(bucket_configs(), st.integers(1, 2), jobs, st.data())
def test_aborts_free_their_slots(config, devices, jobs, data):
    engine = FakeEngine(config, devices)
    for name, (length, outputs, _) in enumerate(jobs):
        engine.add(make_sequence(name, length, outputs))
    while engine.scheduler.active:
        victim = data.draw(st.integers(0, 3 * len(jobs)))
        places = {s.request_id: (s.device, s.slot) for d in engine.scheduler.running for s in d}
        for gone in engine.scheduler.abort(str(victim)):
            assert gone.request_id == str(victim) and gone.slot == -1
            engine.cache.pop(places.get(gone.request_id), None)
        engine.step()
    engine.scheduler.abort()
    assert all(len(free) == config.max_num_seqs for free in engine.scheduler._free)


def test_admission_balances_devices_in_order_of_arrival():
    engine = FakeEngine(config(), devices=2)
    sequences = [make_sequence(name, 3, 5) for name in range(9)]
    for sequence in sequences:
        engine.add(sequence)
    engine.step()
    assert [(s.device, s.slot) for s in sequences[:8]] == [
        (d, slot) for slot in range(4) for d in range(2)
    ]
    assert list(engine.scheduler.waiting) == sequences[8:]


def test_smallest_bucket_that_fits_the_busiest_device():
    ladder = config(8, (1, 2, 8), ((1, 4), (2, 8), (4, 8), (2, 32)))
    for lengths, bucket in [
        ([3], (1, 4)),
        ([5], (2, 8)),
        ([3, 3, 3], (2, 8)),
        ([3] * 6, (4, 8)),
        ([20], (2, 32)),
        ([100] * 8, (2, 32)),
    ]:
        engine = FakeEngine(ladder, devices=2)
        for name, length in enumerate(lengths):
            engine.add(make_sequence(name, length, 2))
        plan = engine.step()
        assert (plan.rows, plan.chunk) == bucket
        engine.scheduler.abort()
    for count, rows in [(1, 1), (2, 1), (3, 2), (5, 8), (16, 8)]:
        engine = FakeEngine(ladder, devices=2)
        for name in range(count):
            engine.add(make_sequence(name, 1, 2))
        while (plan := engine.step()).chunk > 1:
            pass
        assert plan.rows == rows


def test_long_prompts_go_in_chunks_and_only_the_last_samples():
    engine = FakeEngine(config(prefill=((1, 8),)), devices=1)
    engine.add(make_sequence(0, 20))
    plans = [engine.step() for _ in range(3)]
    assert [len(plan.entries[0][0].tokens) for plan in plans] == [8, 8, 4]
    assert [plan.entries[0][0].sample for plan in plans] == [False, False, True]
    assert not engine.scheduler.active


def test_a_stream_of_prompts_does_not_stop_decoding():
    engine = FakeEngine(config(2, (2,), ((2, 8),)), devices=1)
    decoding = make_sequence(0, 4, 10**6)
    engine.add(decoding)
    engine.step()
    for name in range(1, 200):
        engine.add(make_sequence(name, 8, 1))
    for _ in range(150):
        engine.step()
    assert len(decoding.output_token_ids) >= 150 // (MAX_PREFILL_STREAK + 1)


def test_a_recomputed_sequence_prefills_prompt_and_output():
    engine = FakeEngine(config(), devices=1)
    sequence = make_sequence(0, 5, 9)
    sequence.output_token_ids += [-5, -6, -7, -8]
    engine.add(sequence)
    plan = engine.step()
    assert (plan.chunk, plan.entries[0][0].tokens) == (8, [0, 1, 2, 3, 4, -5, -6, -7])
    assert not plan.entries[0][0].sample
    while engine.scheduler.active:
        engine.step()
    assert sequence.output_token_ids == [-5 - i for i in range(9)]


def test_forgetting_a_sampled_token_or_commit_is_noticed():
    scheduler = Scheduler(config(), 1)
    scheduler.add(make_sequence(0, 3))
    plan = scheduler.schedule()
    with pytest.raises(RuntimeError, match="commit"):
        scheduler.schedule()
    scheduler.commit(plan)
    with pytest.raises(RuntimeError, match="not appended"):
        scheduler.schedule()


@pytest.mark.parametrize(
    "wrong, field",
    [
        (config(4, (2,)), "decode_rows"),
        (config(4, (4, 2)), "decode_rows"),
        (config(4, ()), "decode_rows"),
        (config(4, (4,), ()), "prefill"),
        (config(4, (4,), ((1, 1),)), "prefill"),
        (config(4, (4,), ((8, 16),)), "prefill"),
    ],
)
def test_buckets_that_cannot_work_are_refused(wrong, field):
    with pytest.raises(UserError, match=field):
        Scheduler(wrong, 1)
