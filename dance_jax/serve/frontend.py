"""One server's front end, `python -m dance_jax.serve.frontend`.

`launch.cluster.service` starts it. The front end holds what must survive the death of an engine:
users' connections and their requests. Its engine is a child process (`engine_process`). When an
engine dies, the launcher tells its front end to restart it. If servers step together, JAX takes all
engines down with one, and all restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from dance_jax import signals
from dance_jax.config import ServeOptions, UserError
from dance_jax.engine.sequence import request_seeds
from dance_jax.launch.agent import child
from dance_jax.launch.agent.adopted import runs
from dance_jax.launch.agent.model_files import ModelFiles
from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import ControlConnection, bracketed, server_identity
from dance_jax.launch.control.protocol import FrontSetup
from dance_jax.serve.engine_process import EngineProcess
from dance_jax.serve.keys import Keys
from dance_jax.serve.loop_channel import LoopChannel
from dance_jax.serve.placement_state import PlacementState
from dance_jax.serve.queue import RequestQueue
from dance_jax.serve.unread import limit_unread

if TYPE_CHECKING:
    from dance_jax.placement.core import Layout
    from dance_jax.serve.app import ServeInfo
    from dance_jax.serve.http_server import HttpServer
    from dance_jax.serve.view import Views

log = logging.getLogger("dance_jax.frontend")

#: Connections that may wait to be accepted.
BACKLOG = 2048
#: Seconds that responses have to finish after their requests were aborted.
HANGUP_S = 2.0
#: Seconds without a frame from the launcher, which sends one every second, after which it is gone.
LAUNCHER_S = 5.0


def main() -> None:
    """Read the setup from standard input, serve until told to stop, and exit."""
    child.prepare()
    setup = child.read_setup(FrontSetup)
    if setup is None:
        return
    if setup.before is not None and runs("dance_jax.serve.frontend", setup.before):
        child.end(child.STILL_THERE)
    engine = setup.engine
    private = tempfile.mkdtemp(prefix="dance-jax-", dir=child.private_dir() or None)
    front = FrontEnd(setup, private)
    child.end_with_parent(engine, on_parent_gone=front.kill, outlives=setup.outlives)
    connection = ControlConnection(
        child.parent_endpoint(engine), engine.control_key, server_identity(engine.rank)
    )
    status = 0
    try:
        connection.send(protocol.encode(protocol.Hello(os.getpid())))
        asyncio.run(front.run(connection))
    except BaseException as error:
        connection.send(protocol.encode(child.failure(error)))
        traceback.print_exc()
        status = 1
    front.kill()
    connection.close()
    child.end(status)


class FrontEnd:
    """Connects users, the engine and the launcher.

    Args:
        setup: from the launcher.
        private: directory of this process and its engine; removed on exit.
    """

    def __init__(self, setup: FrontSetup, private: str) -> None:
        self._setup = setup
        self._private = private
        self._engine: EngineProcess | None = None
        #: Number of the engine's start, which grows also from one front end to the next.
        self._start = setup.start
        #: What a launcher that takes over must know: where this engine listens, whether it was told
        #: to join, whether it is ready, its last batch, whether it gives no sign of life, and the
        #: report of its death.
        self._endpoint, self._joins, self._ready, self._silent = "", False, False, False
        self._died: protocol.EngineDied | None = None
        self._applied = 0
        #: Names of all servers by rank, "" for vacant seats; they change as servers join and leave.
        self._names = [*setup.engine.spec.names]
        self._keys = Keys(setup.keys)
        seeds = request_seeds(setup.engine.config.seed, setup.engine.rank)
        limits = setup.options.max_queue, setup.options.client_queue
        self.queue = RequestQueue(self._to_engine, *limits, seeds)

    def kill(self) -> None:
        """Kill the engine and remove the private directory; safe in any thread."""
        if self._engine is not None:
            self._engine.kill()
        shutil.rmtree(self._private, ignore_errors=True)

    async def run(self, connection: ControlConnection) -> None:
        """Serve until the launcher sends Stop.

        Raises:
            UserError: the address cannot be listened on, or the model is missing.
        """
        #: Restart commands, which take time, and commands for the engine; handled in order.
        self._commands: asyncio.Queue[protocol.PassedCommand | protocol.Restart] = asyncio.Queue()
        self._draining, self._stopped = asyncio.Event(), asyncio.Event()
        self._connection = connection
        with contextlib.closing(_listen(self._setup.options)) as listener:
            self._launcher = LoopChannel(connection.socket, connection.arrived, self._from_launcher)
            if not signals.ignored(signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._on_sigterm)
            layout = self._setup.engine.layout
            self._start_engine(layout)
            self._experts = PlacementState(_layout(layout), self._tell)
            files = ModelFiles(self._setup.engine, self._private)
            from dance_jax.serve.view import Views

            info = _serve_info(self._setup, self._names, files, self._keys)
            self._views = Views(
                self.queue,
                info,
                self._experts,
                lambda: [server.bandwidth for server in self._setup.engine.spec.servers],
                self._tell,
                self._to_ready_engine,
            )
            server = _http_server(self._setup, info, self.queue, self._experts, self._views)
            tasks = [
                asyncio.create_task(work)
                for work in (
                    self._stopped.wait(),
                    self._serve(server, listener),
                    self._run_commands(),
                    self._mind_launcher(),
                )
            ]
            try:
                # The first two tasks end in normal operation, the others only with an exception.
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                self.queue.close()
                self._experts.close()
                server.should_exit = server.force_exit = True
                await self._end_engine()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._launcher.close()

    # The launcher.

    def _tell(self, event: protocol.FrontEvent) -> None:
        self._connection.send(protocol.encode(event))
        self._launcher.look_again()

    def _from_launcher(self, message: bytes) -> None:
        match protocol.decode_front_command(message):
            case protocol.Stop():
                self._stopped.set()
            case protocol.Drain():
                self._drain()
            case protocol.TakeOver():
                self._taken_over()
            case protocol.Join() as command:
                self._joins = True
                self._commands.put_nowait(command)
            case protocol.Reseat(_, rank, server) as command:
                self._names[rank] = server.name
                spec = self._setup.engine.spec.with_server(rank, server)
                engine = msgspec.structs.replace(self._setup.engine, spec=spec)
                self._setup = msgspec.structs.replace(self._setup, engine=engine)
                self._commands.put_nowait(command)
            case protocol.Keys(keys):
                self._keys.change(keys)
                self._views.end_streams()
            case protocol.Decided() as decided:
                self._experts.decided(decided)
            case protocol.AskView(watcher, url):
                self._views.asked(watcher, url)
            case protocol.Viewed() as viewed:
                self._views.viewed(viewed)
            case protocol.DrainAnswered(number) as answer:
                self._views.answered(number, answer)
            case protocol.Placed() as placed:
                self._experts.placed(placed, _layout(placed.layout))
                self.queue.short = placed.short
            case command:
                self._commands.put_nowait(command)

    def _taken_over(self) -> None:
        """Tell a launcher that did not start this server how things are."""
        self._experts.launcher_lost()
        self._tell(
            protocol.Taken(
                os.getpid(),
                self._start,
                self._endpoint,
                self._ready,
                bool(self._endpoint) and not self._joins,
                self._applied,
                self._draining.is_set(),
                self._experts.report(),
            )
        )
        if self._died is not None:
            self._tell(self._died)
        if self._silent:
            self._tell(protocol.EngineSilent(self._start, True))

    async def _mind_launcher(self) -> None:
        """Notice whether a launcher is there."""
        heard, when = -1, 0.0
        while True:
            now = time.monotonic()
            if (count := self._connection.heard) != heard:
                heard, when = count, now
            self._experts.launcher = now - when < LAUNCHER_S
            if not self._experts.launcher:
                self._experts.launcher_lost()
            await asyncio.sleep(1.0)

    def _on_sigterm(self) -> None:
        self._tell(protocol.DrainWanted())
        self._drain()

    def _drain(self) -> None:
        self.queue.drain()
        self._views.close()
        self._draining.set()

    async def _run_commands(self) -> None:
        while True:
            match await self._commands.get():
                case protocol.Restart(start, layout):
                    await self._end_engine()
                    self._start = start
                    self._start_engine(layout)
                case command:
                    self._to_engine(command)

    # The engine.

    def _start_engine(self, layout: bytes) -> None:
        start = self._start
        self._endpoint, self._joins, self._ready, self._silent = "", False, False, False
        self._died, self._applied = None, 0
        setup = msgspec.structs.replace(self._setup.engine, layout=layout)
        self._engine = EngineProcess(
            setup,
            self._private,
            self._setup.options.watchdog,
            self._from_engine,
            lambda silent: self._on_engine_silence(start, silent),
            lambda: self._on_engine_death(start),
        )
        log.info("engine start %d: process %d", start, self._engine.pid)

    async def _end_engine(self) -> None:
        self.queue.engine_died()
        if self._engine is not None:
            await self._engine.end()

    def _to_engine(self, command: protocol.Command) -> None:
        if self._engine is not None:
            self._engine.send(command)

    def _to_ready_engine(self, command: protocol.Command) -> None:
        """Send what an engine that starts has no answer to."""
        if self._ready:
            self._to_engine(command)

    def _from_engine(self, event: protocol.Event) -> None:
        match event:
            case protocol.Deltas(deltas):
                self.queue.receive(deltas)
            case protocol.Report(report):
                self.queue.reported(_report(report))
            case protocol.Ready():
                self._ready = True
                self.queue.engine_started()
                self._tell(protocol.FromEngine(self._start, event))
            case protocol.Applied(number):
                self._applied = number
                self._tell(protocol.FromEngine(self._start, event))
            case protocol.Prepared(_, endpoint):
                self._endpoint = endpoint
                self._tell(protocol.FromEngine(self._start, event))
            case protocol.Waterfall(number) as answer:
                self._views.answered(number, answer)
            case protocol.Hello() | protocol.Failed() | protocol.Pulse():
                pass
            case protocol.Traced() if not self._experts.launcher:
                pass
            case _:
                self._tell(protocol.FromEngine(self._start, event))

    def _on_engine_death(self, start: int) -> None:
        assert self._engine is not None
        self.queue.engine_died()
        engine = self._engine
        log.error("engine start %d died: exit status %s", start, engine.status)
        self._endpoint, self._ready = "", False
        self._died = protocol.EngineDied(start, engine.pid, engine.status, engine.failure)
        self._tell(self._died)

    def _on_engine_silence(self, start: int, silent: bool) -> None:
        self._silent = silent
        self._tell(protocol.EngineSilent(start, silent))

    # Users.

    async def _serve(self, server: HttpServer, listener: socket.socket) -> None:
        """Serve HTTP until drained, report Drained to the launcher, and wait for Stop."""
        serving = asyncio.create_task(server.serve([listener]))
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({serving, draining}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
                raise RuntimeError("the HTTP server exited unexpectedly")
            log.info("draining: %d requests in flight", self.queue.in_flight)
            server.should_exit = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.queue.drained(), self._setup.options.drain_seconds)
            self.queue.close()
            self._experts.close()
            # Do not wait longer for clients that still send a request or do not read an answer.
            await asyncio.wait({serving}, timeout=HANGUP_S)
            server.force_exit = True
            await serving
            self._tell(protocol.Drained())
            while self._experts.launcher:  # which will say Stop
                await asyncio.sleep(0.2)
        finally:
            serving.cancel()
            draining.cancel()


def _listen(options: ServeOptions) -> socket.socket:
    """Bind the HTTP port, before anything that takes long."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            options.bind, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        where = f"{bracketed(options.bind)}:{options.port}"
        raise UserError(
            f"cannot listen on {where}: {error}; give another --bind or --port"
        ) from error
    limit_unread(listener)
    return listener


def _layout(content: bytes) -> Layout:
    from dance_jax.placement.core import Layout

    return Layout.from_bytes(content)


def _serve_info(
    setup: FrontSetup, names: Sequence[str], files: ModelFiles, keys: Keys
) -> ServeInfo:
    from dance_jax.serve.app import ServeInfo
    from dance_jax.serve.parsers.formats import AnswerFormat

    engine = setup.engine
    model_config, tokenizer = files.read(setup.chat_template)
    files.close()
    answer_format = AnswerFormat.detect(
        tokenizer.template, setup.options.tool_call_parser, setup.options.reasoning_parser
    )
    log.info("answers: tool calls %s, reasoning %s", answer_format.tools, answer_format.reasoning)
    return ServeInfo(
        models=setup.options.served_model_name.split(","),
        tokenizer=tokenizer,
        engine_config=engine.config,
        model_config=model_config,
        servers=names,
        rank=engine.rank,
        keys=keys,
        allowed_origins=[each for each in setup.options.allowed_origins.split(",") if each],
        sampling=setup.sampling,
        answer_format=answer_format,
        created=int(time.time()),
    )


def _http_server(
    setup: FrontSetup,
    info: ServeInfo,
    queue: RequestQueue,
    experts: PlacementState,
    views: Views,
) -> HttpServer:
    from dance_jax.serve.app import create_app
    from dance_jax.serve.http_server import HttpServer
    from dance_jax.serve.metrics import HttpConnections

    options, counts = setup.options, HttpConnections()
    app = create_app(queue, info, experts, counts, views)
    return HttpServer(
        app,
        options.drain_seconds + HANGUP_S,
        BACKLOG,
        counts=counts,
        trusted_proxies=options.trusted_proxies,
        keep_alive_s=options.keep_alive,
    )


def _report(plain: object):
    from dance_jax.engine.report import EngineReport

    return msgspec.convert(plain, EngineReport)


if __name__ == "__main__":
    main()
