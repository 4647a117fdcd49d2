"""One server in this process: a real engine with a tiny model behind a real HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import pathlib
import queue
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import TypeVar

from starlette.types import ASGIApp

from dance_jax.config import EngineConfig
from dance_jax.engine.compile_cache import CompileCache
from dance_jax.engine.engine import Engine, whole_model
from dance_jax.launch.control.protocol import Abort, Command, Submit
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import ensure_converted
from dance_jax.models.random_weights import write_random_checkpoint
from dance_jax.models.tokenizer import Tokenizer
from dance_jax.serve.app import ServeInfo, create_app
from dance_jax.serve.http_server import HttpServer
from dance_jax.serve.keys import Keys
from dance_jax.serve.parsers.formats import AnswerFormat
from dance_jax.serve.placement_state import PlacementState
from dance_jax.serve.queue import RequestQueue
from tests.tiny_models import SERVED

MODEL = "tiny"
#: Context length in tokens, prompt plus output.
CONTEXT = 512
#: Maximum number of waiting requests.
MAX_QUEUE = 32
#: Seconds after which an expected event counts as missing.
PATIENCE_S = 60.0
#: Calls are written as Hermes writes them. Of tools it shows only the names: prompts stay short.
TEMPLATE = r"""
{%- if tools %}tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}
{% endif %}
{%- for message in messages %}
{{- message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{{- call.function.arguments | tojson }}}</tool_call>
{%- endfor %}{{ "\n" }}
{%- endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""


class _EngineThread:
    """Stands in for the engine process: steps in a thread while there is work.

    Args:
        engine: a warm engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        #: Every command sent, in order.
        self.seen: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        #: Ids of requests that the engine aborted, in order.
        self.aborted: queue.SimpleQueue[str] = queue.SimpleQueue()
        #: Permits for steps while the engine is held.
        self._permits: threading.Semaphore | None = None

    def send(self, command: Command | None) -> None:
        """Send a command to the engine; None ends the engine."""
        self.seen.put(command)
        self._commands.put(command)

    @contextlib.contextmanager
    def held(self) -> Iterator[threading.Semaphore]:
        """Within the context, the engine runs one step for each release of the semaphore."""
        permits = self._permits = threading.Semaphore(0)
        try:
            yield permits
        finally:
            self._permits = None
            permits.release()

    def run(self, loop: asyncio.AbstractEventLoop, requests: RequestQueue) -> None:
        """Run the engine until None is sent; its output goes to `requests` on the event loop."""
        while True:
            while not self._engine.has_work or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                self._execute(command)
            if self._permits is not None:
                self._permits.acquire()
            deltas = self._engine.step().outputs
            loop.call_soon_threadsafe(requests.reported, self._engine.report())
            loop.call_soon_threadsafe(requests.receive, deltas)
            for delta in deltas:
                if delta.finish_reason == "abort":
                    self.aborted.put(delta.request_id)

    def _execute(self, command: Command) -> None:
        match command:
            case Submit(requests):
                for request in requests:
                    self._engine.add(request)
            case Abort(request_ids):
                for request_id in request_ids or ():
                    self._engine.abort(request_id)


class HttpThread:
    """An application behind a real HTTP server at `url`, from construction until `stop`.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._http = HttpServer(app, PATIENCE_S, 128)
        # The socket listens from now on; clients wait until their connection is accepted.
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._socket.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()

    async def _serve(self) -> None:
        async with self._beside():
            await self._http.serve(sockets=[self._socket])

    @contextlib.asynccontextmanager
    async def _beside(self) -> AsyncIterator[None]:
        """A context with what runs beside the HTTP server, on its event loop."""
        yield

    def stop(self) -> None:
        """Stop the HTTP server and what runs beside it."""
        self._http.should_exit = True
        self._thread.join()
        self._socket.close()


class LocalServer(HttpThread):
    """A server with an engine, from construction until `stop`.

    Args:
        directory: directory for the model's files.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        fields = SERVED | {"max_position_embeddings": CONTEXT}
        model = write_random_checkpoint(directory / "tiny", fields, seed=3)
        (model / "chat_template.jinja").write_text(TEMPLATE)
        checkpoint = Checkpoint.open(ensure_converted(model, directory / "cache"))
        self.tokenizer = Tokenizer.load(model)
        # As few buckets as possible, because compiling them takes most of the time.
        config = EngineConfig(CONTEXT, max_num_seqs=4, decode_rows=(4,), slice_rows=(1,))
        engine = Engine(
            checkpoint, self.tokenizer, None, 0, None, config, compile_cache=CompileCache(None)
        )
        engine.warmup()
        self.engine = _EngineThread(engine)
        self.queue = RequestQueue(self.engine.send, MAX_QUEUE, MAX_QUEUE, itertools.count())
        info = ServeInfo(
            models=[MODEL],
            tokenizer=self.tokenizer,
            engine_config=config,
            model_config=checkpoint.config,
            servers=("alone",),
            rank=0,
            keys=Keys(),
            allowed_origins=[],
            sampling={},
            answer_format=AnswerFormat.detect(self.tokenizer.template),
            created=1_700_000_000,
        )
        super().__init__(create_app(self.queue, info, PlacementState(whole_model(checkpoint))))

    @contextlib.asynccontextmanager
    async def _beside(self) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        stepping = loop.run_in_executor(None, self.engine.run, loop, self.queue)
        self.queue.engine_started()
        try:
            yield
        finally:
            self.engine.send(None)
            await stepping


@contextlib.contextmanager
def local_server(directory: pathlib.Path) -> Iterator[LocalServer]:
    """A context with a running server."""
    with stopping(LocalServer(directory)) as server:
        yield server


Stoppable = TypeVar("Stoppable", bound=HttpThread)


@contextlib.contextmanager
def stopping(server: Stoppable) -> Iterator[Stoppable]:
    """A context with a server that is stopped at its end."""
    try:
        yield server
    finally:
        server.stop()
