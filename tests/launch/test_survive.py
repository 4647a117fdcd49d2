"""`--survive`: plans, options, decisions and saved states; what a loss means without it."""

from __future__ import annotations

import dataclasses
import io
import pathlib

import numpy as np
import pytest
from rich.console import Console

from dance_jax.config import RebalanceOptions, ServerSpec, UserError
from dance_jax.launch.cli.options import check_mode, parser, rebalance_options
from dance_jax.launch.cli.report import print_plan
from dance_jax.launch.control import protocol
from dance_jax.launch.planning.exchange import choose_exchange
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.launch.planning.loss import load_seconds, loss_lines, losses, most_urgent_loads
from dance_jax.launch.planning.plan import Plan, make_plan, rooms
from dance_jax.launch.rebalance import state
from dance_jax.launch.rebalance.decision import answer, resident
from dance_jax.launch.rebalance.workload import Statistics
from dance_jax.placement.core import Placement
from dance_jax.placement.devices import spread
from dance_jax.placement.migration import changed, migration_seconds
from dance_jax.placement.policies import POLICIES
from dance_jax.placement.recovery import recovery, uncovered
from tests.launch.rebalance_bench import AT_HOME, CONFIG, EXPERTS, LAYERS, LOW, Bench, Facts, halves

TOTAL = LAYERS * EXPERTS
#: Room for two copies on the three servers, and a spare slot on each.
HOSTS = "\n".join(f"{name} address=localhost experts={TOTAL}" for name in "abc")
SPEC = parse_hosts(HOSTS)


def text_of(plan: Plan) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    print_plan(console, plan)
    return console.export_text()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_expert_of_a_plan_has_its_holders(policy: str) -> None:
    spec = parse_hosts(HOSTS.replace(f"experts={TOTAL}", f"experts={3 * TOTAL // 4}"))
    plan = make_plan(spec, Facts(), CONFIG, policy, service=True, survive=1)
    plan.placement.validate([room.capacity for room in plan.servers], spec.names, holders=2)
    assert plan.layout.holders == 2
    assert "If any one server is lost, nobody waits: every expert has another" in text_of(plan)


def test_spare_slots_give_way_to_holders() -> None:
    spec = parse_hosts(f"a address=localhost experts=20\nb address=localhost experts={TOTAL}")
    with pytest.raises(UserError, match="12 slots are missing"):
        rooms(spec, Facts(), CONFIG, survive=1)
    spec = parse_hosts("\n".join(f"{n} address=localhost experts=22" for n in "abc"))
    assert [room.spare for room in rooms(spec, Facts(), CONFIG)] == [1, 1, 1]
    held = rooms(spec, Facts(), CONFIG, survive=1)
    assert [room.spare for room in held] == [0, 1, 1]
    plan = make_plan(spec, Facts(), CONFIG, service=True, survive=1)
    assert plan.layout.capacities.tolist() == [room.capacity for room in held]


def test_too_few_servers_or_too_little_memory() -> None:
    with pytest.raises(UserError, match=r"--survive 3: every expert needs 4 servers.*file has 3"):
        make_plan(SPEC, Facts(), CONFIG, survive=3)
    # A server holds an expert once: more slots than experts are of no use.
    spec = parse_hosts(
        f"a address=localhost devices=3 experts={TOTAL}\nb address=localhost experts=9"
    )
    with pytest.raises(UserError) as caught:
        make_plan(spec, Facts(), CONFIG, survive=1)
    said = str(caught.value)
    assert "32 experts of 6.0 KiB, and with --survive 1 each of them needs 2 servers" in said
    assert "64 slots, but the servers have 41 slots (a 32, b 9); 23 slots are missing" in said
    assert said.endswith("or add a server, or use a smaller --survive")


def test_only_calls_survive() -> None:
    fast = "platform=cuda bandwidth=10Gbps"
    spec = parse_hosts("\n".join(f"{n} address=localhost experts={TOTAL} {fast}" for n in "ab"))
    assert choose_exchange(spec, Facts.config, CONFIG, 0.5).name == "collectives"
    found = choose_exchange(spec, Facts.config, CONFIG, 0.5, survive=1)
    assert found.name == "calls" and "survives the loss" in found.why
    together = dataclasses.replace(CONFIG, exchange="collectives")
    with pytest.raises(UserError, match="--survive 1: with exchange=collectives all engines end"):
        make_plan(spec, Facts(), together, survive=1)
    # Nothing is said of losses where all engines end together, or in a batch.
    for config, service in ((together, True), (CONFIG, False)):
        notes = make_plan(SPEC, Facts(), config, service=service).notes
        assert not any("lost" in note for note in notes)


def test_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*words: str) -> RebalanceOptions:
        return rebalance_options(parser().parse_args(["--hosts", "h", *words]))

    assert found().survive == 0 and found("--survive", "2").survive == 2
    for wrong in ("-1", "1.5", "many"):
        with pytest.raises(SystemExit):
            found("--survive", wrong)
    batch = parser().parse_args(["--hosts", "h", "--prompts", "p", "--survive", "0"])
    with pytest.raises(UserError, match="--survive applies to serving, but --prompts runs a batch"):
        check_mode(batch)


def layout_of(*held: list[int], slots: int):
    """One layer of six experts: what each server holds, in as many slots."""
    resident = np.zeros((len(held), 1, 6), bool)
    for server, experts in enumerate(held):
        resident[server, 0, experts] = True
    return spread(Placement(resident), [1] * len(held), [slots] * len(held))


ABC = tuple(ServerSpec(n, "", read_rate=400e6 if n == "a" else None) for n in "abc")


def test_what_each_loss_means() -> None:
    layout = layout_of([0, 1, 2], [2, 3], [4, 5, 0], slots=4)
    counts = np.zeros((3, 1, 6))
    counts[0, 0, [1, 3]] = counts[1, 0, 1] = 5  # nobody has asked c yet
    size = 2_000_000
    lines = [*loss_lines(losses(layout, ABC, counts, size), ABC, 1, size)]
    # Two slots of b are empty, one of each other server; 10 ms and 10 ms for 2 MB each, or 5 of a.
    assert lines[:3] == [
        "If a is lost, 1 expert has no other holder: b loads 1 (1.9 MiB); users of b, c wait "
        "about 0.02 s.",
        "If b is lost, 1 expert has no other holder: a loads 1 (1.9 MiB); users of a, c wait "
        "about 0.015 s.",
        "If c is lost, 2 experts have no other holder: a loads 1, b loads 1 (3.8 MiB); nobody is "
        "known to call them.",
    ]
    assert lines[3].startswith(
        "Of their models, a reads 381.5 MiB, b, c are assumed to read 190.7 MiB per second; each "
        "expert takes 10 ms more."
    )
    full = layout_of([0, 1, 2], [2, 3], [4, 5, 0], slots=3)
    tight = [*loss_lines(losses(full, ABC, counts, size), ABC, 1, size)]
    assert tight[2] == (
        "If c is lost, 2 experts have no other holder: b loads 2 (3.8 MiB); nobody is known to "
        "call them."
    ), "b gives up expert 2, which a has as well"
    none = layout_of([0, 1], [2, 3], [4, 5], slots=2)
    first, *_ = loss_lines(losses(none, ABC, counts, size), ABC, 1, size)
    assert first == (
        "If a is lost, 2 experts have no other holder; the memory of the others does not suffice: "
        "2 experts lack 3.8 MiB, and requests wait until a is back."
    )


def test_a_plan_says_what_the_service_will_do() -> None:
    """The same experts are loaded in the same batches."""
    spec = parse_hosts("\n".join(f"{n} address=localhost experts=17" for n in "abc"))
    plan = make_plan(spec, Facts(), CONFIG, "dance", service=True)
    counts, size = np.ones((3, LAYERS, EXPERTS)), Facts().expert_bytes("float32")
    found = losses(plan.layout, spec.servers, counts, size)
    for lost, loss in enumerate(found):
        present = {0, 1, 2} - {lost}
        layout = plan.layout
        batches = recovery(layout, layout, present, counts, most_urgent_loads(size))
        for batch in batches:
            layout = changed(layout, batch.changes)
        assert loss.experts == uncovered(plan.layout, present).sum() > 0
        assert loss.short == uncovered(layout, present).sum()
        assert sum(count for _, count in loss.loads) == loss.experts - loss.short
        assert loss.seconds == migration_seconds(
            batches, size, [size / load_seconds(spec.servers[0], size)] * 3
        )
    assert text_of(plan).count("is lost, ") == 3


def test_a_state_with_too_few_holders(tmp_path: pathlib.Path) -> None:
    empty = Statistics(np.zeros((3, LAYERS, EXPERTS)), (AT_HOME[0][:0],) * 3)
    plan = make_plan(SPEC, Facts(), CONFIG, service=True, survive=1)
    state.ServiceState(SPEC.names, "f" * 64, plan.layout, empty).save(tmp_path)
    kept = state.load(tmp_path)
    assert kept is not None and kept.layout.holders == 2
    held = rooms(SPEC, Facts(), CONFIG, survive=1)
    assert kept.misfit(SPEC, Facts(), held, survive=1) == ""
    again = state.resumed_plan(SPEC, Facts(), CONFIG, kept, survive=1)
    assert again.layout.holders == 2 and "nobody waits" in again.notes[-1]
    assert state.resumed_plan(SPEC, Facts(), CONFIG, kept).layout.holders == 1
    once = dataclasses.replace(
        kept, layout=make_plan(SPEC, Facts(), CONFIG, "uniform", service=True).layout
    )
    assert once.misfit(SPEC, Facts(), held) == ""
    assert once.misfit(SPEC, Facts(), held, survive=1) == (
        "32 experts have fewer than the 2 holders of --survive 1"
    )


def test_decisions_keep_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the policy finds; a requested placement with fewer holders is refused."""
    bench = Bench(monkeypatch)
    bench.rebalancer.want(0, protocol.RebalanceWanted(1, force=True, dry_run=True))
    bench.run()
    (question,) = bench.solver.asked
    both = np.ones((2, LAYERS, EXPERTS), bool)
    safe = spread(Placement(both), [1, 1], [TOTAL + 1] * 2, holders=2)
    found = answer(dataclasses.replace(question, layout=safe, policy="dance"))
    assert found.verdict is not None and not found.batches  # all experts are everywhere
    wanted = dataclasses.replace(question, layout=safe, wanted=resident(halves(LOW)))
    refused = answer(wanted)
    assert refused.verdict is not None and not refused.verdict.migrate and not refused.batches
    assert refused.verdict.reason == (
        "32 experts would have fewer than the 2 holders of --survive 1"
    )
