"""One server's engine process: `python -m dance_jax.launch.worker.main`.

It is started by `Cluster` or by the server's front end.

The order of the steps matters. The model is made ready before any server waits for another. Cores
are limited while JAX makes its devices, because XLA sizes its thread pools by them. Then the engine
loads and compiles, and steps while it has work. If servers step together, all processes first run
one collective, because a first collective of only some of them fails; then they all step while any
server has work, and once a second while none has, which shows that all of them still can. Moved
experts are read in the background (`loading`). A step may wait for servers that do not answer;
meanwhile a thread receives the parent's commands.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import gc
import multiprocessing
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from dance_jax.cache import default_cache_dir, private_directory
from dance_jax.config import Rounding, UserError
from dance_jax.launch.agent import child
from dance_jax.launch.agent.model_files import ModelFiles
from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import ControlConnection, derived, server_identity
from dance_jax.launch.control.protocol import Setup
from dance_jax.launch.worker import environment
from dance_jax.launch.worker.join import coordinator_endpoint, join, listen
from dance_jax.launch.worker.pulse import Pulse
from dance_jax.launch.worker.wakeup import Wakeup
from dance_jax.memory import use_huge_pages
from dance_jax.models.connections import Connections, Credentials, Identity

if TYPE_CHECKING:
    from dance_jax.engine.engine import Engine, StepResult
    from dance_jax.launch.worker.loading import Loaded, Loader
    from dance_jax.launch.worker.peers import Peers
    from dance_jax.models.checkpoint import Checkpoint, WeightSource
    from dance_jax.models.config import ModelConfig
    from dance_jax.models.formats import Formats

#: Seconds after which idle servers step together; seconds between two reports of busy servers.
HEARTBEAT_S, REPORT_S = 1.0, 0.25
#: Seconds for which reports have the counts of experts after somebody has looked.
WATCHED_S = 5.0
#: Seconds after which a waterfall that is not complete may be replaced: nobody waits any more.
DRAW_S = 10.0
#: Seconds between two checks of a loading batch on an idle server.
LOADING_POLL_S = 0.05
#: Seconds for which a loading thread may keep the interpreter from the stepping thread.
SWITCH_S = 0.0005
#: Seconds of a step after which another thread receives the parent's commands.
HEAR_S = 0.05
#: Messages without an acknowledgement after which the engine sends no reports: the parent is hung.
UNREAD = 1000
#: Seconds in which the parent's Stop may follow the end of another server.
STOP_WINDOW_S = 0.5


class ParentChannel:
    """Events to the parent, and commands from it; used by one thread at a time."""

    def __init__(self, endpoint: str, key: bytes, rank: int) -> None:
        self._connection = ControlConnection(endpoint, key, server_identity(rank))
        self.socket = self._connection.socket
        self.waits = self._connection.waits
        self.close = self._connection.close
        #: Says what this process does; None: the parent does not watch it.
        self.pulse: Pulse | None = None

    @property
    def keeps_up(self) -> bool:
        """Whether the parent reads what it is sent."""
        return self._connection.unacknowledged < UNREAD

    def send(self, event: protocol.Event) -> None:
        if self.pulse is not None and isinstance(event, protocol.Progress):
            self.pulse.doing = event.stage
        self._connection.send(protocol.encode(event))

    def receive(self) -> protocol.Command:
        """Wait for the parent's next command."""
        return protocol.decode_command(self._connection.receive())


class Stopped(Exception):
    """The parent wants this process to end."""


def main() -> None:
    """Read the setup from standard input, serve until the parent says Stop, and exit."""
    use_huge_pages()
    child.prepare()
    sys.setswitchinterval(SWITCH_S)
    setup = child.read_setup(Setup)
    if setup is None:
        return
    files = ModelFiles(setup, child.private_dir())
    child.end_with_parent(setup, on_parent_gone=files.close)
    own = setup.spec.servers[setup.rank]
    environment.prepare(own.platform, own.gpus)
    channel = ParentChannel(child.parent_endpoint(setup), setup.control_key, setup.rank)
    if setup.watched:
        channel.pulse = Pulse(child.parent_endpoint(setup), setup.control_key, setup.rank)
    status = 0
    try:
        channel.send(protocol.Hello(os.getpid()))
        identity = Identity(setup.fingerprint, setup.experts, setup.config.wire_dtype)
        credentials = Credentials(derived(setup.key, "servers"), identity)
        with contextlib.closing(listen(setup, credentials)) as connections:
            _serve(*_start(setup, files, channel, connections))
    except Stopped:
        channel.close(0)
    except BaseException as error:
        if not _stop_follows(channel):
            channel.send(child.failure(error))
            traceback.print_exc()
            status = 1
    files.close()
    channel.close()
    child.end(status)


def _stop_follows(channel: ParentChannel) -> bool:
    """Whether Stop arrives: then a failure is a consequence of other servers' end."""
    deadline = time.monotonic() + STOP_WINDOW_S
    while channel.waits(max(0.0, deadline - time.monotonic())):
        if isinstance(channel.receive(), protocol.Stop):
            return True
    return False


def _start(
    setup: Setup, files: ModelFiles, channel: ParentChannel, connections: Connections
) -> tuple[Worker, Wakeup | None]:
    """Get ready to serve, together with all other servers.

    Args:
        connections: with the other servers, which do not know this one's endpoint yet.
    """
    cache = _cache_dir(setup)
    checkpoint = None
    if not setup.spec.servers[setup.rank].from_peers:
        checkpoint = _open_model(setup, cache or pathlib.Path(child.private_dir()), channel)
    model, tokenizer = files.read()
    channel.send(protocol.Progress("preparing", 0, 0))
    from dance_jax.engine.compile_cache import CompileCache
    from dance_jax.engine.engine import Engine
    from dance_jax.engine.trace import Trace
    from dance_jax.engine.waterfall import EVENTS
    from dance_jax.launch.planning.costs import cluster_cost
    from dance_jax.launch.worker.memory import free_per_device
    from dance_jax.launch.worker.peer_weights import HeldWeights
    from dance_jax.launch.worker.peers import Peers
    from dance_jax.models import calls, native
    from dance_jax.models.collectives import Collectives
    from dance_jax.placement.core import Layout

    compile_dir = None if cache is None else private_directory(cache / "compiled")
    platform = setup.spec.servers[setup.rank].platform
    if platform == "cpu":
        native.load(compile_dir or pathlib.Path(child.private_dir()))
    channel.send(protocol.Prepared(coordinator_endpoint(setup), connections.endpoint))
    joined = _await_join(channel)
    connections.endpoints, alone = joined.endpoints, joined.calls
    channel.send(protocol.Progress("joining", 0, 0))
    threads = join(setup, None if alone else joined.coordinator)
    native.set_threads(threads)
    wakeup = None if alone else Wakeup(connections)
    shelf = HeldWeights(checkpoint, setup.config.dtype)
    peers = Peers(connections)
    peers.answer(shelf.find)
    weights = checkpoint or _peer_weights(setup, model, files.formats(), peers)
    files.close()
    channel.send(protocol.Joined())
    stage = "loading" if checkpoint is not None else "loading from the other servers"
    channel.send(protocol.Progress(stage, 0, 0))
    layout = Layout.from_bytes(setup.layout)
    # The seed reaches the step only as an argument, and the half-life does not reach it at all.
    shape = dataclasses.replace(setup.config, seed=0, half_life=None, exchange="")
    servers = () if alone else (layout.devices, layout.slots_per_device)
    scope = (setup.fingerprint, servers, shape, threads)
    steps = CompileCache(compile_dir, scope)
    engine = Engine(
        weights,
        tokenizer,
        setup.spec,
        setup.rank,
        layout,
        setup.config,
        compile_cache=steps,
        transport=None if alone else Collectives(),
        free_memory=free_per_device(platform, setup.machine_devices),
        order=cluster_cost(setup.spec, model, setup.config).preferences()[setup.rank].tolist(),
    )
    engine.warmup(lambda stage, done, total: channel.send(protocol.Progress(stage, done, total)))
    if setup.trace_from:
        origin = setup.rank, connections.names
        engine.trace = Trace(*origin, setup.trace_from, engine.runner.calls)
    elif engine.runner.calls is not None:
        engine.runner.calls.start_trace(EVENTS)
    if engine.runner.calls is not None:
        calls.connect(engine.runner.calls, connections)
    shelf.held = engine.expert
    loader = _loader(engine, checkpoint, weights, peers)
    # Freeze present objects: collecting them again takes longer than a step.
    gc.collect()
    gc.freeze()
    channel.send(protocol.Ready(steps.hits, steps.misses))
    return Worker(engine, loader, connections, channel), wakeup


def _await_join(channel: ParentChannel) -> protocol.Join:
    """Wait until the parent says where the other servers are.

    What comes meanwhile, such as the loss of another server, is older than what Join says.

    Raises:
        Stopped: the parent wants this process to end.
    """
    while True:
        match channel.receive():
            case protocol.Join() as joined:
                return joined
            case protocol.Stop():
                raise Stopped


def _peer_weights(setup: Setup, model: ModelConfig, formats: Formats, peers: Peers) -> WeightSource:
    """The weights of a server without a copy of the model, from the servers that have one."""
    from dance_jax.launch.worker.peer_weights import PeerWeights

    servers = setup.spec.servers
    return PeerWeights(
        model, formats, peers, [n for n in setup.spec.seated if not servers[n].from_peers]
    )


def _loader(
    engine: Engine, checkpoint: Checkpoint | None, weights: WeightSource, peers: Peers
) -> Loader:
    """The loader of experts that move to this server."""
    from dance_jax.launch.worker.loading import Loader, checkpoint_reader

    if checkpoint is not None:
        return Loader(checkpoint_reader(checkpoint, engine.form))
    return Loader(peers.reader(engine.expert, engine.form, weights))


def _cache_dir(setup: Setup) -> pathlib.Path | None:
    if setup.cache_dir is None:
        return None
    return pathlib.Path(setup.cache_dir) if setup.cache_dir else default_cache_dir()


def _open_model(setup: Setup, cache: pathlib.Path, channel: ParentChannel) -> Checkpoint:
    """Open this machine's copy of the model, downloading and converting it if needed.

    Raises:
        UserError: the model is missing, damaged, another model, in other formats, or cannot be
            downloaded.
    """
    from dance_jax.models import hub
    from dance_jax.models.checkpoint import Checkpoint, is_converted
    from dance_jax.models.directory import demo_dir

    path = demo_dir()
    if setup.model:
        path = hub.resolve(setup.model, lambda *what: channel.send(protocol.Progress(*what)))
    if not is_converted(path):
        channel.send(protocol.Progress("converting the model", 0, 0))
        # In another process, because JAX must not compute in this one before all servers joined.
        with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn")
        ) as pool:
            path = pool.submit(_convert, path, cache / "models", setup.config.rounding).result()
    checkpoint = Checkpoint.open(path)
    experts = checkpoint.form(setup.config.dtype).name
    if experts != setup.experts:
        raise UserError(
            f"{path}: its experts have the format {experts}, but those of the launch have "
            f"{setup.experts}; all servers need the same format: convert the model with the same "
            "--experts"
        )
    if checkpoint.fingerprint != setup.fingerprint:
        raise UserError(
            f"{path}: is not the model of the launch (fingerprint {checkpoint.fingerprint[:16]} "
            f"instead of {setup.fingerprint[:16]}): copy the same files to this machine"
        )
    return checkpoint


def _convert(source: pathlib.Path, cache: pathlib.Path, rounding: Rounding) -> pathlib.Path:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from dance_jax.models.convert import ensure_converted

    return ensure_converted(source, cache, rounding=rounding)


def _serve(worker: Worker, wakeup: Wakeup | None) -> None:
    """Step until the parent says Stop."""
    if wakeup is None:
        worker.serve_alone()
    else:
        worker.serve_together(wakeup)


class Worker:
    """Runs a ready engine as the parent commands.

    Args:
        connections: with the other servers.
        channel: to the parent.
    """

    def __init__(
        self, engine: Engine, loader: Loader, connections: Connections, channel: ParentChannel
    ) -> None:
        self._engine, self._loader = engine, loader
        self._connections, self._channel = connections, channel
        self._reported = 0.0
        #: time.monotonic() until which reports have the counts of experts.
        self._watched_until = 0.0
        #: Number of the waterfall asked for, and when another one may replace it.
        self._asked, self._drawn_by = 0, 0.0
        #: Number of looks at the parent's commands, of commands and of batches; grows while this
        #: process is not stuck.
        self._turns = 0
        #: Commands that wait for the end of a step.
        self._pending: collections.deque[protocol.Command] = collections.deque()
        #: time.monotonic() at which the current step began; None between steps. Under the lock: a
        #: thread other than the main thread may use the channel during a step only, and the main
        #: thread between steps only.
        self._step_began: float | None = None
        self._lock = threading.Lock()
        #: It waits for the parent's commands.
        self._idle = False

    def serve_alone(self) -> None:
        """Step while this server has work, independently of the other servers."""
        threading.Thread(target=self._listen, daemon=True, name="listen").start()
        if self._channel.pulse is not None:
            self._channel.pulse.watch(self._progress, self._engine.own_cpu_s, _thread_clock())
        busy = True
        while True:
            self._execute()
            with self._listening():
                result = self._engine.step()
            self._send_result(result)
            # The last report covers the end of the work.
            self._report(REPORT_S if result.active else HEARTBEAT_S, at_once=busy != result.active)
            busy = result.active
            if not busy:
                # Waiting sequences and loading batches need a check soon.
                soon = self._loader.busy or self._engine.has_work
                self._idle = True
                self._channel.waits(LOADING_POLL_S if soon else HEARTBEAT_S)
                self._idle = False

    def _progress(self) -> tuple[int, int]:
        """Changes as this server makes progress."""
        assert self._channel.pulse is not None
        began = self._step_began
        if began is not None:
            self._channel.pulse.doing = f"in step {self._engine.steps}"
        else:
            self._channel.pulse.doing = "idle" if self._idle else "between two steps"
        return self._turns, self._engine.beats()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Leave the channel to the listening thread within the block."""
        self._step_began = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._step_began = None

    def _listen(self) -> None:
        """Receive the parent's commands while a step waits for servers that do not answer."""
        while True:
            time.sleep(HEAR_S)
            with self._lock:
                began = self._step_began
                if began is not None and time.monotonic() - began > HEAR_S:
                    self._receive()

    def serve_together(self, wakeup: Wakeup) -> None:
        """Step together with all servers.

        All servers do the same steps. After a step without work on any server
        (`StepResult.active`, equal on all servers), they rest until one of them begins the next
        step and rings the others.
        """
        step = 1  # number of the next step, equal on all servers
        busy = rung = False
        heartbeat = 0.0
        while True:
            self._execute()
            now = time.monotonic()
            if not (busy or rung):
                if not self._engine.has_work and now < heartbeat:
                    wake = min(heartbeat, now + LOADING_POLL_S) if self._loader.busy else heartbeat
                    rung = wakeup.wait(self._channel.socket, wake - now, step)
                    continue
                wakeup.ring(step)
            result = self._engine.step()
            step += 1
            busy, rung = result.active, False
            self._send_result(result)
            heartbeat = time.monotonic() + HEARTBEAT_S
            self._report(REPORT_S, at_once=not busy)

    def _send_result(self, result: StepResult) -> None:
        if result.outputs:
            self._channel.send(protocol.Deltas(result.outputs))
        if result.applied:
            self._channel.send(protocol.Applied(result.applied))
        drawn = self._engine.waterfall
        if drawn is not None and drawn.done:
            self._engine.waterfall = None
            self._channel.send(protocol.Waterfall(self._asked, drawn.steps))

    def _report(self, interval_s: float, at_once: bool) -> None:
        now = time.monotonic()
        if (at_once or now > self._reported + interval_s) and self._channel.keeps_up:
            self._reported = now
            self._channel.send(protocol.Report(self._engine.report(now < self._watched_until)))
            self._send_trace()

    def _send_trace(self) -> None:
        if self._engine.trace is not None and (lines := self._engine.trace.take()):
            self._channel.send(protocol.Traced(lines))

    def _draw(self, number: int, steps: int) -> None:
        """Begin to record steps, or say why that is not possible."""
        from dance_jax.engine.waterfall import Waterfall

        calls, names, why = self._engine.runner.calls, self._connections.names, ""
        if calls is None:
            why = "the servers step together, and call nothing"
        elif self._engine.trace is not None:
            why = "the whole run is traced (--trace)"
        elif self._engine.waterfall is not None and time.monotonic() < self._drawn_by:
            why = "another waterfall is recorded just now"
        if why:
            self._channel.send(protocol.Waterfall(number, [], why))
        else:
            assert calls is not None
            self._asked, self._drawn_by = number, time.monotonic() + DRAW_S
            self._engine.waterfall = Waterfall(calls, names, steps)

    def _receive(self) -> None:
        """Receive the parent's commands, and execute those that may run during a step."""
        while self._channel.waits():
            match command := self._channel.receive():
                case protocol.Stage():
                    self._loader.begin(command)
                case protocol.PeerLost(rank):
                    self._connections.lost(rank)
                case protocol.PeerRestarted(rank, endpoint):
                    self._connections.restarted(rank, endpoint)
                case protocol.Stop():
                    self._engine.cancel()
                    self._pending.append(command)
                case _:
                    self._pending.append(command)
        # Slots emptied by a batch are free for the next batch only once that batch is applied.
        if not any(
            isinstance(each, protocol.Commit | protocol.Drop | protocol.Settle)
            for each in self._pending
        ):
            for loaded in self._loader.finished():
                self._turns += 1
                self._channel.send(_stage(self._engine, loaded))

    def _execute(self) -> None:
        """Execute the parent's commands, and hand loaded batches to the engine.

        Raises:
            Stopped: the parent said Stop.
        """
        engine, channel = self._engine, self._channel
        self._turns += 1
        self._receive()
        while self._pending:
            self._turns += 1
            match self._pending.popleft():
                case protocol.Submit(requests):
                    for request in requests:
                        engine.add(request)
                case protocol.Abort(request_ids):
                    for request_id in [None] if request_ids is None else request_ids:
                        engine.abort(request_id)
                case protocol.Watched():
                    self._watched_until = time.monotonic() + WATCHED_S
                case protocol.AskWaterfall(number, steps):
                    self._draw(number, steps)
                case protocol.AskStats():
                    self._send_trace()
                    stats = msgspec.msgpack.encode(engine.stats())
                    channel.send(protocol.Stats(msgspec.Raw(stats)))
                case protocol.Commit(number):
                    if engine.commit(number):
                        channel.send(protocol.Applied(number))
                case protocol.Drop(number):
                    self._loader.drop(number)
                    engine.unstage(number)
                    channel.send(protocol.Dropped(number))
                case protocol.Reseat(number, rank, server, slots):
                    self._connections.names[rank] = server.name
                    self._connections.rates[rank] = server.bandwidth
                    engine.reseat(number, rank, server.devices, slots)
                case protocol.Settle(applied):
                    self._loader.drop_all()
                    while 0 < engine.staged <= applied:
                        engine.commit(engine.staged)
                    engine.unstage(engine.staged)
                    layout = engine.layout.to_bytes()
                    channel.send(protocol.Holds(layout, engine.last_batch))
                case protocol.Stop():
                    raise Stopped
                case protocol.Join():
                    raise RuntimeError("the servers have joined already")


def _thread_clock() -> Callable[[], float]:
    """A function that returns the processor seconds of the calling thread, in any thread."""
    if not hasattr(time, "pthread_getcpuclockid"):  # macOS
        return lambda: 0.0
    clock = time.pthread_getcpuclockid(threading.get_ident())
    return lambda: time.clock_gettime(clock)


def _stage(engine: Engine, loaded: Loaded) -> protocol.Staged | protocol.StageFailed:
    """Hand a batch to the engine and return the answer for the parent."""
    from dance_jax.placement.migration import SlotChange

    number, why = loaded.stage.number, loaded.why
    if not why:
        try:
            engine.stage(number, map(SlotChange._make, loaded.stage.changes), loaded.experts)
        except ValueError as error:
            why = str(error)
    if why:
        return protocol.StageFailed(number, why)
    return protocol.Staged(number, loaded.seconds, loaded.bytes_read)


if __name__ == "__main__":
    main()
