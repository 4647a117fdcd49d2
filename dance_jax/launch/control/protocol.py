"""What launcher, front ends and engines say to each other: msgspec over a socket.

Without JAX: a worker reads its Setup before it may import it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from dance_jax.config import ClusterSpec, EngineConfig, option
from dance_jax.engine.sequence import OutputDelta, Request

#: In `Setup.control`, stands for the machine that the server's ssh connection comes from.
SSH_CLIENT = "{ssh client}"
#: Where the key of users may be, besides --api-key, which others on the machine can see.
API_KEY_VARIABLE = "DANCE_JAX_API_KEY"


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
    #: Config and tokenizer for a server that has no such directory (`model_files.pack`); empty:
    #: it has.
    model_files: bytes = b""
    #: Fingerprint the model there must have, and the format of its experts (`ExpertFormat.name`).
    fingerprint: str
    experts: str
    #: The layout, as an npz file's content (`Layout.to_bytes`).
    layout: bytes
    #: ZeroMQ endpoint of the parent.
    control: str
    #: The key of that channel.
    control_key: bytes
    #: The launch's key, from which the servers' secrets are derived.
    key: bytes
    #: Of the machine's GPUs, the first that it takes where its line names none.
    first_gpu: int
    #: Port on which the first server coordinates jax.distributed; 0: a free one.
    coordinator_port: int
    #: Devices of the servers on this server's machine, and which of them it is.
    machine_devices: tuple[int, ...]
    machine_index: int
    #: Converted models and compiled steps are kept under it; None: nowhere; "": where the user
    #: of that machine keeps them.
    cache_dir: str | None
    #: The parent's private directory on this machine, removed by the process if the parent is
    #: killed; "": the parent is on another one.
    private_dir: str
    #: The parent sends signs of life on standard input, because a network lies between.
    beats: bool
    #: Unix time, in ns, from which the times of a trace count; 0: none is wanted.
    trace_from: int = 0


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """How front ends serve."""

    served_model_name: str = option(
        "",
        "of the model in requests and answers (default: org/name, the model's directory, or demo)",
        metavar="NAME",
    )
    bind: str = option(
        "127.0.0.1",
        "where each server listens; 0.0.0.0: everywhere (default: {default})",
        metavar="ADDRESS",
    )
    port: int = option(
        8000,
        "of each server; the second one of the same machine has the next, and so on "
        "(default: {default})",
        kind="port",
    )
    api_key: str | None = option(
        None,
        f"what requests must carry; others see it here, not in {API_KEY_VARIABLE} (default: "
        "nothing)",
        metavar="KEY",
    )
    drain_seconds: float = option(
        30.0,
        "for what runs to finish after SIGTERM or Ctrl-C (default: {default})",
        kind="seconds",
        metavar="S",
    )
    max_queue: int = option(
        256,
        "requests on each server that may wait for their first token (default: {default})",
        kind="count",
        metavar="N",
    )


class FrontSetup(msgspec.Struct, kw_only=True):
    """Everything a front end needs to start; one JSON line on its standard input, as a Setup."""

    #: What its engine gets, but for the control channel between the two.
    engine: Setup
    #: With the port of this very server.
    options: ServeOptions


# Parent to worker.


class Join(msgspec.Struct, tag=True):
    """All servers are prepared: connect with each other."""

    #: host:port where rank 0 coordinates a jax.distributed job of servers that step together.
    coordinator: str
    #: Where the servers listen for each other, by rank; "": one starts anew just now.
    endpoints: list[str]
    #: Each server steps on its own, and experts answer calls.
    calls: bool


class Submit(msgspec.Struct, tag=True):
    """More requests for this server."""

    requests: list[Request]


class Abort(msgspec.Struct, tag=True):
    """End these requests, or all: their last deltas say "abort"."""

    request_ids: list[str] | None = None


class AskStats(msgspec.Struct, tag=True):
    """Send a Stats."""


#: New content of a slot, as `placement.migration.SlotChange`: server, local device, slot, and layer
#: and expert, which are both -1 if the slot is emptied.
Change = tuple[int, int, int, int, int]


class ExpertLoad(msgspec.Struct, frozen=True, array_like=True):
    """An expert that a slot is to hold."""

    #: Local device of the server, and slot on it.
    device: int
    slot: int
    layer: int
    expert: int
    #: Rank of a server that holds it until the batch is in force.
    holder: int


class Stage(msgspec.Struct, tag=True):
    """Load a batch of moved experts in the background, into empty slots, and say Staged."""

    #: From 1 on since the engines' start; all servers get the same batches.
    number: int
    #: Of all servers, on top of the batch before.
    changes: list[Change]
    #: What this server loads, and from where.
    loads: list[ExpertLoad]


class PeerRestarted(msgspec.Struct, tag=True):
    """Another server's engine has started anew: connect with it."""

    rank: int
    endpoint: str


class Commit(msgspec.Struct, tag=True):
    """All servers have loaded a batch: put it in force after a step, and say Applied.

    Servers that step together do so after the same one.
    """

    number: int


class Drop(msgspec.Struct, tag=True):
    """Forget a batch that some server could not load, and say Dropped."""

    number: int


class Stop(msgspec.Struct, tag=True):
    """Exit."""


# Worker to parent.


class Hello(msgspec.Struct, tag=True):
    """The process runs and listens."""

    pid: int


class Prepared(msgspec.Struct, tag=True):
    """The model is there and the worker can join the others."""

    #: host:port where it would coordinate.
    coordinator: str
    #: host:port where it listens for the other servers.
    endpoint: str


class Joined(msgspec.Struct, tag=True):
    """The worker is part of the job; now it loads and compiles."""


class Progress(msgspec.Struct, tag=True):
    """`done` of `total` parts of a stage are done (total 0: not known)."""

    stage: str
    done: int
    total: int


class Ready(msgspec.Struct, tag=True):
    """The worker waits for requests."""

    #: Steps read from the compile cache, and compiled.
    cache_hits: int
    cache_misses: int


class Deltas(msgspec.Struct, tag=True):
    """What one step added."""

    deltas: list[OutputDelta]


class Report(msgspec.Struct, tag=True):
    """A step was completed; often, but not after each. `report` is an EngineReport."""

    report: Any


class Stats(msgspec.Struct, tag=True):
    """All that the worker has counted: an EngineStats, which those on the way need not read."""

    stats: msgspec.Raw


class Traced(msgspec.Struct, tag=True):
    """More events of a trace, in lines (`engine.trace`)."""

    lines: bytes


class Staged(msgspec.Struct, tag=True):
    """A batch is loaded, in so many seconds."""

    number: int
    seconds: float
    #: Read from files, or received from other servers.
    bytes_read: int


class StageFailed(msgspec.Struct, tag=True):
    """A batch cannot be loaded; the server goes on as before."""

    number: int
    why: str


class Applied(msgspec.Struct, tag=True):
    """A batch is in force on this server."""

    number: int


class Dropped(msgspec.Struct, tag=True):
    """A batch cannot come into force any more, unless Applied came before this."""

    number: int


class Failed(msgspec.Struct, tag=True):
    """The process is about to exit because of an exception."""

    message: str
    #: The user can do something about it (UserError).
    user: bool


# Launcher to front end, beside Join, PeerRestarted, AskStats, Stage, Commit, Drop and Stop.


class Restart(msgspec.Struct, tag=True):
    """End what is left of the engine and start another."""

    #: Number of this start; the first, without a Restart, is 0.
    start: int
    #: Where experts are by now, as in `Setup`.
    layout: bytes


class Drain(msgspec.Struct, tag=True):
    """Take no more requests, finish what runs, and say Drained; the engine steps on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether experts move, and why; as `/placement` shows it, too."""

    #: Unix time in seconds.
    when: float
    policy: str
    #: Somebody asked for it whatever it costs; only to see it.
    forced: bool
    dry_run: bool
    #: Experts move, or would, but for the dry run.
    migrate: bool
    reason: str
    #: Predicted seconds of expert calls and what they send over the coming interval, where experts
    #: are and where they would be; None: nothing is known to predict them from.
    present_seconds: float | None = None
    expected_seconds: float | None = None
    #: Predicted seconds of loading.
    migration_seconds: float = 0.0
    #: Experts that servers must load.
    experts_moved: int = 0
    #: Share of the present seconds that is saved.
    gain: float | None = None
    #: Why experts stopped moving half-way; "": they did not.
    failure: str = ""


class Decided(msgspec.Struct, tag=True):
    """The answer to a RebalanceWanted; `decision` is None if it failed, and `why` then says why."""

    id: int
    decision: Decision | None
    why: str = ""


class Placed(msgspec.Struct, tag=True):
    """Where experts are now, and what has become of moving them; sent when any of it changes."""

    #: Grows when all experts of a migration have moved, or when it stops half-way.
    version: int
    layout: bytes
    last_decision: Decision | None
    #: Completed, those that loads made impossible, and experts loaded, on all servers.
    migrations: int
    failures: int
    experts_migrated: int


# Front end to launcher, beside Hello and Failed.


class FromEngine(msgspec.Struct, tag=True):
    """What its engine says to the launcher."""

    #: Number of the start.
    start: int
    event: (
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
    )


class EngineDied(msgspec.Struct, tag=True):
    """Its engine has ended, or failed."""

    start: int
    pid: int
    #: Exit status as a shell has it; None: it lives yet.
    status: int | None
    #: What it said.
    failure: Failed | None


class DrainWanted(msgspec.Struct, tag=True):
    """It was told to end (SIGTERM): all servers are to drain."""


class Drained(msgspec.Struct, tag=True):
    """Nothing is in flight any more, and no request is taken."""


class RebalanceWanted(msgspec.Struct, tag=True):
    """A user asks for a decision now."""

    id: int
    #: Move experts whatever it costs; only decide.
    force: bool
    dry_run: bool
    #: [server][layer]: ids of the experts that are to live there; None: as the policy finds.
    resident: list[list[list[int]]] | None = None


# Parent to the launcher of another node (--node-rank), and back.


class NodeSetup(msgspec.Struct, tag=True):
    """Start the server's process with this `Setup` or `FrontSetup`, as JSON."""

    #: What it runs: a module of this package.
    module: str
    #: SIGTERM lets it finish its requests: the node passes the signal on.
    drains: bool
    setup: bytes


class NodeProbe(msgspec.Struct, tag=True):
    """Answer a question of the preflight, as JSON."""

    request: bytes


class NodeEnd(msgspec.Struct, tag=True):
    """End the worker: let it go, or kill it."""

    kill: bool


class NodePing(msgspec.Struct, tag=True):
    """Nothing; that it can be sent says that the node is there."""


class NodeHello(msgspec.Struct, tag=True):
    """A launcher on another node is there."""

    pid: int


class NodeReply(msgspec.Struct, tag=True):
    """The answer to a NodeProbe, as JSON."""

    reply: bytes


class NodeEnded(msgspec.Struct, tag=True):
    """The node's worker has ended."""

    #: Exit status as a shell has it.
    status: int
    #: The end of its log, and where all of it is on the node.
    last_lines: list[str]
    log: str


NodeCommand = NodeSetup | NodeProbe | NodeEnd | NodePing
NodeEvent = NodeHello | NodeReply | NodeEnded

Command = Join | PeerRestarted | Submit | Abort | AskStats | Stage | Commit | Drop | Stop
Event = (
    Hello
    | Prepared
    | Joined
    | Progress
    | Ready
    | Deltas
    | Report
    | Stats
    | Traced
    | Staged
    | StageFailed
    | Applied
    | Dropped
    | Failed
)
FrontCommand = (
    Join
    | PeerRestarted
    | Restart
    | AskStats
    | Stage
    | Commit
    | Drop
    | Decided
    | Placed
    | Drain
    | Stop
)
FrontEvent = Hello | FromEngine | EngineDied | RebalanceWanted | DrainWanted | Drained | Failed

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode
decode_front_command = msgspec.msgpack.Decoder(FrontCommand).decode
decode_front_event = msgspec.msgpack.Decoder(FrontEvent).decode
decode_node_command = msgspec.msgpack.Decoder(NodeCommand).decode
decode_node_event = msgspec.msgpack.Decoder(NodeEvent).decode
