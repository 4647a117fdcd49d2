"""Plans: which server holds which experts, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import types
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dance_jax.config import EngineConfig, EngineOptions, UserError
from dance_jax.launch.cli.report import print_plan
from dance_jax.launch.planning.costs import SERVICE_STAGGERED, cluster_cost
from dance_jax.launch.planning.defaults import engine_config
from dance_jax.launch.planning.exchange import choose_exchange
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.launch.planning.plan import Plan, make_plan, rooms
from dance_jax.models import model_config
from dance_jax.models.formats import Formats, WeightFormat
from dance_jax.placement.activations import Activations
from dance_jax.placement.core import Layout, Placement
from dance_jax.placement.cost import CallCost, Cost, LockStepCost
from dance_jax.placement.policies import POLICIES
from dance_jax.placement.problem import Problem
from tests.launch.tiny import EXPERT_BYTES, EXPERTS, HOSTS, LAYERS
from tests.tiny_models import HYBRID, SERVED

SPEC = parse_hosts(HOSTS)
MODEL: Any = types.SimpleNamespace(
    config=model_config(SERVED),
    source="this model",
    fingerprint="this model, in these formats",
    expert_bytes=lambda dtype: EXPERT_BYTES // (1 if dtype == "float32" else 2),
    trunk_bytes=lambda dtype: 1000,
    expert_formats=lambda dtype: "float32 (32 bits a weight)",
    trunk_formats=lambda dtype: "float32 (32 bits a weight)",
)
CONFIG = EngineConfig(max_model_len=64)


def activations(
    model: str = "this model",
    layers: int = LAYERS,
    names=("gamma", "beta", "alpha"),
    routes: tuple[np.ndarray, ...] = (),
) -> Activations:
    counts = np.zeros((3, layers, EXPERTS), np.int64)
    counts[0, :, :8] = 5  # gamma uses the first half, beta and alpha the second
    counts[1:, :, 8:] = 5
    return Activations(tuple(names), counts, model, routes)


def random_routes() -> tuple[np.ndarray, ...]:
    """Routes of three servers, 20 tokens each."""
    scores = np.random.default_rng(0).random((3, 20, LAYERS, EXPERTS))
    return tuple(scores.argsort(-1)[..., : MODEL.config.top_k])


def text_of(plan: Plan) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    print_plan(console, plan)
    return console.export_text()


def test_slots_are_what_memory_holds() -> None:
    plan = make_plan(SPEC, MODEL, CONFIG)
    assert [server.slots for server in plan.servers] == [14, 11, 10]
    assert [server.pool_bytes for server in plan.servers] == [
        14 * EXPERT_BYTES,
        11 * EXPERT_BYTES,
        10 * EXPERT_BYTES,
    ]
    assert plan.layout.slots_per_device == (14, 11, 10)
    assert plan.layout.devices == (1, 1, 2)
    half = make_plan(SPEC, MODEL, dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert [server.slots for server in half.servers] == [14, 22, 10]


def test_no_device_has_more_slots_than_there_are_experts() -> None:
    spec = parse_hosts("alpha address=localhost memory=9999999TiB")
    plan = make_plan(spec, MODEL, CONFIG)
    assert plan.layout.slots_per_device == (LAYERS * EXPERTS,)


def test_spare_slots_stay_empty() -> None:
    plan = make_plan(SPEC, MODEL, CONFIG)
    assert [(server.spare, server.capacity) for server in plan.servers] == [
        (1, 13),
        (1, 10),
        (1, 18),
    ]
    assert [sum(server.resident) for server in plan.servers] == [13, 10, 18]
    for server, devices in enumerate(SPEC.devices):
        for device in range(devices):
            assert (plan.layout.experts_of(server, device)[:, 0] < 0).sum() == 1
    assert [row.split("│")[7].strip() for row in text_of(plan).splitlines()[4:7]] == ["1"] * 3


def test_without_spare_slots_the_plan_says_so() -> None:
    spec = parse_hosts("a address=localhost experts=22\nb address=localhost experts=10")
    (*_, note) = make_plan(spec, MODEL, CONFIG).notes
    assert note.startswith("No spare slot on a, b: no other experts can be loaded there")
    spec = parse_hosts("a address=localhost experts=32\nb address=localhost experts=10")
    plan = make_plan(spec, MODEL, CONFIG)
    assert [server.spare for server in plan.servers] == [0, 1], "a has everything"
    assert not any("spare" in note for note in plan.notes)


def test_every_expert_has_a_slot() -> None:
    plan = make_plan(SPEC, MODEL, CONFIG, "uniform")
    plan.placement.validate([13, 10, 18])
    placed = {
        (int(layer), int(expert))
        for server, devices in enumerate(SPEC.devices)
        for device in range(devices)
        for layer, expert in plan.layout.experts_of(server, device)
        if layer >= 0
    }
    assert placed == {(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)}


def test_forty_servers_and_too_many() -> None:
    spec = parse_hosts("\n".join(f"s{n} address=localhost experts=2" for n in range(40)))
    counts = np.random.default_rng(0).integers(1, 9, (40, LAYERS, EXPERTS))
    used = Activations(spec.names, counts, "this model", random_routes()[:1] * 40)
    plan = make_plan(spec, MODEL, CONFIG, "optimal", used)
    plan.placement.validate([room.capacity for room in plan.servers])
    layout = Layout.from_bytes(plan.layout.to_bytes())
    assert (layout.resident == plan.placement.resident).all()
    spec = parse_hosts("\n".join(f"s{n} address=localhost experts=1" for n in range(257)))
    with pytest.raises(UserError, match="257 servers: at most 256 can serve a model"):
        rooms(spec, MODEL, CONFIG)


def test_without_activations_the_plan_says_so() -> None:
    plan = make_plan(SPEC, MODEL, CONFIG)
    first, second = plan.notes
    assert first.startswith("No activations were given")
    assert second == "latency needs routes, there are none: policy optimal is used instead."
    assert first in text_of(plan) and second in text_of(plan)
    assert [note[:14] for note in make_plan(SPEC, MODEL, CONFIG, "dance").notes] == [first[:14]]


def test_the_default_policy_needs_routes() -> None:
    counted = make_plan(SPEC, MODEL, CONFIG, activations=activations())
    assert counted.policy == "optimal" and "policy optimal" in text_of(counted)
    assert counted.notes == (
        "latency needs routes, there are none: policy optimal is used instead.",
    )
    empty = tuple(np.zeros((0, LAYERS, 0), int) for _ in range(3))
    assert make_plan(SPEC, MODEL, CONFIG, activations=activations(routes=empty)).notes
    routed = make_plan(SPEC, MODEL, CONFIG, activations=activations(routes=random_routes()))
    assert (routed.policy, routed.notes) == ("latency", ())


def test_what_links_cost_reaches_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = []

    def policy(problem: Problem) -> Placement:
        problems.append(problem)
        return POLICIES["uniform"].place(problem)

    weighing = dataclasses.replace(POLICIES["latency"], place=policy)
    monkeypatch.setitem(POLICIES, "latency", weighing)
    given = activations(routes=random_routes())
    for rate, words in (("500Mbps", ()), ("auto", ("bandwidth=auto of alpha is not measured",))):
        plan = make_plan(
            parse_hosts(HOSTS.replace("500Mbps", rate)), MODEL, CONFIG, "latency", given
        )
        assert len(plan.notes) == len(words)
        assert all(word in text_of(plan) for word in words)
    known, unknown = (problem.cost for problem in problems)
    assert isinstance(known, CallCost) and isinstance(unknown, CallCost)
    assert np.array_equal(known.state, cluster_cost(SPEC, MODEL.config, CONFIG).state)
    assert unknown.state.tolist() == [1, 1, 1]
    spec = parse_hosts(HOSTS.replace("500Mbps", "auto"))
    assert make_plan(spec, MODEL, CONFIG, "uniform", given).notes == ()


def test_the_policy_weighs_the_exchange_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchange depends on the placement: if all servers have accelerators and fast links, a
    placement made for calls is made again for lock step."""
    costs: list[Cost | None] = []

    def policy(problem: Problem) -> Placement:
        costs.append(problem.cost)
        return POLICIES["uniform"].place(problem)

    weighing = dataclasses.replace(POLICIES["latency"], place=policy)
    monkeypatch.setitem(POLICIES, "latency", weighing)

    def weighed(keys: str, exchange: str = "auto", service: bool = False) -> list[Cost | None]:
        costs.clear()
        spec = parse_hosts("\n".join(f"{n} address=localhost experts=32 {keys}" for n in "ab"))
        counts = np.ones((2, LAYERS, EXPERTS), np.int64)
        given = Activations(("a", "b"), counts, "this model", random_routes()[:2])
        config = dataclasses.replace(CONFIG, exchange=exchange)
        plan = make_plan(spec, MODEL, config, "latency", given, service)
        assert (plan.exchange.name == "calls") == isinstance(costs[-1], CallCost)
        return list(costs)

    fast = "platform=cuda bandwidth=10Gbps"
    assert list(map(type, weighed(""))) == [CallCost]
    assert list(map(type, weighed("", "collectives"))) == [LockStepCost]
    assert list(map(type, weighed(fast))) == [CallCost, LockStepCost]
    assert list(map(type, weighed(fast, "calls"))) == [CallCost]
    (batch,), (served,) = weighed("", "collectives"), weighed("", "collectives", service=True)
    assert isinstance(batch, LockStepCost) and isinstance(served, LockStepCost)
    assert served.transfer == batch.staggered(SERVICE_STAGGERED).transfer > batch.transfer


def test_rooms_do_not_depend_on_the_placement() -> None:
    held, plan = rooms(SPEC, MODEL, CONFIG), make_plan(SPEC, MODEL, CONFIG, "uniform")
    for room, server in zip(held, plan.servers, strict=True):
        assert vars(room).items() <= vars(server).items()
        assert room.device_bytes == server.trunk_bytes + server.kv_bytes + server.pool_bytes


def test_activations_are_matched_by_name() -> None:
    plan = make_plan(SPEC, MODEL, CONFIG, "dance", activations())
    text = text_of(plan)
    assert plan.notes == ()
    assert plan.placement.resident[2, :, :8].all()  # gamma has room for 18 and uses 16
    assert plan.servers[2].local_share == 1.0
    assert plan.local_share == plan.placement.local_share(activations().counts[::-1])
    for server in plan.servers:
        assert " ".join(map(str, server.resident)) in text
        assert f"{server.local_share:.3f}" in text


def test_kv_cache_is_what_a_device_allocates() -> None:
    from dance_jax.engine.kv_cache import new_memory, num_blocks
    from dance_jax.models.collectives import Collectives

    plan = make_plan(SPEC, MODEL, CONFIG)
    blocks = num_blocks(MODEL.config, CONFIG)
    cache = new_memory(MODEL.config, CONFIG, blocks, Collectives()).cache
    assert plan.servers[0].kv_bytes == sum(np.asarray(layer).nbytes for layer in cache)


def test_states_are_kept_twice_where_servers_call_each_other() -> None:
    facts = vars(MODEL) | {"config": model_config(HYBRID)}
    model: Any = types.SimpleNamespace(**facts)
    for exchange, copies in (("auto", 2), ("calls", 2), ("collectives", 1)):
        config = dataclasses.replace(CONFIG, exchange=exchange)
        each = (1 + copies * CONFIG.max_num_seqs) * model.config.state_bytes
        assert [room.state_bytes for room in rooms(SPEC, model, config)] == [each] * 3


def test_too_little_memory_says_how_much_is_missing() -> None:
    spec = parse_hosts("a address=localhost experts=20\nb address=localhost devices=2 experts=4")
    with pytest.raises(UserError) as caught:
        make_plan(spec, MODEL, CONFIG)
    message = str(caught.value)
    assert "4 slots are missing" in message
    assert f"{4 * EXPERT_BYTES:,} bytes" in message
    assert "a 20, b 8" in message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (activations(model="another"), "another model"),
        (activations(layers=3), "3 MoE layers"),
        (activations(names=("alpha", "beta", "delta")), "gamma"),
    ],
)
def test_activations_that_do_not_fit(given: Activations, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_plan(SPEC, MODEL, CONFIG, "dance", given)


def test_unknown_policy() -> None:
    with pytest.raises(UserError, match="unknown policy 'best'"):
        make_plan(SPEC, MODEL, CONFIG, "best")


def test_a_layout_travels_whole() -> None:
    layout = make_plan(SPEC, MODEL, CONFIG).layout
    found = Layout.from_bytes(layout.to_bytes())
    for field in dataclasses.fields(layout):
        assert np.array_equal(getattr(found, field.name), getattr(layout, field.name))


@pytest.mark.parametrize(("exchange", "said"), [("calls", False), ("collectives", True)])
def test_the_open_port_of_collectives_is_said(exchange: str, said: bool) -> None:
    notes = make_plan(SPEC, MODEL, dataclasses.replace(CONFIG, exchange=exchange)).notes
    assert any("port of jax.distributed" in note for note in notes) == said


def test_which_exchange() -> None:
    """Collectives only if all servers have accelerators and links are fast."""

    def choose(lines: tuple[str, ...], asked: str = "auto") -> str:
        text = "\n".join(f"{n} address=localhost experts=1 {line}" for n, line in enumerate(lines))
        config = dataclasses.replace(CONFIG, exchange=asked)
        return choose_exchange(parse_hosts(text), MODEL.config, config, 0.5).name

    fast, slow = "platform=cuda bandwidth=10Gbps", "platform=cuda bandwidth=10kbps"
    assert choose(("", "")) == "calls"
    assert choose(("", ""), "collectives") == "collectives"
    assert choose((fast, fast)) == "collectives"
    assert choose((fast, fast), "calls") == "calls"
    assert choose((fast, "platform=cpu")) == "calls"
    assert choose((slow, slow, slow)) == "calls"
    with pytest.raises(UserError, match="different platforms"):
        choose((fast, ""), "collectives")
    assert choose((fast,) * 31) == "collectives"
    assert choose((fast,) * 32) == "calls"
    with pytest.raises(
        UserError, match="32 servers: with --exchange collectives at most 31 servers can"
    ):
        choose(("",) * 32, "collectives")


@pytest.mark.parametrize(
    ("kinds", "dtype", "asked", "wire"),
    [
        (("float32", "float32", "float32"), None, "auto", "float32"),
        (("float32", "float32", "float32"), "bfloat16", "auto", "bfloat16"),
        (("bfloat16", "bfloat16", "bfloat16"), None, "auto", "bfloat16"),
        (("float16", "float16", "float16"), None, "auto", "bfloat16"),
        (("int4:32:float16", "int4:32:float16", "int8:32:float16"), None, "auto", "bfloat16"),
        (("int8:32:bfloat16", "int8:32:bfloat16", "float32"), None, "auto", "float32"),
        (("bfloat16", "bfloat16", "bfloat16"), None, "float32", "float32"),
        (("float32", "float32", "float32"), None, "int8", "int8"),
    ],
)
def test_the_type_of_the_wire(
    kinds: tuple[str, ...], dtype: str | None, asked: str, wire: str
) -> None:
    """The format of the routed experts decides; norms and similar tensors may be wider."""
    experts = dict(zip(("w_gate", "w_up", "w_down"), map(WeightFormat.parse, kinds), strict=True))
    formats = Formats(experts, {"output": WeightFormat("float32")})
    config = engine_config(
        MODEL.config, EngineOptions(dtype=dtype, wire_dtype=asked), formats=formats
    )
    assert config.wire_dtype == wire
    text = text_of(make_plan(SPEC, MODEL, config))
    assert f"Wire: hidden states in {wire}, sums in float32." in text


def test_which_wire_there_is_none_of() -> None:
    with pytest.raises(
        UserError, match="wire_dtype='compute': must be one of auto, float32, bfloat16"
    ):
        engine_config(MODEL.config, EngineOptions(wire_dtype="compute"))


@pytest.mark.parametrize("name", ("max_model_len", "max_num_seqs", "kv_memory", "seed"))
@pytest.mark.parametrize("value", ("8", 1.5, True))
def test_numbers_of_the_engine_must_be_whole(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{name}=.*: must be a whole number"):
        engine_config(MODEL.config, EngineOptions(**{name: value}))  # type: ignore[arg-type]


def test_engine_configuration() -> None:
    model = MODEL.config
    assert engine_config(model).max_model_len == 256
    assert engine_config(model).dtype == "float32"
    assert engine_config(model, platform="cuda").dtype == "bfloat16"
    with pytest.raises(UserError, match="from 2 to 256"):
        engine_config(model, EngineOptions(257))
