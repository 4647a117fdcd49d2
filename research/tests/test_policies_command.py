"""research/placement.py and its parts, on traces of a few tokens."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.targets import Target
from dance_jax.bench.terminal import FAILED, WRONG
from dance_jax.config import UserError
from dance_jax.placement.cost import CallCost
from dance_jax.placement.measures import measure
from dance_jax.placement.policies import place
from research import placement as command
from research.policies import churn, figures, setups, speed, tables, traces
from research.policies.figures import Row, Table
from research.policies.setups import Part, slots
from research.policies.targets import Results, gains, targets

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 16, 2, 16
TOPICS = (*dict.fromkeys(t for each in traces.GPT_OSS_WORKLOADS for t in each), "x", "y", "z", "zz")
POLICIES = ("uniform", "dance")


def said(_: str) -> None:
    """Nobody listens."""


@pytest.fixture
def trace() -> traces.Trace:
    """Three topics; the first has an odd number of tokens."""
    made = traces.synthetic_trace(TOKENS, LAYERS, EXPERTS, TOP_K)
    return dataclasses.replace(made, routes=made.routes | {"a": made.routes["a"][1:]})


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    """Files as those that --traces wants, of a tiny model."""
    rng = np.random.default_rng(0)
    logits = rng.gumbel(size=(len(TOPICS), TOKENS, LAYERS, EXPERTS))
    routes = np.argsort(-logits)[..., :TOP_K].astype(np.uint8)
    counts = np.stack([traces.count(route, EXPERTS) for route in routes])
    arrays = {f"routes_{n:02d}": route for n, route in enumerate(routes)}
    np.savez(tmp_path / traces.GPT_OSS, topics=np.array(TOPICS), counts=counts, **arrays)
    domains = {
        domain: {str(layer): rng.integers(1, 9, EXPERTS).tolist() for layer in range(LAYERS)}
        for domain in traces.DOMAINS
    }
    models = {"olmoe": "OLMoE (16 layers)", "mistral": "Mixtral (32 layers)"}
    plain = {"layers": [*range(LAYERS)], "models": models}
    plain["counts"] = {key: {"topk": domains} for key in models}
    (tmp_path / traces.OLMOE_MIXTRAL).write_text(json.dumps(plain))
    return tmp_path


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch, trace: traces.Trace) -> None:
    """The command with two policies, a tiny trace, few servers and one size to time."""
    monkeypatch.setattr(command, "POLICIES", POLICIES)
    monkeypatch.setattr(traces, "synthetic_trace", lambda: trace)
    small = speed.Setup("small", setups.reference(trace).counts, setups.PATTERN)
    monkeypatch.setattr(speed, "cases", lambda policies: [(policies[0], small)])
    monkeypatch.setattr(setups, "SERVERS", (4,))
    monkeypatch.setattr(setups, "MEMORIES", (1.05, 1.32))


def test_figures_are_of_the_unseen_half(trace: traces.Trace) -> None:
    setup = setups.reference(trace)
    table = figures.measure(setup, POLICIES, said)
    assert [row.policy for row in table.rows] == list(POLICIES)
    seen = [trace.routes[topic][: len(trace.routes[topic]) // 2] for topic in "abc"]
    unseen = [trace.routes[topic][len(trace.routes[topic]) // 2 :] for topic in "abc"]
    counts = np.stack([traces.count(route, EXPERTS) / route.size for route in seen])
    np.testing.assert_allclose(setup.counts, counts)
    for row in table.rows:
        placement = place(row.policy, counts, setup.capacities)
        assert placement == table.placements[row.policy]
        flows = measure(placement.resident, unseen)
        assert row.remote == flows.remote and row.transfers == flows.transfers
        assert row.busiest == flows.busiest and row.any_miss == flows.any_miss
        assert row.load == flows.load(setups.PATTERN)
        assert row.device == flows.device(setups.PATTERN)
        assert row.layer_time == flows.layer_time(CallCost.reference(setups.PATTERN, TOP_K))
        # With the published figures those are compared of which the lowest number is visited.
        lowest = measure(placement.resident, unseen, np.array([[0, 1, 2]] * 3))
        assert row.comparable["busiest"] == lowest.busiest
        assert row.comparable["device"] == lowest.device(setups.PATTERN)
        assert [*row.comparable] == [*figures.COLUMNS]
        assert row.local == placement.local_share(counts)
        assert row.ms > 0 and row.repeatable


def test_counts_alone_are_measured_on_themselves_without_latency(trace: traces.Trace) -> None:
    (setup,) = setups.counts_alone(trace, [])
    table = figures.measure(setup, (*POLICIES, figures.LATENCY), said)
    assert [row.policy for row in table.rows] == list(POLICIES)
    for row in table.rows:
        assert row.remote == 1 - row.local
        assert row.comparable == {"remote": row.remote}
        assert row.any_miss is row.transfers is row.busiest is None
        assert row.load is row.device is row.layer_time is None


@given(
    st.integers(1, 2000),
    st.floats(1, 3),
    st.lists(st.integers(1, 4), min_size=1, max_size=16),
)
def test_slots_are_in_proportion_and_hold_the_model(
    total: int, memory: float, devices: list[int]
) -> None:
    found = slots(total, memory, devices)
    assert total <= sum(found) <= max(int(memory * total + 1e-6), total)
    for each, mine in zip(devices, found, strict=True):
        assert abs(mine - memory * total * each / sum(devices)) < 1


def test_slots_of_the_data_s_description() -> None:
    assert slots(24 * 32, 1.32, (1, 1, 2)) == [253, 253, 506]
    assert sum(slots(58 * 256, 1.0, (1, 1, 2) * 21 + (1,))) == 58 * 256


def test_memory_is_a_multiple_of_the_model(trace: traces.Trace) -> None:
    found = setups.memories(trace)
    assert [setup.memory for setup in found] == list(setups.MEMORIES)
    for setup in found:
        total = LAYERS * EXPERTS
        assert total <= sum(setup.capacities) <= setup.memory * total
        assert sum(setup.capacities) > setup.memory * total - len(setup.devices)


@pytest.mark.parametrize("topics", [3, 14])
@pytest.mark.parametrize("servers", setups.SERVERS)
def test_every_token_is_dealt_once_and_seen_or_not(topics: int, servers: int) -> None:
    # Every token chooses an expert of its own, so that it is known again.
    sizes = [10 + n % 5 for n in range(topics)]
    ids = iter(np.split(np.arange(sum(sizes), dtype=np.int32), np.cumsum(sizes)[:-1]))
    routes = {f"topic {n:02d}": next(ids).reshape(-1, 1, 1) for n in range(topics)}
    trace = traces.Trace("ids", sum(sizes), routes, {}, (), ())
    workloads = setups.deal(trace, servers)
    assert len(workloads) == servers and all(workloads)
    pairs = [setups.halves(trace, workload) for workload in workloads]
    fit, test = ({int(n) for pair in pairs for n in pair[half].ravel()} for half in (0, 1))
    assert fit | test == set(range(sum(sizes))) and not fit & test
    assert sum(len(pair[0]) + len(pair[1]) for pair in pairs) == sum(sizes)
    for route in routes.values():
        assert fit.isdisjoint(route[len(route) // 2 :].ravel().tolist())
    setup = setups.workload_setup(trace, "dealt", workloads)
    assert setup.devices[:4] == (1, 1, 2, 1) and len(setup.devices) == servers


def test_topics_with_most_tokens_are_cut(directory: pathlib.Path) -> None:
    trace = traces.read_trace(directory)
    longer = {topic: np.concatenate([trace.routes[topic]] * 2) for topic in ("y", "law")}
    trace = dataclasses.replace(trace, routes=trace.routes | longer)
    parts = [part for workload in setups.deal(trace, 16) for part in workload]
    cut = [part for part in parts if part.step > 1]
    assert cut == [Part("law", 0, 2), Part("law", 1, 2), Part("y", 0, 2), Part("y", 1, 2)]
    assert len(parts) == 16


def test_holders_are_compared_at_equal_memory(trace: traces.Trace) -> None:
    """Losses for which memory suffices, and what they cost in local share."""
    found = setups.surviving(trace, (0, 1, 2))
    sizes = [(len(setup.devices), setup.survive) for setup in found]
    assert sizes == [(3, 0), (3, 1), (4, 0), (4, 1), (4, 2)]
    measured = [figures.measure(setup, ("optimal",), said) for setup in found]
    for setup, table in zip(found, measured, strict=True):
        assert not table.placements["optimal"].short(setup.survive + 1).any()
    local = [table.rows[0].local for table in measured]
    assert local[0] > local[1] and local[2] >= local[3] >= local[4]


def test_churn_counts_from_the_old_placement(trace: traces.Trace) -> None:
    setup = setups.reference(trace)
    assert churn.measure_churn(setup, POLICIES, said) == []
    shifted = churn.going_on(setup, 1)
    assert setup.test is not None and shifted.test is not None
    np.testing.assert_array_equal(shifted.test[0], setup.test[1])
    old = place("dance", setup.counts, setup.capacities)
    kept = churn._churn("dance", churn.SHIFTED, churn.KEPT, shifted, old, old)
    assert kept.moved == 0 and kept.held == sum(setup.capacities)
    assert kept.remote == old.traffic(shifted.test).remote
    new = place("dance", shifted.counts, setup.capacities)
    afresh = churn._churn("dance", churn.SHIFTED, churn.AFRESH, shifted, new, old)
    assert afresh.moved == new.moved(old) > 0 and afresh.remote < kept.remote


def test_cases_of_speed_and_a_time(trace: traces.Trace, monkeypatch) -> None:
    # Routes of many servers take long to make, those of few show what is made.
    tokens = {speed.SMALL: 8, (*speed.SMALL[:1], 4, 16): 8}
    monkeypatch.setattr(speed, "TOKENS", tokens)
    named = ("dance", figures.OPTIMAL, figures.LATENCY)
    cases = list(speed.cases(named))
    found = [(policy, setup.counts.shape, setup.memory) for policy, setup in cases]
    assert (figures.OPTIMAL, speed.LARGEST, 1.0) in found
    assert [each for each in found if each[0] == figures.LATENCY] == [
        (figures.LATENCY, sizes, setups.MEMORY) for sizes in tokens
    ]
    assert {sizes for policy, sizes, _ in found if policy == "dance"} == {speed.SMALL}
    for policy, setup in cases:
        routes = setup.fit if policy == figures.LATENCY else None
        assert setup.fit is routes and (routes is None or {len(each) for each in routes} == {8})
    np.testing.assert_array_equal(speed.skewed_counts(2, 3, 4), speed.skewed_counts(2, 3, 4))
    np.testing.assert_allclose(speed.skewed_counts(2, 3, 4).sum((1, 2)), 1)
    one = speed.measure_case("dance", setups.reference(trace), said, seconds=0)
    assert one.runs == speed.LEAST_RUNS and 0 < one.best_ms <= one.median_ms
    assert one.limit_ms is None


FIGURES = {
    "remote": 0.4, "any_miss": 0.6, "transfers": 0.58, "busiest": 1.1, "load": 0.3, "device": 0.3,
}  # fmt: skip


def row(policy: str, **changes) -> Row:
    """A row that reaches everything."""
    figured = FIGURES | {key: changes[key] for key in FIGURES.keys() & changes.keys()}
    rest = {"layer_time": 1.6, "local": 0.6, "bound": 0.6, "ms": 1, "repeatable": True}
    return Row(policy, **(rest | figured | changes), comparable=figured)


def latency(**changes) -> Row:
    """A row of that policy that reaches everything."""
    return row("latency", **({"layer_time": 1.5, "any_miss": 0.5} | changes))


def results(trace: traces.Trace, *rows: Row) -> Results:
    """Of the reference section; published figures are those of `row`, for OPTIMAL."""
    setup = dataclasses.replace(setups.reference(trace), published={"optimal": FIGURES})
    return Results({"reference": [Table(setup, list(rows), {})]})


def missed(found: Results) -> list[Target]:
    return [target for target in targets(found) if target.missed]


def test_nothing_measured_is_nothing_missed(trace: traces.Trace) -> None:
    for target in targets(Results()):
        assert target.worst is None and target.line().startswith("not measured")
    assert not missed(results(trace, row("optimal"), latency()))


def test_check_finds_what_is_missed(trace: traces.Trace) -> None:
    optimal = row("optimal")
    for changed, name in (
        (row("optimal", remote=0.41), "optimal: remote off"),
        (row("optimal", transfers=0.6), "optimal: transfers off"),
        (row("optimal", any_miss=0.62), "optimal: any_miss off"),
        (row("optimal", device=0.29), "optimal: device off"),
        (row("optimal", local=0.5999), "optimal: below its bound"),
        (row("optimal", layer_time=1.4), "latency: layer time over"),
        (row("optimal", repeatable=False), "placements that differ"),
    ):
        (target,) = missed(results(trace, changed, latency()))
        assert target.name.startswith(name) and target.line().startswith("MISSED")
    for column, most in (("device", 0.3), ("transfers", 0.58), ("ms", 20_000)):
        (target,) = missed(results(trace, optimal, latency(**{column: most + 0.1})))
        assert target.name == f"latency: {column}" and target.worst == most + 0.1
    for any_miss, limits in ((0.5, []), (0.58, [0.54, 0.95]), (0.63, [0.54, 0.95, 1.0])):
        found = missed(results(trace, optimal, latency(any_miss=any_miss)))
        assert [target.limit for target in found] == limits
    slow = speed.Speed("dance", *speed.SMALL, 1.0, 2, 51.0, 60.0, 50.0, 0.5, None)
    fast = dataclasses.replace(slow, memory=1.32, best_ms=3.0)
    (target,) = missed(Results(speed=[slow, fast]))
    assert target.worst == 51.0 and target.where == "memory 1 x the model"
    far = churn.Churn("optimal", churn.STABLE, churn.AFRESH, 1, 9, 0.5, 1.0, 0.5, 0.6)
    assert "bound" in missed(Results(churn=[far]))[0].name
    assert not missed(Results(churn=[dataclasses.replace(far, how=churn.GIVEN)]))


def test_lines_follow_from_the_figures(trace: traces.Trace) -> None:
    def table(*rows: Row) -> Table:
        return results(trace, *rows).tables["reference"][0]

    slow, fast = latency(layer_time=2.0), latency(layer_time=1.2)
    both = table(row("dance"), row("optimal", layer_time=1.7), slow)
    assert both.over_best_other("layer_time") == (1.25, "dance")
    assert both.over_best_other("bound") == (1.0, "dance")
    assert table(row("dance")).over_best_other("layer_time") is None
    assert table(slow).over_best_other("layer_time") is None
    assert "dance beats latency" in tables.fastest_line(table(row("dance"), slow))
    assert "25.0% less" in tables.fastest_line(table(row("dance"), fast))
    assert "no comparison" in tables.fastest_line(table(row("dance")))
    blind = row("redundance", remote=0.42)
    assert "cannot win much" in tables.gain_line(table(row("dance"), blind))
    assert "placement wins" in tables.gain_line(table(row("dance", remote=0.2), blind))
    assert gains(table(row("dance"))) is None


def test_favourites_are_sorted_by_server_then_calls() -> None:
    from research.policies import plots

    counts = np.array([[[1, 9, 0, 2]], [[5, 1, 7, 0]], [[0, 0, 0, 0]]], float)
    setup = setups.Setup("few", counts, setups.PATTERN)
    assert plots.by_favourite(setup).tolist() == [[1, 3, 2, 0]]
    colours = plots._mixed(np.array([[True, True], [False, True], [False, False]]))
    np.testing.assert_allclose(colours, [plots.INKS[0], plots.INKS[0] * plots.INKS[1]])


def test_the_command_writes_all_of_it(quickly: None, tmp_path: pathlib.Path, capsys) -> None:
    output = tmp_path / "new" / "output"
    assert command.main(["--output", str(output), "--check"]) == 0
    names = ["figures.png", "holders.png", "memory.png", "result.json"]
    assert sorted(path.name for path in output.iterdir()) == names
    for name in names[:3]:
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    plain = json.loads((output / "result.json").read_text())
    tables_of = ["reference", "counts", "memory", "servers"]
    assert list(plain["sections"]) == tables_of
    assert [len(plain["sections"][each]) for each in tables_of] == [1, 1, 2, 1]
    assert [each["policy"] for each in plain["sections"]["servers"][0]["rows"]] == list(POLICIES)
    assert len(plain["speed"]) == 1 and plain["churn"] == []
    assert [table["survive"] for table in plain["survive"]] == [0, 1, 0, 1, 2]
    shown = capsys.readouterr()
    assert "synthetic, 4 servers" in shown.out and "latency is left out" in shown.out
    assert "The price of holders, 4 servers" in shown.out
    assert "synthetic: dance" in shown.err


def test_measured_traces_are_compared_with_published_figures(
    quickly: None, directory: pathlib.Path, tmp_path: pathlib.Path, capsys
) -> None:
    arguments = ["--traces", str(directory), "--quick"]
    assert command.main([*arguments, "--check"]) == FAILED
    assert "MISSED        dance: remote off the published" in capsys.readouterr().out
    assert command.main(arguments) == 0
    assert "Mixtral, counts alone: arxiv | github | wikipedia" in capsys.readouterr().out
    (directory / traces.OLMOE_MIXTRAL).unlink()
    assert command.main(["--traces", str(directory), "--sections", "counts"]) == 0
    assert "OLMoE and Mixtral are left out" in capsys.readouterr().out


def test_traces_that_are_missing_or_broken_are_refused(directory: pathlib.Path, capsys) -> None:
    def refused(traces_at: pathlib.Path) -> str:
        assert command.main(["--traces", str(traces_at), "--quick"]) == WRONG
        return capsys.readouterr().err

    assert "is no directory" in refused(directory / "none")
    (directory / "empty").mkdir()
    assert f"has no {traces.GPT_OSS}" in refused(directory / "empty")
    (directory / traces.OLMOE_MIXTRAL).write_text('{"layers": [0]}')
    assert traces.OLMOE_MIXTRAL in refused(directory)
    np.savez(directory / traces.GPT_OSS, topics=np.array(["law"]))
    assert "counts" in refused(directory)
    (directory / traces.GPT_OSS).write_bytes(b"")
    with pytest.raises(UserError, match="topics, counts and routes"):
        traces.read_trace(directory)


def test_outputs_that_cannot_be_written_are_refused(tmp_path: pathlib.Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert command.main(["--output", str(output)]) == WRONG
        assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--sections", "speed,none"], ["--sections", ""], ["--quick", "--sections=speed"]]
)
def test_wrong_options_are_refused(options: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        command.parser().parse_args(options)
    assert ended.value.code == WRONG
    assert "--sections" in capsys.readouterr().err


def test_sections_are_run_in_order() -> None:
    options = command.parser().parse_args(["--sections", "speed,reference"])
    assert options.sections == ("reference", "speed")
