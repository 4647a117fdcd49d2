"""Messages of the preflight, between the launcher and the probes: questions and answers.

Each is one line of JSON, on a probe's standard input or output.
"""

from __future__ import annotations

import msgspec


class AskClock(msgspec.Struct, tag=True):
    """Ask for the time; as the first question, check that the machine answers."""


class AskMachine(msgspec.Struct, tag=True, kw_only=True):
    """Ask what the machine is, and whether it has what a server needs."""

    #: The server's own address, at which ports are tried.
    address: str
    #: Names to look up: the addresses of all servers.
    names: list[str]
    #: TCP ports to try at the address; 0 is answered with a free port.
    ports: list[int]
    #: Directory of the model, or its name on the hub; None: the demo of the machine's installation.
    model: str | None
    #: False: the machine does not look for the model.
    needs_model: bool = True
    #: None: the machine's default.
    cache_dir: str | None
    #: "cpu" or "cuda".
    platform: str


class Listen(msgspec.Struct, tag=True, kw_only=True):
    """Listen for measurements by peers that know the token, for `seconds`."""

    #: The server's own address.
    address: str
    token: str
    seconds: float


class Peer(msgspec.Struct):
    """The address at which a peer listens."""

    address: str
    port: int


class Measure(msgspec.Struct, tag=True, kw_only=True):
    """Measure the links to these peers."""

    peers: list[Peer]
    token: str
    #: Seconds of sending, and again of receiving; 0: round trips only.
    seconds: float


class Clock(msgspec.Struct, tag=True):
    """`time.time()` when the machine answered AskClock."""

    time: float


class Resolved(msgspec.Struct):
    """Result of looking up a name: addresses in the system's order, or the problem."""

    addresses: list[str]
    problem: str = ""


class PortState(msgspec.Struct):
    """A port that can be used, or the problem."""

    port: int
    problem: str = ""


class Gpu(msgspec.Struct):
    index: int
    #: Bytes.
    free: int


class ModelState(msgspec.Struct, kw_only=True):
    """State of a model's directory; hashes are hex and comparable between machines."""

    #: Path at which the model was looked for.
    path: str
    #: "hf", "gguf" or "converted"; "" if the path is none of them; "from peers" if the machine did
    #: not look; "to download" if the model is on the hub and not in the machine's cache.
    kind: str
    #: What is wrong with the model; empty if nothing is.
    problem: str = ""
    #: Hash of the config and tokenizer files, comparable between all kinds.
    definition: str = ""
    #: Hash of what identifies the weights: names, shapes and sizes, or the manifest. Comparable
    #: between models of one kind.
    index: str = ""
    #: Fingerprint of the source of converted weights; empty for the other kinds.
    fingerprint: str = ""
    #: Bytes per second that the machine reads from the files; None: not measured.
    read_rate: float | None = None


class Machine(msgspec.Struct, tag=True, kw_only=True):
    """Answer to AskMachine."""

    #: E.g. "CPython 3.11.9".
    python: str
    executable: str
    #: Versions by package; None: the package is not installed.
    packages: dict[str, str | None]
    #: Hash of all sources of dance_jax on the machine.
    source_hash: str
    host_name: str
    #: Equal for processes that share memory; empty if unknown.
    machine_id: str
    #: Equal for processes that share network interfaces; empty if unknown.
    network_id: str
    #: By name.
    resolved: dict[str, Resolved]
    #: Bytes of available RAM; None if unknown.
    memory_free: int | None
    #: None if the question was for a CPU server.
    gpus: list[Gpu] | None
    #: Why no GPU was found.
    gpu_problem: str
    cores: int
    #: Whether the C++ library is installed, or a compiler for it.
    compiler: bool
    #: Address of the launching machine as this machine sees it; None without ssh.
    ssh_client: str | None
    #: In the order of the question.
    ports: list[PortState]
    model: ModelState
    #: Why the cache cannot be written; empty if it can.
    cache_problem: str


class Listening(msgspec.Struct, tag=True):
    """Answer to Listen."""

    port: int


class Link(msgspec.Struct):
    """Measurements of the link to one peer, or the problem."""

    problem: str = ""
    #: Seconds, median of several round trips.
    rtt: float | None = None
    #: Bits per second, as measured where the data arrived.
    sent: float | None = None
    received: float | None = None


class Measured(msgspec.Struct, tag=True):
    """Answer to Measure, in the order of the peers."""

    links: list[Link]


class Refused(msgspec.Struct, tag=True):
    """The machine cannot answer the question."""

    why: str


Request = AskClock | AskMachine | Listen | Measure
Reply = Clock | Machine | Listening | Measured | Refused

encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(Request).decode
decode_reply = msgspec.json.Decoder(Reply).decode
