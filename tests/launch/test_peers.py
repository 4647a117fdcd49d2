"""Weights from other servers: their answers, their failures, and a whole model from them."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dance_jax.config import Rounding
from dance_jax.launch.control.protocol import ExpertLoad, Stage
from dance_jax.launch.worker import peer_weights, peers
from dance_jax.launch.worker.loading import Loader, Read
from dance_jax.launch.worker.peer_weights import HeldWeights, PeerWeights
from dance_jax.launch.worker.peers import Find, Like, Peers, WeightKind, WeightRequest
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import ensure_converted
from dance_jax.models.experts import ExpertFormat
from dance_jax.models.formats import WeightFormat
from dance_jax.models.layers import SILU
from dance_jax.models.random_weights import write_random_checkpoint
from tests.connected import connected
from tests.launch.test_loading import first, load
from tests.stacks import stacked
from tests.tiny_models import DEEPSEEK

NAMES = ("alpha", "beta", "gamma")
#: What gamma, which has no copy of the model, loads: experts of both layers, in mixed order.
PAIRS = [(1, 3), (0, 5), (1, 0), (0, 2), (0, 7), (1, 6), (0, 1)]
#: Format of the experts that `held` returns.
HALF = WeightFormat("bfloat16")
FORM = ExpertFormat(2, 3, HALF, HALF, HALF, SILU, bias=False)
LIKES: list[Like] = [(leaf.shape, leaf.dtype) for leaf in FORM.leaves.values()]


def held(layer: int, expert: int):
    """Weights of an expert on a server that does not have expert 9."""
    if expert == 9:
        raise KeyError("it is not resident")
    base = np.arange(6, dtype=np.float32).reshape(2, 3) + 10 * layer + 100 * expert
    return base.astype(jnp.bfloat16), -base.astype(jnp.bfloat16), base.T.astype(jnp.bfloat16)


def pool() -> Find:
    """The `find` of a server that is warm."""
    shelf = HeldWeights(None, "bfloat16")
    shelf.held = held
    return shelf.find


@pytest.fixture
def three() -> Iterator[list[Peers]]:
    """Three servers that are connected; none of them answers yet."""
    with contextlib.ExitStack() as stack:
        made = [Peers(server) for server in stack.enter_context(connected(NAMES))]
        for each in made:
            stack.callback(each.close)
        yield made


@pytest.fixture(scope="module", params=[Rounding(), Rounding("int4-mixed", "int8")], ids=str)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """One checkpoint with float experts and one with codes."""
    folder = tmp_path_factory.mktemp("peers")
    model = write_random_checkpoint(folder / "hf", DEEPSEEK, seed=3)
    return Checkpoint.open(ensure_converted(model, folder / "cache", rounding=request.param))


def reader(peers: Peers) -> Read:
    files: Any = None  # every expert has a holder
    return peers.reader(held, FORM, files)


def test_moved_experts_come_from_those_that_hold_them(three: list[Peers]) -> None:
    """From all peers at the same time; experts that are already here are copied locally."""
    for each in three:
        each.answer(pool())
    wanted = [ExpertLoad(0, n, n % 2, n, n % 3) for n in range(9)]
    loaders = [Loader(reader(each)) for each in three]
    for loader in loaders:
        loader.begin(Stage(1, [], wanted))
    for loader in loaders:
        loaded = first(loader)
        assert loaded.why == "" and loaded.bytes_read == 6 * 3 * 6 * 2
        for each in wanted:
            expected = held(each.layer, each.expert)
            for ours, theirs in zip(loaded.experts[0, each.slot], expected, strict=True):
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(ours, theirs)


def test_what_a_server_does_not_have(three: list[Peers]) -> None:
    """The server reports why, and continues to answer."""
    three[1].answer(pool())
    three[2].answer(HeldWeights(None, "bfloat16").find)
    failed = load(reader(three[0]), [ExpertLoad(0, 0, 1, 9, 1)])
    assert "server beta cannot send expert 9 of MoE layer 1: it is not resident" in failed.why
    assert load(reader(three[0]), [ExpertLoad(0, 0, 1, 8, 1)]).why == ""
    failed = load(reader(three[0]), [ExpertLoad(0, 0, 1, 8, 2)])
    assert (
        "server gamma cannot send expert 8 of MoE layer 1: the server holds no experts yet"
        in failed.why
    )
    with pytest.raises(
        LookupError, match="gamma cannot send experts 1, 2 of MoE layer 0: the server has"
    ):
        three[0].ask(2, WeightRequest(WeightKind.EXPERTS, 0, (1, 2)), LIKES)


def silent(connection: socket.socket) -> None:
    connection.recv(1 << 20)
    connection.recv(1)  # blocks until the other end gives up


def gone(connection: socket.socket) -> None:
    connection.close()


def larger(connection: socket.socket) -> None:
    connection.sendall(peers._ANSWER.pack(True, 144))


def talkative(connection: socket.socket) -> None:
    """Announces a reason for its refusal that is far too long."""
    connection.sendall(peers._ANSWER.pack(False, 1 << 40))


def breaks_off(connection: socket.socket) -> None:
    connection.sendall(peers._ANSWER.pack(True, 36) + b"12")
    connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (silent, "timed out"),
        (gone, ""),
        (larger, "144 bytes announced, not 36"),
        (talkative, "bytes announced"),
        (breaks_off, "it closed the connection"),
    ],
)
def test_what_can_go_wrong(
    what: Callable[[socket.socket], None],
    why: str,
    three: list[Peers],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error names server and expert; the next load asks the server again."""
    monkeypatch.setattr(peers, "ANSWER_TIMEOUT_S", 0.05 if what is silent else 10)
    connections = []

    def handler(_: int, __: int, connection: socket.socket) -> None:
        connections.append(connection)
        what(connection)

    three[2]._connections.handle("peers", handler)
    failed = load(reader(three[0]), [ExpertLoad(0, 0, 0, 1, 2)])
    assert "OSError: server gamma did not send expert 1 of MoE layer 0" in failed.why
    assert why in failed.why
    three[2].answer(pool())
    assert load(reader(three[0]), [ExpertLoad(0, 0, 0, 2, 2)]).why == ""
    for connection in connections:
        connection.close()


def test_a_server_that_does_not_listen(three: list[Peers]) -> None:
    three[2]._connections.close()
    why = load(reader(three[0]), [ExpertLoad(0, 0, 0, 1, 2)]).why
    assert "server gamma did not send expert 1 of MoE layer 0" in why and "refused" in why


def test_a_server_that_has_restarted(three: list[Peers]) -> None:
    """The first question after the restart is not asked of the old process."""
    three[2].answer(pool())
    assert load(reader(three[0]), [ExpertLoad(0, 0, 0, 1, 2)]).why == ""
    three[2].close()
    with connected(NAMES) as servers:
        Peers(servers[2]).answer(pool())
        three[0]._connections.restarted(2, servers[2].endpoint)
        assert load(reader(three[0]), [ExpertLoad(0, 0, 0, 1, 2)]).why == ""


class Source:
    """Answers like `HeldWeights` and records the requests."""

    def __init__(self, checkpoint: Checkpoint, dtype: str) -> None:
        self._shelf = HeldWeights(checkpoint, dtype)
        self.asked: list[WeightRequest] = []
        #: Called before the first answer.
        self.before: Callable[[], object] = lambda: None

    def find(self, question: WeightRequest) -> Sequence[np.ndarray]:
        if not self.asked:
            self.before()
        self.asked.append(question)
        return self._shelf.find(question)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_model_from_others(
    dtype: str, checkpoint: Checkpoint, three: list[Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the files, in answers of bounded size; both servers send at the same time."""
    form = checkpoint.form(dtype)
    monkeypatch.setattr(peer_weights, "PORTION_BYTES", 2 * form.bytes)
    together = threading.Barrier(2, timeout=60)
    sources = [Source(checkpoint, dtype) for _ in range(2)]
    for source, each in zip(sources, three, strict=False):
        each.answer(source.find)
    weights = PeerWeights(checkpoint.config, checkpoint.formats, three[2], [0, 1])
    ours, theirs = (nnx.to_flat_state(nnx.state(w.trunk(dtype))) for w in (weights, checkpoint))
    for (our_path, our), (their_path, their) in zip(ours, theirs, strict=True):
        assert our_path == their_path and our.get_value().dtype == their.get_value().dtype
        np.testing.assert_array_equal(our.get_value(), their.get_value())
    assert all(len(source.asked) > 2 for source in sources)
    for source in sources:
        source.asked.clear()
        source.before = together.wait
    found = form.stacked(len(PAIRS), weights.experts(PAIRS, form))
    for our, their in zip(found, stacked(checkpoint, PAIRS, dtype), strict=True):
        assert our.dtype == their.dtype
        np.testing.assert_array_equal(our, their)
    asked = [question for source in sources for question in source.asked]
    assert {(each.kind, len(each.numbers)) for each in asked} == {
        (WeightKind.EXPERTS, 1),
        (WeightKind.EXPERTS, 2),
    }
    assert sorted((each.layer, n) for each in asked for n in each.numbers) == sorted(PAIRS)


def test_an_expert_that_no_server_holds_comes_from_files(
    checkpoint: Checkpoint, three: list[Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The servers that are left send the part of one that is gone."""
    form = checkpoint.form("float32")
    monkeypatch.setattr(peer_weights, "PORTION_BYTES", form.bytes)
    three[1].answer(HeldWeights(checkpoint, "float32").find)
    three[2]._connections.lost(0)
    weights = PeerWeights(checkpoint.config, checkpoint.formats, three[2], [0, 1])
    loads = [ExpertLoad(0, n, *pair, -1) for n, pair in enumerate(PAIRS)]
    loaded = load(three[2].reader(held, form, weights), loads)
    assert loaded.why == "" and loaded.bytes_read == len(PAIRS) * form.bytes
    for n, pair in enumerate(PAIRS):
        for our, their in zip(
            loaded.experts[0, n], stacked(checkpoint, [pair], "float32"), strict=True
        ):
            np.testing.assert_array_equal(our, their[0])
    three[2]._connections.lost(1)
    assert "not running" in load(three[2].reader(held, form, weights), loads[:1]).why


# Reads that run beside the failed one end after orbax has closed its event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_torn_copy_elsewhere(
    checkpoint: Checkpoint, three: list[Peers], tmp_path: pathlib.Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.path, copy)
    torn = Checkpoint.open(copy)
    shutil.rmtree(copy / "experts" / "1")
    three[1].answer(HeldWeights(torn, "float32").find)
    weights = PeerWeights(checkpoint.config, checkpoint.formats, three[2], [1])
    assert len(jax.tree.leaves(nnx.state(weights.trunk("float32")))) > 10
    with pytest.raises(LookupError, match=rf"server beta cannot send experts .* {copy}.*damaged"):
        list(weights.experts(PAIRS, checkpoint.form("float32")))
