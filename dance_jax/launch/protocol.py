"""What a cluster's parent and its servers say to each other: msgspec over a socket.

Without JAX: a worker reads its Setup before it may import it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from dance_jax.config import ClusterSpec, EngineConfig
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
    #: Directory of the model on the server's machine, converted or not; "": the demo model.
    model: str
    #: Fingerprint the model there must have.
    fingerprint: str
    #: The layout, as an npz file's content (`plan.dump_layout`).
    layout: bytes
    #: ZeroMQ endpoint of the parent.
    control: str
    #: The launch's key, from which all secrets are derived.
    key: bytes
    #: "cpu" or "cuda".
    platform: str
    #: Port on which the first server coordinates jax.distributed; 0: a free one.
    coordinator_port: int
    #: Devices of the servers on this server's machine, and which of them it is.
    machine_devices: tuple[int, ...]
    machine_index: int
    #: Converted models and compiled steps are kept under it; None: nowhere; "": where the user
    #: of that machine keeps them.
    cache_dir: str | None
    #: The launch's private directory on this machine, removed by its servers if the parent is
    #: killed; "": the parent is on another one.
    private_dir: str
    #: The parent sends signs of life on standard input, because a network lies between.
    beats: bool


# Parent to worker.


class Join(msgspec.Struct, tag=True):
    """All servers are prepared: form the jax.distributed job."""

    #: host:port where rank 0 coordinates.
    coordinator: str


class Work(msgspec.Struct, tag=True):
    """Requests of this server; every server gets one at the same time, perhaps without requests."""

    requests: list[Request]


class Abort(msgspec.Struct, tag=True):
    """Drop all requests; the batch ends when no server has work."""


class Stop(msgspec.Struct, tag=True):
    """Exit."""


# Worker to parent.


class Hello(msgspec.Struct, tag=True):
    """The worker runs and listens."""

    pid: int


class Prepared(msgspec.Struct, tag=True):
    """The model is there and the worker can join the others."""

    #: host:port where it would coordinate.
    coordinator: str


class Joined(msgspec.Struct, tag=True):
    """The worker is part of the job; now it loads and compiles."""


class Progress(msgspec.Struct, tag=True):
    """`done` of `total` parts of a stage are done (total 0: not known)."""

    stage: str
    done: int
    total: int


class Ready(msgspec.Struct, tag=True):
    """The worker waits for work."""

    #: Steps read from the compile cache, and compiled.
    cache_hits: int
    cache_misses: int


class Deltas(msgspec.Struct, tag=True):
    """What one step added."""

    deltas: list[OutputDelta]


class Done(msgspec.Struct, tag=True):
    """The batch is finished on all servers; `stats` is an EngineStats as plain types."""

    stats: Any


class Failed(msgspec.Struct, tag=True):
    """The worker is about to exit because of an exception."""

    message: str
    #: The user can do something about it (UserError).
    user: bool


# Parent to the launcher of another node (--node-rank), and back.


class NodeSetup(msgspec.Struct, tag=True):
    """Start the worker with this `Setup`, as JSON."""

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

Command = Join | Work | Abort | Stop
Event = Hello | Prepared | Joined | Progress | Ready | Deltas | Done | Failed

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode
decode_node_command = msgspec.msgpack.Decoder(NodeCommand).decode
decode_node_event = msgspec.msgpack.Decoder(NodeEvent).decode
