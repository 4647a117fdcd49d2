"""The processes of a launch, one per server: start them, talk to them, watch and end them.

Subclasses run different processes: engines for a batch (`batch`), front ends for a service
(`service`). This process computes nothing with JAX: when an engine dies, JAX ends all processes of
its job, and the launcher must survive to report which server failed.
"""

from __future__ import annotations

import abc
import atexit
import collections
import functools
import os
import pathlib
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import msgspec

from dance_jax.cache import default_cache_dir
from dance_jax.config import ClusterSpec, EngineConfig, UserError
from dance_jax.launch.agent import model_files
from dance_jax.launch.agent.adopted import AdoptedProcess, nobody
from dance_jax.launch.agent.child import END
from dance_jax.launch.agent.network import Network
from dance_jax.launch.agent.process import ServerProcess, remove_log
from dance_jax.launch.cluster.trace import TraceFile
from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import (
    ALIVE_INTERVAL_S,
    ControlListener,
    bracketed,
    new_key,
    server_identity,
)
from dance_jax.launch.planning.hosts import is_loopback
from dance_jax.models.hub import portable_name
from dance_jax.placement.core import Layout

if TYPE_CHECKING:
    from dance_jax.models.checkpoint import Checkpoint

_Event = TypeVar("_Event", bound=msgspec.Struct)

#: Called with (server's name, stage, parts done, total parts or 0 if unknown).
StartCallback = Callable[[str, str, int, int], None]

#: Seconds until every started process must have called back; seconds until all prepared servers
#: must have joined.
CALL_TIMEOUT_S, JOIN_TIMEOUT_S = 60.0, 180.0
#: Seconds in which further failures are collected after the first, to find their common cause.
CAUSE_WINDOW_S = 0.7


class ClusterError(RuntimeError):
    """A server failed and the cluster was stopped; the message names it and quotes its log."""


class Fleet(abc.ABC):
    """All servers' processes: on this machine, over ssh, or on other nodes (--node-rank).

    A context manager: `with Cluster(...) as cluster` starts the processes and always stops them.
    If this process is killed or the network to it breaks, the server processes end by themselves.

    Args:
        spec: the servers.
        checkpoint: the converted model on this machine.
        layout: device and slot of every expert.
        config: of all engines.
        model: the model's directory on other machines, or its name on the hub, for servers without
            model=; None: the demo model.
        log_dir: directory that keeps each server's log as NAME.log; None: logs are removed at the
            end.
        cache_dir: directory of converted models and compiled steps; None: no cache (other machines
            then use their default).
        progress: called with what each server does while it starts.
        network: how servers on other machines are reached.
        trace: file for a trace of all servers; None: no trace.
    """

    #: Module that a server's process runs, and whether SIGTERM drains the process first.
    module: ClassVar[str]
    drains: ClassVar[bool] = False
    #: The servers go on without this process, until another one takes over.
    outlives = False

    def __init__(
        self,
        spec: ClusterSpec,
        checkpoint: Checkpoint,
        layout: Layout,
        config: EngineConfig,
        *,
        model: str | os.PathLike[str] | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: StartCallback | None = None,
        network: Network | None = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> None:
        self.spec = spec
        self.checkpoint = checkpoint
        #: Where every expert is, on all servers; the rebalancer of a service replaces it.
        self.layout = layout
        self.config = config
        self.model = "" if model is None else portable_name(model)
        self.log_dir = None if log_dir is None else pathlib.Path(log_dir)
        self.cache_dir = None if cache_dir is None else pathlib.Path(cache_dir).resolve()
        self.progress = progress or (lambda *_: None)
        self.network = network or Network()
        self.nodes = self.network.nodes
        self._trace_path = trace
        self._trace: TraceFile | None = None
        self.started = False
        #: Each server steps on its own and answers calls to its experts.
        self.calls = config.exchange != "collectives"
        #: By rank, where the servers listen for each other; "": the server is restarting.
        self._endpoints: list[str] = []
        self._processes: list[ServerProcess] = []
        #: Per server, the last event of each kind while it starts.
        self._reached: list[dict[type, Any]] = [{} for _ in spec.servers]
        self._stopping = threading.Lock()
        self._private: pathlib.Path | None = None
        #: The launch's key, and the port of this process that servers on other machines connect to.
        self._key, self._control_port = b"", 0
        self._listener: ControlListener | None = None
        self._beating: threading.Event | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pids(self) -> list[int | None]:
        """Process ids of the servers on their machines, in rank order."""
        return [self._processes[rank].pid for rank in self.spec.seated if self._processes]

    def start(self, progress: StartCallback | None = None) -> None:
        """Start all servers; returns when they are ready.

        Raises:
            UserError: a server cannot load its model or options, or the trace cannot be written.
            ClusterError: a server failed.
        """
        if self._processes:
            raise RuntimeError("the cluster was started already")
        self.progress = progress or self.progress
        atexit.register(self.stop)
        try:
            if self._trace_path is not None:
                one_clock = not self.network.any_remote(self.spec)
                self._trace = TraceFile(self._trace_path, self.spec.names, one_clock)
            self._spawn()
            self._bring_up()
        except BaseException:
            self.stop()
            raise
        self.started = True

    def stop(self) -> None:
        """End all processes and remove everything this object made; may be called twice."""
        with self._stopping:
            self.started = False
            try:
                self._end_processes()
            finally:
                if self._trace is not None:
                    self._trace.close()
                if self._beating is not None:
                    self._beating.set()
                if self._listener is not None and self.nodes is None:
                    self._listener.close()
                self._listener = None
                if self._private is not None:
                    shutil.rmtree(self._private, ignore_errors=True)
                atexit.unregister(self.stop)

    # Starting.

    def _spawn(self) -> None:
        self._private = self._private_dir()
        self._key = key = self.network.key or new_key()
        if self.nodes is not None:
            self._listener = self.nodes.listener
        else:
            peers = map(server_identity, range(len(self.spec.servers)))
            self._listener = ControlListener(key, peers)
        self._control_port = self.network.control_port
        if self.nodes is None and self.network.any_remote(self.spec):
            self._control_port = self._listen()
        self._processes = [nobody() for _ in self.spec.servers]
        for rank in self.spec.seated:
            remove_log(self._log_path(rank))
            self._processes[rank] = self._start_process(rank)
            self.progress(self.spec.names[rank], "starting", 0, 0)
        for rank in self.spec.seated:
            self._write_setup(rank)
        self._begin_beats()

    def _private_dir(self) -> pathlib.Path:
        """A new directory for logs and the servers' temporary files."""
        return pathlib.Path(tempfile.mkdtemp(prefix="dance-jax-"))

    def _begin_beats(self) -> None:
        self._beating = stop = threading.Event()
        threading.Thread(target=self._beat, args=(stop,), daemon=True, name="beat").start()

    def _log_path(self, rank: int) -> pathlib.Path:
        assert self._private is not None
        return (self.log_dir or self._private / "logs") / f"{self.spec.names[rank]}.log"

    def _start_process(self, rank: int) -> ServerProcess:
        return self.network.start(
            rank,
            self.spec.servers[rank],
            self.module,
            log_path=self._log_path(rank),
            drains=self.drains,
            private=str(self._private),
        )

    def _write_setup(self, rank: int) -> None:
        setup = self._process_setup(self._setup(rank))
        self._processes[rank].write(msgspec.json.encode(setup))

    def _listen(self) -> int:
        assert self._listener is not None
        network = self.network
        if not network.control_addresses:
            raise ValueError("servers on other machines need Network.control_addresses")
        try:
            return self._listener.listen(network.control_addresses, network.control_port)
        except OSError as error:
            raise UserError(
                f"this machine cannot listen for its servers: {error}; give another "
                "--control-address or --control-port"
            ) from error

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(ALIVE_INTERVAL_S):
            for process in self._processes:
                process.beat()

    def _process_setup(self, engine: protocol.Setup) -> msgspec.Struct:
        """The setup that a server's process reads from its standard input."""
        return engine

    def _setup(self, rank: int) -> protocol.Setup:
        assert self._listener is not None
        server = self.spec.servers[rank]
        process = self._processes[rank]
        neighbours = self._neighbours(rank)
        model = self.model if process.remote else str(self.checkpoint.path.resolve())
        if not process.remote:
            control = self._listener.private
            cache = None if self.cache_dir is None else str(self.cache_dir)
        else:
            # With several addresses, each server saw a different one of this machine's.
            addresses = self.network.control_addresses
            host = addresses[0] if len(addresses) == 1 else protocol.SSH_CLIENT
            control = f"tcp://{bracketed(host)}:{self._control_port}"
            usual = self.cache_dir in (None, default_cache_dir().resolve())
            cache = "" if usual else str(self.cache_dir)
        return protocol.Setup(
            spec=self.spec,
            rank=rank,
            config=self.config,
            model="" if server.from_peers else server.model or model,
            model_files=self._model_files if server.from_peers else b"",
            fingerprint=self.checkpoint.fingerprint,
            experts=self.checkpoint.form(self.config.dtype).name,
            layout=self.layout.to_bytes(),
            control=control,
            control_key=self._key,
            key=self._key,
            first_gpu=self._first_gpu(rank, neighbours),
            coordinator_port=self.network.coordinator_port,
            machine_devices=tuple(self.spec.devices[n] for n in neighbours),
            machine_index=neighbours.index(rank),
            cache_dir=cache,
            beats=process.beats,
            trace_from=0 if self._trace is None else self._trace.began_ns,
        )

    @functools.cached_property
    def _model_files(self) -> bytes:
        return model_files.pack(self.checkpoint.path)

    def _first_gpu(self, rank: int, neighbours: Sequence[int]) -> int:
        """First GPU of a server without gpus=: such servers share out a machine's GPUs in order."""
        before = [self.spec.servers[n] for n in neighbours if n < rank]
        return sum(each.devices for each in before if each.platform == "cuda" and not each.gpus)

    def _neighbours(self, rank: int) -> list[int]:
        """Ranks of the servers on the same machine, including this one."""
        mine = self.spec.servers[rank]
        return [
            n
            for n, other in enumerate(self.spec.servers)
            if n == rank
            or (self.nodes is None and other.ssh == mine.ssh and not other.vacant)
            # Servers with loopback addresses reach each other, so they are on one machine.
            or is_loopback(other.address)
        ]

    def _bring_up(self) -> None:
        """Wait until all processes have called back and their engines are ready for requests."""
        ranks = self.spec.seated
        self._gather(ranks, protocol.Hello, CALL_TIMEOUT_S, "did not call back")
        prepared = self._gather(ranks, protocol.Prepared)
        self._endpoints = [""] * len(self.spec.servers)
        for rank, each in zip(ranks, prepared, strict=True):
            self._endpoints[rank] = each.endpoint
        self._send_all(self._join_message(prepared[0]))
        self._gather(ranks, protocol.Joined, JOIN_TIMEOUT_S, "did not join the others")
        self._gather(ranks, protocol.Ready)

    def _join_message(self, first: protocol.Prepared) -> protocol.Join:
        coordinator = self.network.coordinator or first.coordinator
        return protocol.Join(coordinator, self._endpoints, self.calls)

    def _gather(
        self,
        ranks: Iterable[int],
        kind: type[_Event],
        timeout_s: float = float("inf"),
        what: str = "",
    ) -> list[_Event]:
        """Wait until each of these servers has sent an event of this kind while starting.

        Raises:
            ClusterError: a server has not in time; the message says `what` it did not do.
        """
        deadline = time.monotonic() + timeout_s
        while missing := [rank for rank in ranks if kind not in self._reached[rank]]:
            for rank, event in self._events():
                process = self._processes[rank]
                if protocol.Ready in self._reached[rank]:
                    self._handle(rank, event)
                    continue
                self._reached[rank][type(event)] = event
                if isinstance(event, protocol.Progress):
                    self.progress(process.name, event.stage, event.done, event.total)
                elif isinstance(event, protocol.Ready):
                    self.progress(process.name, "ready", 0, 0)
                elif isinstance(event, protocol.Hello):
                    process.pid = event.pid
            if time.monotonic() > deadline:
                raise self._error(missing[0], f"{what} within {timeout_s:.0f} s")
        return [self._reached[rank][kind] for rank in ranks]

    def _handle(self, rank: int, event: Any) -> None:  # noqa: B027
        """Handle an event of a ready server while other servers start."""

    # Messages.

    def _send_all(self, command: msgspec.Struct) -> None:
        for rank in self.spec.seated:
            self._send(rank, protocol.encode(command))

    def _send(self, rank: int, encoded: bytes) -> None:
        """Send a message; the end of a process that cannot get it is noticed by `_events`."""
        assert self._listener is not None
        self._listener.send(server_identity(rank), encoded)

    @abc.abstractmethod
    def _decode(self, rank: int, content: bytes) -> Any:
        """Decode an event of a server's process; None: the event needs no further handling."""

    def _events(self) -> list[tuple[int, Any]]:
        """Receive the servers' events, waiting at most a fifth of a second.

        Raises:
            UserError, ClusterError: a server failed.
        """
        events, failed = self._receive(200)
        failed += self._ended()
        if failed:
            self._raise_failure(failed)
        return events

    def _ended(self) -> list[int]:
        return [rank for rank in self.spec.seated if self._processes[rank].ended is not None]

    def _unreachable(self) -> list[int]:
        return [rank for rank, each in enumerate(self._processes) if each.unreachable is not None]

    def _receive(self, timeout_ms: int) -> tuple[list[tuple[int, Any]], list[int]]:
        """Receive (rank, event) pairs, and the ranks of servers that report a failure."""
        assert self._listener is not None
        events, failed = self._events_of(self._listener.receive(timeout_ms / 1000))
        if self.nodes is not None:
            self.nodes.check()
        for rank, process in enumerate(self._processes):
            if isinstance(process, AdoptedProcess):
                process.reached(self._listener.connected(server_identity(rank)))
        return events, failed

    def _events_of(
        self, messages: Iterable[tuple[str, bytes]]
    ) -> tuple[list[tuple[int, Any]], list[int]]:
        """The events of messages, as `_receive`."""
        events, failed = [], []
        for sender, content in messages:
            kind, _, number = sender.partition("-")
            rank = int(number)
            if kind == "node":
                assert self.nodes is not None
                self.nodes.receive(rank, content)
                continue
            event = self._decode(rank, content)
            if isinstance(event, protocol.Traced):
                if self._trace is not None:
                    self._trace.add(event.lines)
            elif isinstance(event, protocol.Failed):
                process = self._processes[rank]
                process.failure, process.user_failure = event.message, event.user
                process.failed = time.monotonic()
                failed.append(rank)
            elif event is not None:
                events.append((rank, event))
        return events, failed

    # Ending.

    def _raise_failure(self, failed: list[int]) -> None:
        """Find the server that failed first and raise its error."""
        suspects = set(failed)
        deadline = time.monotonic() + CAUSE_WINDOW_S
        while time.monotonic() < deadline:
            suspects |= {*self._receive(50)[1], *self._ended(), *self._unreachable()}

        def order(rank: int) -> tuple[bool, float]:
            process = self._processes[rank]
            when = process.failed or process.ended or process.unreachable
            return process.ended_as_consequence(), when if when is not None else float("inf")

        cause = min(suspects, key=order)
        process = self._processes[cause]
        if process.failure is not None and process.user_failure:
            raise UserError(f"server {process.name}: {process.failure}")
        raise self._error(cause, process.fate())

    def _error(self, rank: int, what: str) -> ClusterError:
        process = self._processes[rank]
        kept = f"; the whole log is {process.log_place}" if self.log_dir else ""
        lines = "\n".join(f"    {line}" for line in process.last_lines()) or "    (it is empty)"
        number = f" (process {process.pid})" if process.pid is not None else ""
        return ClusterError(
            f"server {process.name}{number} {what}; all servers were "
            f"stopped{kept}. The last lines of its log:\n{lines}"
        )

    def _end_processes(self) -> None:
        alive = [process for process in self._processes if process.ended is None]
        if alive and self._listener is not None:
            for rank, process in enumerate(self._processes):
                if process in alive:
                    self._send(rank, protocol.encode(protocol.Stop()))
        self._await_end(alive, 0.5)
        # A process whose input ends kills itself, on any machine; signals follow if it does not.
        for process in self._processes:
            if self.outlives:
                process.write(END)
            process.let_go()
        self._await_end(self._processes, 3.0)
        for number, seconds in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0)):
            for process in self._processes:
                if process.ended is None:
                    process.kill(number)
            self._await_end(self._processes, seconds)

    def _await_end(self, processes: Iterable[ServerProcess], seconds: float) -> None:
        """Wait until all processes have ended, at most for `seconds`."""
        deadline = time.monotonic() + seconds
        waiting = collections.deque(processes)
        while waiting and time.monotonic() < deadline:
            if waiting[0].ended is not None:
                waiting.popleft()
            elif self._listener is not None and (self.nodes is not None or self.outlives):
                self._receive(10)  # the ends of processes that are not children arrive so
            else:
                time.sleep(0.01)
