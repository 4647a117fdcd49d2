"""Frozen descriptions of the machines and of the engine; every field names its unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

#: Called while something takes long: (what is done, parts done, parts in all or 0 if unknown).
ProgressCallback = Callable[[str, int, int], None]


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, where and what to do."""


def option(
    default: Any,
    help: str,
    *,
    flag: str = "",
    kind: str = "",
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
) -> Any:
    """A field of a frozen dataclass that users set: on the command line, in a file, from Python.

    The field is the only place in which an option is declared; `launch.cli.options` makes the
    command line of it.

    Args:
        help: what it means, for the command line; `{default}` in it stands for the default.
        flag: its name on the command line; "": the field's.
        kind: how text is read: "int", "count" (at least 1), "port", "seconds", "size" (bytes with a
            unit) or "path"; "": as it is, or as a switch where the default is False.
        choices: all that is allowed; (): anything.
        metavar: stands for the value in the help.
    """
    more = {"help": help, "flag": flag, "kind": kind, "choices": choices, "metavar": metavar}
    return dataclasses.field(default=default, metadata=more)


@dataclasses.dataclass(frozen=True)
class SshTarget:
    """What the system's ssh connects to."""

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
    #: Host name or IP address the server listens on and the others reach it by.
    address: str
    #: JAX devices of this server.
    devices: int = 1
    #: Bytes for expert weights, one number per device.
    memory: tuple[int, ...] | None = None
    #: Expert slots on each device.
    experts: int | None = None
    #: Rate of the server's network link in bits per second; None when unknown.
    bandwidth: float | None = None
    #: The rate is to be measured before the start (`bandwidth=auto`).
    measure_bandwidth: bool = False
    #: Seconds of a round trip to a server of equal `round_trip`; None when unknown. Between two
    #: servers it is the mean of both.
    round_trip: float | None = None
    #: Seconds of one expert call, a token through an expert, on one device; None when unknown.
    expert_time: float | None = None
    #: Where ssh starts the server; None: it is a process of this machine.
    ssh: SshTarget | None = None
    #: The Python that runs it; None: the path of the one that launches.
    python: str | None = None
    #: Its copy of the model's directory, or org/name on the hub; None: what is given for all.
    model: str | None = None
    #: What it computes on: "cpu" or "cuda".
    platform: str = "cpu"
    #: Numbers of the GPUs it uses, one per device; empty: JAX's choice.
    gpus: tuple[int, ...] = ()
    #: It has no copy of the model: weights come from servers that have one, experts that move from
    #: those that hold them (`checkpoint=peer`).
    from_peers: bool = False

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


@dataclasses.dataclass(frozen=True)
class ClusterSpec:
    """The servers in the order of the hosts file; a server's position is its rank."""

    servers: tuple[ServerSpec, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(server.name for server in self.servers)

    @property
    def platform(self) -> str:
        """What the servers compute on, if it is the same for all, else "mixed"."""
        found = {server.platform for server in self.servers}
        return found.pop() if len(found) == 1 else "mixed"

    @property
    def devices(self) -> tuple[int, ...]:
        """Devices of each server."""
        return tuple(server.devices for server in self.servers)


#: What users may ask for of the exchange of rows between servers.
EXCHANGES = ("auto", "calls", "collectives")
#: Servers that can step together: each pair has collectives of its own, and every step counts what
#: every pair exchanged.
MOST_TOGETHER = 31
#: What users may ask for, of experts and of the trunk; "int4-mixed" leaves an expert's last
#: projection eight bits, and in the trunk attention, embedding and output.
EXPERT_CHOICES = ("keep", "bf16", "int8", "int4", "int4-mixed", "mxfp4")
TRUNK_CHOICES = ("keep", "bf16", "int8", "int4", "int4-mixed")


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What the matrices of a float checkpoint become when it is converted (models/formats.py).

    Raises:
        UserError: there is no such choice.
    """

    #: One of EXPERT_CHOICES, of routed experts.
    experts: str = "keep"
    #: One of TRUNK_CHOICES, of everything else.
    trunk: str = "keep"

    def __post_init__(self) -> None:
        for name, choices in (("experts", EXPERT_CHOICES), ("trunk", TRUNK_CHOICES)):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name}={getattr(self, name)!r}: one of {', '.join(choices)} is needed"
                )


#: Context when none is asked for, if the model's own is longer: every slot holds it in memory.
DEFAULT_MODEL_LEN = 2048
#: What hidden states are rounded to before routed experts.
WIRE_DTYPES = ("auto", "float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What users choose of the engines, equal on all servers of a cluster.

    `launch.planning.defaults.engine_config` checks the values and makes an `EngineConfig` of them.
    """

    max_model_len: int | None = option(
        None,
        f"context in tokens, prompt and output (default: the model's, at most {DEFAULT_MODEL_LEN})",
        kind="count",
    )
    max_num_seqs: int = option(
        16, "sequences that run at once on each device ({default})", kind="count"
    )
    kv_memory: int | None = option(
        None,
        "of each device's KV cache, e.g. 512MiB (default: all sequences at full length, in at most "
        "half of what is free)",
        kind="size",
        metavar="SIZE",
    )
    dtype: str | None = option(
        None,
        "of activations and KV cache (default: float32 on CPUs, bfloat16 on GPUs)",
        choices=("float32", "bfloat16"),
    )
    wire_dtype: str = option(
        "auto",
        "what hidden states are rounded to before routed experts, wherever these are; int8: only "
        "those that go to another server, with one float32 scale each; auto: bfloat16 if the "
        "experts' weights have 16 bits or less, else not at all ({default})",
        choices=WIRE_DTYPES,
    )
    exchange: str = option(
        "auto",
        "calls: each server steps on its own, and experts answer calls; collectives: all servers "
        "step together, in one jax.distributed job; auto: what is predicted to be faster "
        "({default})",
        choices=EXCHANGES,
    )
    experts: str = option(
        "keep",
        "what the weights of routed experts are rounded to when the model is converted; int4-mixed "
        "leaves the last projection eight bits ({default}: nothing)",
        choices=EXPERT_CHOICES,
    )
    trunk: str = option(
        "keep",
        "what all other matrices are rounded to; int4-mixed leaves attention, embedding and output "
        "eight bits ({default}: nothing)",
        choices=TRUNK_CHOICES,
    )
    seed: int = option(0, "of sampling, for requests without a seed ({default})", kind="int")

    @property
    def rounding(self) -> Rounding:
        """What weights are rounded to when the model is converted."""
        return Rounding(self.experts, self.trunk)


@dataclasses.dataclass(frozen=True)
class EngineConfig(EngineOptions):
    """What one engine process compiles and holds; equal on all servers of a cluster."""

    #: Longest sequence (prompt + output) in tokens.
    max_model_len: int = dataclasses.field()  # has no default here
    #: Sequences that run at once on each device: rows of its decode.
    max_num_seqs: int = 8
    dtype: str = "float32"
    #: Never "auto".
    wire_dtype: str = "float32"
    #: Compiled decodes: sequences per device, ascending; the last is max_num_seqs.
    decode_rows: tuple[int, ...] = (8,)
    #: Compiled slices of prefill beside a decode: blocks per device, ascending. The first is what
    #: a step takes while sequences decode, the others serve when none does.
    slice_rows: tuple[int, ...] = (1, 4)
    #: Positions of a KV block, and tokens of a row of a slice.
    block_size: int = 32
    #: Tokens whose routes are kept for placement, per server; 0 keeps none.
    route_sample: int = 4096
    #: Seconds after which a token's chance to be among them has halved; None: all have the same.
    half_life: float | None = None

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """All (decode rows, slice rows) that are compiled, cheapest first.

        Beside a slice a decode costs little more in full, so there it has one size.
        """
        decodes = ((rows, 0) for rows in self.decode_rows)
        return (*decodes, *((self.max_num_seqs, size) for size in self.slice_rows))

    @property
    def max_step_tokens(self) -> int:
        """Most tokens one device carries in one step."""
        return self.max_num_seqs + self.slice_rows[-1] * self.block_size

    @property
    def max_blocks(self) -> int:
        """KV blocks of the longest sequence."""
        return -(-self.max_model_len // self.block_size)


def check_together(servers: int) -> None:
    """Checks that so many servers can step together.

    Raises:
        UserError: there are too many.
    """
    if servers > MOST_TOGETHER:
        raise UserError(
            f"{servers} servers: with --exchange collectives at most {MOST_TOGETHER} can step "
            "together; take --exchange calls (or auto)"
        )
