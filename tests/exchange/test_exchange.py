"""The parts of benchmarks/exchange that need no testbed."""

from __future__ import annotations

import itertools
import json
import pathlib
import socket
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import exchange as command
from benchmarks.layers import delay, step
from benchmarks.layers.measure import Cell
from benchmarks.layers.routes import Sizes, bound, deal, draw_routes, transfers_per_token
from benchmarks.layers.targets import halved, targets
from benchmarks.layers.texts import Score, read_texts
from benchmarks.targets import Target
from benchmarks.trace import self_times
from dance_jax.config import UserError
from dance_jax.placement.core import spread
from dance_jax.placement.metrics import measure


@st.composite
def sizes(draw) -> Sizes:
    devices = tuple(draw(st.lists(st.integers(1, 3), min_size=2, max_size=5)))
    top_k = draw(st.integers(1, 6))
    experts = sum(devices) * top_k * draw(st.integers(1, 2)) + draw(st.integers(0, 3))
    return Sizes(8, 8, experts, top_k, draw(st.integers(1, 4)), devices)


SHARES = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1)


@settings(deadline=None, max_examples=15)  # every shape is compiled
@given(sizes(), st.integers(1, 40), SHARES, st.integers(0, 99))
def test_routes_have_the_share_and_the_transfers(sizes, tokens, share, seed):
    rng = np.random.default_rng(seed)
    routes = [draw_routes(sizes, n, tokens, share, rng) for n in range(sizes.servers)]
    for route in routes:
        assert route.shape == (tokens, sizes.layers, sizes.top_k)
        assert (np.diff(np.sort(route), axis=-1) > 0).all(), "no expert twice"
    flows = measure(sizes.placement().resident, routes)
    pairs = tokens * sizes.layers
    at_home = round(share * pairs)
    assert flows.remote == pytest.approx(1 - at_home / pairs, abs=1e-9)
    assert flows.transfers == pytest.approx(transfers_per_token(sizes, at_home / pairs), abs=1e-9)


@settings(deadline=None, max_examples=8)  # every shape is compiled
@given(sizes())
def test_every_expert_has_one_server_and_fits(sizes):
    placement = sizes.placement()
    assert (placement.resident.sum(0) == 1).all()
    spread(placement, sizes.devices, sizes.slots())


def test_a_server_needs_enough_experts_for_a_token_at_home():
    with pytest.raises(UserError, match="leave a server 1; with top-k 2"):
        Sizes(8, 8, 4, 2, 1, (1, 1, 2))


@given(st.lists(st.lists(st.integers(0, 999), min_size=3, max_size=3), min_size=3, max_size=3))
def test_the_bound_is_what_rows_and_their_sums_need(rows):
    rows_nn = np.array(rows) * (1 - np.eye(3, dtype=int))
    sent = np.zeros(3, int)
    for source, target in np.ndindex(3, 3):
        sent[source] += rows_nn[source, target] * 128 * 4  # a hidden state
        sent[target] += rows_nn[source, target] * 128 * 4  # its sum
    np.testing.assert_array_equal(bound(rows_nn, 128, 4), sent)
    assert bound(rows_nn, 128, 4).sum() == 2 * rows_nn.sum() * 128 * 4


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=30),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_every_text_is_dealt_once_to_a_free_place(texts, places):
    waves = deal(texts, places)
    dealt = [text for wave in waves for server in wave for text in server]
    assert sorted(dealt) == sorted(texts)
    for wave in waves:
        assert [len(server) <= room for server, room in zip(wave, places, strict=True)]


def cell(**changes) -> Cell:
    """Two servers that exchange 10 bytes more than they must."""
    fields = {
        "tokens": 256,
        "transport": "sockets",
        "wire_dtype": "compute",
        "local_share": 0.0,
        "rate": 20_000_000,
        "steps": 3,
        "transfers_per_token": 2.0,
        "layer_s": 0.1,
        "parts_s": [{"waiting": 0.1}, {"waiting": 0.2}],
        "bytes": [[1010.0, 1000.0], [1000.0, 1010.0]],
        "bound": [1000.0, 1000.0],
        "message_bytes": 500.0,
        "rounds": 2.0,
    }
    return Cell(**fields | changes)


def result(cells: list[Cell], **changes) -> dict:
    empty = {"transport": "sockets", "wire_dtype": "compute", "wire": [], "latency": []}
    return empty | {"cells": cells, "prompts": None} | changes


def by_name(found: list[Target], name: str) -> Target:
    (one,) = (target for target in found if target.name.startswith(name))
    return one


def test_a_cell_is_judged_by_its_worst_server_and_direction():
    assert cell().ratio == pytest.approx(1.01)
    assert cell().worst_bytes == 1010
    assert cell().critical_parts_s == {"waiting": 0.1}
    assert cell(bound=[0.0, 0.0]).ratio is None


def test_what_was_not_measured_is_not_missed():
    for target in targets(result([])):
        assert target.worst is None and not target.missed
        assert target.line().startswith("not measured")


def test_targets_find_the_worst_cell():
    home = cell(
        local_share=1.0, transfers_per_token=0.0, bound=[0.0, 0.0], bytes=[[1200.0, 9.0]] * 2
    )
    half = cell(local_share=0.5, transfers_per_token=1.0, layer_s=0.07)
    decode = cell(tokens=8, rounds=3.0)
    slow = cell(transport="collectives", bytes=[[9000.0, 9000.0]] * 2)
    found = targets(result([cell(), home, half, decode, slow]))
    assert by_name(found, "prefill").worst == pytest.approx(1.01)
    assert not by_name(found, "prefill").missed
    assert by_name(found, "a layer that stays").missed
    assert by_name(found, "half").worst == pytest.approx(0.7)
    assert by_name(found, "decode (to 8").line().startswith("MISSED")
    assert halved([cell(), half, cell(rate=None)]) == [
        (pytest.approx(0.7), "local share 0.0 to 0.5")
    ]


def test_int8_is_compared_by_what_all_servers_sent():
    wire = [cell(), cell(wire_dtype="int8", bytes=[[1.0, 300.0], [1.0, 270.0]])]
    found = by_name(targets(result([], wire=wire)), "int8")
    assert found.worst == pytest.approx(570 / 2010)


def test_scores_add_up():
    exact = np.log2(np.array([[1, 1, 2], [4, 2, 2]])) * np.log(2)
    score = Score()
    score.add(exact, exact, np.array([2, 1]))
    assert score.bits == pytest.approx(1 + 2)
    other = Score()
    other.add(exact + np.array([0, 0.5, 0]), exact, np.array([2, 1]))
    assert other.largest_change == pytest.approx(0.5)
    assert other.same_token == 2
    total = Score.total([score, other])
    assert total.predictions == 4 and total.bits == pytest.approx(3 + other.bits)
    assert total.mean_change == pytest.approx(2 * 0.5 / 3)


def test_texts_are_taken_of_each_file_in_turn(tmp_path: pathlib.Path):
    paths = []
    for name in "ab":
        lines = [json.dumps({"prompt": name * 10}) for _ in range(3)]
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("\n".join(lines) + "\n")
    assert read_texts(paths, 25) == ["a" * 10, "b" * 10, "a" * 10]
    assert len(read_texts(paths, 10**6)) == 6
    paths[0].write_text('{"text": ""}')
    with pytest.raises(UserError, match="--tasks"):
        read_texts(paths, 10)
    with pytest.raises(UserError, match="no text"):
        read_texts([], 10)


def test_operations_are_told_apart_and_timed_without_those_within():
    hlo = """
  %gather.1 = f32[2]{0} collective-permute(%x), channel_id=1
  ROOT %ffn.2 = f32[2]{0} custom-call(%x), custom_call_target="dance_jax.GroupedFfnFloat32"
  %send.3 = (s32[3,4]{1,0}) custom-call(%x), custom_call_target="dance_jax.LinksDispatch"
  %add.4 = f32[2]{0} add(%x, %x)
"""
    parts = dict(step._parts(hlo))
    assert parts == {"gather.1": "collectives", "ffn.2": "experts", "send.3": "links"}

    def event(name: str, start: float, length: float) -> dict:
        return {"ph": "X", "tid": 1, "ts": start, "dur": length, "args": {"hlo_op": name}}

    events = [event("add.4", 0, 10), event("ffn.2", 2, 5), event("gather.1", 12, 3), {"ph": "M"}]
    assert self_times(events, parts, "packing") == {"packing": 5, "experts": 5, "collectives": 3}


def test_a_delayed_link_brings_everything_later_and_in_order():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        outer = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    late = delay.Delay()
    late.seconds = 0.05
    with far, delay._relayed(outer, late) as inner:
        began = time.monotonic()
        inner.sendall(b"one")
        inner.sendall(b"two")
        got = b""
        while len(got) < 6:
            got += far.recv(100)
        assert got == b"onetwo"
        assert time.monotonic() - began >= 0.05
        late.seconds = 1e6
        inner.settimeout(10)
        far.sendall(b"back")
        assert inner.recv(100) == b"back", "only what is sent is delayed"


@pytest.mark.parametrize(
    "option", ["--tokens=0", "--tokens=1,x", "--local-shares=1.5", "--rates=20", "--hidden=-1"]
)
def test_wrong_options_are_refused(option: str, capsys):
    with pytest.raises(SystemExit) as ended:
        command.parser().parse_args([option])
    assert ended.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_the_grid_compiles_every_size_once():
    options = command.parser().parse_args(
        [
            "--transport",
            "both",
            "--tokens",
            "1,8",
            "--rates",
            "20Mbps,none",
            "--local-shares",
            "0,1",
        ]
    )
    variants = [variant for variant, _, _ in command.cells(options)]
    assert len(variants) == 2 * 2 * 2 * 2
    changes = sum(a != b for a, b in itertools.pairwise(variants))
    assert changes == len(set(variants)) - 1
