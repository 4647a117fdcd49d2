"""Messages of the control channel, between launcher, front ends and engines.

They are msgspec over ZeroMQ, and JSON on a process's input for its setup. They carry no version,
because before a launch on other machines the preflight refuses servers whose sources differ
(`preflight.findings.software`).

Free of JAX, because a worker reads its Setup before it may import JAX.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from dance_jax.config import ClusterSpec, EngineConfig, ServeOptions, ServerSpec
from dance_jax.engine.sequence import OutputDelta, Request

#: In `Setup.control`, stands for the machine that the server's ssh connection comes from.
SSH_CLIENT = "{ssh client}"


class Setup(msgspec.Struct, kw_only=True):
    """Everything a worker needs to start; one JSON line on its standard input.

    Standard input then stays open: its end tells the worker that the parent is gone.
    """

    spec: ClusterSpec
    rank: int
    config: EngineConfig
    #: Directory of the model on the server's machine, converted or not, or org/name@revision on
    #: the hub; "": the demo model.
    model: str
    #: Config and tokenizer for a server without a model directory (`model_files.pack`); empty for
    #: servers with one.
    model_files: bytes = b""
    #: Fingerprint that the model there must have, and the format of its experts
    #: (`ExpertFormat.name`).
    fingerprint: str
    experts: str
    #: The layout, as an npz file's content (`Layout.to_bytes`).
    layout: bytes
    #: ZeroMQ endpoint of the parent.
    control: str
    #: Key of the control channel.
    control_key: bytes
    #: The launch's key, from which the servers' secrets are derived.
    key: bytes
    #: First GPU that the server takes if its line names none.
    first_gpu: int
    #: Port at which the first server coordinates jax.distributed; 0: a free port.
    coordinator_port: int
    #: Number of devices of each server on this server's machine, and the server's index there.
    machine_devices: tuple[int, ...]
    machine_index: int
    #: Directory of converted models and compiled steps; None: no cache; "": the default of the
    #: server's machine.
    cache_dir: str | None
    #: The parent is across a network and sends signs of life on standard input.
    beats: bool
    #: Unix time in ns at which the trace begins; 0: no trace.
    trace_from: int = 0
    #: The parent is a front end that watches the engine's signs of life.
    watched: bool = False


class FrontSetup(msgspec.Struct, kw_only=True):
    """Everything a front end needs to start; one JSON line on its standard input, as a Setup."""

    #: Setup of the engine, except for the control channel between front end and engine.
    engine: Setup
    #: With the port of this server.
    options: ServeOptions
    #: Number of the first engine's start; higher than those of earlier front ends of this server.
    start: int = 0
    #: The server goes on without its launcher, until another one takes over.
    outlives: bool = False
    #: Process id of an earlier front end, which may still run on the server's machine.
    before: int | None = None
    #: The model's defaults of fields of `SamplingParams`.
    sampling: dict[str, int | float] = {}
    #: Keys, one of which requests must carry; none: they need no key.
    keys: list[str] = []
    #: A chat template to use instead of the model's, and where it is from.
    chat_template: tuple[str, str] | None = None


# From parent to worker.


class Join(msgspec.Struct, tag=True):
    """All servers are prepared: connect to each other."""

    #: host:port at which rank 0 coordinates the jax.distributed job of servers that step together.
    coordinator: str
    #: Where the servers listen for each other, by rank; "": the server is restarting.
    endpoints: list[str]
    #: Each server steps on its own and answers calls to its experts.
    calls: bool


class Submit(msgspec.Struct, tag=True):
    """Run these requests on this server."""

    requests: list[Request]


class Abort(msgspec.Struct, tag=True):
    """End these requests, or all of them; their last deltas have finish_reason "abort"."""

    request_ids: list[str] | None = None


class AskStats(msgspec.Struct, tag=True):
    """Answer with a Stats."""


#: New content of a slot, as `placement.migration.SlotChange`: server, local device, slot, layer and
#: expert; layer and expert are -1 for a slot that is emptied.
Change = tuple[int, int, int, int, int]


class ExpertLoad(msgspec.Struct, frozen=True, array_like=True):
    """An expert to load into a slot."""

    #: Local device of the server, and a slot of the device.
    device: int
    slot: int
    layer: int
    expert: int
    #: Rank of a server that holds the expert until the batch is committed; -1: no server that runs.
    holder: int


class Stage(msgspec.Struct, tag=True):
    """Load a batch of moved experts into empty slots in the background; answer with Staged."""

    #: Counted from 1 since the engines' start; all servers get the same batches.
    number: int
    #: Changes of all servers relative to the previous batch.
    changes: list[Change]
    #: What this server loads, and from which holders.
    loads: list[ExpertLoad]
    #: Sequences wait for these experts: load them at once, without rests.
    urgent: bool = False


class PeerRestarted(msgspec.Struct, tag=True):
    """Another server's engine has restarted: connect to it."""

    rank: int
    endpoint: str


class PeerLost(msgspec.Struct, tag=True):
    """Another server is gone until PeerRestarted: ask it for nothing."""

    rank: int


class Commit(msgspec.Struct, tag=True):
    """All servers have loaded a batch: apply it after a step and answer with Applied.

    Servers that step together apply the batch after the same step.
    """

    number: int


class Drop(msgspec.Struct, tag=True):
    """Discard a batch that some server could not load; answer with Dropped."""

    number: int


class Reseat(msgspec.Struct, tag=True):
    """A server has left for good, or another one takes its seat; no batch is under way."""

    #: Number as of a batch.
    number: int
    rank: int
    #: The new server; `config.VACANT`: there is none.
    server: ServerSpec
    #: Expert slots of each of its devices.
    slots: int


class TakeOver(msgspec.Struct, tag=True):
    """From a launcher that has not started this front end, or has lost it for a while.

    The front end answers with Taken.
    """


class Settle(msgspec.Struct, tag=True):
    """Apply the staged batches that some server has applied, drop all others; answer with Holds."""

    #: Number of the last batch that any server has applied.
    applied: int


class Watched(msgspec.Struct, tag=True):
    """Somebody looks at the engine: for some seconds, its reports have `EngineReport.counts`."""


class AskWaterfall(msgspec.Struct, tag=True):
    """Record the next steps that decode in detail; answer with Waterfall."""

    id: int
    #: Number of steps.
    steps: int


class Stop(msgspec.Struct, tag=True):
    """Exit."""


# From worker to parent.


class Hello(msgspec.Struct, tag=True):
    """The process runs and is connected."""

    pid: int


class Prepared(msgspec.Struct, tag=True):
    """The model is ready, and the worker can join the other servers."""

    #: host:port at which the worker would coordinate.
    coordinator: str
    #: host:port at which the worker listens for the other servers.
    endpoint: str


class Joined(msgspec.Struct, tag=True):
    """The worker is part of the job; now it loads and compiles."""


class Progress(msgspec.Struct, tag=True):
    """`done` of `total` parts of a stage are done (total 0: unknown)."""

    stage: str
    done: int
    total: int


class Ready(msgspec.Struct, tag=True):
    """The worker is ready for requests."""

    #: Steps read from the compile cache; steps compiled.
    cache_hits: int
    cache_misses: int


class Deltas(msgspec.Struct, tag=True):
    """New output of one step."""

    deltas: list[OutputDelta]


class Report(msgspec.Struct, tag=True):
    """State after a step; sent often, but not after every step. `report` is an EngineReport."""

    report: Any


class Stats(msgspec.Struct, tag=True):
    """All counters of the worker: an EngineStats, left encoded for processes that relay it."""

    stats: msgspec.Raw


class Waterfall(msgspec.Struct, tag=True):
    """Answer to AskWaterfall."""

    id: int
    #: `engine.waterfall.Waterfall.steps`.
    steps: list[dict[str, Any]]
    #: Why steps cannot be recorded; "": they were.
    why: str = ""


class Traced(msgspec.Struct, tag=True):
    """Further events of a trace, as lines (`engine.trace`)."""

    lines: bytes


class Staged(msgspec.Struct, tag=True):
    """A batch is loaded."""

    number: int
    #: Time it took.
    seconds: float
    #: Bytes read from files or received from other servers.
    bytes_read: int


class StageFailed(msgspec.Struct, tag=True):
    """A batch cannot be loaded; the server continues without it."""

    number: int
    why: str


class Applied(msgspec.Struct, tag=True):
    """A batch is applied on this server."""

    number: int


class Dropped(msgspec.Struct, tag=True):
    """A batch will not be applied any more, unless Applied came before this message."""

    number: int


class Holds(msgspec.Struct, tag=True):
    """The layout as the engine knows it, with no batch staged."""

    #: As `Layout.to_bytes`.
    layout: bytes
    #: Number of the last batch; later ones must have higher numbers.
    number: int


class Pulse(msgspec.Struct, tag=True):
    """A sign of life, over a connection of its own."""

    #: What the engine does, in a few words.
    doing: str
    #: Seconds in which it has neither made progress nor used its cores.
    still_s: float
    #: Seconds without progress.
    stalled_s: float


class Failed(msgspec.Struct, tag=True):
    """The process is about to exit because of an exception."""

    message: str
    #: The user can fix the cause (UserError).
    user: bool


# From launcher to front end, in addition to Join, PeerRestarted, AskStats, Stage, Commit, Drop and
# Stop.


class Restart(msgspec.Struct, tag=True):
    """End the rest of the engine and start a new one."""

    #: Number of this start, above that of the previous one.
    start: int
    #: The current layout, as in `Setup`.
    layout: bytes


class Drain(msgspec.Struct, tag=True):
    """Refuse new requests, finish the running ones, then send Drained; the engine steps on."""


@dataclasses.dataclass(frozen=True)
class PlacedServer:
    """The experts of one server, as `/placement` shows them."""

    name: str
    #: Ids of the experts resident on the server, per MoE layer.
    resident: list[list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether experts move, and why; also shown by `/placement`."""

    #: Unix time in seconds.
    when: float
    policy: str
    #: The user asked for the move whatever it costs; the user asked only to see the decision.
    forced: bool
    dry_run: bool
    #: Experts move, or would move without dry_run.
    migrate: bool
    reason: str
    #: Predicted seconds of expert calls and their transfers in the coming interval, with the
    #: present and with the new placement; None: no data to predict from.
    present_seconds: float | None = None
    expected_seconds: float | None = None
    #: Predicted seconds of loading.
    migration_seconds: float = 0.0
    #: Experts that servers must load.
    experts_moved: int = 0
    #: Fraction of the present seconds that is saved.
    gain: float | None = None
    #: Why the migration stopped half-way; "": it did not.
    failure: str = ""
    #: Where all experts are afterwards, or would be; a request for a decision may ask for it. Empty
    #: if they stay.
    servers: list[PlacedServer] = dataclasses.field(default_factory=list)


class Decided(msgspec.Struct, tag=True):
    """Answer to a RebalanceWanted; `decision` is None if it failed, and `why` gives the reason."""

    id: int
    decision: Decision | None
    why: str = ""


class Keys(msgspec.Struct, tag=True):
    """The keys, one of which requests must carry from now on."""

    keys: list[str]


class Placed(msgspec.Struct, tag=True):
    """The current placement and the state of migrations; sent when any of it changes."""

    #: Grows when all experts of a migration have moved, or when a migration stops half-way.
    version: int
    layout: bytes
    last_decision: Decision | None
    #: Migrations completed; migrations that failed to load; experts loaded on all servers.
    migrations: int
    failures: int
    experts_migrated: int
    #: Number of the membership, which grows whenever a server is lost or back; and ranks of the
    #: servers that do not run.
    epoch: int = 1
    absent: list[int] = []
    #: Why requests cannot be answered, because no server has some experts; "": they can.
    short: str = ""
    #: The layout to return to when lost servers are back; empty: `layout`.
    home: bytes = b""
    #: The layout that the migration under way leads to; empty: there is none.
    target: bytes = b""


class AskView(msgspec.Struct, tag=True):
    """Somebody watches at another server: answer with View."""

    #: Rank of the server that asks.
    watcher: int
    #: Where its users reach it: its page may call this server. "": not known.
    url: str


class Viewed(msgspec.Struct, tag=True):
    """What another server has to show, or the launcher of a server that does not run."""

    rank: int
    #: The server's `serve.view.View` as msgpack; empty: it does not run.
    view: bytes
    #: Where users of the watched server reach it; "": they cannot.
    url: str
    #: How the server's processes ended last, and when, unix time in seconds; "": they never did.
    fault: str = ""
    fault_time: float = 0.0


class DrainAnswered(msgspec.Struct, tag=True):
    """Answer to DrainServer."""

    id: int
    #: Why the server cannot leave; "": it finishes its requests now.
    why: str


# From front end to launcher, in addition to Hello and Failed.


#: Events of an engine that its front end passes on to the launcher.
PassedEvent = (
    Prepared
    | Joined
    | Progress
    | Ready
    | Stats
    | Traced
    | Staged
    | StageFailed
    | Applied
    | Dropped
    | Holds
)


class FromEngine(msgspec.Struct, tag=True):
    """An event of the front end's engine."""

    #: Number of the engine's start.
    start: int
    event: PassedEvent


class EngineDied(msgspec.Struct, tag=True):
    """The front end's engine has ended or failed."""

    start: int
    pid: int
    #: Exit status as in a shell; None: the process still runs.
    status: int | None
    #: The engine's own report.
    failure: Failed | None


class EngineSilent(msgspec.Struct, tag=True):
    """The front end's engine gives no sign of life for the moment, or does so again."""

    start: int
    silent: bool


class Taken(msgspec.Struct, tag=True):
    """Answer to a TakeOver; an engine that has died is reported again after this message."""

    pid: int
    #: Number of the engine's start, and where the engine listens; "": it is not prepared.
    start: int
    endpoint: str
    #: The engine is ready; it is prepared, and waits for Join.
    ready: bool
    waits: bool
    #: Number of the last batch that the engine has applied.
    applied: int
    #: The front end accepts no requests any more, and ends when the running ones are done.
    draining: bool
    #: The placement as the front end knows it.
    placed: Placed


class DrainWanted(msgspec.Struct, tag=True):
    """The front end got SIGTERM: drain all servers."""


class Drained(msgspec.Struct, tag=True):
    """No request is in flight, and none is accepted."""


class RebalanceWanted(msgspec.Struct, tag=True):
    """A user asks for a decision now."""

    id: int
    #: Move experts whatever it costs; only decide.
    force: bool
    dry_run: bool
    #: [server][layer]: ids of the experts to place there; None: the policy decides.
    resident: list[list[list[int]]] | None = None


class Watching(msgspec.Struct, tag=True):
    """Somebody watches at this server: have all servers show what they do."""


class View(msgspec.Struct, tag=True):
    """Answer to AskView."""

    watcher: int
    #: As in `Viewed`.
    view: bytes


class DrainServer(msgspec.Struct, tag=True):
    """A user wants a server to finish its requests and leave; answered with DrainAnswered."""

    id: int
    name: str


#: Commands that a front end passes on from the launcher to its engine, and all that each obeys.
PassedCommand = Join | PeerLost | PeerRestarted | AskStats | Stage | Commit | Drop | Reseat | Settle
Command = PassedCommand | Submit | Abort | Watched | AskWaterfall | Stop
FrontCommand = (
    PassedCommand
    | Restart
    | Decided
    | Placed
    | TakeOver
    | Keys
    | AskView
    | Viewed
    | DrainAnswered
    | Drain
    | Stop
)
Event = Hello | PassedEvent | Deltas | Report | Waterfall | Pulse | Failed
FrontEvent = (
    Hello
    | FromEngine
    | EngineDied
    | EngineSilent
    | Taken
    | RebalanceWanted
    | Watching
    | View
    | DrainServer
    | DrainWanted
    | Drained
    | Failed
)

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode
decode_front_command = msgspec.msgpack.Decoder(FrontCommand).decode
decode_front_event = msgspec.msgpack.Decoder(FrontEvent).decode
