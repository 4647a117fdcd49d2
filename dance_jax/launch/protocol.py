"""What a cluster's parent and its workers say to each other: msgspec over a socket.

Without JAX: a worker reads its Setup before it may import it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from dance_jax.config import ClusterSpec, EngineConfig
from dance_jax.engine.sequence import OutputDelta, Request


class Setup(msgspec.Struct, kw_only=True):
    """Everything a worker needs to start; one JSON line on its standard input.

    Standard input then stays open: its end tells the worker that the parent is gone.
    """

    spec: ClusterSpec
    rank: int
    config: EngineConfig
    #: Directory of the converted model.
    checkpoint: str
    #: npz file of the layout (`plan.save_layout`).
    layout: str
    #: ZeroMQ endpoint of the parent.
    control: str
    #: host:port where rank 0 coordinates jax.distributed.
    coordinator: str
    #: Address the collectives of this server use.
    address: str
    #: "cpu" or "cuda".
    platform: str
    #: This server's share of the machine's cores: its thread pools are made for so many.
    cores: list[int]
    #: Where compiled steps are kept; None: nowhere.
    compile_dir: str | None
    #: The C++ expert FFN (models/kernels_cpu.py); None: the experts are computed by XLA.
    expert_library: str | None
    #: The launch's private directory, removed by the workers if the parent is killed.
    private_dir: str


# Parent to worker.


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
    #: time.monotonic() of the exception; one clock for all processes of a machine.
    time: float


Command = Work | Abort | Stop
Event = Hello | Progress | Ready | Deltas | Done | Failed

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode
