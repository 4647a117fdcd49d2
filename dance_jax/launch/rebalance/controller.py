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
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from dance_jax.config import ClusterSpec, EngineConfig, RebalanceOptions
from dance_jax.launch.control import protocol
from dance_jax.launch.control.protocol import Decision
from dance_jax.launch.planning.costs import running_cost
from dance_jax.launch.planning.loss import READ_RATE, READ_S, most_urgent_loads
from dance_jax.launch.planning.plan import ModelFacts
from dance_jax.launch.rebalance.batches import Migration, Purpose
from dance_jax.launch.rebalance.decision import Answer, DecisionInputs, most_loads
from dance_jax.launch.rebalance.solver import Solver, SolverError
from dance_jax.launch.rebalance.state import ServiceState
from dance_jax.launch.rebalance.workload import Statistics, Workload
from dance_jax.launch.worker.loading import rest_s
from dance_jax.memory import format_bytes
from dance_jax.placement.core import Layout, Placement
from dance_jax.placement.migration import difference
from dance_jax.placement.recovery import recovery, restoration, uncovered

#: Most requests for decisions that may wait.
MOST_WAITING = 16
#: Weight of the latest batch in a server's mean loading rate.
_RATE_WEIGHT = 0.3
#: Seconds after which a batch that some server has not loaded is dropped.
LOAD_TIMEOUT_S = 300.0
#: Seconds for servers to apply a loaded batch; later servers are not waited for.
COMMIT_TIMEOUT_S = 10.0
#: Seconds until a recovery that failed is tried again.
RECOVERY_RETRY_S = 5.0
#: Seconds for engines to report their statistics, or that a batch is dropped.
ANSWER_TIMEOUT_S = 30.0


class ServiceAccess(Protocol):
    """What the rebalancer uses of the service: front ends, messages and the layout."""

    #: The layout that is applied on all servers; the rebalancer replaces it as experts move.
    layout: Layout

    @property
    def present(self) -> frozenset[int]:
        """Ranks of the servers that run."""
        ...

    @property
    def gone(self) -> frozenset[int]:
        """Ranks of the servers that are gone with their front ends."""
        ...

    #: Each server steps on its own, so the others go on when one is lost.
    calls: bool

    def tell(self, rank: int, command: protocol.FrontCommand) -> None: ...

    def tell_all(self, command: protocol.FrontCommand) -> None: ...

    def restart(self, rank: int, why: str) -> None:
        """Restart a server's engine."""
        ...

    def notice(self, name: str, text: str) -> None: ...


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A pending decision: requested by a user of server `rank`, or scheduled (`rank` is None)."""

    rank: int | None
    id: int
    force: bool
    dry_run: bool
    #: Requested placement; None: the policy decides.
    placement: Placement | None = None


class _Phase(enum.Enum):
    """Phase of a decision or migration; says what the rebalancer waits for."""

    NOTHING = enum.auto()
    #: All engines report their statistics.
    ASKING = enum.auto()
    #: The solver process computes a placement.
    SOLVING = enum.auto()
    #: All engines load a batch.
    LOADING = enum.auto()
    #: All engines apply the batch.
    COMMITTING = enum.auto()
    #: All engines drop the batch, because one has not loaded it.
    DROPPING = enum.auto()


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
        if len(spec.servers) == 1:  # nothing can move
            options = dataclasses.replace(options, interval_s=0.0)
        self._options, self._spec, self._model, self._config = options, spec, model, config
        self._service, self._clock = service, clock
        self._version = 1
        self._decision: Decision | None = None
        self._migrations = self._failures = self._migrated = 0
        shape = service.layout.device_of.shape
        self._workload = Workload(
            (shape[0], shape[1], shape[2]),
            model.config.top_k,
            sum(spec.devices),
            options.half_life_s,
            before,
            clock(),
        )
        self._solver = Solver()
        self._phase = _Phase.NOTHING
        #: Servers still to answer in this phase, and its deadline.
        self._missing: set[int] = set()
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
        self._migration: Migration | None = None
        #: Number of the latest batch.
        self._number = 0
        #: Names of the servers that have not loaded it, and why.
        self._failed = "", ""
        #: Bytes per second that each server loads; nan: no load so far.
        self._rates = np.full(shape[0], np.nan)
        self._draining = False
        #: Servers that take part in the current batch.
        self._parties: frozenset[int] = frozenset()
        #: By rank, the layout of an engine that was started, or of a server that was lost; and of
        #: those that are back, until they are told what has changed since.
        self._given: dict[int, Layout] = {}
        self._behind: dict[int, Layout] = {}
        #: By rank, number of the batch that tells them, and the layout after it.
        self._following: dict[int, tuple[int, Layout]] = {}
        #: When the servers that are left load the experts of lost ones; inf: nothing to load.
        self._recovery_due = float("inf")
        #: The layout before experts of lost servers were loaded.
        self._before: Layout | None = None
        #: Why requests cannot be answered: experts that no server has; "": they can.
        self._short = ""

    # Called by the service.

    @property
    def settled(self) -> bool:
        """Whether a drained service may end, as far as migrations are concerned."""
        return self._phase is _Phase.NOTHING

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
        absent = len(self._service.present) < len(self._spec.servers)
        if self._phase is _Phase.NOTHING:
            while self._behind:
                self._catch_up(*self._behind.popitem())
            if self._clock() >= self._recovery_due and self._service.present:
                self._recover()
            elif absent:
                while self._waiting:
                    names = ", ".join(self._absent())
                    self._refuse(self._waiting.popleft(), f"{names} does not run")
            elif self._draining:
                pass
            elif self._before is not None:
                self._restore(self._before)
            elif self._waiting:
                self._ask(self._waiting.popleft())
            elif self._options.interval_s and self._clock() >= self._due:
                self._ask(_Wanted(None, 0, force=False, dry_run=False))
        elif self._answer is not None and self._answer.done():
            self._decide(self._answer)
        elif self._clock() >= self._deadline:
            self._give_up()

    def receive(self, rank: int, event: protocol.Event) -> None:
        """Handle an event of an engine."""
        match event:
            case protocol.Staged(number) if self._follows(rank, number):
                self._service.tell(rank, protocol.Commit(number))
            case protocol.Applied(number) if self._follows(rank, number):
                _, reached = self._following.pop(rank)
                if reached is not self._service.layout:
                    self._behind[rank] = reached
            case protocol.Stats(stats) if self._phase is _Phase.ASKING:
                self._stats[rank] = bytes(stats)
                if self._answered(_Phase.ASKING, rank):
                    self._solve()
            case protocol.Staged(number, seconds, size) if number == self._number:
                if size and seconds > 0:
                    rate, known = size / seconds, self._rates[rank]
                    news = rate if np.isnan(known) else known + _RATE_WEIGHT * (rate - known)
                    self._rates[rank] = news
                if self._answered(_Phase.LOADING, rank):
                    self._enter(_Phase.COMMITTING, COMMIT_TIMEOUT_S)
                    self._tell_parties(protocol.Commit(number))
            case protocol.StageFailed(number, why):
                if self._phase is _Phase.LOADING and number == self._number:
                    self._drop(self._spec.names[rank], why)
                elif self._follows(rank, number):  # the other servers have applied the changes
                    self._service.restart(rank, f"it cannot follow the placement: {why}")
            case protocol.Applied(number) if number == self._number:
                if self._answered(_Phase.COMMITTING, rank):
                    self._continue()
            case protocol.Dropped(number) if number == self._number:
                if self._answered(_Phase.DROPPING, rank):
                    self._cancel()

    def _enter(self, phase: _Phase, seconds: float) -> None:
        """Enter a phase that ends when all parties have answered, or after `seconds`."""
        self._phase, self._missing = phase, set(self._parties)
        self._deadline = self._clock() + seconds

    def _answered(self, phase: _Phase, rank: int) -> bool:
        """Record a server's answer; returns whether all have answered."""
        if self._phase is not phase or rank not in self._missing:
            return False
        self._missing.discard(rank)
        return not self._missing

    def _give_up(self) -> None:
        """Handle a phase whose deadline has passed."""
        names = ", ".join(self._spec.names[rank] for rank in sorted(self._missing))
        match self._phase:
            case _Phase.ASKING:
                self._skip(f"no statistics from {names} within {ANSWER_TIMEOUT_S:g} s")
            case _Phase.LOADING:
                self._drop(names, f"experts were not loaded within {LOAD_TIMEOUT_S:g} s")
            case _Phase.COMMITTING:
                # Late servers answer calls with "not here" until they apply the batch too.
                self._continue()
            case _Phase.DROPPING:
                self._deadline = self._clock() + ANSWER_TIMEOUT_S
                self._tell_parties(protocol.Drop(self._number))

    def engines_died(self, ranks: Iterable[int]) -> None:
        """Handle dead engines: the applied layout stays, and new engines start with it."""
        if self._migration is not None:
            self._service.notice("", "the migration stops because an engine restarts")
            if self._phase is _Phase.COMMITTING:  # the surviving engines apply the batch
                self._service.layout = self._migration.commit(self._service.layout)
            else:
                self._tell_parties(protocol.Drop(self._number))
            self._stop_moving(why="an engine died")
            self._publish()
        elif self._phase is not _Phase.NOTHING:
            # Decide again, from the statistics of the next engines.
            self._waiting.appendleft(self._current)
        self._phase, self._answer = _Phase.NOTHING, None
        self._candidate = None
        self._workload.engines_died(ranks, self._clock())
        for rank in ranks:
            self._given[rank] = self._service.layout
            self._behind.pop(rank, None)
            self._following.pop(rank, None)
        if self._service.calls:
            self._recovery_due = self._clock()
        if self._draining:  # no engine is left to report statistics
            self._save()

    def starts(self, rank: int) -> None:
        """An engine is started with the present layout."""
        self._given[rank] = self._service.layout

    def came(self, rank: int) -> None:
        """A lost server is back, with the experts that the layout says."""
        self._behind[rank] = self._given[rank]
        if self._uncovered().any():  # the server may have room for experts of others
            self._recovery_due = self._clock()
        else:
            self._recovery_due, self._short = float("inf"), ""
        self._publish()

    def drain(self, engines_run: bool) -> None:
        """Start no more migrations, and save the state.

        Args:
            engines_run: no engine is dead or restarting, so all can report their statistics.
        """
        self._draining = True
        while self._waiting:
            self._refuse(self._waiting.popleft())
        if self._phase is _Phase.SOLVING:
            self._refuse(self._current)
        if self._phase in (_Phase.NOTHING, _Phase.SOLVING):
            self._phase, self._answer = _Phase.NOTHING, None
            if self._options.state_dir is not None and engines_run:
                self._ask(_Wanted(None, 0, force=False, dry_run=True))

    def close(self) -> None:
        """Stop the solver process; may be called twice."""
        self._solver.close()

    # Decisions.

    def _ask(self, wanted: _Wanted) -> None:
        self._current = wanted
        self._parties = self._service.present
        self._enter(_Phase.ASKING, ANSWER_TIMEOUT_S)
        self._stats.clear()
        self._service.tell_all(protocol.AskStats())

    def _skip(self, why: str) -> None:
        """Give up the current decision."""
        self._phase = _Phase.NOTHING
        self._service.notice("", f"rebalancing skipped: {why}")
        self._refuse(self._current, why)
        if self._current.rank is None:
            self._schedule(None)

    def _read_rates(self) -> np.ndarray:
        """Bytes per second that each server loads, float [servers]."""
        size = self._model.expert_bytes(self._config.dtype)
        read_s = READ_S + size / READ_RATE
        return np.where(np.isnan(self._rates), size / (read_s + rest_s(read_s)), self._rates)

    def _solve(self) -> None:
        """Ask the solver, once all engines have reported their statistics.

        Nothing is asked if the service is shutting down, or if there is nothing to decide.
        """
        now = self._clock()
        self._workload.update(self._stats, now)
        if self._draining:
            self._phase = _Phase.NOTHING
            self._refuse(self._current)
            self._save()
            return
        self._nothing_to_decide = self._nothing_to_decide and self._workload.idle
        if self._nothing_to_decide and self._current.rank is None:
            self._phase = _Phase.NOTHING
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
            expert_bytes=self._model.expert_bytes(self._config.dtype),
            read_rates=self._read_rates(),
            force=self._current.force,
            wanted=self._current.placement,
            patient=self._patient(now),
            candidate=self._candidate,
            seed=self._config.seed,
        )
        self._answer, self._phase = self._solver.ask(question), _Phase.SOLVING
        self._deadline = float("inf")

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
        self._answer, self._phase = None, _Phase.NOTHING
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
            self._migration = Migration(batches, self._service.present)
            self._load(self._migration)
        self._publish()

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
        return dataclasses.replace(base, **(vars(found) | {"migrate": migrate}), gain=found.gain)

    def _refuse(self, wanted: _Wanted, why: str = "the service is shutting down") -> None:
        if wanted.rank is not None:
            self._service.tell(wanted.rank, protocol.Decided(wanted.id, None, why))

    # Lost servers.

    def _absent(self) -> list[str]:
        """Names of the servers that do not run."""
        present = self._service.present
        return [name for rank, name in enumerate(self._spec.names) if rank not in present]

    def _catch_up(self, rank: int, layout: Layout) -> None:
        """Tell a server that is back what has changed on the others."""
        if changes := difference(layout, self._service.layout):
            self._number += 1
            self._following[rank] = self._number, self._service.layout
            self._service.tell(rank, protocol.Stage(self._number, [*changes], []))

    def _follows(self, rank: int, number: int) -> bool:
        """Whether a batch tells a server that is back what has changed."""
        return rank in self._following and self._following[rank][0] == number

    def _uncovered(self) -> np.ndarray:
        """Experts that no server has that runs, bool [layers, experts]."""
        return uncovered(self._service.layout, self._service.present)

    def _recover(self) -> None:
        """Have the servers that are left load the experts that only lost ones have."""
        self._recovery_due = float("inf")
        missing = int(self._uncovered().sum())
        if not missing:
            self._short = ""
            self._publish()
            return
        counts = self._workload.statistics(self._clock()).counts
        size = self._model.expert_bytes(self._config.dtype)
        most = most_urgent_loads(size)
        batches = recovery(self._service.layout, self._service.present, counts, most)
        loads = [change for batch in batches for change in batch.loads()]
        if batches and self._before is None:
            self._before = self._service.layout
        short = missing - len(loads)
        self._short = ""
        if short and self._service.gone:
            self._short = (
                f"no server has {short} of the model's experts while {', '.join(self._absent())} "
                f"is gone, and the others lack {format_bytes(short * size)} of memory to load them"
            )
            self._service.notice("", self._short)
        if batches:
            self._migration = Migration(batches, self._service.present, Purpose.RECOVER)
            self._load(self._migration)
        self._publish()

    def _restore(self, before: Layout) -> None:
        """Go back to the placement before the loss; all servers run again."""
        self._before = None
        most = most_loads(self._model.expert_bytes(self._config.dtype))
        if batches := restoration(self._service.layout, before, most):
            self._migration = Migration(batches, self._service.present, Purpose.RESTORE)
            self._load(self._migration)

    # Migrations.

    def _load(self, moving: Migration) -> None:
        self._number += 1
        self._parties = self._service.present - self._behind.keys() - self._following.keys()
        self._enter(_Phase.LOADING, LOAD_TIMEOUT_S)
        for rank, stage in enumerate(moving.stages(self._number, self._service.layout)):
            if rank in self._parties:
                self._service.tell(rank, stage)

    def _continue(self) -> None:
        """Continue after a batch: it is applied on all servers, or its deadline has passed."""
        moving = self._migration
        assert moving is not None
        self._service.layout = moving.commit(self._service.layout)
        if moving.complete and moving.purpose is Purpose.RECOVER:
            self._stop_moving()
            self._service.notice("", f"{moving.moved} experts of lost servers are loaded")
        elif moving.complete and moving.purpose is Purpose.RESTORE:
            self._stop_moving()
        elif moving.complete:
            self._migrations += 1
            self._workload.migrated(self._clock())
            self._stop_moving()
            text = (
                f"migration complete: {moving.moved} experts loaded, placement version "
                f"{self._version}"
            )
            self._service.notice("", text)
        elif self._draining and moving.purpose is not Purpose.RECOVER:
            self._stop_moving(why="the service is shutting down")
        else:
            self._load(moving)
        self._publish()

    def _drop(self, name: str, why: str) -> None:
        """Drop the batch on all servers; each must confirm that it will not apply it."""
        self._failed = name, why
        self._enter(_Phase.DROPPING, ANSWER_TIMEOUT_S)
        self._tell_parties(protocol.Drop(self._number))

    def _tell_parties(self, command: protocol.FrontCommand) -> None:
        """Tell the servers that take part in the current batch."""
        for rank in self._parties:
            self._service.tell(rank, command)

    def _cancel(self) -> None:
        """End the migration because no server applies the batch any more."""
        name, why = self._failed
        self._failures += 1
        if self._migration is not None and self._migration.purpose is Purpose.RECOVER:
            self._recovery_due = self._clock() + RECOVERY_RETRY_S
        self._stop_moving(why=f"server {name}: {why}")
        self._service.notice(name, f"migration cancelled, experts stay where they are: {why}")
        self._publish()

    def _stop_moving(self, why: str = "") -> None:
        """End the migration, complete or at the last applied batch."""
        assert self._migration is not None
        self._version += self._migration.begun
        self._migrated += self._migration.moved
        self._migration, self._phase = None, _Phase.NOTHING
        self._nothing_to_decide = False  # that decision was about the previous placement
        self._schedule(None)
        if why and self._decision is not None:
            self._decision = dataclasses.replace(self._decision, failure=why)
        self._save()

    def _publish(self) -> None:
        self._service.tell_all(
            protocol.Placed(
                version=self._version,
                layout=self._service.layout.to_bytes(),
                last_decision=self._decision,
                migrations=self._migrations,
                failures=self._failures,
                experts_migrated=self._migrated,
                absent=sorted({*range(len(self._spec.servers))} - self._service.present),
                short=self._short,
            )
        )

    def _save(self) -> None:
        if self._options.state_dir is None:
            return
        statistics = self._workload.statistics(self._clock())
        state = ServiceState(
            self._spec.names, self._model.fingerprint, self._service.layout, statistics
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
