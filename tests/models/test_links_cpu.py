"""Rows over connections between servers: what is sent, and what ends it.

One server runs here, the other is played by the test: it speaks the protocol by hand.
"""

from __future__ import annotations

import contextlib
import pathlib
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from dance_jax.models import links_cpu
from dance_jax.models.connections import Listener
from dance_jax.models.links_cpu import HEAD_BYTES, Moved, Sockets, seconds_per_byte
from dance_jax.models.messages import NO_EXPERT, Outgoing, row_bytes
from dance_jax.models.topology import AXIS, Topology

NAMES = ("here", "there")
KEY = b"the secret of this launch"
TOPOLOGY = Topology(rank=0, devices=(1, 1), max_step_tokens=4)
#: Tokens, hidden size, experts per token.
G, D, K = 4, 3, 2
MAGIC, DISPATCH, RETURN = 0x31786A64, 0, 1


def listen() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


@pytest.mark.parametrize(("names", "usable"), [(("here",), True), (NAMES, False)])
def test_alone_or_without_the_library_there_are_no_links(names: tuple[str, ...], usable: bool):
    """Nobody is dialled or waited for."""
    with contextlib.closing(Listener(0, names, "127.0.0.1", KEY)) as listener:
        endpoints = [listener.endpoint, "127.0.0.1:1"]
        transport = links_cpu.connect(0, names, listener, endpoints, KEY, usable=usable)
    assert transport.name == "collectives"


# What is sent.


@pytest.fixture
def peer(compiled: pathlib.Path) -> Iterator[socket.socket]:
    """The other end of this server's only link."""
    with listen() as listener:
        there = socket.create_connection(listener.getsockname())
        here, _ = listener.accept()
    there.settimeout(20)
    links_cpu.open_links(0, NAMES, {1: here})
    yield there
    links_cpu.close()
    there.close()


def on_one_device(function: Callable) -> Callable:
    mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,))
    spec = PartitionSpec()
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )


@on_one_device
def exchange(goes_ng, x_gd):
    """Rows go with expert 7 and twice their value comes back for what was received."""
    expert = jnp.where(goes_ng[..., None], jnp.array([7, NO_EXPERT]), NO_EXPERT)
    outgoing = Outgoing(goes_ng, expert.astype(jnp.uint16), jnp.ones((G, K)), (x_gd,))
    transport = Sockets()
    incoming, exchanged = transport.dispatch(TOPOLOGY, outgoing, jnp.int32(2), ())
    doubled = tuple(2 * column for column in incoming.hidden)
    sums = transport.give_back(TOPOLOGY, doubled, goes_ng, exchanged.rows)
    return incoming, exchanged, sums


def goes_to_peer(*rows: int) -> np.ndarray:
    goes = np.zeros((2, G), bool)
    goes[1, list(rows)] = True
    return goes


def head(number: int, phase: int, row: int) -> bytes:
    return struct.pack("<IIII", MAGIC, number, phase, row)


#: A dispatch of one row, and its bytes: experts, weights, hidden state.
ROW = np.array([3, NO_EXPERT], "<u2").tobytes() + np.array([0.5, 0, 1, 2, 3], "<f4").tobytes()
ONE_ROW = head(1, DISPATCH, len(ROW)) + struct.pack("<iii", 1, 0, 0) + ROW
QUIET = head(1, DISPATCH, len(ROW)) + struct.pack("<iii", 0, 0, 0)
X = np.arange(G * D, dtype=np.float32).reshape(G, D)


def test_a_quiet_layer_is_a_head(peer: socket.socket):
    peer.sendall(QUIET)
    _, exchanged, _ = exchange(goes_to_peer(), X)
    assert exchanged.rows.tolist() == [[0, 0], [0, 0]]
    expected = head(1, DISPATCH, len(ROW)) + struct.pack("<iii", 0, 0, 2)
    assert exchanged.bytes.tolist() == [[0, len(expected)], [len(QUIET), 0]]
    peer.setblocking(False)
    assert peer.recv(1000) == expected
    with pytest.raises(BlockingIOError):
        peer.recv(1)


def test_rows_go_and_sums_come_back(peer: socket.socket):
    sums = np.array([[10, 20, 30], [40, 50, 60]], "<f4")
    peer.sendall(ONE_ROW + head(1, RETURN, 4 * D) + sums.tobytes())
    incoming, exchanged, returned = exchange(goes_to_peer(1, 3), X)
    assert incoming.expert[0].tolist() == [3, NO_EXPERT]
    assert incoming.weight[0].tolist() == [0.5, 0]
    assert incoming.hidden[0][0].tolist() == [1, 2, 3]
    assert exchanged.rows.tolist() == [[0, 2], [1, 0]]
    assert (exchanged.work, exchanged.loaded) == (2, 0)
    np.testing.assert_array_equal(returned[0][1, [1, 3]], sums)

    expected = (
        head(1, DISPATCH, len(ROW))
        + struct.pack("<iii", 0, 2, 2)
        + np.array([[7, NO_EXPERT]] * 2, "<u2").tobytes()
        + np.ones((2, K), "<f4").tobytes()
        + X[[1, 3]].tobytes()
        + head(1, RETURN, 4 * D)
        + np.array([2, 4, 6], "<f4").tobytes()
    )
    assert peer.recv(10_000) == expected
    reply = HEAD_BYTES + sums.nbytes
    assert exchanged.bytes.tolist() == [[0, len(expected)], [len(ONE_ROW) + reply, 0]]
    counters = links_cpu.counters(2)
    assert counters.bytes_sent == (0, len(expected))
    assert counters.bytes_received == (0, len(ONE_ROW) + reply)
    assert counters.dispatch.calls == counters.give_back.calls == 1
    moved = [counters.dispatch.moved, counters.give_back.moved]
    # Out goes more than comes in a dispatch, and comes more than goes in a return.
    assert [each.bytes for each in moved] == [len(expected) - HEAD_BYTES - 4 * D, reply]
    for each in moved:
        assert each.calls == 1 and each.seconds > 0
        assert each.bytes_bytes == each.bytes**2
        assert each.bytes_seconds == pytest.approx(each.bytes * each.seconds)
        assert each.seconds_seconds == pytest.approx(each.seconds**2)
    assert row_bytes((incoming.expert, incoming.weight, *incoming.hidden)) == len(ROW)


def test_large_messages_cross(peer: socket.socket):
    """More than the sockets hold, both ways at once: neither waits for the other to read."""
    topology = Topology(rank=0, devices=(1, 1), max_step_tokens=512)
    width = 4096

    @on_one_device
    def swap(x_gd):
        goes = jnp.zeros((2, 512), bool).at[1].set(True)
        outgoing = Outgoing(goes, jnp.zeros((2, 512, 1), jnp.uint16), jnp.ones((512, 1)), (x_gd,))
        incoming, _ = Sockets().dispatch(topology, outgoing, jnp.int32(2), ())
        return incoming.hidden[0]

    x_gd = np.random.default_rng(0).normal(size=(512, width)).astype(np.float32)
    message = head(1, DISPATCH, 2 + 4 + 4 * width) + struct.pack("<iii", 512, 0, 0)
    message += bytes(512 * 6) + x_gd.tobytes()
    received = bytearray()

    def play() -> None:
        peer.sendall(message)
        while len(received) < len(message):
            received.extend(peer.recv(1 << 16))

    player = threading.Thread(target=play)
    player.start()
    np.testing.assert_array_equal(swap(x_gd), x_gd)
    player.join()
    assert received[-x_gd.nbytes :] == x_gd.tobytes()


# What a byte takes.


def moved(sizes: np.ndarray, seconds: np.ndarray) -> Moved:
    sums = (seconds, sizes, sizes * sizes, sizes * seconds, seconds * seconds)
    return Moved(len(sizes), *(float(each.sum()) for each in sums))


def phases(byte_s: float, noise_s: float, calls: int = 400) -> list[Moved]:
    """Phases of different sizes and fixed parts on one link."""
    rng = np.random.default_rng(0)
    found = []
    for fixed_s, largest in ((1e-3, 20_000), (5e-3, 90_000)):
        sizes = rng.integers(100, largest, calls).astype(float)
        seconds = fixed_s + byte_s * sizes + np.abs(rng.normal(0, noise_s, calls))
        found.append(moved(sizes, seconds))
    return found


def test_the_slope_of_time_over_bytes_is_found():
    assert seconds_per_byte(phases(1e-8, 0.0)) == pytest.approx(1e-8, rel=1e-6)
    assert seconds_per_byte(phases(1e-8, 1e-4)) == pytest.approx(1e-8, rel=0.05)
    (early, _), (late, other) = phases(1e-8, 1e-4), phases(1e-8, 1e-4, 900)
    assert seconds_per_byte([late - early, other]) == pytest.approx(1e-8, rel=0.1)


def test_an_uncertain_slope_is_not_known():
    assert seconds_per_byte(phases(1e-11, 1e-3)) is None, "lost in the noise"
    assert seconds_per_byte(phases(1e-8, 0.0, calls=20)) is None, "few calls"
    same = moved(np.full(400, 1e4), np.full(400, 1e-3))
    assert seconds_per_byte([same, Moved()]) is None, "all of a size"
    assert seconds_per_byte([]) is None


# What ends them.


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        (head(2, DISPATCH, len(ROW)) + bytes(12), "they do not run the same steps"),
        (head(1, RETURN, len(ROW)) + bytes(12), "they do not run the same steps"),
        (head(1, DISPATCH, len(ROW) + 4) + bytes(12), "they do not run the same program"),
        (bytes(HEAD_BYTES + 12), "another protocol"),
        (head(1, DISPATCH, len(ROW)) + struct.pack("<iii", 99, 0, 0), "more rows"),
        (QUIET[:-1], "closed the connection"),
    ],
)
def test_an_error_names_the_server_and_ends_the_links(
    peer: socket.socket, message: bytes, wrong: str
):
    peer.sendall(message)
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"server there: .*{wrong}"):
        jax.block_until_ready(exchange(goes_to_peer(), X))
    while peer.recv(1000):  # the peer is not left waiting
        pass
    with pytest.raises(jax.errors.JaxRuntimeError, match="server there"):
        jax.block_until_ready(exchange(goes_to_peer(), X))


def test_without_links_a_step_fails(compiled: pathlib.Path):
    with pytest.raises(jax.errors.JaxRuntimeError, match="not open"):
        jax.block_until_ready(exchange(goes_to_peer(), X))


TWO_DEVICES = """
import socket, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from dance_jax.models import native, links_cpu
from jax.sharding import Mesh, PartitionSpec
from tests.models import test_links_cpu as t
native.register(sys.argv[1])
with t.listen() as listener:
    there = socket.create_connection(listener.getsockname())
    here, _ = listener.accept()
links_cpu.open_links(0, t.NAMES, {1: here})
topology = t.Topology(rank=0, devices=(2, 1), max_step_tokens=t.G)
def both(goes, x):
    out = t.Outgoing(goes, t.jnp.zeros((2, t.G, t.K), "uint16"), t.jnp.ones((t.G, t.K)), (x,))
    incoming, exchanged = t.Sockets().dispatch(topology, out, t.jnp.int32(2), ())
    shared = jax.lax.psum(incoming.hidden[0][0], t.AXIS)
    return shared[None], exchanged.rows[None]
one, each = PartitionSpec(), PartitionSpec(t.AXIS)
mesh = Mesh(np.array(jax.devices()), (t.AXIS,))
step = jax.jit(jax.shard_map(
    both, mesh=mesh, in_specs=(one, one), out_specs=(each, each), check_vma=False))
there.sendall(t.ONE_ROW)
shared, rows = step(t.goes_to_peer(), t.X)
assert shared.tolist() == [[2, 4, 6]] * 2, shared
assert rows.tolist() == [[[0, 0], [1, 0]]] * 2, rows
there.close()
try:
    jax.block_until_ready(step(t.goes_to_peer(), t.X))
except jax.errors.JaxRuntimeError as error:
    assert "server there" in str(error), error
    print("failed as one")
"""


def test_all_devices_of_a_server_get_the_rows_and_fail_together(
    compiled: pathlib.Path,
):
    """A device that failed alone would leave its siblings waiting in a collective."""
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-c", TWO_DEVICES, str(compiled)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100)
    assert "failed as one" in done.stdout, done.stderr
