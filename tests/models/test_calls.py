"""Expert calls between servers over sockets: sums, refusals, late answers, lost connections.

Several servers run in this process. A server that must misbehave is played by the test itself: it
speaks the protocol of native/wire.h on a raw socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import pathlib
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_jax.models import native
from dance_jax.models.call_messages import Wire
from dance_jax.models.calls import (
    TRACE_KINDS,
    TRACE_OUTCOMES,
    CallServer,
    ExpertCalls,
    TraceEvent,
    receive,
    send,
)
from dance_jax.models.host_caller import HostRows, choose
from dance_jax.models.host_calls import HostCallServer
from dance_jax.models.host_state import MOST_UNANSWERED, CallSpec
from dance_jax.models.kernels_cpu import NativePool
from dance_jax.placement.visit import choose_servers
from dance_jax.placement.visit import masks as server_masks
from tests.models.test_experts import make_experts, make_format

LAYERS, EXPERTS, D, F, K, MOST_ROWS = 2, 6, 16, 12, 3, 64
FORM = make_format(d=D, f=F)
WEIGHTS = make_experts(FORM, LAYERS * EXPERTS)
CALL, ANSWER = "<IHHQqII", "<IHHQqIIII"
CALL_MAGIC, ANSWER_MAGIC, DONE, NOT_HERE = 0x63786A64, 0x61786A64, 0, 1
#: Timeout in seconds, longer than any successful wait.
LONG_S = 30.0
ffn = jax.jit(functools.partial(FORM.ffn, layers=1))
choose_traced = jax.jit(choose_servers, static_argnums=2)

pytestmark = pytest.mark.usefixtures("compiled")


@functools.partial(jax.jit, static_argnames="first")
def run(
    caller: jax.Array, layer: jax.Array, *routes: jax.Array, first: tuple[int, ...] = (0,)
) -> tuple[jax.Array, jax.Array]:
    """Sums and failed rows; `first` lists the first rows of groups, which are in flight at once."""
    groups = list(itertools.pairwise([*first, len(routes[0])]))
    then = routes[0]
    for begin, end in groups:
        group = [each[begin:end] for each in routes]
        then = send(caller, layer, *group, then=then, first=begin)  # type: ignore[call-arg]
    found = []
    for begin, end in groups:
        found.append(receive(caller, (end - begin, D), then, begin))
    sums, failed = map(jnp.concatenate, zip(*found, strict=True))
    return sums, failed


#: For each server and each of its devices, the experts it holds, as layer * EXPERTS + expert.
Held = Sequence[Sequence[Sequence[int]]]


#: Whether servers use the C++ library (True) or the host (False) for calls; repeated over servers.
FORMS = {"native": [True], "host": [False], "mixed": [False, True]}


@pytest.fixture(params=FORMS, autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "native", FORMS[request.param])


#: For tests of the C++ library's calls only.
native_calls = pytest.mark.parametrize("form", ["native"], indirect=True)


def make_pool(experts: Sequence[int], slots: int | None = None) -> NativePool:
    forms = (FORM.gate, FORM.up, FORM.down)
    pool = NativePool(D, F, FORM.activation, forms, FORM.bias, slots or len(experts))
    for slot, expert in enumerate(experts):
        put(pool, slot, expert)
    return pool


def put(pool: NativePool, slot: int, expert: int) -> None:
    pool.put(slot, expert, [WEIGHTS[expert][name] for name in FORM.leaves])


def resident(held: Sequence[Sequence[int]]) -> np.ndarray:
    """The table, bool [n, l, e], in which each server holds the given experts."""
    table = np.zeros((len(held), LAYERS * EXPERTS), bool)
    for server, experts in enumerate(held):
        table[server, list(experts)] = True
    return table.reshape(len(held), LAYERS, EXPERTS)


def pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    for each in (one, other):
        each.settimeout(LONG_S)
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one, other


class Cluster:
    """Servers that call each other.

    Args:
        held: experts of each device of each server.
        played: servers that are not created, because the test plays them.
        orders: order in which each server prefers to call the others; by number if empty.
        limits: repeat_s and fail_s of `CallServer`.
    """

    #: An entry of FORMS, set by a fixture.
    native: Sequence[bool] = ()

    def __init__(
        self,
        held: Held,
        wire="float32",
        played=(),
        buffers=0,
        most_rows=MOST_ROWS,
        orders: Sequence[Sequence[int]] = (),
        **limits: float,
    ) -> None:
        self.pools = [[make_pool(own, max(len(own), 1)) for own in devices] for devices in held]
        self._orders = orders
        self._limits = {"repeat_s": LONG_S, "fail_s": LONG_S, **limits}
        experts = [[e for own in devices for e in own] for devices in held]
        self.servers = {
            rank: self._make(rank, wire, most_rows, own)
            for rank, own in enumerate(experts)
            if rank not in played
        }
        self.use(1, experts)
        self._buffers = buffers
        for caller, server in self.servers.items():
            for callee in self.servers:
                for device in range(len(server.callers)):
                    if caller != callee:
                        self.connect(caller, callee, device)

    def _make(
        self, rank: int, wire: str, most_rows: int, experts: Sequence[int]
    ) -> CallServer | HostCallServer:
        order = self._orders[rank] if self._orders else range(len(self.pools))
        shape, pools = (rank, tuple(order), LAYERS, EXPERTS), self.pools[rank]
        if self.native[rank % len(self.native)]:
            return CallServer(*shape, wire, most_rows, pools, **self._limits)

        def compute(
            x_nd: np.ndarray, expert_nk: np.ndarray, weight_nk: np.ndarray
        ) -> tuple[np.ndarray, np.ndarray]:
            here_nk = np.isin(expert_nk, [-1, *experts])
            slot_nk = np.where(here_nk, expert_nk, -1).astype(np.int32)
            return np.asarray(ffn(jnp.int32(whole().number), x_nd, slot_nk, weight_nk)), here_nk

        spec = CallSpec(*shape, Wire(wire, D, EXPERTS), most_rows, K, **self._limits)
        return HostCallServer(spec, len(pools), compute)

    def use(self, version: int, held: Sequence[Sequence[int]]) -> None:
        for server in self.servers.values():
            server.use(version, resident(held))

    def connect(self, caller: int, callee: int, device: int = 0) -> None:
        here, there = pair()
        if self._buffers:
            for each in (here, there):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffers)
        self.servers[caller].dial(device, callee, here)
        self.servers[callee].accept(caller, there)

    def play(self, caller: int, callee: int) -> Played:
        """Connect a caller to a server that the test plays; returns the played server."""
        here, there = pair()
        self.servers[caller].dial(0, callee, here)
        return Played(there)

    def close(self) -> None:
        for server in self.servers.values():
            server.close()


class Played:
    """A called server that the test plays."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def receive(self) -> tuple[int, int]:
        """Receive a call; returns its id and its number of rows."""
        head = self._read(struct.calcsize(CALL))
        magic, kind, _, number, self.step, rows, pairs = struct.unpack(CALL, head)
        assert (magic, kind) == (CALL_MAGIC, 1)
        body = self._read(rows * (1 + 4 * D) + pairs * 5)
        assert sum(body[:rows]) == pairs
        return number, rows

    def answer(
        self, number: int, rows: int, value: float = 0.0, status: int = DONE, version: int = 1
    ) -> None:
        rows = rows if status == DONE else 0
        head = struct.pack(ANSWER, ANSWER_MAGIC, 2, status, number, version, rows, 0, 0, 0)
        self.connection.sendall(head + np.full((rows, D), value, "<f4").tobytes())

    def _read(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            more = self.connection.recv(count - len(found))
            assert more, "the connection has ended"
            found += more
        return found


@contextlib.contextmanager
def cluster(held: Held, *arguments, **options) -> Iterator[Cluster]:
    found = Cluster(held, *arguments, **options)
    with contextlib.closing(found):
        yield found


@contextlib.contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Run `act` in a thread during the block; its exception is raised in the test."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if errors:
        raise errors[0]


def draw(seed: int, rows: int, k: int = K) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random hidden states, distinct experts for each row, and weights."""
    rng = np.random.default_rng(seed)
    expert_tk = np.argsort(rng.random((rows, EXPERTS)))[:, :k].astype(np.int32)
    x_td = rng.normal(size=(rows, D)).astype(np.float32)
    return x_td, expert_tk, rng.random((rows, k)).astype(np.float32)


def call(
    server: ExpertCalls, layer: int, *routes: np.ndarray, device: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Call with the values of `draw` and optionally a mask of valid rows; sums and failed rows."""
    if len(routes) == 3:
        routes = (*routes, np.ones(len(routes[0]), bool))
    if isinstance(server, HostCallServer):
        return server.callers[device].run(HostRows(layer, *routes))
    y_td, failed_t = run(jnp.int32(server.callers[device]), jnp.int32(layer), *routes)
    return np.asarray(y_td), np.asarray(failed_t)


@functools.cache
def whole() -> NativePool:
    return make_pool(range(LAYERS * EXPERTS))


def expected(layer: int, *routes: np.ndarray) -> np.ndarray:
    """Sums by a single pool that holds all experts; arguments as for `call`."""
    x_td, expert_tk, weight_tk, *valid = routes
    slot_tk = expert_tk + layer * EXPERTS
    if valid:
        slot_tk = np.where(valid[0][:, None], slot_tk, -1)
    return np.asarray(ffn(jnp.int32(whole().number), x_td, slot_tk, weight_tk))


def spread(held: Sequence[Sequence[int]]) -> Held:
    """Servers with one device each."""
    return [[list(own)] for own in held]


#: Every server holds a third of the experts.
THIRDS = spread([range(n, LAYERS * EXPERTS, 3) for n in range(3)])
#: Servers with one and two devices; some experts have replicas.
UNEVEN: Held = [[[0, 1], [7, 8]], [[2, 3, 0]], [[4, 5, 6, 7, 1], [9, 10, 11, 3]]]


# Sums.


@pytest.mark.parametrize("held", [THIRDS, UNEVEN], ids=["thirds", "uneven"])
@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
def test_sums_are_those_of_one_pool_with_all_experts(held, wire):
    with cluster(held, wire) as found:
        for seed, (rank, server) in enumerate(found.servers.items()):
            for device in range(len(server.callers)):
                for layer in range(LAYERS):
                    x_td, expert_tk, weight_tk = draw(seed, 23)
                    valid_t = np.random.default_rng(seed).random(23) < 0.8
                    rows = (x_td, expert_tk, weight_tk, valid_t)
                    y_td, failed_t = call(server, layer, *rows, device=device)
                    assert not failed_t.any()
                    assert not y_td[~valid_t].any()
                    # Rows are rounded for all experts, including local ones.
                    seen = "bfloat16" if wire == "bfloat16" else "float32"
                    x_td, weight_tk = (
                        each.astype(seen).astype(np.float32) for each in (x_td, weight_tk)
                    )
                    wanted = expected(layer, x_td, expert_tk, weight_tk, valid_t)
                    near = 1e-5 if wire != "int8" else 3e-2
                    scale = 1 + np.abs(wanted).max()
                    np.testing.assert_allclose(y_td, wanted, rtol=0, atol=near * scale)
            peers = server.counters().peers
            assert peers[rank].calls == 0 and any(peer.calls for peer in peers)


def test_rows_that_are_no_numbers_stay_so():
    """int8 has no NaN; a row with NaN must not become a plausible result."""
    with cluster(spread([[], range(12)]), "int8") as found:
        x_td, *routes = draw(1, 3)
        x_td[1, 3] = np.nan
        x_td[2] = 1e-41
        y_td, _ = call(found.servers[0], 0, x_td, *routes)
        assert np.isnan(y_td[1]).all() and np.isfinite(y_td[[0, 2]]).all()


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_a_row_is_the_same_alone_and_in_a_batch(wire):
    with cluster(UNEVEN, wire) as found:
        x_td, expert_tk, weight_tk = draw(3, 40)
        y_td, _ = call(found.servers[0], 1, x_td, expert_tk, weight_tk)
        for t in (0, 17, 39):
            own = (each[t : t + 1] for each in (x_td, expert_tk, weight_tk))
            alone_td, _ = call(found.servers[0], 1, *own)
            assert alone_td[0].tobytes() == y_td[t].tobytes()


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_it_does_not_matter_where_a_rows_only_expert_is(wire):
    routes = draw(4, 20, k=1)
    results = []
    for held in ([range(12), []], [[], range(12)]):
        with cluster(spread(held), wire) as found:
            results.append(call(found.servers[0], 1, *routes)[0].tobytes())
            assert bool(found.servers[0].counters().peers[1].calls) == (len(held[1]) > 0)
    assert results[0] == results[1]


def test_large_messages_cross():
    """Messages larger than the socket buffers, in both directions at once, do not deadlock."""
    with cluster(spread([range(0, 6), range(6, 12)]), buffers=2048) as found:
        routes = draw(5, MOST_ROWS)

        def many(rank: int) -> None:
            for _ in range(20):
                y_td, failed_t = call(found.servers[rank], 1 - rank, *routes)
                assert not failed_t.any()
            np.testing.assert_allclose(y_td, expected(1 - rank, *routes), rtol=0, atol=1e-4)

        with meanwhile(lambda: many(1)):
            many(0)


@native_calls
def test_what_is_no_call_is_an_error():
    with cluster(THIRDS) as found:
        with pytest.raises(Exception, match="more rows than a call may have"):
            call(found.servers[0], 0, *draw(0, MOST_ROWS + 1))
        with pytest.raises(Exception, match="another model"):
            call(found.servers[0], LAYERS, *draw(0, 1))
    with pytest.raises(Exception, match="no call server has this number"):
        call(found.servers[0], 0, *draw(0, 1))


def test_experts_that_no_layer_has_fail_their_rows():
    with cluster(THIRDS) as found:
        x_td, expert_tk, weight_tk = draw(0, 3)
        expert_tk[0, 0], expert_tk[2, 1] = EXPERTS, -1
        _, failed_t = call(found.servers[0], 0, x_td, expert_tk, weight_tk)
        assert failed_t.tolist() == [True, False, True]
        _, failed_t = call(found.servers[0], 0, x_td, expert_tk, weight_tk, np.zeros(3, bool))
        assert not failed_t.any()


@native_calls
def test_groups_of_rows_whose_calls_are_under_way_at_once():
    x_td, *routes = draw(3, 40)
    valid_t = np.random.default_rng(3).random(40) < 0.8
    with cluster(THIRDS) as found:
        server = found.servers[0]
        caller = jnp.int32(server.callers[0])
        y_td, failed_t = run(caller, jnp.int32(1), x_td, *routes, valid_t, first=(0, 17, 30))
        assert not failed_t.any()
        wanted_td = expected(1, x_td, *routes, valid_t)
        np.testing.assert_allclose(np.asarray(y_td), wanted_td, rtol=0, atol=1e-4)
        sums = server.counters().sums
        away_t = (routes[0] % 3 != 0).any(1) & valid_t
        assert (sums.layers, sums.layers_waited, sums.rows_away) == (1, 1, away_t.sum())


def test_experts_whose_numbers_take_two_bytes(monkeypatch):
    here = sys.modules[__name__]
    monkeypatch.setattr(here, "EXPERTS", 300)
    monkeypatch.setattr(here, "WEIGHTS", [WEIGHTS[n % len(WEIGHTS)] for n in range(600)])
    monkeypatch.setattr(here, "whole", functools.cache(whole.__wrapped__))
    routes = draw(0, 40)
    assert routes[1].max() > 255
    y_td = expected(1, *routes)  # before several threads call `whole`
    with cluster(spread([range(0, 600, 2), range(1, 600, 2)])) as found:
        found_td, failed_t = call(found.servers[0], 1, *routes)
        assert not failed_t.any()
        np.testing.assert_allclose(found_td, y_td, rtol=0, atol=1e-4)


@native_calls
def test_there_are_as_many_servers_as_a_call_can_name():
    with pytest.raises(ValueError, match="257 servers"):
        CallServer(0, range(257), 1, 1, "float32", 1, [])
    with pytest.raises(ValueError, match="65537 experts"):
        CallSpec(0, (0, 1), 1, 65537, Wire("float32", D, 65537), 1, 1)


@native_calls
def test_an_order_of_servers_lists_each_once():
    with pytest.raises(ValueError, match="an order of 3 servers"):
        CallServer(0, [1, 2, 2], 1, 1, "float32", 1, [])


# Experts that are not where the table says.


def test_who_has_it_not_says_so_and_another_is_asked():
    with cluster(spread([[], [], range(12)])) as found:
        caller = found.servers[0]
        caller.use(2, resident([[], range(12), range(12)]))
        routes = draw(6, 9)
        y_td, failed_t = call(caller, 0, *routes)
        assert not failed_t.any()
        np.testing.assert_allclose(y_td, expected(0, *routes), rtol=0, atol=1e-4)
        peers = caller.counters().peers
        assert [peer.refusals for peer in peers] == [0, 1, 0]
        assert [peer.calls for peer in peers] == [0, 1, 1]


def test_others_are_asked_for_nothing_but_what_a_server_has_not():
    gone = 2
    with cluster(spread([[], [e for e in range(12) if e != gone], [gone]])) as found:
        caller = found.servers[0]
        caller.use(2, resident([[], range(12), [gone]]))
        x_td, expert_tk, weight_tk = draw(6, 20)
        y_td, failed_t = call(caller, 0, x_td, expert_tk, weight_tk)
        assert not failed_t.any()
        wanted = expected(0, x_td, expert_tk, weight_tk)
        np.testing.assert_allclose(y_td, wanted, rtol=0, atol=1e-4)
        peers = caller.counters().peers
        assert [peer.refusals for peer in peers] == [0, 1, 0]
        assert peers[2].rows == (expert_tk == gone).any(axis=1).sum()


@pytest.mark.parametrize("version", [1, 2])
def test_a_staged_table_says_who_is_asked_next(version: int):
    """A refusal with the newer version sends the call to holders in the newer table first.

    A refusal with the older version sends the call to holders in the older table first. All holders
    in both tables are called, each once, before the rows fail.
    """
    with cluster(spread([[], [], [], []]), played=(1, 2, 3)) as found:
        caller = found.servers[0]
        caller.use(1, resident([[], range(12), range(12), []]))
        peers = {n: found.play(0, n) for n in (1, 2, 3)}

        def refuse() -> None:
            calls = [peers[1].receive()]
            # The table is staged in the middle of the layer.
            caller.stage(2, resident([[], [], [], range(12)]))
            peers[1].answer(*calls[0], status=NOT_HERE, version=version)
            for number in (2, 3) if version == 1 else (3, 2):
                call = peers[number].receive()
                peers[number].answer(*call, status=NOT_HERE, version=version)

        with meanwhile(refuse):
            _, failed_t = call(caller, 0, *draw(7, 4))
        assert failed_t.all()
        assert [peer.calls for peer in caller.counters().peers] == [0, 1, 1, 1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.sampled_from([0.2, 0.5]))
def test_experts_that_have_moved_are_found_by_a_staged_table(seed: int, share: float):
    """Each expert has one real holder, which is in one of the two tables: no row fails."""
    rng = np.random.default_rng(seed)
    tables = rng.random((2, 4, LAYERS * EXPERTS)) < share
    left = rng.integers(4, size=LAYERS * EXPERTS)
    tables[rng.integers(2, size=len(left)), left, np.arange(len(left))] = True
    with cluster(spread([np.flatnonzero(left == n).tolist() for n in range(4)])) as found:
        for server in found.servers.values():
            server.use(2, tables[0].reshape(4, LAYERS, EXPERTS))
            server.stage(3, tables[1].reshape(4, LAYERS, EXPERTS))
        for rank, server in found.servers.items():
            routes = draw(seed % 1000 + rank, 8)
            y_td, failed_t = call(server, 1, *routes)
            assert not failed_t.any()
            np.testing.assert_allclose(y_td, expected(1, *routes), rtol=0, atol=1e-4)


def test_a_dropped_table_counts_no_more():
    with cluster(spread([[], range(12)])) as found:
        caller = found.servers[0]
        caller.use(2, resident([[], []]))
        caller.stage(3, resident([[], range(12)]))
        routes = draw(7, 4)
        assert not call(caller, 0, *routes)[1].any()
        caller.drop(3)
        assert call(caller, 0, *routes)[1].all()
        caller.stage(4, resident([[], range(12)]))
        caller.use(3, resident([[], []]))
        assert not call(caller, 0, *routes)[1].any()
        # A staged table is forgotten once this table or a newer one is in force.
        caller.use(4, resident([[], []]))
        assert call(caller, 0, *routes)[1].all()


def test_rows_of_which_an_expert_is_nowhere_fail():
    with cluster(spread([[0, 1], [2, 3], []])) as found:
        x_td, expert_tk, weight_tk = draw(7, 30)
        y_td, failed_t = call(found.servers[0], 0, x_td, expert_tk, weight_tk)
        assert failed_t.tolist() == (expert_tk >= 4).any(axis=1).tolist()
        assert 0 < failed_t.sum() < 30
        wanted = expected(0, x_td, expert_tk, weight_tk)
        np.testing.assert_allclose(y_td[~failed_t], wanted[~failed_t], rtol=0, atol=1e-4)


def test_a_table_that_comes_meanwhile_is_used():
    """Two servers refuse; then a new table arrives with a holder for both rows' experts."""
    with cluster(spread([[], [], [], range(12)]), played=(1, 2)) as found:
        caller = found.servers[0]
        caller.use(2, resident([[], [0], [1], []]))
        peers = [found.play(0, 1), found.play(0, 2)]

        def refuse() -> None:
            for peer in peers:
                peer.answer(*peer.receive(), status=NOT_HERE)
            until(lambda: sum(each.refusals for each in caller.counters().peers) == 2)
            caller.use(3, resident([[], [], [], range(12)]))

        x_td, expert_tk, weight_tk = draw(8, 2, k=1)
        expert_tk[:, 0] = 0, 1
        with meanwhile(refuse):
            y_td, failed_t = call(caller, 0, x_td, expert_tk, weight_tk)
        assert not failed_t.any()
        wanted = expected(0, x_td, expert_tk, weight_tk)
        np.testing.assert_allclose(y_td, wanted, rtol=0, atol=1e-4)


def test_a_row_whose_expert_is_no_longer_here_waits_for_a_table():
    with cluster(spread([[], [], range(12)]), played=(1,)) as found:
        caller, peer = found.servers[0], found.play(0, 1)
        caller.use(2, resident([[0], [1], []]))

        def move() -> None:
            call = peer.receive()
            caller.use(3, resident([[], [1], range(12)]))
            peer.answer(*call)

        x_td, expert_tk, weight_tk = draw(8, 2, k=1)
        expert_tk[:, 0] = 0, 1
        with meanwhile(move):
            y_td, failed_t = call(caller, 0, x_td, expert_tk, weight_tk)
        assert not failed_t.any()
        wanted = expected(0, x_td, expert_tk, weight_tk)
        np.testing.assert_allclose(y_td[0], wanted[0], rtol=0, atol=1e-4)
        assert [each.calls for each in caller.counters().peers] == [0, 1, 1]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG_S
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


# Late answers and lost connections.


def test_a_late_call_is_repeated_elsewhere():
    held = spread([[], [], range(12)])
    with cluster(held, played=(1,), repeat_s=0.05) as found:
        caller, peer = found.servers[0], found.play(0, 1)
        caller.use(2, resident([[], range(12), range(12)]))
        routes = draw(9, 5)
        y_td, failed_t = call(caller, 0, *routes)
        wanted = expected(0, *routes)
        np.testing.assert_allclose(y_td, wanted, rtol=0, atol=1e-4)
        assert not failed_t.any()
        counters = caller.counters().peers
        assert [each.repeats for each in counters] == [0, 1, 0]
        assert [each.calls for each in counters] == [0, 1, 1]
        # The late server is not called any more, and its late answer changes nothing.
        y_td, _ = call(caller, 0, *routes)
        np.testing.assert_allclose(y_td, wanted, rtol=0, atol=1e-4)
        peer.answer(*peer.receive(), value=1e6)
        y_td, _ = call(caller, 0, *routes, np.zeros(5, bool))
        assert not y_td.any()
        assert caller.counters().peers[1].calls == 1
        # After this answer, the server is no longer suspect.
        with meanwhile(lambda: peer.answer(*peer.receive(), value=2.0)):
            y_td, _ = call(caller, 0, *routes)
        assert (y_td == 2).all()


def test_a_late_refusal_does_not_matter_where_another_answers():
    """The late server refuses after all; the other server answers only the repeated call."""
    with cluster(spread([[], [], []]), played=(1, 2), repeat_s=0.05) as found:
        caller, peers = found.servers[0], [found.play(0, n) for n in (1, 2)]
        caller.use(2, resident([[], range(12), range(12)]))

        def play() -> None:
            late, repeat = peers[0].receive(), peers[1].receive()
            peers[0].answer(*late, status=NOT_HERE)
            peers[1].receive()
            peers[1].answer(*repeat, value=2.0)

        with meanwhile(play):
            y_td, failed_t = call(caller, 0, *draw(9, 5))
        assert not failed_t.any() and (y_td == 2).all()


def test_a_late_call_without_another_holder_fails():
    with cluster(spread([[], range(12)]), played=(1,), repeat_s=0.02, fail_s=0.3) as found:
        caller, peer = found.servers[0], found.play(0, 1)
        routes = draw(10, 5)
        began = time.monotonic()
        _, failed_t = call(caller, 0, *routes)
        assert failed_t.all() and time.monotonic() - began > 0.29
        # The second call fails at once: nothing is sent to a suspect server.
        _, failed_t = call(caller, 0, *routes)
        assert failed_t.all()
        counted = caller.counters().peers[1]
        assert (counted.calls, counted.failed_rows, counted.repeats) == (1, 10, 0)
        peer.answer(*peer.receive(), value=1e6)
        with meanwhile(lambda: peer.answer(*peer.receive(), value=3.0)):
            y_td, failed_t = call(caller, 0, *routes)
        assert not failed_t.any() and (y_td == 3).all()


def test_cancelled_calls_fail_at_once():
    with cluster(spread([[0], range(12)]), played=(1,)) as found:
        caller, peer = found.servers[0], found.play(0, 1)
        routes = draw(10, 5)

        def cancel() -> None:
            peer.receive()
            caller.cancel()

        with meanwhile(cancel):
            _, failed_t = call(caller, 1, *routes)
        assert failed_t.all()
        _, failed_t = call(caller, 1, *routes)
        assert failed_t.all() and caller.counters().peers[1].calls == 1


def test_many_rows_go_in_groups():
    """Rows are split into groups of at least 64 KiB, and each group is a call."""
    rows = 3 * (1 + 2**16 // (4 * D))
    with cluster(spread([range(0, 6), range(6, 12)]), most_rows=rows) as found:
        routes = draw(5, rows)
        y_td, failed_t = call(found.servers[0], 1, *routes)
        assert not failed_t.any()
        np.testing.assert_allclose(y_td, expected(1, *routes), rtol=0, atol=1e-4)
        peer = found.servers[0].counters().peers[1]
        assert (peer.calls, peer.rows) == (3, rows)


def test_a_callee_owes_a_caller_so_many_answers_at_most():
    """Many servers refuse and redirect to one server, which gets a limited number at a time."""
    assert EXPERTS > MOST_UNANSWERED
    others = range(1, 1 + EXPERTS)
    last = others[-1] + 1
    with cluster(spread([[]] * (last + 1)), played=(*others, last)) as found:
        caller = found.servers[0]
        caller.use(2, resident([[], *([n] for n in range(EXPERTS)), []]))
        caller.stage(3, resident([*[[]] * last, range(12)]))
        peers = [found.play(0, n) for n in (*others, last)]

        def play() -> None:
            for peer in peers[:-1]:
                peer.answer(*peer.receive(), status=NOT_HERE, version=3)
            calls = [peers[-1].receive() for _ in range(MOST_UNANSWERED)]
            until(lambda: sum(each.refusals for each in caller.counters().peers) == EXPERTS)
            assert not select.select([peers[-1].connection], [], [], 0.1)[0]
            for n, each in enumerate(calls):
                peers[-1].answer(*each, value=1.0)
                if n == 0:
                    calls.append(peers[-1].receive())

        x_td, expert_tk, weight_tk = draw(8, EXPERTS, k=1)
        expert_tk[:, 0] = range(EXPERTS)
        with meanwhile(play):
            y_td, failed_t = call(caller, 0, x_td, expert_tk, weight_tk)
        assert not failed_t.any() and (y_td == 1).all()
        assert caller.counters().peers[last].calls == EXPERTS


def test_who_calls_without_end_is_read_no_further_than_answered():
    """Backpressure: no call of a flooding client is lost, and other callers are answered."""
    count, size = 300, struct.calcsize(ANSWER) + MOST_ROWS * 4 * D
    message = call_bytes(rows=MOST_ROWS, pairs=MOST_ROWS)
    with cluster(spread([[], range(12), []])) as found:
        here, there = pair()
        with here:
            for each in (here, there):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            found.servers[1].accept(2, there)
            answered = lambda: found.servers[1].counters().peers[2].answered  # noqa: E731

            def flood() -> None:
                for _ in range(count):
                    here.sendall(message)

            def others() -> None:
                routes = draw(14, 5)
                for _ in range(20):
                    y_td, failed_t = call(found.servers[0], 0, *routes)
                    assert not failed_t.any()
                np.testing.assert_allclose(y_td, expected(0, *routes), rtol=0, atol=1e-4)
                time.sleep(0.2)
                assert 0 < answered() < count / 2

            with meanwhile(flood):
                others()
                left = count * size
                while left:
                    left -= len(here.recv(left))
            assert answered() == count


@pytest.mark.parametrize("other", [False, True])
def test_a_connection_that_ends(other: bool):
    with cluster(spread([[], range(12), range(12) if other else []]), played=(1,)) as found:
        caller, peer = found.servers[0], found.play(0, 1)
        routes = draw(11, 5)

        def leave() -> None:
            number, _ = peer.receive()
            # The connection ends in the middle of an answer.
            peer.connection.sendall(struct.pack("<IHHQ", ANSWER_MAGIC, 2, DONE, number))
            peer.connection.close()

        with meanwhile(leave):
            y_td, failed_t = call(caller, 0, *routes)
        assert failed_t.all() != other
        if other:
            np.testing.assert_allclose(y_td, expected(0, *routes), rtol=0, atol=1e-4)
        assert caller.counters().peers[1].lost == 1
        peer = found.play(0, 1)
        with meanwhile(lambda: peer.answer(*peer.receive(), value=4.0)):
            y_td, failed_t = call(caller, 0, *routes)
        assert not failed_t.any() and (y_td == 4).all()


def test_a_new_connection_replaces_one_that_is_waited_for():
    with cluster(spread([[], range(12), range(12)]), played=(1,)) as found:
        caller, peer = found.servers[0], found.play(0, 1)
        routes = draw(12, 5)

        def replace() -> None:
            peer.receive()
            found.play(0, 1)

        with meanwhile(replace):
            y_td, failed_t = call(caller, 0, *routes)
        assert not failed_t.any()
        np.testing.assert_allclose(y_td, expected(0, *routes), rtol=0, atol=1e-4)
        assert caller.counters().peers[1].lost == 1
        assert peer.connection.recv(1) == b"", "the old one is closed"


@pytest.mark.parametrize(
    "answer",
    [
        struct.pack(ANSWER, CALL_MAGIC, 2, DONE, 1, 1, 1, 0, 0, 0),
        struct.pack(ANSWER, ANSWER_MAGIC, 1, DONE, 1, 1, 1, 0, 0, 0),
        struct.pack(ANSWER, ANSWER_MAGIC, 2, DONE, 1, 1, MOST_ROWS + 1, 0, 0, 0),
        struct.pack(ANSWER, ANSWER_MAGIC, 2, DONE, 1, 1, 4, 0, 0, 0) + bytes(4 * 4 * D),
    ],
    ids=["magic", "kind", "rows", "fewer rows"],
)
def test_an_answer_that_is_nonsense(answer: bytes):
    with cluster(spread([[], range(12), range(12)]), played=(1,)) as found:
        caller, peer = found.servers[0], found.play(0, 1)
        routes = draw(13, 5)

        def say() -> None:
            assert peer.receive() == (1, 5)
            # An answer to a call that was never made is ignored.
            peer.answer(77, 5, value=1e6)
            peer.connection.sendall(answer)

        with meanwhile(say):
            y_td, failed_t = call(caller, 0, *routes)
        assert not failed_t.any()
        np.testing.assert_allclose(y_td, expected(0, *routes), rtol=0, atol=1e-4)


def call_bytes(
    rows=1, pairs=1, counts=None, expert=0, layer=0, magic=CALL_MAGIC, kind=1, floats=D
) -> bytes:
    head = struct.pack(CALL, magic, kind, layer, 5, 0, rows, pairs)
    counts = bytes([1] * rows) if counts is None else counts
    experts, weights = np.full(pairs, expert, np.uint8), np.ones(pairs, "<f4")
    x_td = np.ones((rows, floats), "<f4")
    return head + counts + experts.tobytes() + weights.tobytes() + x_td.tobytes()


@pytest.mark.parametrize(
    ("message", "reply"),
    [
        (call_bytes(), DONE),
        (call_bytes(rows=0, pairs=0), DONE),
        (call_bytes(magic=ANSWER_MAGIC), None),
        (call_bytes(kind=3), None),
        (call_bytes(rows=MOST_ROWS + 1)[: struct.calcsize(CALL)], None),
        # The body would have 24 GiB.
        (struct.pack(CALL, CALL_MAGIC, 1, 0, 5, 0, 1, 2**32 - 1), None),
        # This number would refer to the first expert of the next layer.
        (call_bytes(expert=EXPERTS), NOT_HERE),
        (call_bytes(expert=255), NOT_HERE),
        (call_bytes(layer=LAYERS), NOT_HERE),
        (call_bytes(counts=b"\x02"), NOT_HERE),
        (call_bytes(rows=2, counts=b"\x00\x00"), NOT_HERE),
    ],
    ids=[
        *("good", "empty", "magic", "kind", "rows", "pairs"),
        *("expert", "last expert", "layer", "counts", "no counts"),
    ],
)
def test_a_call_that_is_nonsense(message: bytes, reply: int | None):
    with cluster(spread([[], range(12), []])) as found:
        here, there = pair()
        with here:
            found.servers[1].accept(2, there)
            here.sendall(message)
            if reply is None:
                # The server resets the connection if it has not read everything.
                with contextlib.suppress(ConnectionResetError):
                    assert here.recv(1) == b""
            else:
                size = struct.calcsize(ANSWER)
                answer = here.recv(size, socket.MSG_WAITALL)
                magic, kind, status, number, *_ = struct.unpack(ANSWER, answer)
                assert (magic, kind, status, number) == (ANSWER_MAGIC, 2, reply, 5)
        # A connection that ends in the middle of a call.
        here, there = pair()
        found.servers[1].accept(2, there)
        here.sendall(call_bytes()[:40])
        here.close()
        routes = draw(14, 5)
        y_td, failed_t = call(found.servers[0], 0, *routes)
        assert not failed_t.any()
        np.testing.assert_allclose(y_td, expected(0, *routes), rtol=0, atol=1e-4)


# Slots that change.

MOVING, STEADY = 0, list(range(1, LAYERS * EXPERTS))


@native_calls
@pytest.mark.parametrize("careful", [True, False])
def test_slots_are_rewritten_while_calls_run(careful: bool):
    """If a slot is overwritten only when no call can need its old expert, no row fails.

    If slots are overwritten at any time, rows may fail because experts are not where the table
    says, but no sum is wrong.
    """
    # The spare slot of a pool holds a copy of an expert in another slot.
    with cluster(spread([[6, 7], [MOVING, *STEADY], [*STEADY, 1]])) as found:
        routes = draw(15, 12)
        wanted = expected(0, *routes)
        done, turns, failures = threading.Event(), 0, 0
        pools = {rank: found.pools[rank][0] for rank in (1, 2)}

        def hand_over(holder: int, version: int) -> None:
            """Move an expert to the other callee; overwrite the old slot when no call needs it."""
            other = 3 - holder
            put(pools[other], {1: 0, 2: len(STEADY)}[other], MOVING)
            table = [[6, 7], STEADY, STEADY]
            table[other] = [MOVING, *STEADY]
            found.use(version, table)
            seen = turns
            until(lambda: done.is_set() or turns > seen + 1)
            put(pools[holder], {1: 0, 2: len(STEADY)}[holder], 11)

        def spoil(rng: np.random.Generator) -> None:
            rank = int(rng.integers(1, 3))
            put(pools[rank], int(rng.integers(12)), int(rng.integers(12)))
            time.sleep(0.001)

        def change() -> None:
            rng, holder, version = np.random.default_rng(0), 1, 2
            while not done.is_set():
                if careful:
                    hand_over(holder, version)
                    holder, version = 3 - holder, version + 1
                else:
                    spoil(rng)

        with meanwhile(change):
            try:
                # If not careful, a row may wait half a second for a table that never comes.
                for _ in range(60 if careful else 3):
                    y_td, failed_t = call(found.servers[0], 0, *routes)
                    turns += 1
                    failures += failed_t.sum()
                    right = ~failed_t
                    np.testing.assert_allclose(y_td[right], wanted[right], rtol=0, atol=1e-4)
            finally:
                done.set()
        assert not careful or failures == 0


# Counters and traces.


def test_counters():
    held = spread([[0, 1], [2, 3], [4, 5]])
    with cluster(held) as found:
        x_td, expert_tk, weight_tk = draw(16, 20)
        expert_tk[:5] = 0
        for step in range(3):
            found.servers[0].begin_step(step)
            call(found.servers[0], 0, x_td, expert_tk, weight_tk)
        call(found.servers[0], 1, x_td, expert_tk, weight_tk, np.zeros(20, bool))
        rows = [((expert_tk // 2) == n).any(axis=1).sum() for n in range(3)]
        pairs = [((expert_tk // 2) == n).sum() for n in range(3)]
        mine = found.servers[0].counters()
        assert mine.rows.tolist() == [[0, 3 * rows[1], 3 * rows[2]], [0, 0, 0]]
        for n in (1, 2):
            theirs = found.servers[n].counters()
            ours, peer = mine.peers[n], theirs.peers[0]
            assert (ours.calls, ours.rows) == (3, 3 * rows[n])
            assert (peer.answered, peer.answered_rows) == (3, 3 * rows[n])
            assert ours.bytes_sent == 3 * (32 + rows[n] * (1 + 4 * D) + 5 * pairs[n])
            assert ours.bytes_received == 3 * (40 + rows[n] * 4 * D)
            assert (peer.bytes_received, peer.bytes_sent) == (ours.bytes_sent, ours.bytes_received)
            assert ours.waited_ns > 0 and peer.queued_ns >= 0
            assert theirs.sums.served_batches == 3 and theirs.sums.served_s > 0
            assert ours.refusals == ours.repeats == ours.lost == ours.failed_rows == 0
        assert (mine.sums.layers, mine.sums.moved.calls) == (4, 6)
        assert (mine.sums.layers_waited, mine.sums.rows_away) == (3, 3 * 15)
        there_and_back = sum(ours.bytes_sent for ours in mine.peers) + 3 * sum(rows[1:]) * 4 * D
        assert mine.sums.moved.bytes == there_and_back


def take(server: ExpertCalls, kind: str) -> list[TraceEvent]:
    """Trace events of a kind since the previous call."""
    events, lost = server.take_trace()
    assert lost == 0
    return [event for event in events if TRACE_KINDS[event.kind] == kind]


def test_both_ends_of_a_call_are_traced():
    with cluster(spread([[0, 1], [2, 3], [4, 5]])) as found:
        for server in found.servers.values():
            assert server.take_trace() == ([], 0), "nobody wants it"
            server.start_trace()
        began = time.perf_counter_ns()
        for step in (7, 8):
            found.servers[0].begin_step(step)
            call(found.servers[0], 0, *draw(18, 20))
        events, _ = found.servers[0].take_trace()
        assert [event.step for event in events] == 3 * [7] + 3 * [8]
        calls = {event.id: event for event in events if TRACE_KINDS[event.kind] == "call"}
        assert sorted(event.peer for event in calls.values()) == [1, 1, 2, 2]
        for layer in (events[2], events[5]):
            assert (TRACE_KINDS[layer.kind], layer.layer, layer.rows) == ("layer", 0, 20)
            assert began < layer.begin <= layer.compute_begin <= layer.compute_end <= layer.end
        served: list[tuple[int, TraceEvent]] = []

        def come() -> bool:
            """Servers record an event only after sending the answer."""
            for n in (1, 2):
                served.extend((n, event) for event in take(found.servers[n], "served"))
            return len(served) == 4

        until(come)
        for n, event in served:
            ours = calls[event.id]
            assert (event.step, event.peer, ours.peer) == (ours.step, 0, n)
            assert (event.rows, event.calls, event.outcome) == (ours.rows, 1, 0)
            assert ours.begin <= event.begin <= event.compute_begin <= event.end <= ours.end
            assert ours.begin <= ours.arrived <= ours.compute_begin <= ours.compute_end


def test_what_becomes_of_calls_is_traced():
    held = spread([[], [], range(12)])
    with cluster(held, played=(1,), repeat_s=0.02, fail_s=0.1) as found:
        caller = found.servers[0]
        caller.use(2, resident([[], range(12), []]))
        caller.start_trace(3)
        peer, routes = found.play(0, 1), draw(19, 5)

        def outcomes() -> list[str]:
            return [TRACE_OUTCOMES[event.outcome] for event in take(caller, "call")]

        call(caller, 0, *routes)
        assert outcomes() == ["late"]
        peer.answer(*peer.receive())
        with meanwhile(lambda: peer.answer(*peer.receive(), status=NOT_HERE)):
            caller.use(3, resident([[], range(12), range(12)]))
            _, failed_t = call(caller, 0, *routes)
        assert not failed_t.any()
        events, lost = caller.take_trace()
        # Late answer, refusal, answer of another server; the trace has no room for the layer.
        assert [TRACE_OUTCOMES[event.outcome] for event in events[1:]] == ["refused", "answered"]
        assert (events[0].id, events[2].peer, lost) == (1, 2, 1)
        with meanwhile(lambda: (peer.receive(), peer.connection.close())):
            call(caller, 0, *routes)
        assert outcomes() == ["lost", "answered"]


def test_nothing_leaks():
    def once() -> None:
        with cluster(UNEVEN) as found:
            for server in found.servers.values():
                call(server, 0, *draw(17, 3))
            # Two connections that no call has adopted; the second replaces the first.
            found.connect(0, 1)
            found.connect(0, 1)

    once()
    before = len(os.listdir("/dev/fd"))
    once()
    assert len(os.listdir("/dev/fd")) == before


#: Makes a server when this process has one descriptor left.
FULL = """
import contextlib, os, resource, sys
from dance_jax.models import native
native.register(sys.argv[1])
from tests.models.test_calls import UNEVEN, Cluster
Cluster.native = [True]
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
taken = []
with contextlib.suppress(OSError):
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
os.close(taken[0])
Cluster(UNEVEN)
"""


@native_calls
def test_a_server_without_descriptors_says_what_failed(compiled: pathlib.Path):
    command = [sys.executable, "-c", FULL, str(compiled)]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert ended.returncode == -signal.SIGABRT
    assert "cannot start: pipe: Too many open files" in ended.stderr


def test_many_servers():
    """Of 40 servers, the last six hold all experts, one per layer each; 33 are never created."""
    held = [[]] * 34 + [[n, EXPERTS + n] for n in range(EXPERTS)]
    with cluster(spread(held), played=range(1, 34)) as servers:
        for layer in range(LAYERS):
            routes = draw(layer, 20)
            y_td, failed_t = call(servers.servers[0], layer, *routes)
            assert not failed_t.any()
            np.testing.assert_allclose(y_td, expected(layer, *routes), atol=1e-5)
        rows_ln = servers.servers[0].counters().rows
    assert (rows_ln.sum(0) > 0).tolist() == [False] * 34 + [True] * EXPERTS


# Choice of servers.


@native_calls
@settings(max_examples=40, deadline=None)
@given(
    servers=st.sampled_from([2, 3, 8, 9, 31, 50]),
    seed=st.integers(0, 2**31),
    share=st.sampled_from([0.1, 0.3, 0.7]),
)
def test_the_servers_that_are_asked_are_those_of_the_metrics(servers, seed, share):
    """For many tokens with four experts, some without a holder, and any order of servers."""
    rng = np.random.default_rng(seed)
    has_tkn, order_n = rng.random((20, 4, servers)) < share, rng.permutation(servers)
    order_n = order_n.astype(np.int32)
    masks_tk = (has_tkn * (1 << np.arange(servers))).sum(-1)
    holders_wtk = server_masks(np.moveaxis(has_tkn, -1, 0), order_n)
    place_tk = np.asarray(choose_traced(holders_wtk, np.ones(masks_tk.shape, bool), servers))
    wanted_tk = np.where(place_tk < 0, -1, order_n[place_tk])
    library = native.library()
    assert library is not None
    for masks, own in zip(masks_tk, wanted_tk, strict=True):
        masks, found = masks.astype(np.uint64), np.zeros(4, np.int64)
        masks_at, order_at, found_at = (
            ctypes.c_void_p(array.ctypes.data) for array in (masks, order_n, found)
        )
        sizes = ctypes.c_int64(4), ctypes.c_int64(servers)
        library.ChooseServersForTest(sizes[0], masks_at, sizes[1], order_at, found_at)
        assert found.tolist() == own.tolist()
        assert list(choose(tuple(map(int, masks)), tuple(order_n.tolist()))) == own.tolist()


def test_equal_holders_are_asked_in_the_callers_order():
    """Server 0 holds no experts; each other server holds all of them."""
    everything = range(LAYERS * EXPERTS)
    orders = [[2, 1, 0], [0, 2, 1], [0, 1, 2]]
    with cluster(spread([[], everything, everything]), orders=orders) as found:
        routes = draw(0, 4)
        y_td, failed_t = call(found.servers[0], 0, *routes)
        assert not failed_t.any()
        np.testing.assert_allclose(y_td, expected(0, *routes), atol=1e-5)
        assert found.servers[0].counters().rows[0].tolist() == [0, 0, 4]
