"""The parent of a cluster: starts a worker per server, passes work and outputs, ends them all.

The parent holds requests and outputs and computes nothing with JAX: when an engine dies, JAX takes
all processes of its job along, and somebody must be left to say which server it was.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import zmq

from dance_jax.cache import default_cache_dir
from dance_jax.config import ClusterSpec, EngineConfig, UserError
from dance_jax.engine.sequence import OutputDelta, Request
from dance_jax.launch import protocol
from dance_jax.launch.control import ALIVE_INTERVAL_S, Listener, bracketed, new_key
from dance_jax.launch.node import Nodes
from dance_jax.launch.plan import dump_layout
from dance_jax.launch.process import Server, ServerProcess
from dance_jax.placement.core import Layout

if TYPE_CHECKING:
    from dance_jax.models.checkpoint import Checkpoint

_Event = TypeVar("_Event", bound=msgspec.Struct)

#: Called with (server's name, stage, parts done, parts in all or 0).
ProgressCallback = Callable[[str, str, int, int], None]

#: Seconds until every started process must have called back, and, once all are prepared, joined.
CALL_TIMEOUT_S, JOIN_TIMEOUT_S = 60.0, 180.0
#: Seconds an aborted batch has to end before the workers are ended instead.
ABORT_TIMEOUT_S = 5.0
#: What a server runs.
WORKER = "dance_jax.launch.worker"
#: Seconds in which, after a first failure, others are gathered to find the one that caused them.
CAUSE_WINDOW_S = 0.7


class ClusterError(RuntimeError):
    """A server failed and the cluster was stopped; the message names it and quotes its log."""


@dataclasses.dataclass(frozen=True)
class Network:
    """How this process and servers on other machines reach each other."""

    #: For `ssh -F`.
    ssh_config: pathlib.Path | None = None
    #: Addresses of this machine at which the servers reach it (`preflight` finds them).
    control_addresses: tuple[str, ...] = ()
    #: TCP port of this process for them; 0: a free one.
    control_port: int = 0
    #: host:port where the first server coordinates jax.distributed; None: its own address.
    coordinator: str | None = None
    #: That port; 0: a free one.
    coordinator_port: int = 0
    #: The key of the launch; None: a new one.
    key: bytes | None = None


class Cluster:
    """All servers of a hosts file, each an engine process here or, over ssh, elsewhere.

    A context manager: `with Cluster(...) as cluster` starts and, however the block ends, stops
    them. If this process is killed, or the network to it breaks, the workers notice and end.

    Args:
        spec: the servers.
        checkpoint: the model, converted, on this machine.
        layout: which expert is on which device and slot.
        config: of all engines.
        model: the model's directory on other machines, where a server names none of its own;
            None: the demo model.
        log_dir: keeps each server's log as NAME.log; None: logs are removed at the end.
        cache_dir: converted models and compiled steps are kept under it; None: nowhere (other
            machines then use their own default).
        platform: "cpu" or "cuda".
        progress: told what each server does while it starts.
        network: how servers on other machines are reached.
        nodes: launchers on other nodes, which hold all servers but the first; None: this process
            starts all of them.
    """

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
        platform: str = "cpu",
        progress: ProgressCallback | None = None,
        network: Network | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        self.spec = spec
        self.checkpoint = checkpoint
        self.layout = layout
        self.config = config
        self.model = "" if model is None else str(pathlib.Path(model).absolute())
        self.log_dir = None if log_dir is None else pathlib.Path(log_dir)
        self.cache_dir = None if cache_dir is None else pathlib.Path(cache_dir).resolve()
        self.platform = platform
        self.progress = progress or (lambda *_: None)
        self.network = network or Network()
        self.nodes = nodes
        self.started = False
        #: Per server: steps read from the compile cache, and compiled.
        self.cache_use: list[tuple[int, int]] = []
        #: Per server, the last event of each kind while it starts.
        self._reached: list[dict[type, Any]] = [{} for _ in spec.servers]
        self._stats: list[Any] = [None] * len(spec.servers)
        self._processes: list[Server] = []
        self._stopping = threading.Lock()
        self._stopped_by = ""
        self._private: pathlib.Path | None = None
        self._listener: Listener | None = None
        self._beating: threading.Event | None = None

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pids(self) -> list[int | None]:
        """Process ids of the workers on their machines, in rank order."""
        return [process.pid for process in self._processes]

    def start(self, progress: ProgressCallback | None = None) -> None:
        """Starts all servers; returns when they are ready.

        Raises:
            UserError: a server cannot load what it was given.
            ClusterError: a server failed.
        """
        if self._processes:
            raise RuntimeError("the cluster was started already")
        self.progress = progress or self.progress
        atexit.register(self.stop)
        try:
            self._spawn()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        self.started = True

    def generate(
        self, requests: Iterable[tuple[int, Request]]
    ) -> Iterator[tuple[int, OutputDelta]]:
        """Runs requests on their servers, all servers together, until all are finished.

        Args:
            requests: (rank of the server, request).

        Yields:
            (rank, delta) as the servers send them. An iterator that is closed early aborts
            what still runs.

        Raises:
            ClusterError: a server failed; all are stopped.
        """
        if not self.started:
            why = f": it was stopped by {self._stopped_by}" if self._stopped_by else ""
            raise RuntimeError(f"the cluster is not running{why}; start a new one")
        batches: list[list[Request]] = [[] for _ in self.spec.servers]
        for rank, request in requests:
            batches[rank].append(request)
        # All of them first: what cannot be encoded must not leave the servers with half of it.
        work = [protocol.encode(protocol.Work(batch)) for batch in batches]
        busy = set(range(len(batches)))
        try:
            for rank, encoded in enumerate(work):
                self._send(rank, encoded)
            while busy:
                for rank, event in self._events():
                    if isinstance(event, protocol.Done):
                        self._stats[rank] = event.stats
                        busy.discard(rank)
                    elif isinstance(event, protocol.Deltas):
                        for delta in event.deltas:
                            yield rank, delta
        except GeneratorExit:
            self._abort(busy)
            raise
        except BaseException as error:
            self._stopped_by = str(error).partition("\n")[0] or type(error).__name__
            self.stop()
            raise

    def stats(self) -> list[Any]:
        """Each server's statistics since its start, as plain types, as of the last batch."""
        return list(self._stats)

    def stop(self) -> None:
        """Ends all workers and removes everything the cluster made; may be called twice."""
        with self._stopping:
            self.started = False
            try:
                self._end_processes()
            finally:
                if self._beating is not None:
                    self._beating.set()
                if self._listener is not None:
                    self._listener.close()
                    self._listener = None
                if self._private is not None:
                    shutil.rmtree(self._private, ignore_errors=True)
                atexit.unregister(self.stop)

    # Starting.

    def _spawn(self) -> None:
        self._private = private = pathlib.Path(tempfile.mkdtemp(prefix="dance-jax-"))
        key = self.network.key or new_key()
        if self.nodes is not None:
            self._listener = self.nodes.listener
        else:
            self._listener = Listener(key)
        port = self.network.control_port
        if self.nodes is None and any(server.ssh for server in self.spec.servers):
            port = self._listen()
        logs = self.log_dir or private / "logs"
        for rank, server in enumerate(self.spec.servers):
            if self.nodes is not None and rank in self.nodes.servers:
                self._processes.append(self.nodes.servers[rank])
            else:
                log, ssh_config = logs / f"{server.name}.log", self.network.ssh_config
                self._processes.append(ServerProcess(server, log, WORKER, ssh_config))
            self.progress(server.name, "starting", 0, 0)
        for rank, process in enumerate(self._processes):
            process.tell(msgspec.json.encode(self._setup(rank, key, port)))
        self._beating = stop = threading.Event()
        threading.Thread(target=self._beat, args=(stop,), daemon=True, name="beat").start()

    def _listen(self) -> int:
        assert self._listener is not None
        network = self.network
        if not network.control_addresses:
            raise ValueError("servers on other machines need Network.control_addresses")
        try:
            return self._listener.listen(network.control_addresses, network.control_port)
        except OSError as error:
            raise UserError(
                f"this machine cannot listen for its servers: {error}; give --control-address and "
                "--control-port"
            ) from error

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(ALIVE_INTERVAL_S):
            for process in self._processes:
                process.beat()

    def _setup(self, rank: int, key: bytes, port: int) -> protocol.Setup:
        assert self._listener is not None
        server = self.spec.servers[rank]
        on_node = self.nodes is not None and rank in self.nodes.servers
        remote = server.ssh is not None or on_node
        servers = list(enumerate(self.spec.servers))
        neighbours = [n for n, other in servers if other.ssh == server.ssh]
        if self.nodes is not None:
            neighbours = [rank]
        here = str(self.checkpoint.path.resolve())
        if not remote:
            control = self._listener.private
            cache = None if self.cache_dir is None else str(self.cache_dir)
        else:
            # Several: each server has seen another one of this machine's.
            addresses = self.network.control_addresses
            host = addresses[0] if len(addresses) == 1 else protocol.SSH_CLIENT
            control = f"tcp://{bracketed(host)}:{port}"
            usual = self.cache_dir in (None, default_cache_dir().resolve())
            cache = "" if usual else str(self.cache_dir)
        return protocol.Setup(
            spec=self.spec,
            rank=rank,
            config=self.config,
            model=server.model or (self.model if remote else here),
            fingerprint=self.checkpoint.fingerprint,
            layout=dump_layout(self.layout),
            control=control,
            key=key,
            platform=self.platform,
            coordinator_port=self.network.coordinator_port,
            machine_devices=tuple(self.spec.devices[n] for n in neighbours),
            machine_index=neighbours.index(rank),
            cache_dir=cache,
            private_dir="" if remote else str(self._private),
            beats=server.ssh is not None,
        )

    def _wait_until_ready(self) -> None:
        self._gather(protocol.Hello, CALL_TIMEOUT_S, "did not call back")
        prepared = self._gather(protocol.Prepared)
        join = protocol.Join(self.network.coordinator or prepared[0].coordinator)
        for rank in range(len(self._processes)):
            self._send(rank, protocol.encode(join))
        self._gather(protocol.Joined, JOIN_TIMEOUT_S, "did not join the others")
        ready = self._gather(protocol.Ready)
        self.cache_use = [(each.cache_hits, each.cache_misses) for each in ready]

    def _gather(
        self, kind: type[_Event], timeout_s: float = float("inf"), what: str = ""
    ) -> list[_Event]:
        """Waits until every server has sent an event of this kind while it starts.

        Raises:
            ClusterError: one has not within the time: `what` it did not do.
        """
        deadline = time.monotonic() + timeout_s
        while missing := [rank for rank, seen in enumerate(self._reached) if kind not in seen]:
            for rank, event in self._events():
                process = self._processes[rank]
                self._reached[rank][type(event)] = event
                if isinstance(event, protocol.Progress):
                    self.progress(process.name, event.stage, event.done, event.total)
                elif isinstance(event, protocol.Ready):
                    self.progress(process.name, "ready", 0, 0)
                elif isinstance(event, protocol.Hello):
                    process.pid = event.pid
            if time.monotonic() > deadline:
                raise self._error(self._processes[missing[0]], f"{what} within {timeout_s:.0f} s")
        return [seen[kind] for seen in self._reached]

    # Talking.

    def _send(self, rank: int, encoded: bytes) -> None:
        assert self._listener is not None
        try:
            self._listener.socket.send_multipart([b"server-%d" % rank, encoded])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._raise_failure([rank])

    def _events(self) -> list[tuple[int, Any]]:
        """What has come from the workers; waits a fifth of a second at most.

        Raises:
            UserError, ClusterError: a worker failed.
        """
        events, failed = self._receive(200)
        failed += [rank for rank, p in enumerate(self._processes) if p.ended is not None]
        if failed:
            self._raise_failure(failed)
        return events

    def _receive(self, timeout_ms: int) -> tuple[list[tuple[int, Any]], list[int]]:
        """(rank, event) of workers, and the ranks that say they failed."""
        assert self._listener is not None
        events, failed = [], []
        while self._listener.socket.poll(0 if events else timeout_ms):
            sender, content = self._listener.socket.recv_multipart()
            kind, _, number = sender.partition(b"-")
            rank = int(number)
            if kind == b"node":
                assert self.nodes is not None
                self.nodes.receive(rank, content)
                break
            event = protocol.decode_event(content)
            if isinstance(event, protocol.Failed):
                process = self._processes[rank]
                process.failure, process.user_failure = event.message, event.user
                process.failed = time.monotonic()
                failed.append(rank)
                break
            events.append((rank, event))
        if self.nodes is not None:
            self.nodes.check()
        return events, failed

    def _abort(self, busy: set[int]) -> None:
        """Ends a batch early; a cluster that does not manage to is stopped."""
        try:
            for rank in range(len(self._processes)):
                self._send(rank, protocol.encode(protocol.Abort()))
            deadline = time.monotonic() + ABORT_TIMEOUT_S
            while busy and time.monotonic() < deadline:
                for rank, event in self._events():
                    if isinstance(event, protocol.Done):
                        self._stats[rank] = event.stats
                        busy.discard(rank)
            if busy:
                self.stop()
        except (ClusterError, UserError):
            self.stop()

    # Ending.

    def _raise_failure(self, failed: list[int]) -> None:
        """Finds the server whose failure came first and raises its error."""
        suspects = {rank: self._processes[rank] for rank in failed}
        deadline = time.monotonic() + CAUSE_WINDOW_S
        while time.monotonic() < deadline:
            _, more = self._receive(50)
            more += [rank for rank, p in enumerate(self._processes) if p.ended is not None]
            suspects |= {rank: self._processes[rank] for rank in more}

        def order(process: Server) -> tuple[bool, float]:
            when = process.failed or process.ended
            return process.echo(), when if when is not None else float("inf")

        cause = min(suspects.values(), key=order)
        if cause.failure is not None and cause.user_failure:
            raise UserError(f"server {cause.name}: {cause.failure}")
        raise self._error(cause, cause.fate())

    def _error(self, process: Server, what: str) -> ClusterError:
        kept = f"; the whole log is {process.log}" if self.log_dir else ""
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
                    # DONTWAIT: nothing may hold up the end.
                    message = [b"server-%d" % rank, protocol.encode(protocol.Stop())]
                    with contextlib.suppress(zmq.ZMQError):
                        self._listener.socket.send_multipart(message, flags=zmq.DONTWAIT)
        self._await_end(alive, 0.5)
        # A worker whose input ends kills itself, on whatever machine: the others are only told so.
        for process in self._processes:
            process.let_go()
        self._await_end(self._processes, 3.0)
        for number, seconds in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0)):
            for process in self._processes:
                if process.ended is None:
                    process.kill(number)
            self._await_end(self._processes, seconds)

    def _await_end(self, processes: Iterable[Server], seconds: float) -> None:
        """Waits until all have ended, or for so long."""
        deadline = time.monotonic() + seconds
        waiting = collections.deque(processes)
        while waiting and time.monotonic() < deadline:
            if waiting[0].ended is not None:
                waiting.popleft()
            elif self.nodes is not None and self._listener is not None:
                self._receive(10)  # their ends come as messages
            else:
                time.sleep(0.01)
