"""The scheduler in plain Python: a fake engine checks every plan and that all work finishes."""

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dance_jax.config import UserError
from dance_jax.engine.scheduler import Scheduler
from dance_jax.engine.sequence import SamplingParams, Sequence
from tests.engine.fake_engine import FakeEngine, known_tokens, make_config, outputs_of

#: Prefixes that prompts share, of several blocks and of less than one.
BEGINNINGS = ([1, 2, 3, 4, 5, 6, 7, 8, 9, 1], [1, 2, 3, 4, 9, 9, 9], [5], [])
sizes = st.sets(st.integers(1, 5), min_size=1, max_size=3).map(lambda found: tuple(sorted(found)))


class AnyTraffic(RuleBasedStateMachine):
    """Requests arrive, resume and abort in any order; blocks are short more often than not."""

    @initialize(
        decode_rows=sizes,
        slice_rows=sizes,
        block_size=st.integers(2, 4),
        max_model_len=st.integers(12, 30),
        devices=st.integers(1, 3),
        spare=st.integers(0, 12),
    )
    def start(self, decode_rows, slice_rows, block_size, max_model_len, devices, spare):
        config = make_config(decode_rows, slice_rows, block_size, max_model_len)
        self.engine = FakeEngine(config, devices, config.max_blocks + spare)

    @rule(
        beginning=st.sampled_from(BEGINNINGS),
        tail=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        outputs=st.integers(1, 16),
        resumed=st.integers(0, 15),
        copies=st.sampled_from([1, 1, 1, 3]),
        client=st.sampled_from("aaab"),
    )
    def add(self, beginning, tail, outputs, resumed, copies, client):
        longest = self.engine.config.max_model_len
        prompt = [*beginning, *tail][: longest - 1]
        outputs = min(outputs, longest - len(prompt))
        for _ in range(copies):
            self.engine.add(prompt, outputs, min(resumed, outputs - 1), client)

    @rule(count=st.integers(1, 8), others_decode=st.booleans())
    def step(self, count, others_decode):
        for _ in range(count):
            self.engine.step(others_decode)

    @precondition(lambda self: self.engine.live)
    @rule(data=st.data())
    def hang_up(self, data):
        victim = data.draw(st.sampled_from(self.engine.live))
        assert self.engine.abort(victim.request_id) == [victim]
        assert self.engine.abort(victim.request_id) == []

    @precondition(lambda self: self.engine.live)
    @rule(data=st.data())
    def finish_early(self, data):
        self.engine.finish(data.draw(st.sampled_from(self.engine.live)))

    @precondition(lambda self: len(self.engine.live) > 5)
    @rule()
    def abort_all(self):
        self.engine.abort()
        assert not self.engine.live and self.engine.scheduler.blocks_used == 0

    @invariant()
    def blocks_are_accounted_for(self):
        self.engine.check_blocks()

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.drain()
            assert self.engine.scheduler.schedule().empty
            assert self.engine.scheduler.blocks_used == 0


AnyTraffic.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
test_any_traffic = AnyTraffic.TestCase


def prompt_of(length: int, name: int = 0) -> list[int]:
    """A prompt with a unique first token, so that it shares no prefix with another prompt."""
    return [100 + name, *range(1, length)]


def test_no_token_is_lost_when_blocks_run_out():
    config = make_config(decode_rows=(8,), max_model_len=64)
    engine = FakeEngine(config, num_blocks=config.max_blocks)
    sequences = [engine.add(prompt_of(9, name), 40) for name in range(8)]
    engine.drain()
    assert engine.scheduler.preemptions >= 4
    assert [s.output_token_ids for s in sequences] == [
        outputs_of(s.prompt_token_ids, 40) for s in sequences
    ]
    # Sequences finish oldest first, despite preemptions.
    assert engine.done == sequences


def test_the_youngest_is_preempted_and_prefilled_with_its_outputs():
    engine = FakeEngine(make_config(slice_rows=(6,), max_model_len=32), num_blocks=8)
    old, young = engine.add(prompt_of(11, 0), 12), engine.add(prompt_of(11, 1), 20)
    while not engine.scheduler.preemptions:
        engine.step()
    assert (old.device, len(old.blocks)) == (0, 5)
    assert (young.device, young.blocks, young.num_computed) == (-1, [], 0)
    assert len(young.output_token_ids) == 6
    engine.step()
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (1, 1)
    known = known_tokens(young)
    while young.device < 0:
        plan = engine.step()
    rows = [row for row in plan.entries[0] if row.sequence is young]
    assert rows[0].start == 8, "what nobody needed meanwhile is still cached"
    assert known[8:] == [token for row in rows for token in row.tokens]
    assert [row.sample for row in rows] == [False] * (len(rows) - 1) + [True]
    engine.drain()
    assert engine.scheduler.preemptions == 1
    assert engine.done == [old, young]


def test_a_resumed_sequence_counts_as_a_prompt_even_if_all_but_one_token_is_cached():
    config = make_config(decode_rows=(1, 2, 3), slice_rows=(1, 2), block_size=2, max_model_len=12)
    engine = FakeEngine(config)
    for _ in range(3):
        engine.add([5, 0], outputs=3, done=1)
    engine.step()
    plan = engine.step()
    assert plan.bucket == (3, 2) and [len(row.tokens) for row in plan.entries[0]] == [1, 1, 1]
    engine.drain()


def test_a_prompt_keeps_its_rows_of_a_step_in_which_blocks_run_out():
    engine = FakeEngine(make_config(slice_rows=(2, 3), max_model_len=32), num_blocks=9)
    old = [engine.add(prompt_of(3, name), 20) for name in range(3)]
    engine.step()
    young = engine.add(prompt_of(20, 9), 2)
    engine.step()
    assert ([s.num_computed for s in old], young.num_computed) == ([4, 4, 4], 8)
    # All old sequences start a new block, which leaves one block for two rows of the prompt.
    engine.step()
    assert (young.num_computed, engine.scheduler.preemptions) == (12, 0)
    engine.step()
    assert (young.device, engine.scheduler.preemptions) == (-1, 1)
    engine.drain()


def test_what_is_preempted_goes_before_all_younger_ones():
    engine = FakeEngine(make_config(max_model_len=32), num_blocks=8)
    old, preempted = (engine.add(prompt_of(11, name), 20) for name in range(2))
    while not engine.scheduler.preemptions:
        engine.step()
    younger = [engine.add(prompt_of(1, name), 9) for name in range(2, 5)]
    while preempted.device < 0:
        assert engine.scheduler.running[0] in ([old], [])
        engine.step()
    assert engine.scheduler.running[0] in ([preempted, *younger], [preempted, *younger[:2]])


def test_a_preempted_sequence_takes_its_place_by_age_on_another_device():
    engine = FakeEngine(make_config(slice_rows=(8,), max_model_len=32), devices=2, num_blocks=8)
    lengths, outputs = (11, 3, 11, 3), (20, 3, 20, 20)
    first, _, preempted, last = (
        engine.add(prompt_of(length, name), count)
        for name, (length, count) in enumerate(zip(lengths, outputs, strict=True))
    )
    while not engine.scheduler.preemptions:
        engine.step()
    assert engine.scheduler.running == [[first], [last]]
    engine.step()
    assert engine.scheduler.running == [[first], [preempted, last]]
    engine.drain()


def test_those_who_wait_keep_their_order_when_others_hang_up():
    engine = FakeEngine(make_config((2,), (6,), max_model_len=32), num_blocks=8)
    old, preempted = (engine.add(prompt_of(11, name), 20) for name in range(2))
    waiting = [engine.add(prompt_of(3, name), 1) for name in range(2, 9)]
    while not engine.scheduler.preemptions:
        engine.step()
    for sequence in (preempted, waiting[0]):
        assert engine.abort(sequence.request_id) == [sequence]
    engine.drain()
    assert engine.done == [*waiting[1:], old]


def test_clients_are_admitted_round_robin():
    """However many sequences one client has, another waits for at most one of them."""
    engine = FakeEngine(make_config((1,), (1,)))
    many = [engine.add(prompt_of(2, name), 1, client="many") for name in range(9)]
    engine.step()
    few = [engine.add(prompt_of(2, name), 1, client="few") for name in (20, 21)]
    late = engine.add(prompt_of(2, 30), 1, client="late")
    engine.drain()
    assert engine.done == [*many[:2], few[0], late, many[2], few[1], *many[3:]]


def test_what_an_earlier_engine_began_goes_before_new_requests_of_all_clients():
    engine = FakeEngine(make_config((1,), (4,)))
    new = engine.add(prompt_of(2, 0), 5, client="other")
    begun = [engine.add(prompt_of(2, name), 5, done=2, client="many") for name in (1, 2)]
    engine.drain()
    assert engine.done == [*begun, new]


def test_a_client_that_hung_up_waits_no_longer_than_others():
    engine = FakeEngine(make_config((1,), (1,)))
    for name in range(9):
        engine.add(prompt_of(2, name), 1, client="many")
    old = engine.add(prompt_of(2, 20), 1, client="other")
    engine.step()
    for sequence in [s for s in engine.live if s.client == "many"]:
        assert engine.abort(sequence.request_id) == [sequence]
    again = engine.add(prompt_of(2, 10), 1, client="many")
    later = engine.add(prompt_of(2, 21), 1, client="other")
    engine.drain()
    assert engine.done[1:] == [old, again, later]


def test_a_long_prompt_is_not_starved_by_short_ones():
    config = make_config(decode_rows=(4,), block_size=4, max_model_len=64)
    engine = FakeEngine(config, num_blocks=config.max_blocks)
    for name in range(4):
        engine.add(prompt_of(6, name), 10)
    engine.step()
    long = engine.add(prompt_of(62, 9), 2)
    steps = 0
    while long in engine.live:
        engine.add(prompt_of(6, 10 + steps), 10)
        engine.step()
        steps += 1
    assert steps < 40
    assert len(engine.done) == 5


def test_decoding_goes_on_beside_a_long_prompt():
    engine = FakeEngine(make_config(decode_rows=(4,), slice_rows=(1, 8), max_model_len=200))
    decoding = [engine.add(prompt_of(3, name), 150) for name in range(3)]
    engine.step()
    long = engine.add(prompt_of(160, 9), 2)
    for row in range(40):
        plan = engine.step()
        assert plan.bucket == (4, 1)
        assert [len(s.output_token_ids) for s in decoding] == [row + 2] * 3
        assert long.num_computed == 4 * (row + 1)
    assert len(long.output_token_ids) == 1
    assert engine.step().bucket == (4, 0)
    assert not engine.live.count(long)


def test_many_prompts_take_a_row_each_beside_a_decode():
    engine = FakeEngine(make_config(decode_rows=(8,), slice_rows=(1, 3, 4), max_model_len=200))
    engine.add(prompt_of(3, 0), 60)
    engine.step()
    prompts = [engine.add(prompt_of(12, name), 2) for name in range(1, 5)]
    # Four prompts of three rows each, then three prompts; the last two are fewer than size 3.
    assert engine.step().bucket == (8, 4)
    assert [len(s.output_token_ids) for s in prompts] == [1, 0, 0, 0]
    assert engine.step().bucket == (8, 3)
    assert engine.step().bucket == (8, 1)


@pytest.mark.parametrize(
    "lengths, others_decode, sizes",
    [
        ([3], False, [1]),
        ([5], False, [2]),
        ([5, 5], False, [2]),
        ([3, 3, 3, 3, 3], False, [4]),
        ([70], False, [8, 8, 2]),
        ([9], True, [1, 1, 1]),
    ],
)
def test_the_slice_is_the_smallest_that_holds_the_prompts(lengths, others_decode, sizes):
    config = make_config((2, 4), (1, 2, 4, 8), max_model_len=128)
    engine = FakeEngine(config, devices=2)
    for name, length in enumerate(lengths):
        engine.add(prompt_of(length, name))
    plans = []
    while engine.live:
        plans.append(engine.step(others_decode))
    assert [plan.bucket for plan in plans] == [(4, size) for size in sizes]
    assert not any(plan.decoding for plan in plans)


@pytest.mark.parametrize("count, rows", [(1, 1), (2, 1), (3, 2), (5, 8), (16, 8)])
def test_the_decode_is_the_smallest_for_the_busiest_device(count, rows):
    engine = FakeEngine(make_config((1, 2, 8), (8,)), devices=2)
    for name in range(count):
        engine.add(prompt_of(1, name), 2)
    assert engine.step().bucket == (8, 8)
    plan = engine.step()
    assert plan.bucket == (rows, 0) and plan.decoding
    assert not engine.live


def test_rows_of_a_slice():
    engine = FakeEngine(make_config((2,), (6,)))
    one, two = engine.add(prompt_of(9, 1)), engine.add(prompt_of(20, 2))
    rows = engine.step().entries[0]
    assert [row.sequence for row in rows] == [one] * 3 + [two] * 3
    assert [row.index for row in rows] == [2, 3, 4, 5, 6, 7]
    assert [row.first for row in rows] == [2, 2, 2, 5, 5, 5]
    assert [row.start for row in rows] == [0, 4, 8, 0, 4, 8]
    assert [len(row.tokens) for row in rows] == [4, 4, 1, 4, 4, 4]
    assert [row.sample for row in rows] == [False, False, True, False, False, False]
    rows = engine.step().entries[0]
    assert [(row.index, row.first, row.start) for row in rows] == [(2, 2, 12), (3, 2, 16)]
    assert not engine.live


def test_a_shared_prefix_is_computed_once():
    engine = FakeEngine(make_config(slice_rows=(4,)))
    engine.add([*range(40), 50])
    engine.drain()
    assert (engine.scheduler.prefix_queries, engine.scheduler.prefix_hits) == (41, 0)
    engine.add([*range(38), 60, 61])
    (row,) = engine.step().entries[0]
    assert (row.start, row.tokens) == (36, [36, 37, 60, 61])
    assert (engine.scheduler.prefix_queries, engine.scheduler.prefix_hits) == (81, 36)


def test_the_last_token_is_computed_even_if_all_is_cached():
    engine = FakeEngine(make_config(slice_rows=(4,)))
    for start in (0, 4):
        engine.add(list(range(8)))
        plan = engine.step()
        assert [row.start for row in plan.entries[0]] == list(range(start, 8, 4))
        assert plan.entries[0][-1].sample


def test_samples_of_a_prompt_share_its_blocks_while_they_run():
    engine = FakeEngine(make_config((4,), (4,)))
    samples = [engine.add(prompt_of(17), 8) for _ in range(3)]
    while any(s.prefilling for s in samples):
        engine.step()
    assert [s.blocks[:4] for s in samples] == [samples[0].blocks[:4]] * 3
    assert engine.scheduler.prefix_hits == 2 * 16
    assert engine.scheduler.blocks_used == 4 + 3


def test_outputs_are_found_by_the_next_turn_of_a_chat():
    engine = FakeEngine(make_config())
    first = engine.add(prompt_of(6), 11)
    engine.drain()
    engine.add([*known_tokens(first), 7, 7, 7])
    engine.step()
    # The last output has not been an input of any step yet.
    assert engine.scheduler.prefix_hits == 16


def test_devices_the_cached_prefix_first_then_the_fewest():
    engine = FakeEngine(make_config((3,), (8,)), devices=3)
    spread = [engine.add(prompt_of(9, name), 9) for name in range(3)]
    engine.step()
    assert [s.device for s in spread] == [0, 1, 2]
    # Prompts 1, 1, 1, 2 and a new one; device 1 has room for two.
    more = [engine.add([*prompt_of(8, name), 77], 9) for name in (1, 1, 1, 2, 3)]
    engine.step()
    assert [s.device for s in more] == [1, 1, 0, 2, 0]


def test_cached_blocks_give_way_to_new_ones():
    config = make_config(slice_rows=(16,), max_model_len=33)
    engine = FakeEngine(config, num_blocks=config.max_blocks)
    for name in range(5):
        engine.add(prompt_of(32, name))
        engine.drain()
    assert engine.scheduler.preemptions == 0
    engine.add(prompt_of(32, 4))
    engine.step()
    assert engine.scheduler.prefix_hits == 28
    engine.add(prompt_of(32, 0))
    engine.step()
    assert engine.scheduler.prefix_hits == 28


def test_a_resumed_sequence_prefills_prompt_and_output():
    engine = FakeEngine(make_config(slice_rows=(4,)))
    sequence = engine.add(prompt_of(5), 9, done=4)
    rows = engine.step().entries[0]
    assert [len(row.tokens) for row in rows] == [4, 4, 1] and rows[-1].sample
    engine.drain()
    assert sequence.output_token_ids == outputs_of(prompt_of(5), 9)


def test_a_step_looks_at_the_oldest_waiting_sequence_alone():
    looked_at = []

    class Watched(Sequence):
        @property
        def num_tokens(self):
            looked_at.append(self)
            return super().num_tokens

    engine = FakeEngine(make_config((4,), (1,)))
    for name in range(4):
        engine.add(prompt_of(1, name), 9)
    engine.step()
    waiting = [Watched(str(n), 0, [n], SamplingParams(), 1, seed=0) for n in range(1000)]
    for sequence in waiting:
        engine.scheduler.add(sequence)
    looked_at.clear()
    plan = engine.scheduler.schedule()
    assert engine.scheduler.num_waiting == 1000 and not plan.empty
    assert set(looked_at) <= {waiting[0]}


def test_forgetting_a_sampled_token_or_commit_is_noticed():
    scheduler = Scheduler(make_config(), 1, 16)
    engine = FakeEngine(make_config())
    scheduler.add(engine.add(prompt_of(3)))
    plan = scheduler.schedule()
    with pytest.raises(RuntimeError, match="commit"):
        scheduler.schedule()
    scheduler.commit(plan)
    with pytest.raises(RuntimeError, match="not appended"):
        scheduler.schedule()


def test_finishing_what_is_unknown_is_noticed():
    engine = FakeEngine(make_config())
    sequence = engine.add(prompt_of(3))
    engine.finish(sequence)
    with pytest.raises(ValueError):
        engine.scheduler.finish(sequence)


@pytest.mark.parametrize(
    "wrong, field",
    [
        ({"decode_rows": (4, 2)}, "decode_rows"),
        ({"decode_rows": (2, 2)}, "decode_rows"),
        ({"decode_rows": (0, 2)}, "decode_rows"),
        ({"decode_rows": ()}, "decode_rows"),
        ({"max_num_seqs": 8}, "decode_rows"),
        ({"slice_rows": ()}, "slice_rows"),
        ({"slice_rows": (0, 1)}, "slice_rows"),
        ({"slice_rows": (4, 1)}, "slice_rows"),
        ({"block_size": 1, "max_model_len": 8}, "block_size"),
    ],
)
def test_configurations_that_cannot_work_are_refused(wrong, field):
    good = make_config()
    Scheduler(good, 1, 16)
    with pytest.raises(UserError, match=f"^{field}: "):
        Scheduler(dataclasses.replace(good, **wrong), 1, 16)


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_a_sequence_that_failed_is_stalled_until_it_goes_on(share_prefixes):
    scheduler = Scheduler(make_config(), 1, 16, share_prefixes)
    sequence = Sequence("a", 0, prompt_of(3), SamplingParams(), 1, seed=0)
    scheduler.add(sequence)
    scheduler.commit(scheduler.schedule(), [sequence, sequence])
    assert (scheduler.stalled, scheduler.failures) == (1, 1)
    assert scheduler.schedule().empty
    sequence.rests_until = 1e-9  # the pause is over
    plan = scheduler.schedule()
    assert plan.num_tokens == 3 and scheduler.stalled == 1
    scheduler.commit(plan)
    assert (scheduler.stalled, scheduler.failures) == (0, 1)
