"""What a preflight asks a server's machine, and what is answered: one line of JSON each."""

from __future__ import annotations

import msgspec

#: Precedes every answer: a login shell may print what it likes before.
MARK = b"dance_jax probe: "


class AskClock(msgspec.Struct, tag=True):
    """What time is it? Also the first question, whose answer shows that the machine is there."""


class AskMachine(msgspec.Struct, tag=True, kw_only=True):
    """What is this machine, and is there on it what a server needs?"""

    #: The server's own: where ports are tried.
    address: str
    #: Names to look up: the addresses of all servers.
    names: list[str]
    #: TCP ports to try on the address; 0 is answered with a free one.
    ports: list[int]
    #: Directory of the model, or its name on the hub; None: the demo of this installation.
    model: str | None
    #: There is to be a model; else nobody looks for it.
    needs_model: bool = True
    #: None: the default one.
    cache_dir: str | None
    #: "cpu" or "cuda".
    platform: str


class Listen(msgspec.Struct, tag=True, kw_only=True):
    """Be measured by peers that know the token, for so long."""

    #: The server's own.
    address: str
    token: str
    seconds: float


class Peer(msgspec.Struct):
    """Where a peer listens."""

    address: str
    port: int


class Measure(msgspec.Struct, tag=True, kw_only=True):
    """Measure the way to these peers."""

    peers: list[Peer]
    token: str
    #: Seconds in which data is sent, and as many in which it is received; 0: round trips only.
    seconds: float


class Clock(msgspec.Struct, tag=True):
    """`time.time()` of the moment it was asked for."""

    time: float


class Resolved(msgspec.Struct):
    """What a name means on a machine: addresses in the system's order, or why there are none."""

    addresses: list[str]
    problem: str = ""


class PortState(msgspec.Struct):
    """A port that can be used, or why not."""

    port: int
    problem: str = ""


class Gpu(msgspec.Struct):
    index: int
    #: Bytes.
    free: int


class ModelState(msgspec.Struct, kw_only=True):
    """A model's directory; hashes are hex and comparable between machines."""

    #: Where it was looked for.
    path: str
    #: "hf", "gguf", "converted", or "" if it is none; "from peers" if nobody looked for it, "to
    #: download" if it is a model of the hub that the machine's cache lacks.
    kind: str
    #: What is wrong with it; empty if nothing was found.
    problem: str = ""
    #: Of config and tokenizer files, alike for all kinds.
    definition: str = ""
    #: Of what says which weights these are: names, shapes and sizes, or the manifest. Tells
    #: models of one kind apart.
    index: str = ""
    #: Of the converted weights' source; empty for the other kinds.
    fingerprint: str = ""


class Machine(msgspec.Struct, tag=True, kw_only=True):
    """Answer to AskMachine."""

    #: E.g. "CPython 3.11.9".
    python: str
    executable: str
    #: Versions by name; None: it is not installed.
    packages: dict[str, str | None]
    #: Of all sources of dance_jax that run there.
    source_hash: str
    host_name: str
    #: Equal for processes that share memory; empty: the system does not say.
    machine_id: str
    #: Equal for processes that share network interfaces; empty: the system does not say.
    network_id: str
    #: By name.
    resolved: dict[str, Resolved]
    #: Bytes of RAM that could be had; None: the system does not say.
    memory_free: int | None
    #: None where none was asked for.
    gpus: list[Gpu] | None
    #: Why no GPU was found.
    gpu_problem: str
    cores: int
    #: There is a C++ compiler.
    compiler: bool
    #: Address that the launching machine has over there; None without ssh.
    ssh_client: str | None
    #: In the order asked for.
    ports: list[PortState]
    model: ModelState
    #: Why the cache cannot be written; empty: it can.
    cache_problem: str


class Listening(msgspec.Struct, tag=True):
    """Answer to Listen."""

    port: int


class Link(msgspec.Struct):
    """The way to one peer, or why there is none."""

    problem: str = ""
    #: Seconds, median of several round trips.
    rtt: float | None = None
    #: Bits per second, as measured where they arrived.
    sent: float | None = None
    received: float | None = None


class Measured(msgspec.Struct, tag=True):
    """Answer to Measure, in the order of the peers."""

    links: list[Link]


class Refused(msgspec.Struct, tag=True):
    """A question that has no answer."""

    why: str


Request = AskClock | AskMachine | Listen | Measure
Reply = Clock | Machine | Listening | Measured | Refused

encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(Request).decode
decode_reply = msgspec.json.Decoder(Reply).decode
