"""A cluster that serves: the parent of one front end per server, each with its own engine.

What all services have in common; servers that step on their own are in `independent`, servers that
step together in `together`. The rebalancer moves experts to where they are used.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from dance_jax.config import ClusterSpec, EngineConfig, RebalanceOptions, ServeOptions, UserError
from dance_jax.launch.agent.process import in_words, is_consequence
from dance_jax.launch.cluster.fleet import CAUSE_WINDOW_S, Fleet
from dance_jax.launch.cluster.keys import KeyFile
from dance_jax.launch.cluster.succession import FRONT_END
from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import bracketed
from dance_jax.launch.planning.hosts import is_loopback

if TYPE_CHECKING:
    from dance_jax.launch.rebalance.workload import Statistics
    from dance_jax.models.checkpoint import Checkpoint
    from dance_jax.placement.core import Layout

#: Called with (server's name or "", a message).
Notice = Callable[[str, str], None]

MAX_PORT = 65535
#: Seconds beyond the drain time after which a front end that has not drained is stopped.
DRAIN_MARGIN_S = 5.0


class EngineFailure(Exception):
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
        ports: of servers that have one already, by rank.
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
        ports: Mapping[int, int] = MappingProxyType({}),
        **kwargs: Any,
    ) -> None:
        # Imported here, because the import is slow and errors in the files are reported first.
        from dance_jax.engine.generation import sampling_defaults
        from dance_jax.launch.rebalance.controller import Rebalancer
        from dance_jax.models.chat_template import read_template

        super().__init__(spec, checkpoint, layout, config, **kwargs)
        self.options = options
        #: The model's defaults of sampling.
        self.sampling = sampling_defaults(checkpoint.path, options.generation_config)
        self._chat_template = read_template(options.chat_template)
        self._key_file = None if options.api_key_file is None else KeyFile(options.api_key_file)
        #: Ports of the servers by rank; they change as servers join and leave.
        self._ports = dict(ports)
        for rank in self.spec.seated:
            self._ports.setdefault(rank, self._free_port(rank))
        how = rebalance or RebalanceOptions(interval_s=0)
        self._rebalancer = Rebalancer(how, self.spec, self.checkpoint, self.config, self, before)
        #: Whether the hosts file is to be read again.
        self._reload = False
        #: Per server, number of the engine's latest start.
        self._starts = [0] * len(self.spec.servers)
        #: By rank, how a server's processes ended last, and when, unix time in seconds.
        self.faults: dict[int, tuple[str, float]] = {}
        #: Ranks of dead engines with the reports of their death.
        self._died: dict[int, protocol.EngineDied] = {}
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
                self._turn()
                self._follow_keys()

    @abc.abstractmethod
    def _turn(self) -> None:
        """Handle what has happened, and do what is due.

        Raises:
            ClusterError: as `serve`.
            _Drained: as `_check_drain`.
        """

    @property
    def _keys(self) -> list[str]:
        """Keys, one of which requests must carry; none: they need no key."""
        one = [] if self.options.api_key is None else [self.options.api_key]
        return one + ([] if self._key_file is None else self._key_file.keys)

    def _follow_keys(self) -> None:
        try:
            if self._key_file is not None and self._key_file.changed():
                self.tell_all(protocol.Keys(self._keys))
                self.notice("", f"{self.options.api_key_file}: the keys have changed")
        except UserError as error:
            self.notice("", f"{error}; the keys stay as they were")

    def stop(self) -> None:
        """Stop all servers, as `Fleet.stop`."""
        self._rebalancer.close()
        super().stop()

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
    @abc.abstractmethod
    def present(self) -> frozenset[int]:
        """Ranks of the servers that run."""

    @property
    def gone(self) -> frozenset[int]:
        """Ranks of the servers that are gone with their front ends."""
        return frozenset()

    @property
    def epoch(self) -> int:
        """Number that grows whenever `present` changes."""
        return 1

    @abc.abstractmethod
    def restart(self, rank: int, why: str) -> None:
        """Restart an engine that is out of step with the launcher."""

    def drain(self) -> None:
        """Let all servers finish their requests and end `serve`; safe in a signal handler."""
        self._drain_wanted = True

    def reload(self) -> None:
        """Read the hosts file again; safe in a signal handler."""
        self._reload = True

    def _bring_up(self) -> None:
        try:
            super()._bring_up()
        except EngineFailure as failure:
            if self.started:
                raise
            died = self._died[failure.rank]
            name = self.spec.names[failure.rank]
            if died.failure is not None and died.failure.user:
                raise UserError(f"server {name}: {died.failure.message}") from None
            what = f"cannot start: its engine {self._fate(failure.rank)}"
            raise self._error(failure.rank, what) from None

    def _process_setup(self, engine: protocol.Setup) -> msgspec.Struct:
        options = dataclasses.replace(self.options, port=self._ports[engine.rank])
        return protocol.FrontSetup(
            engine=engine,
            options=options,
            start=self._starts[engine.rank],
            sampling=self.sampling,
            keys=self._keys,
            chat_template=self._chat_template,
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
        return self._sorted(rank, protocol.decode_front_event(content))

    def _sorted(self, rank: int, event: Any) -> Any:
        """Handle an event that is the same for all services; returns others."""
        match event:
            case protocol.FromEngine(start, from_engine):
                return from_engine if start == self._starts[rank] else None
            case protocol.EngineDied() as died:
                if died.start == self._starts[rank]:
                    self._died[rank] = died
                    self.faults[rank] = f"its engine {fate(died)}", time.time()
            case protocol.Watching():
                self._show(rank)
            case protocol.View(watcher, view):
                self._tell_view(watcher, rank, view)
            case protocol.DrainServer(number, name):
                self.tell(rank, protocol.DrainAnswered(number, self._drain_server(name)))
            case protocol.RebalanceWanted() as wanted:
                self._rebalancer.want(rank, wanted)
            case protocol.DrainWanted():
                self.drain()
            case protocol.Drained():
                self._drained.add(rank)
            case _:
                return event
        return None

    def _show(self, watcher: int) -> None:
        """Have all servers show what they do to somebody who watches at one of them."""
        for rank in self.spec.seated:
            if rank in self.present and rank != watcher:
                self.tell(rank, protocol.AskView(watcher, self._url(watcher, rank)))
            else:
                self._tell_view(watcher, rank, b"")

    def _tell_view(self, watcher: int, rank: int, view: bytes) -> None:
        fault = self.faults.get(rank, ("", 0.0))
        self.tell(watcher, protocol.Viewed(rank, view, self._url(rank, watcher), *fault))

    def _url(self, rank: int, other: int) -> str:
        """Where users of another server reach a server; "" if the server is gone, or listens only
        on the loopback interface of another machine."""
        if is_loopback(self.options.bind) and rank not in self._neighbours(other):
            return ""
        return dict(zip(self.spec.seated, self.urls, strict=True)).get(rank, "")

    def _drain_server(self, name: str) -> str:
        """Let a server finish its requests and leave; or say why it cannot."""
        return "servers of this service cannot leave"

    def _handle(self, rank: int, event: Any) -> None:
        self._rebalancer.receive(rank, event)

    def _events(self) -> list[tuple[int, Any]]:
        """Receive events as `Fleet._events`, only of the engines' current starts.

        Raises:
            EngineFailure: an engine died.
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
        raise EngineFailure(min(self._died, key=self._is_consequence))

    def _is_consequence(self, rank: int) -> bool:
        died = self._died[rank]
        said = None if died.failure is None else died.failure.message
        return is_consequence(said, died.status, self._processes[rank].last_lines())

    def _fate(self, rank: int) -> str:
        return fate(self._died[rank])


def fate(died: protocol.EngineDied) -> str:
    """How an engine ended, as text."""
    if died.failure is not None:
        what = f"failed: {died.failure.message}"
    else:
        what = "ended" if died.status is None else in_words(died.status)
    return f"(process {died.pid}) {what}"
