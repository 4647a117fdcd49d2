"""Experts move to other slots of one server while the server answers requests."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dance_jax.config import EngineConfig
from dance_jax.engine.compile_cache import CompileCache
from dance_jax.engine.engine import Engine
from dance_jax.engine.pools import ArrayPools, SlotWrite
from dance_jax.engine.sequence import Request, RequestOutput, SamplingParams
from dance_jax.models import native
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.tokenizer import Tokenizer
from dance_jax.placement.core import Layout, Placement
from dance_jax.placement.devices import spread
from dance_jax.placement.migration import SlotChange, changed
from tests.engine.traffic import make_checkpoint
from tests.tiny_models import OSS

LAYERS, EXPERTS = 2, 16
#: More slots than experts, so that experts can move.
SLOTS = 40
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, expert_library: pathlib.Path | None
) -> Checkpoint:
    """A checkpoint with biases, so that experts have leaves of two types."""
    return make_checkpoint(tmp_path_factory.mktemp("engine"), OSS)


def start(checkpoint: Checkpoint, dtype: str) -> Engine:
    """An engine of one server with all experts and free slots."""
    config = EngineConfig(
        max_model_len=64,
        max_num_seqs=4,
        decode_rows=(4,),
        slice_rows=(2,),
        block_size=8,
        dtype=dtype,
    )
    everything = Placement(np.ones((1, LAYERS, EXPERTS), bool))
    layout = spread(everything, [1], [SLOTS])
    tokenizer, steps = Tokenizer.load(checkpoint.path), CompileCache(None)
    return Engine(checkpoint, tokenizer, None, 0, layout, config, compile_cache=steps)


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Engine:
    engine = start(checkpoint, "float32")
    engine.warmup()
    return engine


def shuffled(layout: Layout, seed: int, most: int) -> list[SlotChange]:
    """Changes that move some experts to other experts' slots and to free slots."""
    rng = np.random.default_rng(seed)
    table = layout.experts_of(0, 0)
    moving = rng.choice(SLOTS, most, replace=False)
    pairs = zip(moving.tolist(), table[np.roll(moving, 1)].tolist(), strict=True)
    return [SlotChange(0, 0, slot, *pair) for slot, pair in pairs]


def loads(checkpoint: Checkpoint, engine: Engine, old: Layout, new: Layout):
    """The experts that `new` has in other slots, read from the checkpoint."""
    was, now = old.experts_of(0, 0), new.experts_of(0, 0)
    slots = np.flatnonzero((was != now).any(1) & (now[:, 0] >= 0)).tolist()
    assert slots
    pairs = [tuple(now[slot].tolist()) for slot in slots]
    experts = checkpoint.experts(pairs, engine.form)
    return {(0, slots[place]): weights for place, weights in experts}


def stage(checkpoint: Checkpoint, engine: Engine, number: int, seed: int, most: int) -> None:
    changes = shuffled(engine.layout, seed, most)
    experts = loads(checkpoint, engine, engine.layout, changed(engine.layout, changes))
    engine.stage(number, changes, experts)


def check_pool(checkpoint: Checkpoint, engine: Engine) -> None:
    """Check every expert against the checkpoint; the experts are read in a separate thread."""
    pairs = list(np.ndindex(LAYERS, EXPERTS))
    found = []
    reader = threading.Thread(target=lambda: found.extend(engine.expert(*pair) for pair in pairs))
    reader.start()
    reader.join()
    assert len(found) == len(pairs)
    for place, wanted in checkpoint.experts(pairs, engine.form):
        for ours, theirs in zip(found[place], wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)


REQUESTS = {str(n): np.random.default_rng(n).integers(2, 258, 5 + 4 * n).tolist() for n in range(6)}


def outputs(engine: Engine, each_step=lambda: None) -> dict[str, list[int]]:
    """Greedy outputs of all requests, run at once."""
    found = {}
    for name, prompt in REQUESTS.items():
        sampling = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
        request = Request(name, None, prompt, sampling)
        found[name] = RequestOutput.of(request)
        engine.add(request)
    while engine.has_work:
        each_step()
        for delta in engine.step().outputs:
            found[delta.request_id].add(delta)
    return {name: each.outputs[0].token_ids for name, each in found.items()}


def test_outputs_do_not_change_and_nothing_is_compiled(checkpoint: Checkpoint, engine: Engine):
    expected = outputs(engine)
    first, before = engine.layout, engine.report()
    numbers = iter(range(1, 100))

    def move() -> None:
        stage(checkpoint, engine, number := next(numbers), seed=number, most=12 + number % 7)
        assert engine.commit(number)

    compiled = []
    listener = lambda event, _, **__: compiled.append(event) if "compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        jax.jit(lambda x: x + 43)(jnp.ones(3))
        assert compiled, "the listener hears nothing"
        compiled.clear()
        assert outputs(engine, move) == expected
        after = engine.report()
        check_pool(checkpoint, engine)
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert next(numbers) > 20, "a batch in every step"
    assert (engine.layout.slot_of != first.slot_of).mean() > 0.5
    # All calls are served locally under any layout.
    computed = after.prompt_tokens - before.prompt_tokens
    computed += after.generation_tokens - before.generation_tokens - len(REQUESTS)
    calls = after.calls_local - before.calls_local
    assert calls == computed * LAYERS * checkpoint.config.top_k and after.calls_remote == 0


def test_a_batch_is_in_force_once_it_is_committed(checkpoint: Checkpoint, engine: Engine):
    """The experts of a staged batch are in their slots before the commit."""
    old = engine.layout
    stage(checkpoint, engine, 1000, seed=1, most=12)
    assert not engine.has_work and engine.layout is old
    assert not engine.commit(999) and engine.layout is old
    assert engine.commit(1000) and engine.layout is not old
    assert not engine.commit(1000) and not engine.unstage(1000)
    check_pool(checkpoint, engine)

    kept = engine.layout
    stage(checkpoint, engine, 1001, seed=2, most=12)
    assert engine.unstage(1001) and not engine.commit(1001) and engine.layout is kept
    with pytest.raises(KeyError, match="expert 3 of MoE layer 1 is not on this server"):
        absent = kept.device_of.copy()
        absent[0, 1, 3] = -1
        engine._staging.layout = dataclasses.replace(kept, device_of=absent)
        engine.expert(1, 3)
    engine._staging.layout = kept
    # Batch 1001 overwrote slots in use, which the launcher's batches never do.
    stage(checkpoint, engine, 1002, seed=2, most=12)
    assert engine.commit(1002)


def test_routes_since_a_migration_are_kept_while_there_is_room(
    checkpoint: Checkpoint, engine: Engine
):
    """All routes are kept, because nothing fades."""
    assert engine.config.half_life is None
    outputs(engine)
    assert len(engine.stats().routes_tlk) > 0
    stage(checkpoint, engine, 1003, seed=3, most=12)
    assert engine.commit(1003)
    before = engine.stats()
    assert len(before.routes_tlk) == 0
    outputs(engine)
    after = engine.stats()
    assert len(after.routes_tlk) == after.tokens - before.tokens > 0
    for layer in range(LAYERS):
        found_e = np.bincount(after.routes_tlk[:, layer].ravel(), minlength=EXPERTS)
        counted_e = np.subtract(after.counts[layer], before.counts[layer])
        assert found_e.tolist() == counted_e.tolist()


def test_costs_are_measured(engine: Engine):
    """Costs include the calls served, but not those of the warm-up."""
    before = engine.report()
    outputs(engine)
    after, stats = engine.report(), engine.stats()
    served = after.calls_served - before.calls_served
    assert served == after.calls_local - before.calls_local > 0
    assert after.expert_seconds > before.expert_seconds
    assert (stats.calls_served, stats.sums) == (after.calls_served, after.sums)
    assert after.sums.moved.calls == 0, "alone nobody is called"


@dtypes
def test_slots_are_written_in_place(checkpoint: Checkpoint, dtype: str):
    """Neither the compiled write nor its call copies the pool."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "usable", lambda: False)
        runner = start(checkpoint, dtype).runner
    pools = runner.pools
    assert isinstance(pools, ArrayPools)
    text = pools.lower_write().compile().as_text()
    assert text is not None
    shapes = {shape for leaf in pools.argument for shape in (leaf.shape, leaf.shape[1:])}
    forbidden = "|".join(",".join(map(str, shape)) for shape in shapes)
    assert re.search(rf"\[({forbidden})\]", text), "the pool is in the program"
    assert not re.search(rf"= \w+\[({forbidden})\]\S* copy\(", text)
    assert not re.search(rf"\w+\[({forbidden})\][^=]* copy-start\(", text)
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
    assert aliased is not None and (
        len(re.findall("(?:may|must)-alias", aliased[1])) == len(pools.argument)
    )

    def places() -> list[int]:
        return [leaf.addressable_shards[0].data.unsafe_buffer_pointer() for leaf in pools.argument]

    pools.warm_up()
    before, neighbour = places(), pools.read(0, 8)
    fresh = tuple(np.full_like(leaf, 2) for leaf in runner.form.empty())
    pools.write([[SlotWrite(slot, slot, fresh) for slot in (7, 9)]])
    assert places() == before
    for slot, wanted in ((7, fresh), (8, neighbour), (9, fresh)):
        for ours, theirs in zip(pools.read(0, slot), wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
    assert {leaf.dtype.name for leaf in fresh} == {dtype, "float32"}
