"""Tests of research/migrate.py: figures and targets from servers' metrics and answers."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.live.tasks import Plan
from benchmarks.live.watch import Sample, Watched
from dance_jax.bench.client import Answer, Call, Token
from research.migrate import main
from research.shifting import plots, tables
from research.shifting.results import Results, after_shift, differences, plain
from research.shifting.runs import SECTIONS, Pause, Round, Shift, _gaps, _longest_s


def sample(at_s: float, local: float, remote: float, migrations: int = 0) -> Sample:
    """Make a sample of two servers with the same metrics."""
    return Sample(
        at_s=at_s,
        local=[local] * 2,
        remote=[remote] * 2,
        sent=[10 * remote] * 2,
        wire=[],
        transfers=[0.0] * 2,
        away=[0.0] * 2,
        busiest=[0.0] * 2,
        tokens=[0.0] * 2,
        seconds={},
        messages=[],
        rows=[],
        repeats=[],
        cpu_s=[],
        steps=[0.0] * 2,
        bucket_steps={},
        positions=[0.0] * 2,
        served=[0.0] * 2,
        longest_step_s=[0.0] * 2,
        version=1 + migrations,
        migrations=migrations,
        experts_migrated=7 * migrations,
    )


def answers(taken_s: float, text: str = "a", margin: float = 1.0) -> list[Answer]:
    found = []
    for n in range(4):
        answer = Answer(Call(n % 2, [1], 1, float(10 * n)), due_s=10.0 * n, end_s=10 * n + taken_s)
        answer.tokens = [Token(text, 0.0, {"a": 0.0, "b": -margin})]
        found.append(answer)
    return found


def run(taken_s: float, samples: Sequence[Sample], **more: Any) -> Watched:
    return Watched(answers(taken_s, **more), list(samples), None)


STAY = run(2.0, [sample(0, 0, 0), sample(20, 90, 10), sample(40, 140, 60)])
MOVE = run(
    1.5, [sample(0, 0, 0), sample(20, 90, 10), sample(30, 110, 40, 1), sample(40, 190, 60, 1)]
)
PLACED = run(1.0, [sample(0, 0, 0), sample(20, 80, 20)])
GOOD = Shift(Plan((), 15.0), STAY, MOVE, PLACED)


def verdicts(results: Results) -> dict[str, bool]:
    return {target.name: target.missed for target in results.targets()}


def test_figures_of_a_shift() -> None:
    assert MOVE.moves_s == [30] and after_shift(GOOD) == [30]
    assert MOVE.remote_share(30) == pytest.approx(0.2)
    assert MOVE.remote_share(0, 20) == pytest.approx(0.1)
    assert MOVE.sent_per_call(30) == pytest.approx([1.0, 1.0])
    assert not any(verdicts(Results(shift=GOOD)).values())


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"stay": run(1.6, STAY.samples)}, "mean latency with migration / without"),
        ({"move": run(1.5, STAY.samples)}, "migrations after the shift, difference from one"),
        ({"placed": run(1.0, [sample(0, 0, 0), sample(9, 85, 15)])}, "remote share after one"),
        ({"stay": run(2.0, STAY.samples, text="b", margin=2e-3)}, "margin of outputs"),
    ],
)
def test_what_misses_a_target_is_told(change: dict[str, Watched], missed: str) -> None:
    found = verdicts(Results(shift=dataclasses.replace(GOOD, **change)))
    assert any(name.startswith(missed) for name, miss in found.items() if miss)


def test_close_choices_may_fall_otherwise() -> None:
    move = run(1.5, MOVE.samples, margin=5e-4)
    stay = run(2.0, STAY.samples, text="b", margin=4e-4)
    other = dataclasses.replace(GOOD, move=move, stay=stay)
    assert differences(other.move, other.stay) == pytest.approx([5e-4] * 4)
    assert not any(verdicts(Results(shift=other)).values())


def test_gaps_beside_a_migration() -> None:
    assert _gaps([[0.0, 1.0, 2.0, 3.5]], 1.5, 3.0) == [1.0, 1.5]
    steady = Round([0.02] * 99, [0.025] * 99, 1.0, 0.06, 12)
    assert not any(verdicts(Results(pause=Pause([steady]))).values())
    slow = dataclasses.replace(steady, longest_step_s=0.08)
    late = dataclasses.replace(steady, moving=[0.025] * 90 + [0.04] * 9)
    idle = dataclasses.replace(steady, experts=0)
    for bad in (slow, late, idle):
        assert sum(verdicts(Results(pause=Pause([steady, bad]))).values()) == 1


def test_the_longest_step_is_of_the_migration_alone() -> None:
    """A sample covers the last ten seconds, so the first samples include earlier steps."""
    longest_s = {0.0: 0.9, 5.0: 0.8, 11.0: 0.04, 16.0: 0.03}
    samples = [
        dataclasses.replace(sample(at_s, 0, 0), longest_step_s=[0.01, each_s])
        for at_s, each_s in longest_s.items()
    ]
    assert _longest_s(samples) == 0.04
    assert _longest_s(samples[:2]) == 0.8


def test_results_are_shown(tmp_path: pathlib.Path, capsys: Any) -> None:
    from rich.console import Console

    steady = Round([0.02] * 9, [0.025] * 9, 1.0, 0.06, 12)
    results = Results(shift=GOOD, accumulate=MOVE, pause=Pause([steady]), stable=STAY)
    for section in SECTIONS:
        tables.show(Console(width=120), section, ("alpha", "beta"), results)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("nothing fades", "30 s", "alpha, bytes/call", "0.200"))
    plots.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(plain(results)))["shift"]["move"]["moves_s"] == [30]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "nowhere"], "0 files *.jsonl"),
        (["--hosts", "nowhere.txt"], "nowhere.txt"),
        (["--output", "no/such/place.json"], "--output"),
    ],
)
def test_wrong_options_start_nothing(words: list[str], said: str, capsys: Any) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err
