"""One server's engine process: `python -m dance_jax.launch.worker.main`.

`Cluster` starts it, or the server's front end.

The order is what matters here: the model is made ready before anybody waits for anybody; cores are
limited while JAX makes its devices, because XLA sizes its thread pools by them; then the engine
loads, compiles, and steps while it has work. Where servers step together instead, all processes do
one collective before anything else, because a first collective of only some of them fails; they do
one step after another while any of them has work, and one a second while none has, which shows that
all can. Experts that move are read in the background (`loading`). A step may wait for servers that
do not answer: a thread hears the parent meanwhile.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import gc
import logging
import multiprocessing
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from dance_jax.cache import default_cache_dir, private_directory
from dance_jax.config import Rounding, UserError
from dance_jax.launch.agent import child
from dance_jax.launch.agent.model_files import ModelFiles
from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import ControlConnection, derived
from dance_jax.launch.control.protocol import Setup
from dance_jax.launch.worker import environment
from dance_jax.launch.worker.join import coordinator_endpoint, join, listen
from dance_jax.launch.worker.wakeup import Wakeup, connect
from dance_jax.memory import use_huge_pages
from dance_jax.models.connections import Identity, Key, PeerListener

if TYPE_CHECKING:
    from dance_jax.engine.engine import Engine, StepResult
    from dance_jax.launch.worker.loading import Loaded, Loader
    from dance_jax.launch.worker.peers import Peers
    from dance_jax.models.calls import Lines
    from dance_jax.models.checkpoint import Checkpoint, WeightSource
    from dance_jax.models.config import ModelConfig
    from dance_jax.models.formats import Formats

log = logging.getLogger("dance_jax.worker")

#: Seconds after which servers without work do a step together; between two reports of busy ones.
HEARTBEAT_S, REPORT_S = 1.0, 0.25
#: Seconds between two looks at a batch that is being loaded, of a server that rests.
LOADING_POLL_S = 0.05
#: Seconds for which a thread that loads may keep the interpreter from the one that steps.
SWITCH_S = 0.0005
#: Seconds after which the parent is heard while a step waits for other servers.
HEAR_S = 0.05
#: Seconds in which the parent's Stop may follow the end of another server.
STOP_WINDOW_S = 0.5


class ParentChannel:
    """The socket to the parent; used by one thread at a time."""

    def __init__(self, endpoint: str, key: bytes, rank: int) -> None:
        self._connection = ControlConnection(endpoint, key, f"server-{rank}")
        self.socket = self._connection.socket

    def send(self, event: protocol.Event) -> None:
        self.socket.send(protocol.encode(event))

    def receive(self) -> protocol.Command:
        """Waits for the parent's next command."""
        return protocol.decode_command(self.socket.recv())

    def waits(self, timeout_s: float = 0.0) -> bool:
        """A command is there, or comes within so long."""
        return bool(self.socket.poll(int(1000 * timeout_s)))

    def close(self) -> None:
        """Sends what is left, for a second at most."""
        self._connection.close()


class Stopped(Exception):
    """The parent wants this process to end."""


def main() -> None:
    """Reads the setup from standard input, serves until told to stop, and exits."""
    use_huge_pages()
    child.prepare()
    sys.setswitchinterval(SWITCH_S)
    setup = child.read_setup(Setup)
    if setup is None:
        return
    files = ModelFiles(setup, setup.private_dir)
    child.end_with_parent(setup, before=files.close)
    own = setup.spec.servers[setup.rank]
    environment.prepare(own.platform, own.gpus)
    channel = ParentChannel(child.parent_endpoint(setup), setup.control_key, setup.rank)
    status = 0
    try:
        channel.send(protocol.Hello(os.getpid()))
        identity = Identity(setup.fingerprint, setup.experts, setup.config.wire_dtype)
        key = Key(derived(setup.key, "servers"), identity)
        with contextlib.closing(listen(setup, key)) as listener:
            _serve(*_start(setup, files, channel, listener, key))
    except Stopped:
        pass
    except BaseException as error:
        if not _told_to_stop(channel):
            traceback.print_exc()
            channel.send(child.failure(error))
            status = 1
    files.close()
    channel.close()
    child.end(status)


def _told_to_stop(channel: ParentChannel) -> bool:
    """What failed may be a consequence: other servers have been stopped already."""
    deadline = time.monotonic() + STOP_WINDOW_S
    while channel.waits(max(0.0, deadline - time.monotonic())):
        if isinstance(channel.receive(), protocol.Stop):
            return True
    return False


def _start(
    setup: Setup, files: ModelFiles, channel: ParentChannel, listener: PeerListener, key: Key
) -> tuple[Worker, Wakeup | None]:
    """Makes ready to serve, together with all others.

    Args:
        listener: where the others reach this server, with that key.
    """
    cache = _cache_dir(setup)
    checkpoint = None
    if not setup.spec.servers[setup.rank].from_peers:
        checkpoint = _open_model(setup, cache or pathlib.Path(setup.private_dir), channel)
    model, tokenizer = files.read()
    channel.send(protocol.Progress("preparing", 0, 0))
    from dance_jax.engine.compile_cache import CompileCache
    from dance_jax.engine.engine import Engine
    from dance_jax.engine.trace import Trace
    from dance_jax.launch.planning.costs import cluster_cost
    from dance_jax.launch.worker.memory import free_per_device
    from dance_jax.launch.worker.peer_weights import HeldWeights
    from dance_jax.launch.worker.peers import Peers
    from dance_jax.models import native
    from dance_jax.models.calls import Lines
    from dance_jax.models.collectives import Collectives
    from dance_jax.placement.core import Layout

    compile_dir = None if cache is None else private_directory(cache / "compiled")
    platform = setup.spec.servers[setup.rank].platform
    if platform == "cpu":
        native.load(compile_dir or pathlib.Path(setup.private_dir))
    channel.send(protocol.Prepared(coordinator_endpoint(setup), listener.endpoint))
    match channel.receive():
        case protocol.Join(coordinator, endpoints, calls):
            pass
        case _:
            raise Stopped
    channel.send(protocol.Progress("joining", 0, 0))
    threads = join(setup, None if calls else coordinator)
    native.set_threads(threads)
    me = (setup.rank, setup.spec.names, listener, endpoints, key)
    rates = [server.bandwidth for server in setup.spec.servers]
    lines = Lines(setup.rank, setup.spec.names, listener, key, rates=rates)
    wakeup = None if calls else connect(*me)
    shelf = HeldWeights(checkpoint, setup.config.dtype)
    peers = Peers(*me) if any(server.from_peers for server in setup.spec.servers) else None
    if peers is not None:
        peers.answer(shelf.find)
    weights = checkpoint or _peer_weights(setup, model, files.formats, peers)
    channel.send(protocol.Joined())
    stage = "loading" if checkpoint is not None else "loading from the other servers"
    channel.send(protocol.Progress(stage, 0, 0))
    layout = Layout.from_bytes(setup.layout)
    # The seed only reaches the step as an argument, and the half-life does not.
    shape = dataclasses.replace(setup.config, seed=0, half_life=None, exchange="")
    servers = () if calls else (layout.devices, layout.slots_per_device)
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
        transport=None if calls else Collectives(),
        free_memory=free_per_device(platform, setup.machine_devices),
        order=cluster_cost(setup.spec, model, setup.config).preferences()[setup.rank].tolist(),
    )
    engine.warmup(lambda stage, done, total: channel.send(protocol.Progress(stage, done, total)))
    if setup.trace_from:
        whose = setup.rank, setup.spec.names
        engine.trace = Trace(*whose, setup.trace_from, engine.runner.calls)
    if engine.runner.calls is not None:
        lines.connect(engine.runner.calls, endpoints)
    shelf.held = engine.expert
    loader = _loader(engine, checkpoint, peers)
    # What is there now stays: later collections need not look at it, for longer than a step takes.
    gc.collect()
    gc.freeze()
    channel.send(protocol.Ready(steps.hits, steps.misses))
    return Worker(engine, loader, lines, endpoints, channel), wakeup


def _peer_weights(
    setup: Setup, model: ModelConfig, formats: Formats | None, peers: Peers | None
) -> WeightSource:
    """What a server without a copy of the model loads from: those that have one."""
    from dance_jax.launch.worker.peer_weights import PeerWeights

    assert formats is not None and peers is not None
    servers = enumerate(setup.spec.servers)
    return PeerWeights(
        model, formats, peers, [rank for rank, server in servers if not server.from_peers]
    )


def _loader(engine: Engine, checkpoint: Checkpoint | None, peers: Peers | None) -> Loader:
    """What reads the experts that move to this server."""
    from dance_jax.launch.worker.loading import Loader, checkpoint_reader

    if checkpoint is not None:
        return Loader(checkpoint_reader(checkpoint, engine.form))
    assert peers is not None
    return Loader(peers.reader(engine.expert, engine.form))


def _cache_dir(setup: Setup) -> pathlib.Path | None:
    if setup.cache_dir is None:
        return None
    return pathlib.Path(setup.cache_dir) if setup.cache_dir else default_cache_dir()


def _open_model(setup: Setup, cache: pathlib.Path, channel: ParentChannel) -> Checkpoint:
    """This machine's copy of the model, downloaded and converted into its cache if need be.

    Raises:
        UserError: it is missing, torn, another one or in other formats, or cannot be downloaded.
    """
    from dance_jax.launch.planning.defaults import demo_dir
    from dance_jax.models import hub
    from dance_jax.models.checkpoint import Checkpoint, is_converted

    path = demo_dir()
    if setup.model:
        path = hub.resolve(setup.model, lambda *what: channel.send(protocol.Progress(*what)))
    if not is_converted(path):
        channel.send(protocol.Progress("converting the model", 0, 0))
        # Elsewhere: it computes with JAX, which must not happen here before all have joined.
        with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn")
        ) as pool:
            path = pool.submit(_convert, path, cache / "models", setup.config.rounding).result()
    checkpoint = Checkpoint.open(path)
    experts = checkpoint.form(setup.config.dtype).name
    if experts != setup.experts:
        raise UserError(
            f"{path}: its experts are kept as {experts}, those of the launch as {setup.experts}; "
            "all servers need one format: convert the model with the same --experts"
        )
    if checkpoint.fingerprint != setup.fingerprint:
        raise UserError(
            f"{path}: is not the model that the launch is for (fingerprint "
            f"{checkpoint.fingerprint[:16]}, not {setup.fingerprint[:16]}): copy the same files"
        )
    return checkpoint


def _convert(source: pathlib.Path, cache: pathlib.Path, rounding: Rounding) -> pathlib.Path:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from dance_jax.models.convert import ensure_converted

    return ensure_converted(source, cache, rounding=rounding)


def _serve(worker: Worker, wakeup: Wakeup | None) -> None:
    """Steps until the parent says Stop."""
    if wakeup is None:
        worker.serve_alone()
    else:
        worker.serve_together(wakeup)


class Worker:
    """An engine that is ready, and what the parent has it do.

    Args:
        lines: to the other servers.
        endpoints: of all servers by rank, which change where one is restarted.
        channel: to the parent.
    """

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        lines: Lines,
        endpoints: list[str],
        channel: ParentChannel,
    ) -> None:
        self._engine, self._loader = engine, loader
        self._lines, self._endpoints, self._channel = lines, endpoints, channel
        self._reported = 0.0
        #: Commands that wait for the end of a step.
        self._heard: collections.deque[protocol.Command] = collections.deque()
        #: time.monotonic() at which a step began; None: none is under way. Under the lock, whoever
        #: is not in the step has the channel while one is, and the main thread else.
        self._step_began: float | None = None
        self._lock = threading.Lock()

    def serve_alone(self) -> None:
        """Steps while there is work here, whatever the other servers do."""
        threading.Thread(target=self._listen, daemon=True, name="listen").start()
        busy = True
        while True:
            self._obey()
            with self._heard_meanwhile():
                result = self._engine.step()
            self._hand_out(result)
            # The last report is of what ended the work.
            self._report(REPORT_S if result.active else HEARTBEAT_S, at_once=busy != result.active)
            busy = result.active
            if not busy:
                # A sequence that rests, or a batch that is being loaded, is looked after soon.
                soon = self._loader.busy or self._engine.has_work
                self._channel.waits(LOADING_POLL_S if soon else HEARTBEAT_S)

    @contextlib.contextmanager
    def _heard_meanwhile(self) -> Iterator[None]:
        """Within it the main thread leaves the channel to the one that listens."""
        self._step_began = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._step_began = None

    def _listen(self) -> None:
        """Hears the parent while steps wait for servers that do not answer."""
        while True:
            time.sleep(HEAR_S)
            with self._lock:
                began = self._step_began
                if began is not None and time.monotonic() - began > HEAR_S:
                    self._hear()

    def serve_together(self, wakeup: Wakeup) -> None:
        """Steps together with all servers.

        All servers do the same steps. After one in which none had work (`StepResult.active`, known
        to all alike) they rest, until one of them begins the next step and rings.
        """
        step = 1  # number of the next one, the same on all servers
        busy = rung = False
        heartbeat = 0.0
        while True:
            self._obey()
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
            self._hand_out(result)
            heartbeat = time.monotonic() + HEARTBEAT_S
            self._report(REPORT_S, at_once=not busy)

    def _hand_out(self, result: StepResult) -> None:
        if result.outputs:
            self._channel.send(protocol.Deltas(result.outputs))
        if result.applied:
            self._channel.send(protocol.Applied(result.applied))

    def _report(self, interval_s: float, at_once: bool) -> None:
        now = time.monotonic()
        if at_once or now > self._reported + interval_s:
            self._reported = now
            self._channel.send(protocol.Report(self._engine.report()))
            self._send_trace()

    def _send_trace(self) -> None:
        if self._engine.trace is not None and (lines := self._engine.trace.take()):
            self._channel.send(protocol.Traced(lines))

    def _hear(self) -> None:
        """Takes in what the parent has said, and does what need not wait for the end of a step."""
        while self._channel.waits():
            match command := self._channel.receive():
                case protocol.Stage():
                    self._loader.begin(command)
                case protocol.PeerRestarted(rank, endpoint):
                    self._endpoints[rank] = endpoint
                    threading.Thread(
                        target=self._redial, args=(rank, endpoint), daemon=True, name="redial"
                    ).start()
                case protocol.Stop():
                    self._engine.cancel()
                    self._heard.append(command)
                case _:
                    self._heard.append(command)
        # Slots that a batch empties are free for the next one once it is in force.
        if not any(isinstance(each, protocol.Commit | protocol.Drop) for each in self._heard):
            for loaded in self._loader.finished():
                self._channel.send(_stage(self._engine, loaded))

    def _obey(self) -> None:
        """Does what the parent has said, and hands over what was loaded.

        Raises:
            Stopped: it wants an end.
        """
        engine, channel = self._engine, self._channel
        self._hear()
        while self._heard:
            match self._heard.popleft():
                case protocol.Submit(requests):
                    for request in requests:
                        engine.add(request)
                case protocol.Abort(request_ids):
                    for request_id in [None] if request_ids is None else request_ids:
                        engine.abort(request_id)
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
                case protocol.Stop():
                    raise Stopped
                case protocol.Join():
                    raise RuntimeError("the servers have joined already")

    def _redial(self, rank: int, endpoint: str) -> None:
        try:
            self._lines.dial(rank, endpoint)
        except RuntimeError as error:  # it has died again, and will be heard of
            log.warning("%s", error)


def _stage(engine: Engine, loaded: Loaded) -> protocol.Staged | protocol.StageFailed:
    """Hands a batch to the engine: what the parent is told of it."""
    from dance_jax.placement.migration import SlotChange, changed

    number, why = loaded.stage.number, loaded.why
    if not why:
        try:
            layout = changed(engine.latest_layout, map(SlotChange._make, loaded.stage.changes))
            engine.stage(number, layout, loaded.experts)
        except ValueError as error:
            why = str(error)
    if why:
        return protocol.StageFailed(number, why)
    return protocol.Staged(number, loaded.seconds, loaded.bytes_read)


if __name__ == "__main__":
    main()
