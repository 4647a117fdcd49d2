"""A service that loses servers: the rebalancer and the members are real, and so is what an engine's
process does with commands; engines have no weights, and time passes as the test says.
"""

from __future__ import annotations

import collections
import types
from typing import Any, cast

import msgspec
import numpy as np

from dance_jax.config import RebalanceOptions
from dance_jax.engine.staging import Staging
from dance_jax.launch.cluster.members import Members
from dance_jax.launch.control import protocol
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.launch.rebalance import controller
from dance_jax.launch.rebalance.controller import Rebalancer
from dance_jax.launch.worker.loading import Loaded
from dance_jax.launch.worker.main import Worker
from dance_jax.placement.core import Layout
from dance_jax.placement.migration import changed
from tests.launch.rebalance_bench import CONFIG, EXPERT_BYTES, LAYERS, Facts, Inline, K, stats

NAMES = ("alpha", "beta", "gamma")
SPEC = parse_hosts(
    "".join(f"{name} address=localhost experts=20 bandwidth=1Mbps\n" for name in NAMES)
)
RANKS = range(len(NAMES))
#: Of a pool whose experts have no arrays.
FORM: Any = types.SimpleNamespace(leaves={})
#: What an engine's process gets; all other messages are for its front end.
PASSED = (protocol.Stage, protocol.Commit, protocol.Drop, protocol.AskStats, protocol.Settle)


class EngineProcess:
    """One start of an engine: as much of an `Engine`, a `Loader` and a channel as a `Worker` needs.

    Args:
        layout: with which it starts.
        bench: whose messages it gets.
    """

    def __init__(self, rank: int, layout: Layout, bench: LossesBench) -> None:
        self.rank, self._bench = rank, bench
        self.staging = Staging(layout, rank, FORM)
        #: It is ready; the last batch that it has applied.
        self.runs, self.applied = False, 0
        #: Commands on the way here, and how many of them arrive now; batches that it loads.
        self.inbox: collections.deque[bytes] = collections.deque()
        self._arrived = 0
        self.loading: list[protocol.Stage] = []
        self._loaded: list[protocol.Stage] = []
        self.pulse = None
        self._worker = Worker(*cast(Any, (self, self, None, self)))

    def obey(self, commands: int, loads: int) -> None:
        """Handle so many commands, after so many batches are loaded."""
        self._arrived = min(commands, len(self.inbox))
        self._loaded, self.loading = self.loading[:loads], self.loading[loads:]
        self._worker._execute()

    @property
    def held(self) -> np.ndarray:
        """Experts in its slots, of staged batches as well, bool [layers, experts]."""
        layouts = [self.staging.layout, *(batch.layout for batch in self.staging._batches)]
        return np.any([layout.resident[self.rank] for layout in layouts], 0)

    # The channel.

    def waits(self, timeout_s: float = 0.0) -> bool:
        return self._arrived > 0

    def receive(self) -> protocol.Command:
        self._arrived -= 1
        return protocol.decode_command(self.inbox.popleft())

    def send(self, event: protocol.Event) -> None:
        self._bench.events.append((self, protocol.decode_event(protocol.encode(event))))

    # The loader.

    def begin(self, stage: protocol.Stage) -> None:
        self.loading.append(stage)

    def drop(self, number: int) -> None:
        self.loading = [stage for stage in self.loading if stage.number != number]
        self._loaded = [stage for stage in self._loaded if stage.number != number]

    def drop_all(self) -> None:
        self.loading, self._loaded = [], []

    def finished(self) -> list[Loaded]:
        found, self._loaded = self._loaded, []
        why = "the disk is gone" if self.rank in self._bench.broken else ""
        return [
            Loaded(stage, {}, 0.5, 0, why)
            if why and stage.loads
            else Loaded(
                stage,
                {(load.device, load.slot): () for load in stage.loads},
                0.5,
                len(stage.loads) * EXPERT_BYTES,
            )
            for stage in found
        ]

    # The engine.

    trace = None

    def stage(self, number: int, changes: Any, experts: Any) -> None:
        try:
            self.staging.add(number, changed(self.staging.latest, changes), experts)
        except ValueError as error:
            raise AssertionError(f"{NAMES[self.rank]} cannot do what it is told") from error

    def commit(self, number: int) -> bool:
        assert self.staging.ready == number, "the engine has no such batch"
        self.staging.take(number)
        self.applied = number
        return True

    def unstage(self, number: int) -> bool:
        return self.staging.drop(number)

    @property
    def staged(self) -> int:
        return self.staging.ready

    @property
    def layout(self) -> Layout:
        return self.staging.layout

    @property
    def last_batch(self) -> int:
        return self.staging.last

    def stats(self) -> Any:
        tokens = np.zeros((0, LAYERS, K), np.int16)
        return msgspec.structs.replace(
            stats(tokens), transfers=[[0] * len(NAMES)] * LAYERS, bytes_sent=[0] * len(NAMES)
        )


class LossesBench:
    """The launcher of a service of three servers, and their engines.

    Args:
        layout: at first.
    """

    def __init__(self, monkeypatch: Any, layout: Layout, **more: Any) -> None:
        self.now = 1000.0
        self.layout = layout
        self.engines: list[EngineProcess | None] = []
        self.events: list[tuple[EngineProcess, Any]] = []
        #: Servers whose engine is stopped, and those whose disk cannot be read.
        self.paused: set[int] = set()
        self.broken: set[int] = set()
        self.said: list[str] = []
        #: The latest news of the placement, the answers to users, and all batches to load.
        self.placed: protocol.Placed | None = None
        self.decided: list[protocol.Decided] = []
        self.staged: list[tuple[int, protocol.Stage]] = []
        self._heard = 0
        monkeypatch.setattr(controller, "Solver", Inline)
        self.members = Members(NAMES, self, lambda: self.now)
        self._options = RebalanceOptions(interval_s=0.0, policy="dance", **more)
        self.rebalancer = self._rebalancer()
        self.engines += [EngineProcess(rank, layout, self) for rank in RANKS]
        for engine in self.engines:
            assert engine is not None
            engine.runs = True
        self.turn()

    def _rebalancer(self) -> Rebalancer:
        return Rebalancer(self._options, SPEC, Facts(), CONFIG, self, clock=lambda: self.now)

    # What happens.

    def take_over(self) -> None:
        """The launcher is lost, and another one takes over the servers that run."""
        present = self.present
        self.members, self.events = Members(NAMES, self, lambda: self.now), []
        if self.placed is not None:
            self.layout = Layout.from_bytes(self.placed.layout)
        self.rebalancer = self._rebalancer()
        if self.placed is not None:
            self.rebalancer.resume(self.placed)
        engines = [each for each in self.engines if each is not None and each.rank in present]
        settle = protocol.Settle(max(engine.applied for engine in engines))
        for rank in {*RANKS} - present:
            self.engines[rank] = None
            self.paused.discard(rank)
            self.members.front_died(rank, "ended meanwhile")
        for engine in engines:
            self.members.await_call(engine.rank)
            self.tell(engine.rank, settle)
        while self.present < present:
            for engine in engines:
                engine.obey(100, 0)
            events, self.events = self.events, []
            for engine, event in events:
                if isinstance(event, protocol.Holds):
                    layout = Layout.from_bytes(event.layout)
                    self.rebalancer.holds(engine.rank, layout, event.number)
                    self.members.ready(engine.rank)
        self.turn()

    def kill_engine(self, rank: int) -> None:
        self.engines[rank] = None
        self.paused.discard(rank)
        self.members.engine_died(rank, "its engine ended")
        self.turn()

    def kill_front(self, rank: int) -> None:
        self.engines[rank] = None
        self.paused.discard(rank)
        self.members.front_died(rank, "ended")
        self.turn()

    def pause(self, rank: int) -> None:
        self.paused.add(rank)
        self.members.engine_silent(rank, True)
        self.turn()

    def resume(self, rank: int) -> None:
        self.paused.discard(rank)
        self.members.engine_silent(rank, False)
        self.turn()

    def ready(self, rank: int) -> None:
        """The engine that was started is ready."""
        engine = self.engines[rank]
        assert engine is not None
        engine.runs = True
        self.members.ready(rank)
        self.turn()

    def obey(self, rank: int, commands: int = 1, loads: int = 1) -> None:
        engine = self.engines[rank]
        if engine is not None and engine.runs and rank not in self.paused:
            engine.obey(commands, loads)
        self.turn()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.turn()

    def turn(self) -> None:
        """One turn of the launcher's loop."""
        events, self.events = self.events, []
        for engine, event in events:
            if engine is self.engines[engine.rank]:
                self.rebalancer.receive(engine.rank, event)
        for rank in self.starting:  # front ends call back at once
            self.members.called(rank)
        self.members.tick(fronts=True)
        self.rebalancer.tick()

    def settle(self) -> None:
        """Let all that run do what they are told, until nothing is left to do."""
        for _ in range(1000):
            before = len(self.staged)
            for rank in RANKS:
                self.obey(rank, commands=100, loads=100)
            busy = [
                each
                for each in self.engines
                if each is not None and each.runs and each.rank not in self.paused
                if each.inbox or each.loading
            ]
            if not (busy or self.events or len(self.staged) > before):
                break
        else:
            raise AssertionError("the rebalancer does not come to an end")

    def all_back(self) -> None:
        """Bring all servers back, and let them do what they are told."""
        self.broken.clear()
        for rank in sorted(self.paused):
            self.resume(rank)
        while len(self.present) < len(NAMES):
            self.wait(6.0)
            for rank, engine in enumerate(self.engines):
                if engine is not None and not engine.runs:
                    self.ready(rank)
        for _ in range(3):  # what failed is tried again
            self.settle()
            self.wait(6.0)
        self.settle()

    # What the rebalancer and the members ask for.

    @property
    def present(self) -> frozenset[int]:
        return self.members.present

    @property
    def epoch(self) -> int:
        return self.members.epoch

    @property
    def gone(self) -> frozenset[int]:
        return self.members.gone

    def tell(self, rank: int, command: Any) -> None:
        encoded = protocol.encode(command)
        match protocol.decode_front_command(encoded):
            case protocol.Placed() as placed:
                self.placed = placed
            case protocol.Decided() as decided:
                self.decided.append(decided)
            case command:
                assert isinstance(command, PASSED)
                self._pass(rank, command, encoded)

    def _pass(self, rank: int, command: Any, encoded: bytes) -> None:
        engine = self.engines[rank]
        if engine is None:
            return
        assert engine.runs, f"{command} is sent to an engine that has not joined"
        engine.inbox.append(encoded)
        if isinstance(command, protocol.Stage):
            self.staged.append((rank, command))
            for load in command.loads:
                assert not engine.held[load.layer, load.expert]
                if load.holder >= 0:
                    holder = self.engines[load.holder]
                    assert holder is not None and holder.held[load.layer, load.expert]

    def tell_all(self, command: Any) -> None:
        for rank in RANKS:
            self.tell(rank, command)

    def restart(self, rank: int, why: str) -> None:
        self.said.append(f"{NAMES[rank]} restarts: {why}")
        self.engines[rank] = None
        self.members.engine_died(rank, why)

    def notice(self, name: str, text: str) -> None:
        self.said.append(f"{name}: {text}" if name else text)

    def start_engine(self, rank: int, number: int) -> None:
        self.rebalancer.starts(rank)
        self.engines[rank] = EngineProcess(rank, self.layout, self)

    def start_front(self, rank: int, number: int) -> bool:
        self.start_engine(rank, number)
        return True

    def end_front(self, rank: int) -> None:
        raise AssertionError("a front end does not call back")

    def left(self, rank: int) -> None:
        self.rebalancer.engines_died([rank])

    def came(self, rank: int) -> None:
        self.rebalancer.came(rank)

    def heard(self, rank: int) -> int:
        self._heard += 1
        return self._heard

    # What a test looks at.

    @property
    def held(self) -> np.ndarray:
        """Experts that a server present has, bool [layers, experts]."""
        held = np.zeros(self.layout.resident.shape[1:], bool)
        for rank in self.present:
            engine = self.engines[rank]
            assert engine is not None
            held |= engine.held
        return held

    @property
    def starting(self) -> list[int]:
        """Ranks of the engines that are not ready yet."""
        return [each.rank for each in self.engines if each is not None and not each.runs]

    @property
    def views(self) -> list[Layout]:
        """The layout that each engine has in force."""
        return [engine.staging.layout for engine in self.engines if engine is not None]
