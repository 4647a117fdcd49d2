"""What a dashboard shows: each server's view of itself, once a second while somebody watches."""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from dance_jax.launch.control import protocol
from dance_jax.serve.queue import Unavailable

if TYPE_CHECKING:
    from dance_jax.serve.info import ServeInfo
    from dance_jax.serve.placement_state import PlacementState
    from dance_jax.serve.queue import RequestQueue

#: Seconds between two views.
VIEW_S = 1.0
#: Seconds for an engine to compute the tokens of a waterfall, and most steps of one.
WATERFALL_S, MAX_STEPS = 10.0, 16
#: Seconds for the launcher to answer whether a server can leave.
DRAIN_S = 30.0

_encode = msgspec.json.Encoder().encode


@dataclasses.dataclass
class Latest:
    """The latest latencies of this server's users, in seconds."""

    ttft: collections.deque[float] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=256)
    )
    itl: collections.deque[float] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=1024)
    )


class Link(msgspec.Struct):
    """A server's side of the link to a peer; counters are since the engine's start."""

    peer: str
    #: Payload bytes.
    sent: int
    received: int
    calls: int
    repeats: int
    lost: int
    #: Mean seconds from a call to its answer; None without calls.
    round_trip: float | None
    #: Seconds in which steps waited for answers of the peer.
    waited: float
    #: Rate of the slower end in bytes per second; None if unknown.
    rate: float | None


class View(msgspec.Struct):
    """What one server has to show; counters are since the engine's start."""

    name: str
    #: Unix time in seconds.
    time: float
    #: Sequences in the engine, and requests of this server that have not ended.
    running: int = 0
    waiting: int = 0
    in_flight: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    #: p50 and p99 in seconds, of the latest requests and tokens; None without any.
    ttft: tuple[float, float] | None = None
    itl: tuple[float, float] | None = None
    steps: int = 0
    #: MoE layers of the steps, those that waited for another server, tokens times MoE layers, and
    #: those with a call to another server.
    layers: int = 0
    layers_waited: int = 0
    rows: int = 0
    rows_away: int = 0
    calls_local: int = 0
    calls_remote: int = 0
    #: Bytes by use: "trunk", "kv", "kv_used" and "experts".
    memory: dict[str, int] = {}
    spare_slots: int = 0
    #: uint32 [l, e] in base64: expert calls of this server's tokens.
    counts: str = ""
    links: list[Link] = []


def own_view(
    queue: RequestQueue, latest: Latest, info: ServeInfo, rates: Sequence[float | None]
) -> View:
    """The view of this server, from its engine's latest report.

    Args:
        queue: provides the report.
        latest: latencies.
        info: of the server.
        rates: of each server's network in bits per second, by rank; None if unknown.
    """
    layers = len(info.model_config.moe_layers)
    view = View(info.servers[info.rank], time.time(), in_flight=queue.in_flight)
    view.ttft, view.itl = _percentiles(latest.ttft), _percentiles(latest.itl)
    report = queue.report
    if report is None:
        return view
    for name in ("running", "waiting", "prompt_tokens", "generation_tokens", "steps"):
        setattr(view, name, getattr(report, name))
    for name in ("calls_local", "calls_remote", "spare_slots"):
        setattr(view, name, getattr(report, name))
    view.layers = int(report.sums.layers) or report.steps * layers
    view.layers_waited = int(report.sums.layers_waited)
    view.rows = (report.prompt_tokens + report.generation_tokens) * layers
    view.rows_away = int(report.sums.rows_away)
    used = report.kv_blocks_used / max(report.kv_blocks, 1)
    view.memory = {**report.memory, "kv_used": int(used * report.memory.get("kv", 0))}
    view.counts = base64.b64encode(report.counts).decode()
    view.links = [
        _link(rank, name, report, (rates[rank], rates[info.rank]))
        for rank, name in info.seated.items()
        if rank != info.rank
    ]
    return view


def _link(rank: int, name: str, report: Any, rates: Sequence[float | None]) -> Link:
    peer = report.peers[rank] if report.peers else None
    known = [rate / 8 for rate in rates if rate is not None]
    return Link(
        peer=name,
        sent=report.bytes_sent[rank],
        received=report.bytes_received[rank],
        calls=peer.calls if peer else 0,
        repeats=peer.repeats if peer else 0,
        lost=peer.lost if peer else 0,
        round_trip=peer.waited_ns / 1e9 / peer.calls if peer and peer.calls else None,
        waited=peer.waited_ns / 1e9 if peer else 0.0,
        rate=min(known) if known else None,
    )


def _percentiles(values: Any) -> tuple[float, float] | None:
    if not values:
        return None
    low, high = np.percentile(values, (50, 99))
    return float(low), float(high)


class Views:
    """The views of all servers, and what else users of a dashboard ask for; for the event loop.

    Nothing is done while nobody watches.

    Args:
        queue: provides the engine's reports.
        info: of this server.
        experts: the placement.
        rates: of each server's network in bits per second, by rank; they change. None: unknown.
        tell: sends an event to the launcher.
        to_engine: sends a command to the engine, if one is ready.
    """

    def __init__(
        self,
        queue: RequestQueue,
        info: ServeInfo,
        experts: PlacementState,
        rates: Callable[[], Sequence[float | None]] | None = None,
        tell: Callable[[protocol.FrontEvent], None] = lambda event: None,
        to_engine: Callable[[protocol.Command], None] = lambda command: None,
    ) -> None:
        self._queue, self._info, self._experts = queue, info, experts
        self._rates = rates or (lambda: [None] * len(info.servers))
        #: Filled by the metrics.
        self.latest = Latest()
        self._tell, self._to_engine = tell, to_engine
        #: By rank, the latest view of each other server, and time.time() when it came.
        self._others: dict[int, tuple[protocol.Viewed, float]] = {}
        self._watchers = 0
        self._closed = asyncio.Event()
        #: Grows when all streams must end.
        self._era = 0
        self._tick = asyncio.Event()
        self._views = b""
        self._ticking: asyncio.Task[None] | None = None
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}

    def _own(self) -> View:
        return own_view(self._queue, self.latest, self._info, self._rates())

    # From the launcher and the engine.

    def asked(self, watcher: int, url: str) -> None:
        """Another server's watcher wants the view of this one, and its page may call this one."""
        self._allow(url)
        self._to_engine(protocol.Watched())
        self._tell(protocol.View(watcher, msgspec.msgpack.encode(self._own())))

    def _allow(self, url: str) -> None:
        allowed = self._info.allowed_origins
        # Browsers on the server's machine may know it by either name.
        number, name = "//127.0.0.1:", "//localhost:"
        for origin in {url, url.replace(number, name), url.replace(name, number)} - {""}:
            if origin not in allowed:
                allowed.append(origin)

    def viewed(self, viewed: protocol.Viewed) -> None:
        """Take in the view of another server."""
        self._others[viewed.rank] = viewed, time.time()

    def answered(self, number: int, answer: Any) -> None:
        """Take in the answer of the engine or of the launcher to what was asked."""
        future = self._asked.get(number)
        if future is not None and not future.done():
            future.set_result(answer)

    def end_streams(self) -> None:
        """End all streams: the keys have changed. Viewers whose keys are valid come back."""
        self._era += 1
        self._wake()

    def close(self) -> None:
        """End all streams: the server drains."""
        self._closed.set()
        self.end_streams()

    # For users.

    async def events(self) -> AsyncGenerator[tuple[str, bytes]]:
        """Names and JSON of events, until the server drains."""
        with self._watching():
            placed: Any = None
            decided: Any = None
            era = self._era
            while self._era == era and not self._closed.is_set():
                placement = self._placement_key()
                if placement != placed:
                    placed = placement
                    yield "placement", self._placement()
                decision = self._experts.last_decision
                if decision is not None and decision != decided:
                    decided = decision
                    yield "decision", _encode(decision)
                if self._views:
                    yield "views", self._views
                await self._tick.wait()

    async def waterfall(self, steps: int) -> protocol.Waterfall:
        """The next steps that decode, in detail, or why they cannot be recorded.

        Raises:
            Unavailable: no engine is ready.
            TimeoutError: no token was computed for a while.
        """
        if not self._queue.running:
            raise Unavailable("the engine is starting")
        ask = lambda number: self._to_engine(protocol.AskWaterfall(number, steps))  # noqa: E731
        return await self._ask(ask, WATERFALL_S)

    async def drain(self, name: str) -> str:
        """Have a server finish its requests and leave; "", or why it cannot.

        Raises:
            Unavailable: no launcher answers.
        """
        if not self._experts.launcher:
            raise Unavailable("the launcher does not answer")
        try:
            ask = lambda number: self._tell(protocol.DrainServer(number, name))  # noqa: E731
            return (await self._ask(ask, DRAIN_S)).why
        except TimeoutError:
            raise Unavailable("the launcher does not answer") from None

    async def _ask(self, ask: Callable[[int], None], patience_s: float) -> Any:
        number = next(self._numbers)
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            ask(number)
            async with asyncio.timeout(patience_s):
                return await future
        finally:
            del self._asked[number]

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        self._watchers += 1
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._look())
        try:
            yield
        finally:
            self._watchers -= 1

    async def _look(self) -> None:
        """Collect views as long as anybody watches."""
        while self._watchers and not self._closed.is_set():
            self._to_engine(protocol.Watched())
            if self._experts.launcher:
                self._tell(protocol.Watching())
            # Meanwhile the others answer.
            await asyncio.sleep(VIEW_S / 2)
            self._views = self._all_views()
            self._wake()
            await asyncio.sleep(VIEW_S / 2)
        self._ticking = None
        self._views = b""
        self._wake()

    def _wake(self) -> None:
        """Wake all streams that wait for a tick; streams that come later wait for the next one."""
        self._tick.set()
        self._tick = asyncio.Event()

    def _all_views(self) -> bytes:
        now, shown = time.time(), []
        for rank, name in self._info.seated.items():
            viewed, came = self._others.get(rank, (None, now))
            if rank == self._info.rank:
                fields = msgspec.to_builtins(self._own())
            elif viewed and viewed.view:
                fields = msgspec.msgpack.decode(viewed.view)
            else:
                fields = msgspec.to_builtins(View(name, now))
            fields["alive"] = rank not in self._experts.absent and (
                rank == self._info.rank or viewed is not None
            )
            fields["age"] = 0.0 if rank == self._info.rank else now - came
            fields["url"] = viewed.url if viewed else ""
            fields["fault"] = viewed.fault if viewed else ""
            fields["fault_time"] = viewed.fault_time if viewed else 0.0
            shown.append(fields)
        return _encode({"time": now, "launcher": self._experts.launcher, "servers": shown})

    def _placement_key(self) -> tuple[Any, ...]:
        experts = self._experts
        held = experts.layout.resident.tobytes()
        return experts.version, held, experts.absent, experts.target, *self._info.servers

    def _placement(self) -> bytes:
        experts, layout = self._experts, self._experts.layout
        layers, count = layout.device_of.shape[1:]
        capacities = layout.capacities
        target = type(layout).from_bytes(experts.target) if experts.target else None
        servers = [
            {
                "name": name,
                "slots": int(capacities[rank]),
                "resident": [_bits(layer) for layer in layout.resident[rank]],
                "target": target and [_bits(layer) for layer in target.resident[rank]],
            }
            for rank, name in self._info.seated.items()
        ]
        return _encode(
            {
                "version": experts.version,
                "epoch": experts.epoch,
                "model": self._info.model,
                "you": self._info.servers[self._info.rank],
                "layers": layers,
                "experts": count,
                "servers": servers,
                "lost": [n for rank, n in self._info.seated.items() if rank in experts.absent],
            }
        )


def _bits(row: np.ndarray) -> str:
    return base64.b64encode(np.packbits(row, bitorder="little").tobytes()).decode()
