"""One server's engine process: `python -m dance_jax.launch.worker`, started by `Cluster`.

The order is what matters here: the model is made ready before anybody waits for anybody; cores are
limited while JAX makes its devices, because XLA sizes its thread pools by them; all processes do
one collective before anything else, because a first collective of only some of them fails; then
the engine loads, compiles, and steps together with all others while any server has work.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import faulthandler
import logging
import multiprocessing
import os
import pathlib
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

import msgspec

from dance_jax.cache import default_cache_dir, private_directory
from dance_jax.config import UserError
from dance_jax.engine.sequence import OutputDelta, Request
from dance_jax.launch import environment, protocol
from dance_jax.launch.control import ALIVE_TIMEOUT_S, Connection, bracketed, derived
from dance_jax.launch.join import coordinator_endpoint, join, own_address
from dance_jax.launch.protocol import Setup

if TYPE_CHECKING:
    from dance_jax.engine.engine import Engine
    from dance_jax.models.checkpoint import Checkpoint

log = logging.getLogger("dance_jax.worker")


class Channel:
    """The socket to the parent; used by the main thread alone."""

    def __init__(self, endpoint: str, key: bytes, rank: int) -> None:
        self._connection = Connection(endpoint, key, f"server-{rank}")
        self._socket = self._connection.socket

    def send(self, event: protocol.Event) -> None:
        self._socket.send(protocol.encode(event))

    def receive(self) -> protocol.Command:
        """Waits for the parent's next command."""
        return protocol.decode_command(self._socket.recv())

    @property
    def waiting(self) -> bool:
        """A command is there."""
        return bool(self._socket.poll(0))

    def close(self) -> None:
        """Sends what is left, for a second at most."""
        self._connection.close()


def main() -> None:
    """Reads the setup from standard input, serves until told to stop, and exits."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s"
    )
    logging.getLogger("jax").setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.WARNING)
    line = _read_line(0)
    if not line:
        return  # the parent changed its mind
    setup = msgspec.json.decode(line, type=Setup)
    _end_with_parent(setup.private_dir, setup.beats)
    environment.prepare(setup.platform, setup.spec.servers[setup.rank].gpus)
    control = setup.control.replace(protocol.SSH_CLIENT, _ssh_client())
    channel = Channel(control, setup.key, setup.rank)
    status = 0
    try:
        channel.send(protocol.Hello(os.getpid()))
        engine = _start(setup, channel)
        _serve(engine, channel)
    except BaseException as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        user = isinstance(error, UserError)
        channel.send(protocol.Failed(str(error) if user else message, user))
        status = 1
    _exit(channel, status)


def _exit(channel: Channel, status: int) -> None:
    channel.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: jax.distributed would wait at its exit for processes that may be gone.
    os._exit(status)


def _ssh_client() -> str:
    """The machine that this process's ssh connection comes from, as a URL has it; "" for none."""
    return bracketed((os.environ.get("SSH_CONNECTION", "").split() or [""])[0])


def _read_line(descriptor: int) -> bytes:
    """The next line that is not empty, unbuffered: what follows it stays in the pipe."""
    parts: list[bytes] = []
    while (byte := os.read(descriptor, 1)) != b"":
        if byte != b"\n":
            parts.append(byte)
        elif parts:
            break
    return b"".join(parts)


def _end_with_parent(private_dir: str, beats: bool) -> None:
    """Kills this process and what it started when the parent is gone.

    It is when standard input ends, when this process's parent is another one, or, for a parent on
    another machine, when it has been silent for ALIVE_TIMEOUT_S: a broken network ends nothing.
    """
    parent = os.getppid()

    def watch() -> None:
        heard = time.monotonic()
        while True:
            readable, _, _ = select.select([0], [], [], 0.5)
            ended = bool(readable) and not os.read(0, 4096)
            heard = time.monotonic() if readable else heard
            silent = beats and time.monotonic() - heard > ALIVE_TIMEOUT_S
            if ended or silent or os.getppid() != parent:
                if private_dir:
                    shutil.rmtree(private_dir, ignore_errors=True)
                os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def _start(setup: Setup, channel: Channel) -> Engine:
    cache = _cache_dir(setup)
    checkpoint = _open_model(setup, cache or pathlib.Path(setup.private_dir), channel)
    channel.send(protocol.Progress("preparing", 0, 0))
    from dance_jax.engine.compile_cache import CompileCache
    from dance_jax.engine.engine import Engine
    from dance_jax.launch.plan import parse_layout
    from dance_jax.models import kernels_cpu, links_cpu
    from dance_jax.models.tokenizer import Tokenizer

    compile_dir = None if cache is None else private_directory(cache / "compiled")
    if setup.platform == "cpu":
        kernels_cpu.load(compile_dir or pathlib.Path(setup.private_dir))
    channel.send(protocol.Prepared(coordinator_endpoint(setup)))
    match channel.receive():
        case protocol.Join(coordinator):
            pass
        case _:
            _exit(channel, 0)
            raise AssertionError
    channel.send(protocol.Progress("joining", 0, 0))
    threads = join(setup, coordinator)
    names, link_key = setup.spec.names, derived(setup.key, "links")
    transport = links_cpu.connect(setup.rank, names, own_address(setup), link_key)
    channel.send(protocol.Joined())
    channel.send(protocol.Progress("loading", 0, 0))
    layout = parse_layout(setup.layout)
    # The seed only reaches the step as an argument.
    shape = dataclasses.replace(setup.config, seed=0)
    scope = (checkpoint.fingerprint, layout.devices, layout.slots_per_device, shape, threads)
    steps = CompileCache(compile_dir, scope)
    engine = Engine(
        checkpoint,
        Tokenizer.load(checkpoint.path),
        setup.spec,
        setup.rank,
        layout,
        setup.config,
        compile_cache=steps,
        transport=transport,
    )
    engine.warmup(lambda stage, done, total: channel.send(protocol.Progress(stage, done, total)))
    channel.send(protocol.Ready(steps.hits, steps.misses))
    return engine


def _cache_dir(setup: Setup) -> pathlib.Path | None:
    if setup.cache_dir is None:
        return None
    return pathlib.Path(setup.cache_dir) if setup.cache_dir else default_cache_dir()


def _open_model(setup: Setup, cache: pathlib.Path, channel: Channel) -> Checkpoint:
    """This machine's copy of the model, converted into its cache if need be.

    Raises:
        UserError: it is missing, torn or another one.
    """
    from dance_jax.launch.defaults import demo_dir
    from dance_jax.models.checkpoint import Checkpoint, is_converted

    path = pathlib.Path(setup.model) if setup.model else demo_dir()
    if not is_converted(path):
        channel.send(protocol.Progress("converting the model", 0, 0))
        # Elsewhere: it computes with JAX, which must not happen here before all have joined.
        with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn")
        ) as pool:
            path = pool.submit(_convert, path, cache / "models").result()
    checkpoint = Checkpoint.open(path)
    if checkpoint.fingerprint != setup.fingerprint:
        raise UserError(
            f"{path}: is not the model that the launch is for (fingerprint "
            f"{checkpoint.fingerprint[:16]}, not {setup.fingerprint[:16]}): copy the same files"
        )
    return checkpoint


def _convert(source: pathlib.Path, cache: pathlib.Path) -> pathlib.Path:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from dance_jax.models.convert import ensure_converted

    return ensure_converted(source, cache)


def _serve(engine: Engine, channel: Channel) -> None:
    """Answers commands until told to stop."""
    while True:
        command = channel.receive()
        match command:
            case protocol.Stop():
                return
            case protocol.Work():
                _run(engine, channel, command.requests)
            case protocol.Abort():
                pass  # it came after the batch had ended
            case protocol.Join():
                raise RuntimeError("the servers have joined already")


def _run(engine: Engine, channel: Channel, requests: list[Request]) -> None:
    """Steps together with all servers until none has work."""
    refused = []
    for request in requests:
        try:
            engine.add(request)
        except UserError as error:
            refused += [
                OutputDelta(
                    request.request_id, index, finish_reason="error", stop_reason=str(error)
                )
                for index in range(request.params.n)
            ]
    if refused:
        channel.send(protocol.Deltas(refused))
    active = True
    while active:
        if channel.waiting:
            match channel.receive():
                case protocol.Stop():
                    _exit(channel, 0)
                case protocol.Abort():
                    engine.abort_all()
                case command:
                    raise RuntimeError(f"{command!r:.80} came before the batch had ended")
        result = engine.step()
        active = result.active
        if result.outputs:
            channel.send(protocol.Deltas(result.outputs))
    channel.send(protocol.Done(msgspec.to_builtins(engine.stats())))


if __name__ == "__main__":
    main()
