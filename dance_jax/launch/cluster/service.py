"""A cluster that serves: the parent of one front end per server, each with its own engine.

Servers that step on their own are lost and come back alone (`members`); meanwhile the others load
their experts. Engines that step together die together, so all of them restart, and a dead front end
ends the service. The rebalancer moves experts to where they are used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from dance_jax.config import RebalanceOptions, ServeOptions, UserError
from dance_jax.launch.agent.process import in_words, is_consequence
from dance_jax.launch.cluster.fleet import CAUSE_WINDOW_S, Fleet
from dance_jax.launch.cluster.members import MAX_FAILED_STARTS, AllFailed, Members
from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import bracketed, server_identity

if TYPE_CHECKING:
    from dance_jax.launch.rebalance.workload import Statistics

#: Called with (server's name or "", a message).
Notice = Callable[[str, str], None]

MAX_PORT = 65535
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
        arguments: as for `Fleet`.
        rebalance: when experts move; None: only on request.
        before: statistics of a previous service.
    """

    module = "dance_jax.serve.frontend"
    drains = True

    def __init__(
        self,
        options: ServeOptions,
        *args: Any,
        rebalance: RebalanceOptions | None = None,
        before: Statistics | None = None,
        **kwargs: Any,
    ) -> None:
        # Imported here, because the import is slow and errors in the files are reported first.
        from dance_jax.launch.rebalance.controller import Rebalancer

        super().__init__(*args, **kwargs)
        self.options = options
        ports = [self._port(rank) for rank in range(len(self.spec.servers))]
        if max(ports) > MAX_PORT:
            raise UserError(
                f"--port {options.port}: the servers of one machine use a port each, up to "
                f"{max(ports)}, which is above {MAX_PORT}: choose a lower --port, or fewer servers "
                "per machine"
            )
        how = rebalance or RebalanceOptions(interval_s=0)
        self._rebalancer = Rebalancer(how, self.spec, self.checkpoint, self.config, self, before)
        #: Servers that step on their own: which of them run. Unused if they step together.
        self.members = Members(self.spec.names, self)
        #: Per server, number of the engine's latest start.
        self._starts = [0] * len(self.spec.servers)
        #: Ranks of dead engines with the reports of their death; ranks whose engines are not ready.
        self._died: dict[int, protocol.EngineDied] = {}
        self._down: set[int] = set()
        self._drained: set[int] = set()
        #: Ranks of the servers whose front ends have ended and were not started again.
        self._fronts_dead: set[int] = set()
        #: Draining was requested; time.monotonic() at which the service ends in any case.
        self._drain_wanted = False
        self._deadline: float | None = None
        self._notice: Notice = lambda name, text: None

    @property
    def urls(self) -> list[str]:
        """URL of each server, by rank; usable only on the server's machine if bind is loopback."""
        anywhere = self.options.bind in ("0.0.0.0", "::", "")
        return [
            f"http://{bracketed(server.address if anywhere else self.options.bind)}:"
            f"{self._port(rank)}"
            for rank, server in enumerate(self.spec.servers)
        ]

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
        super().stop()

    def tell(self, rank: int, command: protocol.FrontCommand) -> None:
        """Send a command to a front end, or through it to its engine."""
        self._send(rank, protocol.encode(command))

    def tell_all(self, command: protocol.FrontCommand) -> None:
        """Send a command to all front ends."""
        for rank in range(len(self.spec.servers)):
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

    def drain(self) -> None:
        """Let all servers finish their requests and end `serve`; safe in a signal handler."""
        self._drain_wanted = True

    def _bring_up(self) -> None:
        try:
            super()._bring_up()
        except _EngineFailure as failure:
            if self.started:
                raise
            died = self._died[failure.rank]
            name = self.spec.names[failure.rank]
            if died.failure is not None and died.failure.user:
                raise UserError(f"server {name}: {died.failure.message}") from None
            what = f"cannot start: its engine {self._fate(failure.rank)}"
            raise self._error(failure.rank, what) from None

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
                self._fronts_dead.add(rank)
                process = self._processes[rank]
                why = f"(process {process.pid}) {process.fate()}"
                process.kill(signal.SIGKILL)
                self.members.front_died(rank, why)
            for rank, event in events:
                self._member_event(rank, event)
            died, self._died = self._died, {}
            for rank, death in died.items():
                self.members.engine_died(rank, f"its engine {_fate(death)}")
            self.members.tick(fronts=self._deadline is None)
        except AllFailed as error:
            what = f"{error.why}, as in the {MAX_FAILED_STARTS - 1} starts before"
            raise self._error(error.rank, what) from None
        self._rebalancer.tick()
        self._check_drain()

    def _member_event(self, rank: int, event: Any) -> None:
        match event:
            case protocol.Hello(pid):
                self._processes[rank].pid = pid
                self.members.called(rank)
            case protocol.Prepared():
                self._endpoints[rank] = event.endpoint
                # Servers that are not present connect when they are.
                there = self.present | {rank}
                endpoints = [
                    each if other in there else "" for other, each in enumerate(self._endpoints)
                ]
                self.tell(rank, protocol.Join(event.coordinator, endpoints, calls=True))
            case protocol.Ready():
                self.members.ready(rank)
            case _:
                self._handle(rank, event)

    def restart(self, rank: int, why: str) -> None:
        self.members.engine_died(rank, f"its engine is out of step: {why}")

    def start_engine(self, rank: int, number: int) -> None:
        self._starts[rank] = number
        self._rebalancer.starts(rank)
        self.tell(rank, protocol.Restart(number, self.layout.to_bytes()))

    def start_front(self, rank: int, number: int) -> bool:
        if self._processes[rank].ended is None:
            return False
        try:
            self._processes[rank] = self._start_process(rank)
        except UserError as error:
            self.notice(self.spec.names[rank], str(error))
            return False
        self._starts[rank] = number
        self._rebalancer.starts(rank)
        self._fronts_dead.discard(rank)
        self._write_setup(rank)
        return True

    def end_front(self, rank: int) -> None:
        self._processes[rank].kill(signal.SIGKILL)

    def left(self, rank: int) -> None:
        for other in set(range(len(self._starts))) - {rank}:
            self.tell(other, protocol.PeerLost(rank))
        self._rebalancer.engines_died([rank])

    def came(self, rank: int) -> None:
        for other in self.present - {rank}:
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
        options = dataclasses.replace(self.options, port=self._port(engine.rank))
        start = self._starts[engine.rank]
        return protocol.FrontSetup(engine=engine, options=options, start=start)

    def _port(self, rank: int) -> int:
        return self.options.port + self._neighbours(rank).index(rank)

    def _decode(self, rank: int, content: bytes) -> Any:
        match protocol.decode_front_event(content):
            case protocol.FromEngine(start, event):
                return event if start == self._starts[rank] else None
            case protocol.EngineDied() as died:
                if died.start == self._starts[rank]:
                    self._died[rank] = died
            case protocol.EngineSilent(start, silent):
                if self.calls and self.started and start == self._starts[rank]:
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
            engines_run = len(self.present) == len(self._starts) and not self._died
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
