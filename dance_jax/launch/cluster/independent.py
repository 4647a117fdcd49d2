"""A service whose servers step on their own and call each other's experts.

Servers are lost and come back alone (`members`), while the others load their experts. They may
join and leave (`changes`), and with --state-dir they outlive their launcher (`succession`).
"""

from __future__ import annotations

import functools
import pathlib
import signal
import time
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
from dance_jax.launch.agent.process import ServerProcess, remove_log
from dance_jax.launch.cluster.changes import Changes, Survey
from dance_jax.launch.cluster.members import MAX_FAILED_STARTS, AllFailed, Members
from dance_jax.launch.cluster.service import DRAIN_MARGIN_S, Service, fate
from dance_jax.launch.cluster.succession import FILE_NAME, FRONT_END, Handover, Survivors
from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import server_identity
from dance_jax.launch.planning.hosts_file import HostsFile
from dance_jax.launch.planning.plan import rooms
from dance_jax.placement.core import Layout
from dance_jax.placement.visit import MAX_SERVERS

if TYPE_CHECKING:
    from dance_jax.launch.rebalance.workload import Statistics
    from dance_jax.models.checkpoint import Checkpoint

#: Failed starts in a row after which a server that joins is taken out again.
FAILED_JOINS = 2
#: Seconds for a server that leaves to end by itself.
END_S = 5.0
#: Seats of a service, taken or not, unless it starts with more servers.
SEATS = 8
#: Seconds for the engines of servers that are taken over to tell what they hold.
TAKE_OVER_S = 30.0


class IndependentService(Service):
    """The servers of a hosts file, each of which steps on its own.

    Args:
        options, spec, checkpoint, layout, others: as for `Service`.
        hosts_file: of these servers; None: they cannot change.
        survey: of servers that are to join.
        survivors: servers to take over; None: all are started.
    """

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
        hosts_file: HostsFile | None = None,
        survey: Survey | None = None,
        survivors: Survivors | None = None,
        **kwargs: Any,
    ) -> None:
        hosts = spec if hosts_file is None else hosts_file.read()
        seats = min(max(SEATS, len(spec.servers)), MAX_SERVERS)
        spec, layout = spec.with_seats(seats), layout.with_seats(seats)
        before = None if before is None else before.with_seats(seats)
        super().__init__(
            options,
            spec,
            checkpoint,
            layout,
            config,
            rebalance=rebalance,
            before=before,
            ports={} if survivors is None else survivors.handover.ports,
            **kwargs,
        )
        #: Names by rank; they change as servers join and leave.
        self._names = [*spec.names]
        self._survivors = survivors
        #: Servers that an earlier launcher has connected to each other and that were never lost.
        self._connected: set[int] = set()
        #: Number of the last batch under earlier launchers that any server has applied.
        self._applied = 0
        self._state_dir = None if rebalance is None else rebalance.state_dir
        self.outlives = (
            self._state_dir is not None and self.nodes is None and not options.die_with_launcher
        )
        self._hosts_file = hosts_file
        #: None: no server can join or leave.
        self._changes: Changes | None = None
        if hosts_file is not None and survey is not None and self.nodes is None:
            known = hosts if survivors is None else survivors.handover.hosts
            patience_s = options.drain_seconds + DRAIN_MARGIN_S
            self._changes = Changes(known, self, survey, self._state_dir, patience_s)
            self._reload = hosts != known
        #: Processes of servers that have left, and when they are killed.
        self._left: list[tuple[ServerProcess, float]] = []
        #: By rank, process id of the front end before the present one.
        self._before: dict[int, int | None] = {}
        #: Which servers run.
        self.members = Members(self._names, self)

    def stop(self) -> None:
        """Stop all servers, as `Fleet.stop`."""
        if self._changes is not None:
            self._changes.close()
        super().stop()
        if self.outlives and self._state_dir is not None:
            (pathlib.Path(self._state_dir) / FILE_NAME).unlink(missing_ok=True)

    @property
    def present(self) -> frozenset[int]:
        return self.members.present

    @property
    def gone(self) -> frozenset[int]:
        return self.members.gone

    @property
    def epoch(self) -> int:
        return self.members.epoch

    def _spawn(self) -> None:
        if self._survivors is None:
            super()._spawn()
        else:
            self._adopt(self._survivors)
        self._save_handover()

    def _bring_up(self) -> None:
        if self._survivors is not None:
            self._take_over(self._survivors)
        else:
            super()._bring_up()
            self._save_handover()

    def _process_setup(self, engine: protocol.Setup) -> msgspec.Struct:
        setup = super()._process_setup(engine)
        before = self._before.get(engine.rank)
        return msgspec.structs.replace(setup, outlives=self.outlives, before=before)

    def _sorted(self, rank: int, event: Any) -> Any:
        match event:
            case protocol.Taken():
                self._starts[rank] = event.start
            case protocol.EngineSilent(start, silent):
                known = self.started or self._survivors is not None
                if known and start == self._starts[rank]:
                    self.members.engine_silent(rank, silent)
                return None
        return super()._sorted(rank, event)

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
                self.faults[rank] = why, time.time()
                self.members.front_died(rank, why)
            for rank, event in events:
                if rank in self.spec.seated:
                    self._member_event(rank, event)
            died, self._died = self._died, {}
            for rank in died.keys() & self.spec.seated:
                self.members.engine_died(rank, f"its engine {fate(died[rank])}")
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
                self.tell(rank, protocol.Keys(self._keys))
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

    # What members and the rebalancer ask for.

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

    # A changed hosts file.

    def _follow_hosts(self) -> None:
        """Change the servers as the hosts file says."""
        if self._reload:
            self._reload = False
            if self._changes is None or self._hosts_file is None:
                self.notice("", "hosts: servers of this service cannot join or leave")
                return
            try:
                self._changes.want(self._hosts_file.read())
            except UserError as error:
                self._changes.refuse(str(error))
        if self._changes is not None and self._deadline is None:
            self._changes.tick()
        now = time.monotonic()
        for process, until in self._left:
            if process.ended is None and now > until:
                process.kill(signal.SIGKILL)
        self._left = [each for each in self._left if each[0].ended is None and now <= each[1]]

    def _drain_server(self, name: str) -> str:
        if self._changes is None or self._hosts_file is None:
            return super()._drain_server(name)
        if self._drain_wanted:
            return "the service is shutting down"
        if self._changes.under_way:
            return "another server is joining or leaving; try again when that is done"
        if name not in self._names:
            return "it has left"
        if why := self._rebalancer.shortage_without(self._names.index(name)):
            return why
        try:
            self._hosts_file.change("drain", name)
            hosts = self._hosts_file.read()
        except UserError as error:
            return str(error)
        self.notice(name, "leaves, as a user of the dashboard wants")
        self._changes.want(hosts, functools.partial(self._keep_server, name))
        return ""

    def _keep_server(self, name: str) -> None:
        """Undo a drain in the hosts file, which may have changed otherwise since."""
        assert self._hosts_file is not None
        try:
            self._hosts_file.change("add", name)
        except UserError as error:
            self.notice("", f"hosts: {error}")

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
