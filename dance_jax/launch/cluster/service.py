"""A cluster that serves: the parent of one front end per server, each with its own engine.

Servers that step on their own are lost and come back alone (`members`); meanwhile the others load
their experts. Engines that step together die together, so all of them restart, and a dead front end
ends the service. The rebalancer moves experts to where they are used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from dance_jax.config import (
    VACANT,
    ClusterSpec,
    EngineConfig,
    RebalanceOptions,
    ServeOptions,
    ServerSpec,
    UserError,
)
from dance_jax.launch.agent.adopted import AdoptedProcess, nobody
from dance_jax.launch.agent.child import END, STILL_THERE
from dance_jax.launch.agent.network import Network
from dance_jax.launch.agent.process import ServerProcess, in_words, is_consequence, remove_log
from dance_jax.launch.cluster.changes import Changes, Survey
from dance_jax.launch.cluster.fleet import CAUSE_WINDOW_S, Fleet
from dance_jax.launch.cluster.members import MAX_FAILED_STARTS, AllFailed, Members
from dance_jax.launch.cluster.succession import FILE_NAME, FRONT_END, Handover, Survivors
from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import bracketed, server_identity
from dance_jax.launch.planning.plan import rooms
from dance_jax.placement.core import Layout
from dance_jax.placement.visit import MAX_SERVERS

if TYPE_CHECKING:
    from dance_jax.launch.rebalance.workload import Statistics
    from dance_jax.models.checkpoint import Checkpoint

#: Called with (server's name or "", a message).
Notice = Callable[[str, str], None]

MAX_PORT = 65535
#: Failed starts in a row after which a server that joins is taken out again.
FAILED_JOINS = 2
#: Seconds for a server that leaves to end by itself.
END_S = 5.0
#: Seats of a service, taken or not, unless it starts with more servers.
SEATS = 8
#: Seconds for the engines of servers that are taken over to tell what they hold.
TAKE_OVER_S = 30.0
#: Seconds beyond the drain time after which a front end that has not drained is stopped.
DRAIN_MARGIN_S = 5.0


class _EngineFailure(Exception):
    """An engine died; `rank` is the server whose engine died first."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.rank = rank


class _Drained(Exception):
    """The service has drained, or its time to drain is over."""


class Service(Fleet):
    """The servers of a hosts file, each with a front end and an engine.

    Args:
        options: of serving.
        spec, checkpoint, layout, config, others: as for `Fleet`.
        rebalance: when experts move; None: only on request.
        before: statistics of a previous service.
        read_hosts: reads the hosts file, as it was at the start and later; None: it cannot change.
        survey: of servers that are to join.
        survivors: servers to take over; None: all are started.
    """

    module = FRONT_END
    drains = True

    def __init__(
        self,
        options: ServeOptions,
        spec: ClusterSpec,
        checkpoint: Checkpoint,
        layout: Layout,
        config: EngineConfig,
        *,
        rebalance: RebalanceOptions | None = None,
        before: Statistics | None = None,
        read_hosts: Callable[[], ClusterSpec] | None = None,
        survey: Survey | None = None,
        survivors: Survivors | None = None,
        **kwargs: Any,
    ) -> None:
        # Imported here, because the import is slow and errors in the files are reported first.
        from dance_jax.launch.rebalance.controller import Rebalancer

        hosts = spec if read_hosts is None else read_hosts()
        if config.exchange != "collectives":  # servers that step together cannot join or leave
            seats = min(max(SEATS, len(spec.servers)), MAX_SERVERS)
            spec, layout = spec.with_seats(seats), layout.with_seats(seats)
            before = None if before is None else before.with_seats(seats)
        super().__init__(spec, checkpoint, layout, config, **kwargs)
        self.options = options
        #: Names by rank, and ports; they change as servers join and leave.
        self._names = [*spec.names]
        self._ports = dict(survivors.handover.ports) if survivors is not None else {}
        for rank in self.spec.seated:
            self._ports.setdefault(rank, self._free_port(rank))
        how = rebalance or RebalanceOptions(interval_s=0)
        self._rebalancer = Rebalancer(how, self.spec, self.checkpoint, self.config, self, before)
        self._survivors = survivors
        #: Servers that an earlier launcher has connected to each other and that were never lost.
        self._connected: set[int] = set()
        #: Number of the last batch under earlier launchers that any server has applied.
        self._applied = 0
        self._state_dir = how.state_dir
        self.outlives = (
            self.calls
            and how.state_dir is not None
            and self.nodes is None
            and not options.die_with_launcher
        )
        #: Whether the hosts file is to be read again.
        self._reload = False
        self._read_hosts = read_hosts
        #: None: no server can join or leave.
        self._changes: Changes | None = None
        if self.calls and read_hosts is not None and survey is not None and self.nodes is None:
            known = hosts if survivors is None else survivors.handover.hosts
            patience_s = options.drain_seconds + DRAIN_MARGIN_S
            self._changes = Changes(known, self, survey, self._state_dir, patience_s)
            self._reload = hosts != known
        #: Processes of servers that have left, and when they are killed.
        self._left: list[tuple[ServerProcess, float]] = []
        #: By rank, process id of the front end before the present one.
        self._before: dict[int, int | None] = {}
        #: Servers that step on their own: which of them run. Unused if they step together.
        self.members = Members(self._names, self)
        #: Per server, number of the engine's latest start.
        self._starts = [0] * len(self.spec.servers)
        #: Ranks of dead engines with the reports of their death; ranks whose engines are not ready.
        self._died: dict[int, protocol.EngineDied] = {}
        self._down: set[int] = set()
        self._drained: set[int] = set()
        #: Ranks of the servers whose front ends have ended and were not started again.
        self._fronts_dead = {*range(len(self.spec.servers))} - {*self.spec.seated}
        #: Draining was requested; time.monotonic() at which the service ends in any case.
        self._drain_wanted = False
        self._deadline: float | None = None
        self._notice: Notice = lambda name, text: None

    @property
    def urls(self) -> list[str]:
        """URLs of the servers; usable only on the server's machine if bind is loopback."""
        anywhere = self.options.bind in ("0.0.0.0", "::", "")
        hosts = [server.address if anywhere else self.options.bind for server in self.spec.servers]
        return [f"http://{bracketed(hosts[n])}:{self._ports[n]}" for n in self.spec.seated]

    def serve(self, notice: Notice = lambda name, text: None) -> None:
        """Serve until `drain` was called and all servers have drained; restarts dead engines.

        Args:
            notice: called with messages for the operator.

        Raises:
            ClusterError: a front end failed, or restarted engines keep dying.
        """
        self.progress, self._notice = (lambda *_: None), notice
        with contextlib.suppress(_Drained):
            while True:
                if self.calls:
                    self._turn()
                else:
                    self._recover(self._next_death())

    def stop(self) -> None:
        """Stop all servers, as `Fleet.stop`."""
        self._rebalancer.close()
        if self._changes is not None:
            self._changes.close()
        super().stop()
        if self.outlives and self._state_dir is not None:
            (pathlib.Path(self._state_dir) / FILE_NAME).unlink(missing_ok=True)

    def tell(self, rank: int, command: protocol.FrontCommand) -> None:
        """Send a command to a front end, or through it to its engine."""
        self._send(rank, protocol.encode(command))

    def tell_all(self, command: protocol.FrontCommand) -> None:
        """Send a command to all front ends."""
        for rank in self.spec.seated:
            self.tell(rank, command)

    def notice(self, name: str, text: str) -> None:
        """Pass a message to the operator."""
        self._notice(name, text)

    @property
    def present(self) -> frozenset[int]:
        """Ranks of the servers that run; with collectives, all that are not restarting."""
        if self.calls:
            return self.members.present
        return frozenset(range(len(self._starts))) - self._down

    @property
    def gone(self) -> frozenset[int]:
        """Ranks of the servers that are gone with their front ends."""
        return self.members.gone

    @property
    def epoch(self) -> int:
        """Number that grows whenever `present` changes."""
        return self.members.epoch

    def drain(self) -> None:
        """Let all servers finish their requests and end `serve`; safe in a signal handler."""
        self._drain_wanted = True

    def _spawn(self) -> None:
        if self._survivors is None:
            super()._spawn()
        else:
            self._adopt(self._survivors)
        self._save_handover()

    # A changed hosts file.

    def reload(self) -> None:
        """Read the hosts file again; safe in a signal handler."""
        self._reload = True

    def _follow_hosts(self) -> None:
        """Change the servers as the hosts file says."""
        if self._reload:
            self._reload = False
            if self._changes is None or self._read_hosts is None:
                self.notice("", "hosts: servers of this service cannot join or leave")
                return
            try:
                self._changes.want(self._read_hosts())
            except UserError as error:
                self._changes.refuse(str(error))
        if self._changes is not None and self._deadline is None:
            self._changes.tick()
        now = time.monotonic()
        for process, until in self._left:
            if process.ended is None and now > until:
                process.kill(signal.SIGKILL)
        self._left = [each for each in self._left if each[0].ended is None and now <= each[1]]

    @property
    def settled(self) -> bool:
        return self._rebalancer.idle

    def dismiss(self, rank: int) -> str:
        why = self._rebalancer.leaves(rank)
        if not why:
            self.tell(rank, protocol.Drain())
        return why

    def dismissed(self, rank: int) -> bool:
        serves = rank in self.present and rank not in self._drained
        return not serves and self._rebalancer.may_leave

    def unseat(self, rank: int) -> None:
        process = self._processes[rank]
        self.members.leave(rank)
        self.tell(rank, protocol.Stop())
        if self.outlives:
            process.write(END)
        process.let_go()
        self._left.append((process, time.monotonic() + END_S))
        self._processes[rank] = nobody()
        self._fronts_dead.add(rank)
        self._drained.discard(rank)
        self._before.pop(rank, None)
        self._reseat(rank, VACANT, 0)
        del self._ports[rank]

    def seat(self, rank: int, server: ServerSpec, network: Network) -> None:
        slots = rooms(ClusterSpec((server,)), self.checkpoint, self.config, alone=False)[0].slots
        if server.ssh is not None and not self._control_port:
            self.network = network
            self._control_port = self._listen()
        self._reseat(rank, server, slots)
        self._ports[rank] = self._free_port(rank)
        remove_log(self._log_path(rank))
        self.members.join(rank)
        self._save_handover()

    def fails(self, rank: int) -> str:
        member = self.members[rank]
        return member.why if member.failures >= FAILED_JOINS else ""

    def _reseat(self, rank: int, server: ServerSpec, slots: int) -> None:
        self.spec, self._names[rank] = self.spec.with_server(rank, server), server.name
        self._endpoints[rank] = ""
        self._rebalancer.reseat(rank, server, slots)
        self._save_handover()

    def _bring_up(self) -> None:
        if self._survivors is not None and not self.started:
            self._take_over(self._survivors)
            return
        try:
            super()._bring_up()
            self._save_handover()
        except _EngineFailure as failure:
            if self.started:
                raise
            died = self._died[failure.rank]
            name = self.spec.names[failure.rank]
            if died.failure is not None and died.failure.user:
                raise UserError(f"server {name}: {died.failure.message}") from None
            what = f"cannot start: its engine {self._fate(failure.rank)}"
            raise self._error(failure.rank, what) from None

    # Servers that outlive their launcher.

    def _adopt(self, survivors: Survivors) -> None:
        handover = survivors.handover
        self._private = pathlib.Path(handover.private)
        self._key, self._control_port = handover.key, handover.control_port
        self._listener, self._processes = survivors.listener, [*survivors.processes]
        self._endpoints = [""] * len(self._processes)
        for rank in self.spec.seated:
            self.members.await_call(rank)
        self._begin_beats()

    def _take_over(self, survivors: Survivors) -> None:
        """Find out what the servers do and hold; those that do not answer count as lost."""
        self._rebalancer.resume(survivors.latest)
        self._applied = max(taken.applied for taken in survivors.taken.values())
        ready = {rank for rank, taken in survivors.taken.items() if taken.ready}
        self._connected = ready - {*survivors.latest.absent}
        self.members.epoch = 1 + max(taken.placed.epoch for taken in survivors.taken.values())
        deadline = time.monotonic() + TAKE_OVER_S
        events, _ = self._events_of(survivors.messages)
        while True:
            for rank, event in events:
                self._member_event(rank, event)
            if not ready - self.present - self._died.keys() or time.monotonic() > deadline:
                break
            events, _ = self._receive(200)
        for rank in self.spec.seated:
            there = rank in self.present
            self.progress(self._names[rank], "taken over" if there else "does not answer", 0, 0)
            if not there:
                self.left(rank)

    def _still_runs(self, rank: int) -> bool:
        """Whether a front end goes on, though the process that this one started has ended.

        Its ssh connection broke, or the front end that was to replace it has found it.
        """
        process, before = self._processes[rank], self._before.get(rank)
        assert self._listener is not None
        found = process.status == STILL_THERE
        if not found and not (
            self.outlives and process.lost() and self._listener.connected(server_identity(rank))
        ):
            return False
        pid = before if found else process.pid
        self._processes[rank] = AdoptedProcess(
            self.spec.servers[rank], pid, self._log_path(rank), self.network.ssh_config, FRONT_END
        )
        if found:
            self.members.await_call(rank)
            self.tell(rank, protocol.TakeOver())
        return True

    def _save_handover(self) -> None:
        if not self.outlives or self._state_dir is None:
            return
        assert self._listener is not None and self._private is not None
        ssh_config = self.network.ssh_config
        handover = Handover(
            hosts=ClusterSpec(tuple(self._changes.hosts.values())) if self._changes else self.spec,
            spec=self.spec,
            config=self.config,
            options=self.options,
            fingerprint=self.checkpoint.fingerprint,
            model=self.model,
            key=self._key,
            private_port=self._listener.port,
            control_addresses=self.network.control_addresses,
            control_port=self._control_port,
            ssh_config=None if ssh_config is None else str(ssh_config.resolve()),
            private=str(self._private),
            log_dir=None if self.log_dir is None else str(self.log_dir.resolve()),
            pids=[process.pid for process in self._processes],
            ports=self._ports,
        )
        try:
            handover.save(self._state_dir)
        except OSError as error:
            self.notice("", f"--state-dir {self._state_dir}: cannot be written: {error}")

    # Servers that step on their own.

    def _turn(self) -> None:
        """Handle what has happened, and do what is due.

        Raises:
            ClusterError: every server fails again and again.
            _Drained: as `_check_drain`.
        """
        events, failed = self._receive(200)
        try:
            for rank in {*failed, *self._ended()} - self._fronts_dead:
                if self._still_runs(rank):
                    continue
                self._fronts_dead.add(rank)
                process = self._processes[rank]
                number = "" if process.pid is None else f"(process {process.pid}) "
                why = f"{number}{process.fate()}"
                process.kill(signal.SIGKILL)
                self.members.front_died(rank, why)
            for rank, event in events:
                if rank in self.spec.seated:
                    self._member_event(rank, event)
            died, self._died = self._died, {}
            for rank in died.keys() & self.spec.seated:
                self.members.engine_died(rank, f"its engine {_fate(died[rank])}")
            self.members.tick(fronts=self._deadline is None)
        except AllFailed as error:
            what = f"{error.why}, as in the {MAX_FAILED_STARTS - 1} starts before"
            raise self._error(error.rank, what) from None
        self._rebalancer.tick()
        self._follow_hosts()
        self._check_drain()

    def _member_event(self, rank: int, event: Any) -> None:
        match event:
            case protocol.Hello(pid):
                self._processes[rank].pid = pid
                self.members.called(rank)
                self._save_handover()
            case protocol.Taken():
                self._processes[rank].pid = event.pid
                self._endpoints[rank] = event.endpoint
                self.members.called(rank, event.start)
                if event.ready:
                    self.tell(rank, protocol.Settle(self._applied))
                elif event.waits:
                    self._let_join(rank, event.endpoint)
                self._save_handover()
            case protocol.Holds():
                self._rebalancer.holds(rank, Layout.from_bytes(event.layout), event.number)
                self.members.ready(rank)
            case protocol.Prepared():
                self._let_join(rank, event.endpoint)
            case protocol.Ready():
                self.members.ready(rank)
            case _:
                self._handle(rank, event)

    def _let_join(self, rank: int, endpoint: str) -> None:
        """Tell a prepared engine where the others are; those not present connect when they are."""
        self._endpoints[rank] = endpoint
        there = self.present | {rank}
        endpoints = [each if n in there else "" for n, each in enumerate(self._endpoints)]
        self.tell(rank, protocol.Join("", endpoints, calls=True))

    def restart(self, rank: int, why: str) -> None:
        self.members.engine_died(rank, f"its engine is out of step: {why}")

    def start_engine(self, rank: int, number: int) -> None:
        self._starts[rank] = number
        self._rebalancer.starts(rank)
        self.tell(rank, protocol.Restart(number, self.layout.to_bytes()))

    def start_front(self, rank: int, number: int) -> bool:
        if self._processes[rank].ended is None:
            return False
        self._before[rank] = self._processes[rank].pid or self._before.get(rank)
        try:
            self._processes[rank] = self._start_process(rank)
        except UserError as error:
            self.notice(self.spec.names[rank], str(error))
            return False
        self._starts[rank] = number
        self._rebalancer.starts(rank)
        self._fronts_dead.discard(rank)
        self._write_setup(rank)
        self._save_handover()
        return True

    def end_front(self, rank: int) -> None:
        self._processes[rank].kill(signal.SIGKILL)

    def left(self, rank: int) -> None:
        self._connected.discard(rank)
        for other in {*self.spec.seated} - {rank}:
            self.tell(other, protocol.PeerLost(rank))
        self._rebalancer.engines_died([rank])

    def came(self, rank: int) -> None:
        for other in self.present - {rank}:
            if {rank, other} <= self._connected:
                continue
            self.tell(other, protocol.PeerRestarted(rank, self._endpoints[rank]))
            self.tell(rank, protocol.PeerRestarted(other, self._endpoints[other]))
        self._rebalancer.came(rank)

    def heard(self, rank: int) -> int:
        assert self._listener is not None
        return self._listener.heard(server_identity(rank))

    # All servers.

    def _next_death(self) -> int:
        """Wait until an engine dies and return its rank."""
        try:
            while True:
                for rank, event in self._events():
                    self._handle(rank, event)
                self._rebalancer.tick()
        except _EngineFailure as failure:
            return failure.rank

    def _handle(self, rank: int, event: Any) -> None:
        self._rebalancer.receive(rank, event)

    def _recover(self, dead: int) -> None:
        """Restart all engines, because they step together and die together.

        Raises:
            ClusterError: the engines died again in MAX_FAILED_STARTS starts.
        """
        for _ in range(MAX_FAILED_STARTS):
            what, _, _ = f"its engine {self._fate(dead)}".partition("\n")
            text = f"{what}; all engines restart, requests in flight wait"
            self._notice(self.spec.names[dead], text)
            self._restart({*range(len(self._starts))})
            try:
                self._await_restarted()
            except _EngineFailure as failure:
                dead = failure.rank
            else:
                self._notice("", "all engines are running again")
                return
        what = f"its engine {self._fate(dead)}, as in the {MAX_FAILED_STARTS - 1} starts before"
        raise self._error(dead, what)

    def _restart(self, ranks: set[int]) -> None:
        """Tell front ends to restart their engines."""
        self._rebalancer.engines_died(ranks)
        self._died.clear()
        self._down |= ranks
        for rank in ranks:
            self._starts[rank] += 1
            # The front end stays, and with it its Hello.
            self._reached[rank] = {protocol.Hello: self._reached[rank][protocol.Hello]}
            self._endpoints[rank] = ""
            self.tell(rank, protocol.Restart(self._starts[rank], self.layout.to_bytes()))

    def _await_restarted(self) -> None:
        """Wait until all engines are ready."""
        self._bring_up()
        self._down.clear()

    def _process_setup(self, engine: protocol.Setup) -> msgspec.Struct:
        options = dataclasses.replace(self.options, port=self._ports[engine.rank])
        start = self._starts[engine.rank]
        return protocol.FrontSetup(
            engine=engine,
            options=options,
            start=start,
            outlives=self.outlives,
            before=self._before.get(engine.rank),
        )

    def _free_port(self, rank: int) -> int:
        """The lowest port that no other server of the same machine has."""
        taken = {self._ports.get(other) for other in self._neighbours(rank)}
        port = next(port for port in itertools.count(self.options.port) if port not in taken)
        if port > MAX_PORT:
            raise UserError(
                f"--port {self.options.port}: the servers of one machine use a port each, up to "
                f"{port}, which is above {MAX_PORT}: choose a lower --port, or fewer servers per "
                "machine"
            )
        return port

    def _decode(self, rank: int, content: bytes) -> Any:
        match protocol.decode_front_event(content):
            case protocol.FromEngine(start, event):
                return event if start == self._starts[rank] else None
            case protocol.EngineDied() as died:
                if died.start == self._starts[rank]:
                    self._died[rank] = died
            case protocol.Taken() as taken:
                self._starts[rank] = taken.start
                return taken
            case protocol.EngineSilent(start, silent):
                known = self.started or self._survivors is not None
                if self.calls and known and start == self._starts[rank]:
                    self.members.engine_silent(rank, silent)
            case protocol.RebalanceWanted() as wanted:
                self._rebalancer.want(rank, wanted)
            case protocol.DrainWanted():
                self.drain()
            case protocol.Drained():
                self._drained.add(rank)
            case event:
                return event
        return None

    def _events(self) -> list[tuple[int, Any]]:
        """Receive events as `Fleet._events`, only of the engines' current starts.

        Raises:
            _EngineFailure: an engine died.
            _Drained: as `_check_drain`.
        """
        events = super()._events()
        self._check_drain()
        if self._died:
            self._raise_engine_failure()
        return events

    def _check_drain(self) -> None:
        """Start to drain once that is wanted and all servers have started.

        Raises:
            _Drained: the service has drained, or its time to drain is over.
        """
        if self._drain_wanted and self.started and self._deadline is None:
            seconds = self.options.drain_seconds
            self._deadline = time.monotonic() + seconds + DRAIN_MARGIN_S
            self._notice("", f"finishing running requests, for at most {seconds:g} s")
            self._send_all(protocol.Drain())
            engines_run = len(self.present) == len(self.spec.seated) and not self._died
            self._rebalancer.drain(engines_run)
        if self._deadline is not None:
            late = [
                name
                for n, name in enumerate(self.spec.names)
                if n not in self._drained and n not in self._fronts_dead
            ]
            done = not late and self._rebalancer.settled
            if done or time.monotonic() > self._deadline:
                text = (
                    f"not drained in time: {', '.join(late)}"
                    if late
                    else "all servers have drained"
                )
                self._notice("", text)
                raise _Drained

    def _raise_engine_failure(self) -> None:
        """Find the engine that died first."""
        deadline = time.monotonic() + CAUSE_WINDOW_S
        failed: list[int] = []
        while time.monotonic() < deadline:
            failed += self._receive(50)[1]
        # A dead front end takes its engine along, so the front end is the cause.
        if failed := failed + self._ended():
            self._raise_failure(failed)
        raise _EngineFailure(min(self._died, key=self._is_consequence))

    def _is_consequence(self, rank: int) -> bool:
        died = self._died[rank]
        said = None if died.failure is None else died.failure.message
        return is_consequence(said, died.status, self._processes[rank].last_lines())

    def _fate(self, rank: int) -> str:
        return _fate(self._died[rank])


def _fate(died: protocol.EngineDied) -> str:
    """How an engine ended, as text."""
    if died.failure is not None:
        what = f"failed: {died.failure.message}"
    else:
        what = "ended" if died.status is None else in_words(died.status)
    return f"(process {died.pid}) {what}"
