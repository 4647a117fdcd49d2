"""Tests of the requests that users send to a running service, and of their arrival times."""

from __future__ import annotations

import json
import pathlib

import pytest

from benchmarks.live.tasks import Askers, Task, read_task
from dance_jax.config import UserError
from dance_jax.models.directory import demo_dir
from dance_jax.models.tokenizer import Tokenizer

ONE, OTHER = (Task(n, (f"fit {n}",), tuple(f"{n} {i}" for i in range(5))) for n in ("one", "other"))
REQUESTS = 12


@pytest.fixture(scope="module")
def askers() -> Askers:
    return Askers(Tokenizer.load(demo_dir()), context=64, longest=16, rate=2.0, seed=3)


def test_every_server_asks_for_both_tasks_in_turn(askers: Askers) -> None:
    plan = askers.plan([(ONE, OTHER), (OTHER, ONE)], REQUESTS)
    tokenizer = Tokenizer.load(demo_dir())
    assert [call.arrival_s for call in plan.calls] == sorted(c.arrival_s for c in plan.calls)
    for server, (first, second) in enumerate([("one", "other"), ("other", "one")]):
        texts = [tokenizer.decode(call.prompt) for call in plan.calls if call.server == server]
        words = [text.split()[-2] for text in texts]
        assert words == [first] * REQUESTS + [second] * REQUESTS
        # Every prompt of a task is sent before any is repeated.
        assert len(set(texts[:5])) == len(set(texts[REQUESTS : REQUESTS + 5])) == 5
    assert all(1 <= call.max_tokens <= 16 for call in plan.calls)
    late = plan.after(plan.shift_s)
    assert late.calls[0].arrival_s == 0.0 and late.shift_s == 0.0
    assert 0 < len(late.calls) <= 2 * REQUESTS
    assert askers.plan([(ONE, OTHER), (OTHER, ONE)], REQUESTS) == plan


def test_streams_fill_the_context(askers: Askers) -> None:
    calls = askers.streams((ONE, OTHER), 7)
    assert [call.server for call in calls] == [0] * 7 + [1] * 7
    assert {len(call.prompt) + call.max_tokens for call in calls} == {63}


def test_salt_comes_before_every_prompt(askers: Askers) -> None:
    plain = askers.plan([(ONE, OTHER)], REQUESTS).calls
    salted = askers.plan([(ONE, OTHER)], REQUESTS, [7, 8]).calls
    assert [call.prompt for call in salted] == [[7, 8, *call.prompt] for call in plain]


def test_prompts_to_fit_are_not_asked(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}+{n}="}) + "\n" for n in range(5)))
    task = read_task(path)
    assert (task.name, task.fit, task.asked) == ("sums", ("0+0=", "2+2=", "4+4="), ("1+1=", "3+3="))
    path.write_text('{"prompt": "1"}\n{"text": "2"}\n')
    with pytest.raises(UserError, match=r"sums\.jsonl: not JSON Lines of prompts"):
        read_task(path)
