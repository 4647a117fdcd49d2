"""Messages between node 0 and the launcher of another node (--node-rank).

That launcher holds one process at a time. The preflight asks through it, so these messages come
before sources are compared (see `protocol`).
"""

from __future__ import annotations

import msgspec


class Start(msgspec.Struct, tag=True):
    """Start a process, after ending the present one."""

    #: Number of this process, counted from 1; messages about another number are out of date.
    number: int
    #: Module of this package that the process runs.
    module: str
    #: The process answers on its output: send its answers on.
    answers: bool
    #: The process drains on SIGTERM: pass the signal on to it.
    drains: bool


class Input(msgspec.Struct, tag=True):
    """Write a line to the input of the process, or close the input."""

    line: bytes | None


class Signal(msgspec.Struct, tag=True):
    """Send a signal to the process."""

    signal: int


class End(msgspec.Struct, tag=True):
    """End: node 0 needs this node no more."""


class Hello(msgspec.Struct, tag=True):
    """A launcher on another node has connected."""

    pid: int


class Answer(msgspec.Struct, tag=True):
    """An answer of the process."""

    number: int
    line: bytes


class Ended(msgspec.Struct, tag=True):
    """The process has ended, or could not be started."""

    number: int
    #: Exit status as in a shell.
    status: int
    #: The last lines of the log, and the path of the whole log on the node.
    last_lines: list[str]
    log: str


Command = Start | Input | Signal | End
Event = Hello | Answer | Ended

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode
