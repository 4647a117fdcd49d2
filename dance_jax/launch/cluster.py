"""The parent of a cluster: starts a worker per server, passes work and outputs, ends them all.

The parent holds requests and outputs and computes nothing with JAX: when an engine dies, JAX takes
all processes of its job along, and somebody must be left to say which server it was.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
import zmq

from dance_jax.cache import private_directory
from dance_jax.config import ClusterSpec, EngineConfig, UserError
from dance_jax.engine.sequence import OutputDelta, Request
from dance_jax.launch import cores, protocol
from dance_jax.launch.plan import save_layout
from dance_jax.models import kernels_cpu
from dance_jax.placement.core import Layout

#: Called with (server's name, stage, parts done, parts in all or 0).
ProgressCallback = Callable[[str, str, int, int], None]

#: Seconds from the start of the workers until all must have joined.
JOIN_TIMEOUT_S = 180.0
#: Seconds an aborted batch has to end before the workers are ended instead.
ABORT_TIMEOUT_S = 5.0
#: Seconds in which, after a first failure, others are gathered to find the one that caused them.
CAUSE_WINDOW_S = 0.7
#: Lines of a dead server's log in the error.
LOG_LINES = 25

#: In a log or message, signs that a process failed because another was gone.
_ECHOES = (
    "gloo",
    "Connection reset by peer",
    "Connection closed by peer",
    "coordination service",
    "CoordinationService",
    "heartbeat",
    "another task died",
    "UNAVAILABLE",
)


class ClusterError(RuntimeError):
    """A server failed and the cluster was stopped; the message names it and quotes its log."""


class _Process:
    """One worker process and what is known of its end."""

    def __init__(self, name: str, log_path: pathlib.Path, environment: dict[str, str]) -> None:
        self.name = name
        self.log_path = log_path
        #: time.monotonic() of its end, as soon as it is noticed.
        self.ended: float | None = None
        self.failure: protocol.Failed | None = None
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(log_path, "wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "dance_jax.launch.worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is for the parent alone
            )
        threading.Thread(target=self._wait, daemon=True, name=f"wait-{name}").start()

    def _wait(self) -> None:
        self.popen.wait()
        self.ended = time.monotonic()

    def tell(self, line: bytes) -> None:
        """Writes its setup; standard input stays open as a sign of life."""
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead, which is noticed elsewhere
            self.popen.stdin.write(line + b"\n")
            self.popen.stdin.flush()

    def kill(self, number: signal.Signals) -> None:
        """Sends a signal to the worker and everything it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, number)

    def fate(self) -> str:
        """How it ended, in words."""
        code = self.popen.poll()
        if self.failure is not None:
            return f"failed: {self.failure.message}"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"ended with exit status {code}"

    def last_lines(self) -> list[str]:
        try:
            with open(self.log_path, "rb") as log:
                log.seek(max(0, os.path.getsize(self.log_path) - 16384))
                return log.read().decode(errors="replace").splitlines()[-LOG_LINES:]
        except OSError as error:
            return [f"(the log cannot be read: {error})"]

    def echo(self) -> bool:
        """It looks like a consequence of another server's end."""
        code = self.popen.poll()
        if self.failure is None and code is not None and code < 0:
            return code == -signal.SIGABRT  # how JAX ends a process whose job is broken
        text = self.failure.message if self.failure else "\n".join(self.last_lines())
        return any(sign.lower() in text.lower() for sign in _ECHOES)


class Cluster:
    """All servers of a hosts file, each an engine process on this machine.

    A context manager: `with Cluster(...) as cluster` starts and, however the block ends, stops
    them. If this process is killed, the workers notice and end as well.

    Args:
        spec: the servers.
        checkpoint: directory of the converted model.
        layout: which expert is on which device and slot.
        config: of all engines.
        log_dir: keeps each server's log as NAME.log; None: logs are removed at the end.
        cache_dir: compiled steps are kept under it; None: nowhere.
        platform: "cpu" or "cuda".
        progress: told what each server does while it starts.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        checkpoint: str | os.PathLike[str],
        layout: Layout,
        config: EngineConfig,
        *,
        log_dir: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        platform: str = "cpu",
        progress: ProgressCallback | None = None,
    ) -> None:
        self.spec = spec
        self.checkpoint = pathlib.Path(checkpoint).resolve()
        self.layout = layout
        self.config = config
        self.log_dir = None if log_dir is None else pathlib.Path(log_dir)
        self.cache_dir = None if cache_dir is None else pathlib.Path(cache_dir).resolve()
        self.platform = platform
        self.progress = progress or (lambda *_: None)
        self.started = False
        #: Per server: steps read from the compile cache, and compiled.
        self.cache_use: list[tuple[int, int]] = []
        self._stats: list[Any] = [None] * len(spec.servers)
        self._processes: list[_Process] = []
        self._stopping = threading.Lock()
        self._stopped_by = ""
        self._private: pathlib.Path | None = None
        self._context: zmq.Context | None = None
        self._socket: zmq.Socket | None = None

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, in rank order."""
        return [process.popen.pid for process in self._processes]

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
                if self._socket is not None and self._context is not None:
                    self._socket.close(linger=0)
                    self._context.term()
                    self._socket = self._context = None
                if self._private is not None:
                    shutil.rmtree(self._private, ignore_errors=True)
                atexit.unregister(self.stop)

    # Starting.

    def _spawn(self) -> None:
        self._private = private = pathlib.Path(tempfile.mkdtemp(prefix="dance-jax-"))
        self._context = zmq.Context()
        self._socket = listener = self._context.socket(zmq.ROUTER)
        listener.setsockopt(zmq.ROUTER_MANDATORY, 1)
        control = f"ipc://{private}/control"
        if len(control) > 100:  # a socket's path has 107 bytes at most
            control = f"tcp://127.0.0.1:{listener.bind_to_random_port('tcp://127.0.0.1')}"
        else:
            listener.bind(control)
        save_layout(self.layout, private / "layout.npz")
        shares = cores.share(cores.available(), self.spec.devices)
        coordinator = f"127.0.0.1:{_free_port()}"
        logs = self.log_dir or private / "logs"
        environment = _environment(self.platform)
        for server in self.spec.servers:
            process = _Process(server.name, logs / f"{server.name}.log", environment)
            self._processes.append(process)
        compile_dir = self.cache_dir and private_directory(self.cache_dir / "compiled")
        library = kernels_cpu.build(compile_dir or private) if self.platform == "cpu" else None
        for rank, process in enumerate(self._processes):
            setup = protocol.Setup(
                spec=self.spec,
                rank=rank,
                config=self.config,
                checkpoint=str(self.checkpoint),
                layout=str(private / "layout.npz"),
                control=control,
                coordinator=coordinator,
                address="127.0.0.1",
                platform=self.platform,
                cores=shares[rank],
                compile_dir=None if compile_dir is None else str(compile_dir),
                expert_library=None if library is None else str(library),
                private_dir=str(private),
            )
            process.tell(msgspec.json.encode(setup))

    def _wait_until_ready(self) -> None:
        ready: dict[int, tuple[int, int]] = {}
        joined: set[int] = set()
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        for process in self._processes:
            self.progress(process.name, "starting", 0, 0)
        while len(ready) < len(self._processes):
            for rank, event in self._events():
                name = self._processes[rank].name
                if isinstance(event, protocol.Progress):
                    if event.stage != "joining":
                        joined.add(rank)
                    self.progress(name, event.stage, event.done, event.total)
                elif isinstance(event, protocol.Ready):
                    ready[rank] = (event.cache_hits, event.cache_misses)
                    self.progress(name, "ready", 0, 0)
            late = [p.name for rank, p in enumerate(self._processes) if rank not in joined]
            if late and time.monotonic() > deadline:
                raise self._error(
                    self._processes[self.spec.rank_of(late[0])],
                    f"did not join the others within {JOIN_TIMEOUT_S:.0f} s",
                )
        self.cache_use = [ready[rank] for rank in range(len(self._processes))]

    # Talking.

    def _send(self, rank: int, encoded: bytes) -> None:
        assert self._socket is not None
        try:
            self._socket.send_multipart([b"server-%d" % rank, encoded])
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
        assert self._socket is not None
        events, failed = [], []
        while self._socket.poll(0 if events else timeout_ms):
            sender, content = self._socket.recv_multipart()
            rank, event = int(sender.rpartition(b"-")[2]), protocol.decode_event(content)
            if isinstance(event, protocol.Failed):
                self._processes[rank].failure = event
                failed.append(rank)
                break
            events.append((rank, event))
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

        def order(process: _Process) -> tuple[bool, float]:
            failure = process.failure
            when = failure.time if failure else process.ended
            return process.echo(), when if when is not None else float("inf")

        cause = min(suspects.values(), key=order)
        failure = cause.failure
        if failure is not None and failure.user:
            raise UserError(f"server {cause.name}: {failure.message}")
        raise self._error(cause, cause.fate())

    def _error(self, process: _Process, what: str) -> ClusterError:
        kept = f"; the whole log is {process.log_path}" if self.log_dir else ""
        lines = "\n".join(f"    {line}" for line in process.last_lines()) or "    (it is empty)"
        return ClusterError(
            f"server {process.name} (process {process.popen.pid}) {what}; all servers were "
            f"stopped{kept}. The last lines of its log:\n{lines}"
        )

    def _end_processes(self) -> None:
        alive = [process for process in self._processes if process.ended is None]
        if alive and self._socket is not None:
            for rank, process in enumerate(self._processes):
                if process in alive:
                    # DONTWAIT: nothing may hold up the end.
                    message = [b"server-%d" % rank, protocol.encode(protocol.Stop())]
                    with contextlib.suppress(zmq.ZMQError):
                        self._socket.send_multipart(message, flags=zmq.DONTWAIT)
        _wait(alive, 0.5)
        for number, seconds in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 10.0)):
            for process in self._processes:
                if process.ended is None:
                    process.kill(number)
            _wait(self._processes, seconds)
        for process in self._processes:
            if process.popen.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.popen.stdin.close()


def _wait(processes: Iterable[_Process], seconds: float) -> None:
    """Waits until all have ended, or for so long."""
    deadline = time.monotonic() + seconds
    waiting = collections.deque(processes)
    while waiting and time.monotonic() < deadline:
        if waiting[0].ended is None:
            time.sleep(0.01)
        else:
            waiting.popleft()


def _environment(platform: str) -> dict[str, str]:
    """The workers' environment: this one's, without what would steer JAX elsewhere."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_COORDINATOR", "JAX_NUM_", "JAX_PROCESS", "JAX_LOCAL_DEVICE"))
    }
    package_parent = str(pathlib.Path(__file__).resolve().parents[2])
    paths = [package_parent, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["PYTHONUNBUFFERED"] = "1"
    environment["JAX_PLATFORMS"] = platform
    # A worker's device count is its server's, not a test's or a user's flag.
    flags = environment.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if "host_platform_device_count" not in flag]
    if platform == "cpu":
        # A step is hundreds of small kernels around library matrix products: compiling them
        # plainly halves the time to start and costs no measurable time in the step.
        flags = [
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_backend_optimization_level=1",
            *flags,
        ]
    if platform == "cuda":
        # Each process compiles its own program, so results of autotuning are not to be shared.
        flags.append("--xla_gpu_shard_autotuning=false")
    environment["XLA_FLAGS"] = " ".join(flags)
    return environment


def _free_port() -> int:
    """A TCP port of the loopback interface that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
