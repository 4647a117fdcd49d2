"""Arrivals, lengths and texts are reproducible and follow the seed and the files."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from dance_jax.bench.arrivals import Arrival, answer_lengths, limited, poisson, read_trace
from dance_jax.bench.client import Call
from dance_jax.bench.texts import TEXT, WORDS, Texts
from dance_jax.bench.workload import calls_of_passages, calls_of_prompts, calls_of_texts
from dance_jax.config import UserError
from dance_jax.launch.cli.prompts import Prompt

TRACE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:04.0000000,40,8
2023-11-16 18:17:03.5000000,4808,10
2023-11-16 18:17:06.0000000,3,400
"""
TEXTS = Texts([[[10, 11, 12], [13]], [[20, 21]]])


def test_poisson_arrivals_come_from_the_seed_alone() -> None:
    some = limited(poisson([2.0, 0.0, 1.0], seed=3), 50)
    assert some == limited(poisson([2.0, 0.0, 1.0], seed=3), 50)
    assert some != limited(poisson([2.0, 0.0, 1.0], seed=4), 50)
    assert some == sorted(some) and {arrival.server for arrival in some} == {0, 2}
    # A server's arrivals do not depend on other servers.
    alone = limited(poisson([2.0], seed=3), 20)
    assert [a for a in limited(poisson([2.0, 9.0], seed=3), 300) if a.server == 0][:20] == alone


def test_poisson_arrivals_have_their_rate_and_spread() -> None:
    gaps = np.diff([arrival.at_s for arrival in limited(poisson([4.0], seed=0), 20001)])
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.03)


def test_limits() -> None:
    everything = [Arrival(0.5, 0), Arrival(1.0, 1), Arrival(2.0, 0)]
    assert limited(everything, duration_s=1.0) == everything[:2]
    assert limited(everything, 1, 1.0) == everything[:1]
    assert limited(everything) == everything
    assert len(limited(poisson([1.0, 1.0], 0), 7)) == 7


def test_a_trace_is_dealt_in_the_order_of_time(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    assert read_trace(path, 2, speedup=2.0) == [
        Arrival(0.0, 0, 4808, 10),
        Arrival(0.25, 1, 40, 8),
        Arrival(1.25, 0, 3, 400),
    ]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("TIMESTAMP,Tokens\n", "trace.csv: the columns"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no arrivals"),
        (TRACE + "2023-11-16,x,5\n", "trace.csv:5"),
        (TRACE + "yesterday,1,5\n", "trace.csv:5"),
        (TRACE + "2023-11-16,1\n", "trace.csv:5"),
        (TRACE + "2023-11-16,0,5\n", "trace.csv:5"),
    ],
)
def test_wrong_traces_are_told(text: str, where: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=where):
        read_trace(path, 1)
    with pytest.raises(UserError, match="cannot be read"):
        read_trace(tmp_path / "none.csv", 1)


def test_lengths_vary_within_their_limits() -> None:
    found = answer_lengths(2000, 100, np.random.default_rng(0))
    assert found == answer_lengths(2000, 100, np.random.default_rng(0))
    assert min(found) >= 1 and max(found) == 100 and len(set(found)) > 50
    assert np.median(found) == pytest.approx(60, abs=5)


def test_cut_prompts_are_of_the_server_s_texts_and_begin_by_themselves() -> None:
    rng = np.random.default_rng(0)
    long = Texts([[list(range(100)), list(range(100, 1000))]])
    found = [long.cut(0, 50, rng) for _ in range(200)]
    assert all(len(prompt) == 50 for prompt in found)
    assert len({tuple(prompt[:3]) for prompt in found}) == 200
    for prompt in found:  # after its first tokens, a prompt is the unchanged text, repeated
        assert np.all(np.diff(prompt[3:]) % 1000 == 1)
    assert set(TEXTS.cut(1, 7, rng)) <= {20, 21}
    assert len(TEXTS.cut(0, 1, rng)) == 1
    assert {tuple(TEXTS.whole(0, rng)) for _ in range(50)} == {(10, 11, 12), (13,)}


def test_calls_keep_to_arrivals_and_context() -> None:
    arrivals = [Arrival(0.0, 0), Arrival(1.0, 1, 30, 5), Arrival(2.0, 1, 4, 500), Arrival(3.0, 0)]
    calls = calls_of_texts(arrivals, TEXTS, longest=16, context=20, seed=1)
    assert calls == calls_of_texts(arrivals, TEXTS, longest=16, context=20, seed=1)
    assert [(call.server, call.arrival_s) for call in calls] == [
        (arrival.server, arrival.at_s) for arrival in arrivals
    ]
    assert (len(calls[1].prompt), calls[1].max_tokens) == (15, 5)
    assert (len(calls[2].prompt), calls[2].max_tokens) == (4, 16)
    assert calls[0].prompt in ([10, 11, 12], [13]) and 1 <= calls[0].max_tokens <= 16


def test_prompts_of_a_file_take_turns_as_text() -> None:
    texts = ["one", "two", "three"]
    prompts = [Prompt(n, text, n % 2, 5 + n, 0.5) for n, text in enumerate(texts)]
    arrivals = [Arrival(float(n), server) for n, server in enumerate([0, 0, 1, 0])]
    calls = calls_of_prompts(arrivals, prompts)
    assert [call.prompt for call in calls] == ["one", "three", "two", "one"]
    assert calls[1] == Call(0, "three", 7, 1.0, temperature=0.5, ignore_eos=False)


def test_a_context_may_be_unknown() -> None:
    (call,) = calls_of_texts([Arrival(0.0, 1, 30, 5)], TEXTS, longest=16, context=None, seed=1)
    assert (len(call.prompt), call.max_tokens) == (30, 5)


def test_passages_differ_and_follow_the_seed() -> None:
    arrivals = [Arrival(float(n), n % 2) for n in range(100)]
    calls = calls_of_passages(arrivals, 40, seed=2)
    assert calls == calls_of_passages(arrivals, 40, seed=2) != calls_of_passages(arrivals, 40, 3)
    assert [(call.server, call.arrival_s) for call in calls] == [(n % 2, n) for n in range(100)]
    twice = " ".join(2 * TEXT.split())
    for call in calls:
        assert isinstance(call.prompt, str) and call.prompt in twice
        assert WORDS[0] <= len(call.prompt.split()) <= WORDS[1]
        # Without ignore_eos, which is no field of OpenAI's API.
        assert 1 <= call.max_tokens <= 40 and b"ignore_eos" not in call.body("m")
    assert len({call.prompt for call in calls}) > 90
