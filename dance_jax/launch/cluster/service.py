"""A cluster that serves: the parent of one front end per server, each with an engine of its own.

An engine that dies is started anew; its users' requests wait, and those of others that need its
experts. Engines that step together die together, so all of them start anew. A front end that dies
ends the service. Meanwhile experts move to where they are used (`rebalancer`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from dance_jax.config import UserError
from dance_jax.launch.agent.process import in_words, is_echo
from dance_jax.launch.cluster.fleet import CAUSE_WINDOW_S, Fleet
from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import bracketed
from dance_jax.launch.control.protocol import ServeOptions
from dance_jax.launch.rebalance.decision import RebalanceOptions

if TYPE_CHECKING:
    from dance_jax.launch.rebalance.workload import Statistics

#: Called with (server's name or "", what happens, in words).
Notice = Callable[[str, str], None]

MAX_PORT = 65535
#: Starts of the engines in a row that fail until the service gives up.
MAX_FAILED_STARTS = 5
#: Seconds beyond the time to drain until a front end that has not drained is not waited for.
DRAIN_MARGIN_S = 5.0


class _EngineFailure(Exception):
    """An engine died; `rank` is the server whose engine did so first."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.rank = rank


class _Drained(Exception):
    """The service has come to its end."""


class Service(Fleet):
    """All servers of a hosts file, each with a front end and an engine.

    Args:
        options: how they serve.
        arguments: as for `Fleet`.
        rebalance: when experts move; None: on request alone.
        before: statistics of an earlier service.
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
        # Not above: it takes long, and what is wrong with files is said before.
        from dance_jax.launch.rebalance.controller import Rebalancer

        super().__init__(*args, **kwargs)
        self.options = options
        ports = [self._port(rank) for rank in range(len(self.spec.servers))]
        if max(ports) > MAX_PORT:
            raise UserError(
                f"--port {options.port}: the servers of a machine take one port each, up to "
                f"{max(ports)}; the last there is is {MAX_PORT}"
            )
        how = rebalance or RebalanceOptions(interval_s=0)
        self._rebalancer = Rebalancer(
            how, self.spec, self.checkpoint, self.config, self.layout, self, before
        )
        #: Number of each engine's start.
        self._starts = [0] * len(self.spec.servers)
        #: Ranks whose latest engines have died, with what is known of it; those that are not ready.
        self._died: dict[int, protocol.EngineDied] = {}
        self._down: set[int] = set()
        self._drained: set[int] = set()
        #: Somebody wants the service to end; time.monotonic() at which it does in any case.
        self._drain_wanted = False
        self._deadline: float | None = None
        self._notice: Notice = lambda name, text: None

    @property
    def urls(self) -> list[str]:
        """Where each server is reached, by rank; from its own machine if it binds to loopback."""
        anywhere = self.options.bind in ("0.0.0.0", "::", "")
        return [
            f"http://{bracketed(server.address if anywhere else self.options.bind)}:"
            f"{self._port(rank)}"
            for rank, server in enumerate(self.spec.servers)
        ]

    def serve(self, notice: Notice = lambda name, text: None) -> None:
        """Serves until `drain` was called and all servers have drained; starts engines anew.

        Args:
            notice: told what happens.

        Raises:
            ClusterError: a front end failed, or engines that are started anew die again and again.
        """
        self.progress, self._notice = (lambda *_: None), notice
        with contextlib.suppress(_Drained):
            while True:
                self._start_anew(self._next_death())

    def stop(self) -> None:
        """As `Fleet.stop`."""
        self._rebalancer.close()
        super().stop()

    def tell(self, rank: int, command: protocol.FrontCommand) -> None:
        """Says something to a front end, or to its engine.

        It does not hear it while its connection is made anew, after this process was stopped for
        some seconds; its end is noticed elsewhere.
        """
        self._sent(rank, protocol.encode(command))

    def tell_all(self, command: protocol.FrontCommand) -> None:
        """Says it to all."""
        for rank in range(len(self.spec.servers)):
            self.tell(rank, command)

    def notice(self, name: str, text: str) -> None:
        """Tells who serves what happens."""
        self._notice(name, text)

    def drain(self) -> None:
        """Lets all servers finish what runs, and then `serve` return; from a signal handler too."""
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

    def _next_death(self) -> int:
        """Waits until an engine dies: its server's rank."""
        try:
            while True:
                for rank, event in self._events():
                    self._heard(rank, event)
                self._rebalancer.tick()
        except _EngineFailure as failure:
            return failure.rank

    def _heard(self, rank: int, event: Any) -> None:
        self._rebalancer.receive(rank, event)

    def _start_anew(self, dead: int) -> None:
        """Starts the engine of that server again, which has died, and those that died with it.

        Raises:
            ClusterError: it does not help.
        """
        for _ in range(MAX_FAILED_STARTS):
            what, _, _ = f"its engine {self._fate(dead)}".partition("\n")
            which = "it starts anew" if self.calls else "all engines start anew"
            text = f"{what}; {which}, requests in flight wait"
            self._notice(self.spec.names[dead], text)
            self._restart({*self._died} if self.calls else {*range(len(self._starts))})
            try:
                self._bring_back()
            except _EngineFailure as failure:
                dead = failure.rank
            else:
                self._notice("", "all servers go on")
                return
        what = f"its engine {self._fate(dead)}, as in the {MAX_FAILED_STARTS - 1} starts before"
        raise self._error(dead, what)

    def _restart(self, ranks: set[int]) -> None:
        """Has front ends start their engines anew."""
        self._rebalancer.engines_died(ranks)
        self.layout = self._rebalancer.layout
        self._died.clear()
        self._down |= ranks
        for rank in ranks:
            self._starts[rank] += 1
            # Hello came with the front end, which stays.
            self._reached[rank] = {protocol.Hello: self._reached[rank][protocol.Hello]}
            self._endpoints[rank] = ""
            self.tell(rank, protocol.Restart(self._starts[rank], self.layout.to_bytes()))

    def _bring_back(self) -> None:
        """Waits until the engines that were started anew are ready, and connects the others."""
        if not self.calls:
            self._bring_up()
            self._down.clear()
            return
        ranks = sorted(self._down)
        for rank, prepared in zip(ranks, self._gather(ranks, protocol.Prepared), strict=True):
            if not self._endpoints[rank]:  # it has not been told yet
                self._endpoints[rank] = prepared.endpoint
                self.tell(rank, self._join_message(prepared))
        self._gather(ranks, protocol.Ready)
        self._down.clear()
        for rank in ranks:
            for other in set(range(len(self._starts))) - {rank}:
                self.tell(other, protocol.PeerRestarted(rank, self._endpoints[rank]))

    def _process_setup(self, engine: protocol.Setup) -> msgspec.Struct:
        options = dataclasses.replace(self.options, port=self._port(engine.rank))
        return protocol.FrontSetup(engine=engine, options=options)

    def _port(self, rank: int) -> int:
        return self.options.port + self._neighbours(rank).index(rank)

    def _decode(self, rank: int, content: bytes) -> Any:
        match protocol.decode_front_event(content):
            case protocol.FromEngine(start, event):
                return event if start == self._starts[rank] else None
            case protocol.EngineDied() as died:
                if died.start == self._starts[rank]:
                    self._died[rank] = died
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
        """As `Fleet._events`, of engines of this start.

        Raises:
            _EngineFailure: one has died.
            _Drained: there is no more to do.
        """
        events = super()._events()
        if self._drain_wanted and self.started and self._deadline is None:
            seconds = self.options.drain_seconds
            self._deadline = time.monotonic() + seconds + DRAIN_MARGIN_S
            self._notice("", f"finishing what runs, for {seconds:g} s at most")
            self._send_all(protocol.Drain())
            self._rebalancer.drain()
        if self._deadline is not None:
            late = [name for n, name in enumerate(self.spec.names) if n not in self._drained]
            done = not late and self._rebalancer.settled
            if done or time.monotonic() > self._deadline:
                text = f"not in time: {', '.join(late)}" if late else "all servers have drained"
                self._notice("", text)
                raise _Drained
        if self._died:
            self._raise_engine_failure()
        return events

    def _raise_engine_failure(self) -> None:
        """Finds the engine that died first."""
        deadline = time.monotonic() + CAUSE_WINDOW_S
        failed: list[int] = []
        while time.monotonic() < deadline:
            failed += self._receive(50)[1]
        # A front end that is gone takes its engine along.
        if failed := failed + self._ended():
            self._raise_failure(failed)
        raise _EngineFailure(min(self._died, key=self._is_consequence))

    def _is_consequence(self, rank: int) -> bool:
        died = self._died[rank]
        said = None if died.failure is None else died.failure.message
        return is_echo(said, died.status, self._processes[rank].last_lines())

    def _fate(self, rank: int) -> str:
        died = self._died[rank]
        if died.failure is not None:
            what = f"failed: {died.failure.message}"
        else:
            what = "was ended" if died.status is None else in_words(died.status)
        return f"(process {died.pid}) {what}"
