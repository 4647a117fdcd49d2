"""The rebalancer of a service, between made-up front ends and engines."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
from typing import Any

import msgspec
import numpy as np

from dance_jax.config import EngineConfig, RebalanceOptions, UserError
from dance_jax.engine.report import STEP_SIZES, EngineStats
from dance_jax.launch.control import protocol
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.launch.rebalance import controller as rebalancer
from dance_jax.launch.rebalance.controller import Rebalancer
from dance_jax.launch.rebalance.decision import (
    Answer,
    DecisionInputs,
    answer,
    resident,
)
from dance_jax.launch.rebalance.solver import SolverError
from dance_jax.models import model_config
from dance_jax.placement.core import Layout, Placement
from dance_jax.placement.devices import spread
from dance_jax.placement.migration import SlotChange, changed
from tests.tiny_models import SERVED

SPEC = parse_hosts(
    "alpha address=localhost experts=20 bandwidth=1Mbps\n"
    "beta address=localhost experts=20 bandwidth=1Mbps"
)
MODEL = model_config(SERVED)
CONFIG = EngineConfig(max_model_len=64)
LAYERS, EXPERTS, K = 2, 16, 4
EXPERT_BYTES = 3 * 32 * 16 * 4
INTERVAL_S = 300.0


class Facts:
    """A checkpoint as planning sees it."""

    config = MODEL
    source = fingerprint = "f" * 64

    def expert_bytes(self, dtype: str) -> int:
        return EXPERT_BYTES

    def trunk_bytes(self, dtype: str) -> int:
        return 1

    def expert_formats(self, dtype: str) -> str:
        return "float32 (32 bits a weight)"

    trunk_formats = expert_formats


def halves(first: range) -> Layout:
    """Alpha holds these experts of every layer, beta the others; both have spare slots."""
    held = np.zeros((2, LAYERS, EXPERTS), bool)
    held[0, :, first] = True
    held[1] = ~held[0]
    return spread(Placement(held), [1, 1], [20, 20])


def routes(experts: range, tokens: int = 400, seed: int = 0) -> np.ndarray:
    """Routes of tokens that choose K of these experts in every layer."""
    rng = np.random.default_rng(seed)
    chosen = rng.permuted(np.tile(np.array(experts), (tokens * LAYERS, 1)), axis=1)[:, :K]
    return chosen.reshape(tokens, LAYERS, K).astype(np.int16)


def tastes(seed: int, tokens: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Routes of alpha's users and of beta's: both use all experts, some of them a little more."""

    def chosen(server: int) -> np.ndarray:
        taste = np.random.default_rng([0, server]).gumbel(size=(LAYERS, EXPERTS))
        mood = np.random.default_rng([seed, server, 0]).gumbel(size=(tokens, LAYERS, EXPERTS))
        return np.argsort(-(taste / 2 + mood))[:, :, :K].astype(np.int16)

    return chosen(0), chosen(1)


def stats(tokens: np.ndarray, more: int = 1) -> EngineStats:
    """Statistics of an engine that computed these tokens `more` times; it sampled the latest."""
    counts = [np.bincount(tokens[:, layer].ravel(), minlength=EXPERTS) for layer in range(LAYERS)]
    return EngineStats(
        counts=(more * np.array(counts)).tolist(),
        transfers=[[0, 0]] * LAYERS,
        bytes_sent=[0, 0],
        tokens=more * len(tokens),
        steps=1,
        routes=tokens[-400:].tobytes(),
        top_k=K,
        pool_bytes=[0],
        step_rows=[(0, 0), (1, 2), *[(0, 0)] * (STEP_SIZES - 2)],
    )


#: What users of alpha and of beta ask for. The experts are at home if LOW is on alpha.
LOW, HIGH = range(8), range(8, 16)
AT_HOME = (routes(LOW), routes(HIGH))


class Inline:
    """Stands in for the solver process and answers at once."""

    def __init__(self) -> None:
        self.asked: list[DecisionInputs] = []

    def ask(self, question: DecisionInputs) -> concurrent.futures.Future[Answer]:
        self.asked.append(question)
        future: concurrent.futures.Future[Answer] = concurrent.futures.Future()
        try:
            future.set_result(answer(question))
        except UserError as error:
            future.set_exception(SolverError(str(error)))
        return future

    def close(self) -> None:
        pass


class Bench:
    """A rebalancer between front ends and engines that do as they are told.

    Args:
        directory: for the state; None to keep no state.
        fails: number of the batch that beta cannot load.
        more: options.
    """

    def __init__(
        self, monkeypatch: Any, directory: pathlib.Path | None = None, fails: int = 0, **more: Any
    ) -> None:
        self.now, self.fails = 1000.0, fails
        #: The layout at first, with the experts at the wrong servers, and the present one.
        self.first = self.layout = halves(HIGH)
        #: Messages to each front end, and to users of the launch.
        self.told: list[list[Any]] = [[], []]
        self.said: list[str] = []
        self.tokens: tuple[np.ndarray, ...] = AT_HOME
        self.more = 1000
        #: Servers that do not run.
        self.absent: frozenset[int] = frozenset()
        #: The layout that each engine has in force, and the batches that each engine has staged.
        self.in_force = [self.layout, self.layout]
        self.staged: list[set[int]] = [set(), set()]
        self.layouts: dict[int, Layout] = {}
        #: Messages to front ends in the last run.
        self.history: list[list[Any]] = [[], []]
        self.solver = Inline()
        monkeypatch.setattr(rebalancer, "Solver", lambda: self.solver)
        options = RebalanceOptions(
            interval_s=INTERVAL_S,
            policy="dance",
            half_life_s=None,
            state_dir=None if directory is None else str(directory),
        )
        self.options = dataclasses.replace(options, **more)
        self.rebalancer = Rebalancer(
            self.options, SPEC, Facts(), CONFIG, self, clock=lambda: self.now
        )
        self.rebalancer.tick()  # now all engines run

    gone: frozenset[int] = frozenset()
    epoch = 1

    @property
    def present(self) -> frozenset[int]:
        return frozenset(range(len(SPEC.servers))) - self.absent

    def restart(self, rank: int, why: str) -> None:
        raise AssertionError(f"server {rank} is to restart: {why}")

    def tell(self, rank: int, command: Any) -> None:
        self.told[rank].append(protocol.decode_front_command(protocol.encode(command)))

    def tell_all(self, command: Any) -> None:
        for rank in range(2):
            self.tell(rank, command)

    def notice(self, name: str, text: str) -> None:
        self.said.append(f"{name}: {text}" if name else text)

    def run(self) -> None:
        """Runs until nothing is left to do."""
        done = [0, 0]
        self.rebalancer.tick()
        while any(done[rank] < len(self.told[rank]) for rank in range(2)):
            for rank in range(2):
                while done[rank] < len(self.told[rank]):
                    done[rank] += 1
                    self._obey(rank, self.told[rank][done[rank] - 1])
            self.rebalancer.tick()
        self.history, self.told = self.told, [[], []]

    def _obey(self, rank: int, command: Any) -> None:
        match command:
            case protocol.AskStats():
                found = msgspec.msgpack.encode(stats(self.tokens[rank], self.more))
                self._say(rank, protocol.Stats(msgspec.Raw(found)))
            case protocol.Stage(number, changes, loads):
                moved = changed(self.in_force[rank], map(SlotChange._make, changes))
                self._stage(rank, number, moved, loads)
            case protocol.Commit(number):
                assert all(number in staged for staged in self.staged)
                self.in_force[rank] = self.layouts[number]
                self._say(rank, protocol.Applied(number))
            case protocol.Drop(number):
                self.staged[rank].discard(number)
                self._say(rank, protocol.Dropped(number))

    def _stage(self, rank: int, number: int, layout: Layout, loads: list[Any]) -> None:
        before = self.in_force[rank]
        for load in loads:
            assert before.device_of[rank, load.layer, load.expert] < 0
            assert before.device_of[load.holder, load.layer, load.expert] >= 0
            assert load.holder != rank
        if rank == 1 and number == self.fails:
            self._say(rank, protocol.StageFailed(number, "the disk is gone"))
            return
        self.staged[rank].add(number)
        self._say(rank, protocol.Staged(number, 0.5, len(loads) * EXPERT_BYTES))
        self.layouts[number] = layout

    def _say(self, rank: int, event: protocol.Event) -> None:
        said = protocol.FromEngine(0, event)  # pyright: ignore[reportArgumentType]
        found = protocol.decode_front_event(protocol.encode(said))
        assert isinstance(found, protocol.FromEngine)
        self.rebalancer.receive(rank, found.event)

    def heard(self, kind: type, rank: int = 0) -> list[Any]:
        """Messages of one kind to a front end in the last run."""
        return [command for command in self.history[rank] if isinstance(command, kind)]


def local_share(layout: Layout) -> float:
    counts = np.array([stats(tokens).counts for tokens in AT_HOME])
    return resident(layout).local_share(counts)
