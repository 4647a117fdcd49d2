"""Frozen descriptions of the machines, of the engine and of all options that are dataclasses.

Every field names its unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

#: Reports a long operation: (what is being done, parts done, total parts or 0 if unknown).
ProgressCallback = Callable[[str, int, int], None]


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, where and what to do."""


#: The kinds of `option` whose values are whole numbers.
INTEGER_KINDS = ("int", "whole", "count", "port", "size")


def option(
    default: Any,
    help: str,
    *,
    flag: str = "",
    kind: str = "",
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
) -> Any:
    """Declare a user option as a field of a frozen dataclass.

    Users set it on the command line, in a file or from Python. The field is the only declaration
    of the option; `launch.cli.options` builds the command line from it.

    Args:
        help: help text for the command line; `{default}` in the text stands for the default.
        flag: name on the command line; "": that of the field.
        kind: how text is parsed: "int", "whole" (at least 0), "count" (at least 1), "port",
            "seconds", "size" (bytes with a unit), "path", "policy" (a name in
            `placement.POLICIES`) or "networks" (IP addresses or networks with commas between them);
            "": a string, or a switch if the default is False.
        choices: all allowed values; (): any value.
        metavar: stands for the value in the help.
    """
    more = {"help": help, "flag": flag, "kind": kind, "choices": choices, "metavar": metavar}
    return dataclasses.field(default=default, metadata=more)


@dataclasses.dataclass(frozen=True)
class SshTarget:
    """The host that the system's ssh connects to."""

    host: str
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{user}{host}" + (f":{self.port}" if self.port else "")


@dataclasses.dataclass(frozen=True)
class ServerSpec:
    """One line of the hosts file: one engine process with one or more equal devices.

    Exactly one of `memory` and `experts` is given.
    """

    name: str
    #: Host name or IP address that the server listens on and that other servers connect to.
    address: str
    #: Number of JAX devices of this server.
    devices: int = 1
    #: Bytes for expert weights, one number per device.
    memory: tuple[int, ...] | None = None
    #: Expert slots on each device.
    experts: int | None = None
    #: Rate of the server's network link in bits per second; None if unknown.
    bandwidth: float | None = None
    #: Measure the rate before the start (`bandwidth=auto`).
    measure_bandwidth: bool = False
    #: Round trip in seconds to a server with the same value; None if unknown.
    round_trip: float | None = None
    #: Seconds of one expert call (a token through an expert) on one device; None if unknown.
    expert_time: float | None = None
    #: Bytes per second that the server reads from its copy of the model; None if unknown. It is
    #: measured before the start.
    read_rate: float | None = None
    #: Where ssh starts the server; None: a process of this machine.
    ssh: SshTarget | None = None
    #: Path of the Python that runs the server; None: the launcher's path.
    python: str | None = None
    #: The server's copy of the model's directory, or org/name on the hub; None: --model.
    model: str | None = None
    #: "cpu" or "cuda".
    platform: str = "cpu"
    #: Indices of the server's GPUs, one per device; empty: JAX's choice.
    gpus: tuple[int, ...] = ()
    #: The server has no copy of the model: the weights come from servers with a copy, and experts
    #: that move come from the servers that hold them (`checkpoint=peer`).
    from_peers: bool = False

    @property
    def vacant(self) -> bool:
        """Whether this is a seat that a server may take later."""
        return not self.name

    def slots(self, expert_bytes: int) -> int:
        """Expert slots on each device: floor(memory / bytes of one expert).

        The devices of a server run one program and have equal pools, so the smallest memory
        decides.
        """
        if self.experts is not None:
            return self.experts
        if self.memory is None:
            raise UserError(f"server {self.name}: give memory= or experts=")
        return min(self.memory) // expert_bytes


#: A seat without a server.
VACANT = ServerSpec("", "", experts=0)


@dataclasses.dataclass(frozen=True)
class ClusterSpec:
    """The servers in the order of the hosts file; a server's position is its rank.

    A service that servers may join has vacant seats at the end, or where servers have left.
    """

    servers: tuple[ServerSpec, ...]

    @property
    def seated(self) -> tuple[int, ...]:
        """Ranks of the servers, without vacant seats."""
        return tuple(rank for rank, server in enumerate(self.servers) if not server.vacant)

    def with_seats(self, count: int) -> ClusterSpec:
        """The same servers, with vacant seats up to `count`."""
        more = count - len(self.servers)
        return ClusterSpec((*self.servers, *(VACANT,) * more))

    def with_server(self, rank: int, server: ServerSpec) -> ClusterSpec:
        """The same servers but for one."""
        return ClusterSpec((*self.servers[:rank], server, *self.servers[rank + 1 :]))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(server.name for server in self.servers)

    @property
    def platform(self) -> str:
        """The platform of the servers if all have the same, else "mixed"."""
        found = {server.platform for server in self.servers}
        return found.pop() if len(found) == 1 else "mixed"

    @property
    def devices(self) -> tuple[int, ...]:
        """Number of devices of each server."""
        return tuple(server.devices for server in self.servers)


#: Choices for the exchange of rows between servers.
EXCHANGES = ("auto", "calls", "collectives")
#: Most servers that can step together: each pair has collectives of its own, and every step counts
#: what every pair exchanged.
MOST_TOGETHER = 31
#: Choices for the rounding of experts and of the trunk; "int4-mixed" keeps 8 bits for an expert's
#: last projection, and in the trunk for attention, embedding and output.
EXPERT_CHOICES = ("keep", "bf16", "int8", "int4", "int4-mixed", "mxfp4")
TRUNK_CHOICES = ("keep", "bf16", "int8", "int4", "int4-mixed")


@dataclasses.dataclass(frozen=True)
class Rounding:
    """The formats that a float checkpoint's matrices are converted to (models/formats.py).

    Raises:
        UserError: a value is not among the choices.
    """

    #: Of routed experts; one of EXPERT_CHOICES.
    experts: str = "keep"
    #: Of everything else; one of TRUNK_CHOICES.
    trunk: str = "keep"

    def __post_init__(self) -> None:
        for name, choices in (("experts", EXPERT_CHOICES), ("trunk", TRUNK_CHOICES)):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}"
                )


#: Largest default context; each slot holds its context in memory.
DEFAULT_MODEL_LEN = 2048
#: Formats that hidden states are rounded to before routed experts.
WIRE_DTYPES = ("auto", "float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Options of the engines, equal on all servers of a cluster.

    `launch.planning.defaults.engine_config` checks the values and makes an `EngineConfig` of them.
    """

    max_model_len: int | None = option(
        None,
        "context length in tokens, prompt and output together (default: the model's, at most "
        f"{DEFAULT_MODEL_LEN})",
        kind="count",
    )
    max_num_seqs: int = option(
        16, "sequences that run at once on each device ({default})", kind="count"
    )
    kv_memory: int | None = option(
        None,
        "size of each device's KV cache, e.g. 512MiB (default: room for all sequences at full "
        "length, at most half of the free memory)",
        kind="size",
        metavar="SIZE",
    )
    dtype: str | None = option(
        None,
        "type of activations and KV cache (default: float32 on CPUs, bfloat16 on GPUs)",
        choices=("float32", "bfloat16"),
    )
    wire_dtype: str = option(
        "auto",
        "format that hidden states are rounded to before routed experts, local or remote; int8: "
        "only hidden states sent to another server, with one float32 scale each; auto: bfloat16 if "
        "the experts' weights have 16 bits or less, else no rounding ({default})",
        choices=WIRE_DTYPES,
    )
    exchange: str = option(
        "auto",
        "calls: each server steps on its own and calls the experts of other servers; collectives: "
        "all servers step together, in one jax.distributed job; auto: the one that is predicted to "
        "be faster ({default})",
        choices=EXCHANGES,
    )
    experts: str = option(
        "keep",
        "format that the weights of routed experts are rounded to when the model is converted; "
        "int4-mixed keeps 8 bits for the last projection ({default}: no rounding)",
        choices=EXPERT_CHOICES,
    )
    trunk: str = option(
        "keep",
        "format that all other matrices are rounded to; int4-mixed keeps 8 bits for attention, "
        "embedding and output ({default}: no rounding)",
        choices=TRUNK_CHOICES,
    )
    seed: int = option(
        0, "seed of sampling, for requests without their own seed ({default})", kind="int"
    )

    @property
    def rounding(self) -> Rounding:
        """The formats that weights are rounded to when the model is converted."""
        return Rounding(self.experts, self.trunk)


#: Environment variable with the API key; --api-key is visible to other users of the machine.
API_KEY_VARIABLE = "DANCE_JAX_API_KEY"


#: Values of --generation-config.
GENERATION_CONFIGS = ("auto", "none")


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Options of the front ends."""

    served_model_name: str = option(
        "",
        "name of the model in requests and answers (default: org/name, the model's directory, or "
        "demo)",
        metavar="NAME",
    )
    bind: str = option(
        "127.0.0.1",
        "address that each server listens on; 0.0.0.0: all addresses (default: {default})",
        metavar="ADDRESS",
    )
    port: int = option(
        8000,
        "port of each server; the second server on the same machine uses the next port, and so on "
        "(default: {default})",
        kind="port",
    )
    api_key: str | None = option(
        None,
        "key that requests must carry; visible to other users of the machine, unlike "
        f"{API_KEY_VARIABLE} (default: no key)",
        metavar="KEY",
    )
    allowed_origins: str = option(
        "",
        "web sites whose pages may call the servers, with commas between them; *: any "
        "(default: none)",
        metavar="ORIGINS",
    )
    keep_alive: float = option(
        75.0,
        "seconds for which a connection without a request stays open; longer than the proxies in "
        "front of the servers keep theirs (default: {default})",
        kind="seconds",
        metavar="S",
    )
    chat_template: str | None = option(
        None,
        "file with a chat template, on the launcher's machine, to use instead of the model's",
        kind="path",
        metavar="FILE",
    )
    tool_call_parser: str = option(
        "auto",
        "how the model writes calls of tools: hermes, qwen_xml, glm, deepseek_v3, mistral or "
        "harmony; auto: as its chat template does; none: calls stay text (default: {default})",
        metavar="FORMAT",
    )
    reasoning_parser: str = option(
        "auto",
        "how the model writes what it thinks: think or harmony; auto: as its chat template does; "
        "none: it stays text (default: {default})",
        metavar="FORMAT",
    )
    generation_config: str = option(
        "auto",
        "auto: requests that say nothing else are sampled as the model's generation_config.json "
        "says; none: with OpenAI's defaults ({default})",
        choices=GENERATION_CONFIGS,
    )
    api_key_file: str | None = option(
        None,
        "file with a key in each line, on the launcher's machine, any of which a request must "
        "carry; it is read again when it changes",
        kind="path",
        metavar="FILE",
    )
    drain_seconds: float = option(
        30.0,
        "seconds for running requests to finish after SIGTERM or Ctrl-C (default: {default})",
        kind="seconds",
        metavar="S",
    )
    watchdog: float = option(
        10.0,
        "seconds without progress after which an engine is restarted; waiting for other servers "
        "and compiling are progress; 0: never (default: {default})",
        kind="seconds",
        metavar="S",
    )
    die_with_launcher: bool = option(
        False,
        "end all servers if the launcher is killed; without this option, servers with --state-dir "
        "go on, and a launcher that is started again takes them over",
    )
    max_queue: int = option(
        512,
        "requests per server that may wait for their first token (default: {default})",
        kind="count",
        metavar="N",
    )
    max_queue_per_client: int | None = option(
        None,
        "how many of these requests may come from one client, that is, one IP address (default: "
        "half of them)",
        kind="count",
        metavar="N",
    )
    trusted_proxies: str = option(
        "127.0.0.1,::1",
        "addresses or networks of the proxies whose X-Forwarded-For names the client (default: "
        "{default})",
        kind="networks",
        metavar="ADDRESS,...",
    )

    @property
    def client_queue(self) -> int:
        """`max_queue_per_client` or its default, half of `max_queue`."""
        return self.max_queue_per_client or -(-self.max_queue // 2)


#: The default placement policy, a name in `placement.POLICIES`.
DEFAULT_POLICY = "latency"
#: Seconds over which a placement is evaluated if it is computed only on request.
HORIZON_S = 300.0


@dataclasses.dataclass(frozen=True)
class RebalanceOptions:
    """When experts move while a service runs, by which policy, and what losses it survives."""

    interval_s: float = option(
        300.0,
        "seconds between two decisions; 0: only on POST /placement/rebalance (default: {default})",
        flag="--rebalance-interval",
        kind="seconds",
        metavar="S",
    )
    policy: str = option(
        DEFAULT_POLICY,
        "policy for moving experts, as --policy (default: {default})",
        flag="--rebalance-policy",
        kind="policy",
        metavar="NAME",
    )
    # A fifth of the interval: at the second decision after a shift, hardly any weight is left on
    # the workload before the shift.
    half_life_s: float | None = option(
        60.0,
        "seconds after which past requests count half; 0: they never fade (default: {default})",
        flag="--half-life",
        kind="seconds",
        metavar="S",
    )
    state_dir: str | None = option(
        None,
        "directory that keeps placement and statistics for the next start; with it, servers go on "
        "when the launcher is killed",
        kind="path",
        metavar="DIR",
    )
    dry_run: bool = option(
        False, "report which experts would move, without moving them", flag="--rebalance-dry-run"
    )
    survive: int = option(
        0,
        "servers that may be lost at once without anything to load: every expert has one holder "
        "more than that; 0: the other servers load what a loss takes away (default: {default})",
        kind="whole",
        metavar="N",
    )

    @property
    def horizon_s(self) -> float:
        """Seconds over which costs are compared."""
        return self.interval_s or HORIZON_S


@dataclasses.dataclass(frozen=True)
class EngineConfig(EngineOptions):
    """What one engine process compiles and holds, equal on all servers of a cluster."""

    #: Longest sequence (prompt + output) in tokens.
    max_model_len: int = dataclasses.field()  # no default here
    #: Sequences that run at once on each device: rows of its decode.
    max_num_seqs: int = 8
    dtype: str = "float32"
    #: Never "auto".
    wire_dtype: str = "float32"
    #: Compiled decodes: sequences per device, ascending; the last is max_num_seqs.
    decode_rows: tuple[int, ...] = (8,)
    #: Compiled slices of prefill beside a decode: blocks per device, ascending. A step takes the
    #: first while sequences decode, the others when none does.
    slice_rows: tuple[int, ...] = (1, 4)
    #: Positions of a KV block, and tokens of a row of a slice.
    block_size: int = 32
    #: Tokens per server whose routes are kept for placement; 0 keeps none.
    route_sample: int = 4096
    #: Seconds after which a token is half as likely to be in that sample; None: all equally likely.
    half_life: float | None = None

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """All compiled (decode rows, slice rows), cheapest first.

        With a slice, a full decode costs little more, so there the decode has one size.
        """
        decodes = ((rows, 0) for rows in self.decode_rows)
        return (*decodes, *((self.max_num_seqs, size) for size in self.slice_rows))

    @property
    def max_step_tokens(self) -> int:
        """Most tokens that one device carries in one step."""
        return self.max_num_seqs + self.slice_rows[-1] * self.block_size

    @property
    def max_blocks(self) -> int:
        """KV blocks of the longest sequence."""
        return -(-self.max_model_len // self.block_size)


def check_together(servers: int) -> None:
    """Check that so many servers can step together.

    Raises:
        UserError: there are too many.
    """
    if servers > MOST_TOGETHER:
        raise UserError(
            f"{servers} servers: with --exchange collectives at most {MOST_TOGETHER} servers can "
            "step together; use --exchange calls or auto"
        )
