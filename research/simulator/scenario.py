"""What is simulated: machines, the model's sizes, a placement, routes and requests."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from dance_jax.config import EngineConfig, UserError
from dance_jax.placement.core import Placement
from dance_jax.placement.cost import CallCost, Cost, LockStepCost, call_order
from dance_jax.placement.visit import MAX_SERVERS

#: (decode rows, slice rows) of a compiled step, on each device.
Bucket = tuple[int, int]
#: A hidden state is sent once per visited server, or once per remote expert call.
Messages = Literal["server", "expert"]


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a server computes; numbers are seconds of at least 0, except `quota`.

    The trunk (attention, norms, routers, shared experts, head) takes a time by bucket, padding
    included, and a time by the positions that tokens attend to.
    """

    #: Every step, besides all below: scheduling, dispatch, sampling, output.
    step: float = 0.0
    #: Trunk of each token of a bucket, over all layers; for buckets that were not measured.
    token: float = 0.0
    #: Trunk of a whole step in a bucket that was measured.
    buckets: Mapping[Bucket, float] = dataclasses.field(default_factory=dict)
    #: Each position that a token attends to, over all layers.
    position: float = 0.0
    #: An expert call: a token through an expert.
    call: float = 0.0
    #: Each expert with any call in a step: its weights are read once.
    expert: float = 0.0
    #: Each message between servers, there or back, besides links' rates and delays.
    round: float = 0.0
    #: Each row into or out of a link, besides the link's rate: packing, unpacking. Without lock
    #: step this is computation, once for each row of a call that is sent, and of one that is
    #: answered.
    row: float = 0.0
    #: Each call that is sent, and each that is answered: also computation. Not in lock step.
    message: float = 0.0
    #: Every request, besides its steps: HTTP, tokens from text and back.
    request: float = 0.0
    #: The cores (not seconds) that all threads of the server together may use in the long run, see
    #: `shares`; infinite if nothing limits them.
    quota: float = math.inf
    #: Processor seconds that an idle server has saved, and may use on top of its quota.
    burst: float = 0.0

    def trunk(self, bucket: Bucket, positions: int, block_size: int) -> float:
        """Seconds of the trunk on one device, in a step of this bucket.

        Args:
            bucket: of the step.
            positions: that the device's tokens attend to.
            block_size: tokens of a slice row.
        """
        decode, rows = bucket
        seconds = self.buckets.get(bucket, self.token * (decode + rows * block_size))
        return seconds + self.position * positions


@dataclasses.dataclass(frozen=True)
class Server:
    """One server: equal devices behind one link."""

    devices: int
    #: Expert slots of each device.
    slots: int
    speed: Speed
    #: Bits per second of its link, in each direction; may be infinite.
    bandwidth: float = math.inf
    #: Seconds from the server to the middle of the network. A message takes the delays of both
    #: servers.
    delay: float = 0.0
    #: Bytes that its link carries at once in each direction after it was idle. Not in lock step.
    burst: float = 0.0
    #: A thread of its own computes calls of others beside the server's steps (a CPU). Otherwise
    #: devices compute them between parts of the steps. Not in lock step.
    beside: bool = False


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of an MoE model."""

    #: MoE layers.
    layers: int
    #: Experts of a layer.
    experts: int
    #: Experts that a token chooses in a layer.
    top_k: int
    #: Bytes of a hidden state between servers, and of a sum; None: the same.
    state_bytes: int
    sum_bytes: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes to a server for one token: the hidden state, experts (2 bytes), weights (4)."""
        return self.state_bytes + 6 * self.top_k

    @property
    def reply_bytes(self) -> int:
        """Bytes that come back for one token: a sum."""
        return self.state_bytes if self.sum_bytes is None else self.sum_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Requests:
    """When and where requests arrive, and their lengths; in any order.

    Raises:
        UserError: arrays of different lengths, or a number out of range.
    """

    #: float64 [requests]: seconds after the start.
    at: np.ndarray
    #: int64 [requests]: the server where it arrives.
    server: np.ndarray
    #: int64 [requests] each: tokens of the prompt and of the output, at least 1.
    prompt: np.ndarray
    output: np.ndarray

    def __post_init__(self):
        at = np.asarray(self.at, float)
        whole = {name: np.asarray(getattr(self, name)) for name in ("server", "prompt", "output")}
        if at.ndim != 1 or not at.size or any(each.shape != at.shape for each in whole.values()):
            shapes = ", ".join(f"{name} {each.shape}" for name, each in whole.items())
            raise UserError(f"requests: one number each is needed; got at {at.shape}, {shapes}")
        if not (np.isfinite(at) & (at >= 0)).all():
            raise UserError("requests: times must be finite and at least 0")
        for name, each in whole.items():
            if each.dtype.kind not in "iu" or each.min() < (name != "server"):
                raise UserError(
                    f"requests: {name} must be whole numbers of at least {int(name != 'server')}"
                )
            object.__setattr__(self, name, each.astype(np.int64))
        object.__setattr__(self, "at", at)

    def __len__(self) -> int:
        return len(self.at)


@dataclasses.dataclass(frozen=True, eq=False)
class Scenario:
    """Everything that a simulation depends on.

    Raises:
        UserError: the parts do not fit each other, or a number is out of range.
    """

    servers: tuple[Server, ...]
    model: Model
    #: Only its buckets, block_size, max_num_seqs and max_model_len are used.
    config: EngineConfig
    placement: Placement
    #: Per server int [tokens, layers, k]: what its requests' tokens choose.
    routes: tuple[np.ndarray, ...]
    requests: Requests
    #: All servers do every step together.
    lock_step: bool = True
    messages: Messages = "server"
    #: Cores of a machine that all devices share, if there are fewer cores than devices: devices
    #: that compute at the same time slow each other down. None: each device has the cores that it
    #: needs.
    cores: float | None = None
    #: [servers, layers, experts]: calls by which `spread` puts experts on devices; None: equal.
    counts: np.ndarray | None = None
    #: Seed of what is drawn: where in the routes a request begins, and which holder serves a call.
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "servers", tuple(self.servers))
        object.__setattr__(self, "routes", tuple(np.asarray(route) for route in self.routes))
        _check_servers(self.servers)
        _check_mode(self)
        shape = (len(self.servers), self.model.layers, self.model.experts)
        if self.placement.resident.shape != shape:
            raise UserError(
                f"scenario: placement {self.placement.resident.shape}, but servers, layers and "
                f"experts are {shape}"
            )
        self.placement.validate([server.devices * server.slots for server in self.servers])
        _check_routes(self)
        _check_requests(self)

    @property
    def devices(self) -> tuple[int, ...]:
        """Devices of each server."""
        return tuple(server.devices for server in self.servers)

    @functools.cached_property
    def order(self) -> np.ndarray:
        """The order in which each server prefers to call the others: int32 [servers, servers]."""
        call_n = np.array([server.speed.call for server in self.servers])
        round_n = None if self.lock_step else _round_seconds(self.servers)
        return call_order(_state_seconds(self.servers, self.model), call_n, round_n)


def cost_of(servers: Sequence[Server], model: Model, lock_step: bool) -> Cost:
    """The cost of servers, for policies that predict time; launch/costs makes that of real servers.

    It leaves out the trunk and the reading of weights. If all links are infinitely fast, it is
    `Cost.reference`.

    Raises:
        UserError: some links are infinitely fast and others are not.
    """
    form = LockStepCost if lock_step else CallCost
    devices = [server.devices for server in servers]
    infinite = [math.isinf(server.bandwidth) for server in servers]
    if all(infinite):
        return form.reference(devices, model.top_k)
    if any(infinite):
        raise UserError(
            "scenario: a policy cannot weigh links without limit against others; "
            "give every server a finite bandwidth, or none"
        )
    cost = form.of_links(_state_seconds(servers, model), devices, model.top_k)
    cost = dataclasses.replace(cost, call=np.array([server.speed.call for server in servers]))
    if isinstance(cost, CallCost):
        cost = dataclasses.replace(cost, round=_round_seconds(servers))
    return cost


def _state_seconds(servers: Sequence[Server], model: Model) -> np.ndarray:
    """`Cost.state` of each server."""
    there_and_back = model.state_bytes + model.reply_bytes
    return np.array([8 * there_and_back / server.bandwidth for server in servers])


def _round_seconds(servers: Sequence[Server]) -> np.ndarray:
    """`CallCost.round`: each server's part in a message and its answer."""
    return np.array([2 * s.delay + s.speed.round + s.speed.message for s in servers])


def _check_servers(servers: tuple[Server, ...]) -> None:
    if not servers:
        raise UserError("scenario: at least one server is needed")
    for n, server in enumerate(servers):
        if server.devices < 1 or server.slots < 0:
            raise UserError(
                f"scenario: server {n} has {server.devices} devices of {server.slots} slots; at "
                "least one device is needed, and slots are not negative"
            )
        if not server.bandwidth > 0:
            raise UserError(f"scenario: bandwidth of server {n} is {server.bandwidth}, not above 0")
        seconds = {
            field.name: getattr(server.speed, field.name)
            for field in dataclasses.fields(Speed)
            if field.name not in ("buckets", "quota")
        }
        seconds |= {f"bucket {bucket}": each for bucket, each in server.speed.buckets.items()}
        if not server.speed.quota > 0:
            raise UserError(f"scenario: quota of server {n} is {server.speed.quota}, not above 0")
        others = {"delay": server.delay, "burst of the link": server.burst}
        for name, value in (seconds | others).items():
            if not (math.isfinite(value) and value >= 0):
                raise UserError(
                    f"scenario: {name} of server {n} must be finite and at least 0; got {value}"
                )


def _check_mode(scenario: Scenario) -> None:
    if scenario.messages not in ("server", "expert"):
        raise UserError(f'scenario: messages={scenario.messages!r}; "server" or "expert"')
    if len(scenario.servers) > MAX_SERVERS:
        raise UserError(f"scenario: {len(scenario.servers)} servers; at most {MAX_SERVERS}")
    if scenario.cores is not None and not scenario.cores > 0:
        raise UserError(f"scenario: cores={scenario.cores}, not above 0")
    limited = any(server.speed.quota < math.inf for server in scenario.servers)
    if limited and scenario.cores is not None:
        raise UserError("scenario: servers share cores, or each has a quota; give one of them")
    if scenario.cores is not None and not scenario.lock_step:
        raise UserError("scenario: shared cores are simulated in lock step only")


def _check_routes(scenario: Scenario) -> None:
    model = scenario.model
    if len(scenario.routes) != len(scenario.servers):
        raise UserError(
            f"scenario: routes of {len(scenario.routes)} servers, but there are "
            f"{len(scenario.servers)} servers"
        )
    for n, route in enumerate(scenario.routes):
        if route.ndim != 3 or route.shape[1:] != (model.layers, model.top_k):
            raise UserError(
                f"scenario: routes of server {n} have shape {route.shape}; "
                f"[tokens, {model.layers} layers, {model.top_k}] is needed"
            )
        if route.dtype.kind not in "iu" or (
            route.size and not 0 <= route.min() <= route.max() < model.experts
        ):
            raise UserError(
                f"scenario: routes of server {n} are not expert numbers 0..{model.experts - 1}"
            )


def _check_requests(scenario: Scenario) -> None:
    requests, longest = scenario.requests, scenario.config.max_model_len
    if requests.server.max() >= len(scenario.servers):
        raise UserError(
            f"scenario: a request for server {requests.server.max()}, but there are "
            f"{len(scenario.servers)} servers, numbered from 0"
        )
    for n in np.unique(requests.server):
        if not len(scenario.routes[n]):
            raise UserError(f"scenario: server {n} has requests but no routes")
    too_long = requests.prompt + requests.output > longest
    if too_long.any():
        raise UserError(
            f"scenario: {too_long.sum()} of {len(requests)} requests are longer than "
            f"max_model_len, {longest} tokens; cut them or raise max_model_len"
        )
