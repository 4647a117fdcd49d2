"""The rebalancer of a service (the paper's global scheduler).

It queries the engines, decides, and moves experts. The rebalancer runs no steps and never blocks:
it receives the engines' events, and `Rebalancer.tick` checks whether something is due. Placements
are computed in another process.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import enum
import itertools
import time
from collections.abc import Callable, Iterable

import numpy as np

from dance_jax.config import ClusterSpec, EngineConfig, RebalanceOptions, ServerSpec
from dance_jax.launch.control import protocol
from dance_jax.launch.control.protocol import Decision, PlacedServer
from dance_jax.launch.planning.costs import running_cost
from dance_jax.launch.planning.loss import load_seconds
from dance_jax.launch.planning.plan import ModelFacts
from dance_jax.launch.rebalance.batches import Migration, Phase, Purpose, Rollout, stages
from dance_jax.launch.rebalance.decision import Answer, DecisionInputs
from dance_jax.launch.rebalance.losses import Losses, ServiceAccess
from dance_jax.launch.rebalance.solver import Solver, SolverError
from dance_jax.launch.rebalance.state import ServiceState
from dance_jax.launch.rebalance.workload import Statistics, Workload
from dance_jax.launch.worker.loading import rest_s
from dance_jax.placement.core import Layout, Placement
from dance_jax.placement.migration import MoveBatch, changed, target

#: Most requests for decisions that may wait.
MOST_WAITING = 16
#: Weight of the latest batch in a server's mean loading rate.
_RATE_WEIGHT = 0.3
#: Seconds after a server has joined or left until the next decision.
JOINED_S = 10.0
#: Seconds for engines to report their statistics.
ANSWER_TIMEOUT_S = 30.0


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A pending decision: requested by a user of server `rank`, or scheduled (`rank` is None)."""

    rank: int | None
    id: int
    force: bool
    dry_run: bool
    #: Requested placement; None: the policy decides.
    placement: Placement | None = None


class _Doing(enum.Enum):
    """What the rebalancer does."""

    NOTHING = enum.auto()
    #: All engines report their statistics.
    ASKING = enum.auto()
    #: The solver process computes a placement.
    SOLVING = enum.auto()
    #: Experts move.
    MOVING = enum.auto()


class Rebalancer:
    """Decides where experts go, and moves them there.

    Args:
        options: when experts move, and by which policy.
        spec: the servers.
        model: the checkpoint.
        config: of all engines.
        service: to send commands and messages; holds the current layout.
        before: statistics of a previous service.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        options: RebalanceOptions,
        spec: ClusterSpec,
        model: ModelFacts,
        config: EngineConfig,
        service: ServiceAccess,
        before: Statistics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options, self._spec, self._model, self._config = options, spec, model, config
        self._service, self._clock = service, clock
        self._version = 1
        self._decision: Decision | None = None
        self._migrations = self._failures = self._migrated = 0
        self._expert_bytes = model.expert_bytes(config.dtype)
        shape = service.layout.device_of.shape
        self._workload = Workload(
            (shape[0], shape[1], shape[2]),
            model.config.top_k,
            sum(spec.devices[rank] for rank in spec.seated),
            options.half_life_s,
            before,
            clock(),
        )
        self._solver = Solver()
        #: Numbers of batches.
        self._numbers = itertools.count(1)
        #: Names of the servers by rank, "" for vacant seats.
        self._names = [*spec.names]
        self._losses = Losses(self._names, service, self._expert_bytes, self._numbers, clock)
        self._doing = _Doing.NOTHING
        #: When the servers that have not reported their statistics are given up.
        self._deadline = float("inf")
        #: When the next scheduled decision is due.
        self._due = float("inf")
        #: Placement to move to if it still pays off at the next scheduled decision.
        self._candidate: Placement | None = None
        #: When a move needs no further confirmation.
        self._patient_until = 0.0
        #: The latest scheduled decision moved nothing, and no tokens were computed since.
        self._nothing_to_decide = False
        self._waiting: collections.deque[_Wanted] = collections.deque()
        self._current = _Wanted(None, 0, False, False)
        self._stats: dict[int, bytes] = {}
        self._answer: concurrent.futures.Future[Answer] | None = None
        #: The experts that move, and their batch on its way.
        self._migration: Migration | None = None
        self._rollout: Rollout | None = None
        #: Bytes per second that each server loads, of those that have loaded something.
        self._rates: dict[int, float] = {}
        self._draining = False
        #: Front ends are to hear of a change, once the servers know what to load.
        self._news = False

    # Called by the service.

    @property
    def settled(self) -> bool:
        """Whether a drained service may end, as far as migrations are concerned."""
        return self._doing is _Doing.NOTHING

    def want(self, rank: int, wanted: protocol.RebalanceWanted) -> None:
        """Queue a user's request for a decision."""
        there = None
        if wanted.resident is not None:
            there = Placement.of_lists(wanted.resident, self._service.layout.device_of.shape[2])
        one = _Wanted(rank, wanted.id, wanted.force, wanted.dry_run, there)
        if self._draining:
            self._refuse(one)
        elif len(self._waiting) >= MOST_WAITING:
            self._refuse(one, f"{MOST_WAITING} other requests wait for a decision; try again later")
        else:
            self._waiting.append(one)

    def tick(self) -> None:
        """Do what is due; to be called often while all engines run."""
        if self._due == float("inf"):
            self._workload.engines_began(self._clock())
            self._due = self._clock() + self._options.interval_s
        self._losses.tick()
        if self._doing is _Doing.ASKING:
            self._check_answers()
        if self._doing is _Doing.SOLVING and self._answer is not None and self._answer.done():
            self._decide(self._answer)
        if self._doing is _Doing.MOVING:
            self._go_on()
        if self._doing is _Doing.NOTHING:
            self._begin()
        if self._news:
            self._publish()

    def _begin(self) -> None:
        """Begin what is due next, if anything."""
        if batches := self._recovery():
            self._move(batches, Purpose.RECOVER)
        elif absent := self._losses.absent:
            while self._waiting:
                self._refuse(self._waiting.popleft(), f"{', '.join(absent)} does not run")
        elif self._draining or self._losses.current != self._service.present:
            pass
        elif batches := self._losses.restoration():
            self._move(batches, Purpose.RESTORE)
        elif self._waiting:
            self._ask(self._waiting.popleft())
        elif self._options.interval_s and self._clock() >= self._due and self._several:
            self._ask(_Wanted(None, 0, force=False, dry_run=False))

    def receive(self, rank: int, event: protocol.Event) -> None:
        """Handle an event of an engine."""
        match event:
            case protocol.Stats(stats) if self._doing is _Doing.ASKING:
                self._stats[rank] = bytes(stats)
            case protocol.Staged(_, seconds, size) if size and seconds > 0:
                known = self._rates.get(rank, size / seconds)
                self._rates[rank] = known + _RATE_WEIGHT * (size / seconds - known)
        if self._rollout is not None:
            self._rollout.receive(rank, event)
        self._losses.receive(rank, event)

    def engines_died(self, ranks: Iterable[int]) -> None:
        """Handle dead engines: the applied layout stays, and new engines start with it."""
        if self._rollout is not None:
            self._service.notice("", "the migration stops because an engine restarts")
            if self._rollout.abandon():
                self._applied(self._rollout)
            self._stop_moving(why="an engine died")
        elif self._doing is not _Doing.NOTHING and self._current.rank is not None:
            # Decide again, from the statistics of the next engines.
            self._waiting.appendleft(self._current)
        self._doing, self._answer = _Doing.NOTHING, None
        self._candidate = None
        self._workload.engines_died(ranks, self._clock())
        for rank in ranks:
            self._losses.lost(rank)
        self._news = True
        if self._draining:  # no engine is left to report statistics
            self._save()

    def starts(self, rank: int) -> None:
        """An engine is started with the present layout."""
        self._losses.started(rank)

    def came(self, rank: int) -> None:
        """A lost server is back, with the layout that it had or was started with."""
        self._losses.returned()
        self._news = True

    def resume(self, placed: protocol.Placed) -> None:
        """Go on where another launcher stopped."""
        self._version, self._decision = placed.version, placed.last_decision
        self._migrations, self._failures = placed.migrations, placed.failures
        self._migrated = placed.experts_migrated
        if placed.home:
            self._losses.home = Layout.from_bytes(placed.home)

    def holds(self, rank: int, layout: Layout, number: int) -> None:
        """Take in what a server knows that another launcher started, or that was silent for long.

        Its own experts are where it says; another launcher may have stopped half-way.

        Args:
            rank: of the server.
            layout: as the server knows it.
            number: of its last batch.
        """
        while next(self._numbers) < number:
            pass
        self._workload.goes_on(rank)
        self._losses.knows(rank, layout)
        in_force = self._service.layout
        if in_force.same_experts(layout, rank):
            return
        if self._doing is _Doing.MOVING:
            self._service.restart(rank, "it holds other experts than the launcher knows")
            return
        self._service.layout = in_force.with_server(rank, layout)
        if self._losses.home is in_force:
            self._losses.home = self._service.layout

    @property
    def idle(self) -> bool:
        """Nothing is decided or moved, and all servers that run have the layout in force."""
        return self._doing is _Doing.NOTHING and self._losses.current == self._service.present

    def leaves(self, rank: int) -> str:
        """A server is about to leave: the others load the experts that only it has.

        Returns:
            Why it cannot leave; "" if it can.
        """
        why = self.shortage_without(rank)
        if not why:
            self._losses.leaving |= {rank}
        return why

    def shortage_without(self, rank: int) -> str:
        """Why the other servers cannot hold all experts; "": they can."""
        calls_nle = self._workload.statistics(self._clock()).counts
        return self._losses.shortage_without(rank, calls_nle)

    @property
    def may_leave(self) -> bool:
        """Whether the servers that stay hold all experts."""
        return self._doing is _Doing.NOTHING and not self._losses.uncovered.any()

    def reseat(self, rank: int, server: ServerSpec, slots: int) -> None:
        """Put another server in the place of one that has left; only while `idle`.

        Args:
            rank: of both.
            server: `config.VACANT`: nobody takes the seat.
            slots: expert slots of each device of the server.
        """
        told = self._losses.current - {rank}
        layout = self._service.layout.reseated(rank, server.devices, slots)
        before = self._spec.servers[rank]
        devices = (each.devices * (not each.vacant) for each in (server, before))
        self._workload.reseated(rank, *devices)
        self._spec, self._names[rank] = self._spec.with_server(rank, server), server.name
        self._service.layout = layout
        self._losses.leaving -= {rank}
        self._losses.reseated(layout, told)
        self._rates.pop(rank, None)
        command = protocol.Reseat(next(self._numbers), rank, server, slots)
        for other in told:
            self._service.tell(other, command)
        self._due = min(self._due, self._clock() + JOINED_S)
        self._nothing_to_decide = False
        self._news = True

    @property
    def _several(self) -> bool:
        return len(self._spec.seated) > 1

    def drain(self, engines_run: bool) -> None:
        """Start no more migrations, and save the state.

        Args:
            engines_run: no engine is dead or restarting, so all can report their statistics.
        """
        self._draining = True
        while self._waiting:
            self._refuse(self._waiting.popleft())
        if self._doing is _Doing.SOLVING:
            self._refuse(self._current)
        if self._doing in (_Doing.NOTHING, _Doing.SOLVING):
            self._doing, self._answer = _Doing.NOTHING, None
            if self._options.state_dir is not None and engines_run:
                self._ask(_Wanted(None, 0, force=False, dry_run=True))

    def close(self) -> None:
        """Stop the solver process; may be called twice."""
        self._solver.close()

    # Decisions.

    def _ask(self, wanted: _Wanted) -> None:
        self._current, self._doing = wanted, _Doing.ASKING
        self._deadline = self._clock() + ANSWER_TIMEOUT_S
        self._stats.clear()
        self._service.tell_all(protocol.AskStats())

    def _check_answers(self) -> None:
        """Go on if all engines have reported their statistics, or if time is up."""
        late = [self._names[rank] for rank in self._spec.seated if rank not in self._stats]
        if not late:
            self._solve()
        elif self._clock() >= self._deadline:
            self._skip(f"no statistics from {', '.join(late)} within {ANSWER_TIMEOUT_S:g} s")

    def _skip(self, why: str) -> None:
        """Give up the current decision."""
        self._doing = _Doing.NOTHING
        self._service.notice("", f"rebalancing skipped: {why}")
        self._refuse(self._current, why)
        if self._current.rank is None:
            self._schedule(None)

    def _read_rates(self) -> np.ndarray:
        """Bytes per second that each server loads, float [servers]."""
        size = self._expert_bytes
        read_s = [load_seconds(server, size) for server in self._spec.servers]
        return np.array(
            [self._rates.get(rank, size / (s + rest_s(s))) for rank, s in enumerate(read_s)]
        )

    def _solve(self) -> None:
        """Ask the solver, once all engines have reported their statistics.

        Nothing is asked if the service is shutting down, or if there is nothing to decide.
        """
        now = self._clock()
        self._workload.update(self._stats, now)
        if self._draining:
            self._doing = _Doing.NOTHING
            self._refuse(self._current)
            self._save()
            return
        self._nothing_to_decide = self._nothing_to_decide and self._workload.idle
        if self._nothing_to_decide and self._current.rank is None:
            self._doing = _Doing.NOTHING
            self._schedule(None)
            return
        statistics, load = self._workload.statistics(now), self._workload.load(now)
        question = DecisionInputs(
            policy=self._options.policy,
            layout=self._service.layout,
            names=self._spec.names,
            counts=statistics.counts,
            routes=statistics.routes,
            cost=running_cost(
                self._spec, self._model.config, self._config, self._workload.measured, load
            ),
            busiest=load.busiest,
            tokens=self._workload.token_rates(now) * self._options.horizon_s,
            expert_bytes=self._expert_bytes,
            read_rates=self._read_rates(),
            force=self._current.force,
            wanted=self._current.placement,
            patient=self._patient(now),
            candidate=self._candidate,
            seed=self._config.seed,
        )
        self._answer, self._doing = self._solver.ask(question), _Doing.SOLVING

    def _patient(self, now: float) -> bool:
        """Whether a move must wait for a second decision that confirms it.

        While the workload shifts, a move at once would soon need another. So a scheduled decision
        is confirmed by a second one a half-life later, at most one interval later. Users' requests
        are not delayed; nor are scheduled decisions without a half-life, because old counts then
        never fade.
        """
        scheduled, fades = self._current.rank is None, self._options.half_life_s is not None
        return scheduled and fades and (self._candidate is None or now < self._patient_until)

    def _schedule(self, candidate: Placement | None) -> None:
        """Schedule the next decision, earlier if a candidate is to be confirmed."""
        now, interval_s = self._clock(), self._options.interval_s
        if candidate is None:
            self._due = now + interval_s
        else:
            if self._candidate is None:
                self._patient_until = now + interval_s
            self._due = min(now + (self._options.half_life_s or 0.0), self._patient_until)
        self._candidate = candidate

    def _decide(self, future: concurrent.futures.Future[Answer]) -> None:
        self._answer, self._doing = None, _Doing.NOTHING
        try:
            answer = future.result()
        except SolverError as error:
            decision, batches = self._no_move(f"computing a placement failed: {error}"), []
            candidate = None
        else:
            decision, batches = self._decided(answer), answer.batches
            candidate = answer.candidate
        self._decision = decision
        wanted = self._current
        if wanted.rank is None:  # users' requests do not postpone scheduled decisions
            self._schedule(candidate)
            self._nothing_to_decide = not decision.migrate and candidate is None
        else:
            self._service.tell(wanted.rank, protocol.Decided(wanted.id, decision))
        self._service.notice("", in_words(decision, self._options.horizon_s))
        if decision.migrate and not decision.dry_run:
            self._move(batches, Purpose.DECIDED)
        self._news = True

    def _no_move(self, reason: str, policy: str = "") -> Decision:
        """The current decision if nothing moves, for this reason."""
        return Decision(
            when=time.time(),
            policy=policy or self._options.policy,
            forced=self._current.force,
            dry_run=self._current.dry_run or self._options.dry_run,
            migrate=False,
            reason=reason,
        )

    def _decided(self, answer: Answer) -> Decision:
        found = answer.verdict
        if found is None:
            return self._no_move("no requests so far", answer.policy)
        # The placement fitted to all tokens may be the one in force: no batches, so nothing to do.
        migrate = found.migrate and bool(answer.batches)
        base = self._no_move(found.reason, answer.policy)
        result = vars(found) | {"migrate": migrate, "gain": found.gain}
        if migrate:
            result["servers"] = self._after(answer.batches)
        return dataclasses.replace(base, **result)

    def _after(self, batches: list[MoveBatch]) -> list[PlacedServer]:
        """The experts of all servers once these batches are applied."""
        held = Placement(target(self._service.layout, batches).resident).lists()
        return [
            PlacedServer(name, each) for name, each in zip(self._names, held, strict=True) if name
        ]

    def _refuse(self, wanted: _Wanted, why: str = "the service is shutting down") -> None:
        if wanted.rank is not None:
            self._service.tell(wanted.rank, protocol.Decided(wanted.id, None, why))

    # Migrations.

    def _recovery(self) -> list[MoveBatch]:
        short = self._losses.short
        found = self._losses.recovery(lambda: self._workload.statistics(self._clock()).counts)
        if self._losses.short != short:
            self._news = True
        return found

    def _move(self, batches: list[MoveBatch], purpose: Purpose) -> None:
        """Start a migration."""
        self._doing = _Doing.MOVING
        self._migration = Migration(batches, purpose, target(self._service.layout, batches))
        self._load(self._migration)
        self._news = True

    def _load(self, moving: Migration) -> None:
        """Have the servers load the next batch."""
        batch, service = moving.left[0], self._service
        urgent = moving.purpose is Purpose.RECOVER
        each = stages(next(self._numbers), batch, service.layout, service.present, urgent)
        self._rollout = Rollout(
            {rank: each[rank] for rank in self._losses.current},
            changed(service.layout, batch.changes),
            self._names,
            service.tell,
            self._clock,
        )

    def _go_on(self) -> None:
        """Go on with a migration once its batch is applied or dropped."""
        moving, rollout = self._migration, self._rollout
        assert moving is not None and rollout is not None
        rollout.tick()
        if rollout.phase is Phase.APPLIED:
            self._applied(rollout)
            if not moving.left:
                self._complete(moving)
            elif self._draining and moving.purpose is not Purpose.RECOVER:
                self._stop_moving(why="the service is shutting down")
            elif moving.purpose is Purpose.RECOVER and not self._losses.uncovered.any():
                self._complete(moving)  # the lost servers are back
            else:
                self._load(moving)
            self._news = True
        elif rollout.phase is Phase.DROPPED:
            self._cancel(moving, *rollout.failure)

    def _applied(self, rollout: Rollout) -> None:
        assert self._migration is not None
        self._service.layout = rollout.after
        self._losses.applied(rollout)
        self._migration.applied()
        if self._migration.purpose is Purpose.DECIDED:
            self._losses.home = rollout.after

    def _complete(self, moving: Migration) -> None:
        if moving.purpose is Purpose.DECIDED:
            self._migrations += 1
            self._workload.migrated(self._clock())
        self._stop_moving()
        if moving.purpose is Purpose.DECIDED:
            text = (
                f"migration complete: {moving.moved} experts loaded, placement version "
                f"{self._version}"
            )
            self._service.notice("", text)
        elif moving.purpose is Purpose.RECOVER:
            self._service.notice("", f"{moving.moved} experts of lost servers are loaded")

    def _cancel(self, moving: Migration, name: str, why: str) -> None:
        """End the migration because no server applies the batch any more."""
        self._failures += 1
        if moving.purpose is not Purpose.DECIDED:
            self._losses.failed()
        self._stop_moving(why=f"server {name}: {why}")
        self._service.notice(name, f"migration cancelled, experts stay where they are: {why}")
        self._news = True

    def _stop_moving(self, why: str = "") -> None:
        """End the migration, complete or at the last applied batch."""
        assert self._migration is not None
        self._version += self._migration.begun
        self._migrated += self._migration.moved
        self._migration = self._rollout = None
        self._doing = _Doing.NOTHING
        self._nothing_to_decide = False  # that decision was about the previous placement
        self._schedule(None)
        if why and self._decision is not None:
            self._decision = dataclasses.replace(self._decision, failure=why)
        self._save()

    def _publish(self) -> None:
        self._news = False
        home, moving = self._losses.home, self._migration
        self._service.tell_all(
            protocol.Placed(
                version=self._version,
                layout=self._service.layout.to_bytes(),
                last_decision=self._decision,
                migrations=self._migrations,
                failures=self._failures,
                experts_migrated=self._migrated,
                epoch=self._service.epoch,
                absent=sorted({*self._spec.seated} - self._service.present),
                short=self._losses.short,
                home=b"" if home is self._service.layout else home.to_bytes(),
                target=b"" if moving is None else moving.target.to_bytes(),
            )
        )

    def _save(self) -> None:
        if self._options.state_dir is None:
            return
        statistics = self._workload.statistics(self._clock())
        state = ServiceState(
            self._spec.names, self._model.fingerprint, self._losses.home, statistics
        )
        try:
            state.save(self._options.state_dir)
        except OSError as error:
            text = f"--state-dir {self._options.state_dir}: the placement cannot be saved: {error}"
            self._service.notice("", text)


def in_words(decision: Decision, horizon_s: float) -> str:
    """Describe a decision in one line."""
    what = f"placement by {decision.policy}: "
    if decision.gain is not None:
        what += (
            f"{decision.expected_seconds:.3g} s instead of {decision.present_seconds:.3g} s in "
            f"{horizon_s:g} s ({-decision.gain:+.1%}), {decision.experts_moved} experts to load in "
            f"{decision.migration_seconds:.2g} s: "
        )
    moves = "experts move" if decision.migrate else "nothing moves"
    if decision.migrate and decision.dry_run:
        moves = "experts would move (dry run)"
    return f"{what}{decision.reason}; {moves}"
