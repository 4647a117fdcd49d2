"""Servers that do every step together: the engine with collectives.

In each layer, from one dispatch to the next, every server hears from all others (a dispatch brings
a head even without rows), computes the experts of its own and of received rows, waits for the sums
from the servers to which it sent rows, and computes the trunk of the next layer. No server is more
than a layer ahead, because a dispatch ends when the slowest server has sent its own. But a server
that has its sums goes on while others still wait for theirs.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from research.simulator.batches import Batches, Plan, Sequence
from research.simulator.flows import Flows
from research.simulator.result import Book, Result
from research.simulator.scenario import Bucket, Scenario
from research.simulator.shares import Shares


@dataclasses.dataclass(frozen=True, eq=False)
class Layers:
    """What one step moves and computes; l layers, n and m servers, d devices of all servers."""

    #: int64 [l, n, m]: rows from n to m.
    rows_lnm: np.ndarray
    #: float64 [l, d]: seconds of each device's experts, undisturbed.
    experts_ld: np.ndarray
    #: float64 [n]: seconds of the trunk on each device of a server, per layer.
    trunk_n: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class StepTime:
    """How long a step takes, and how long it uses each link."""

    seconds: float
    #: Seconds of computation on the critical path: in each layer, the experts and the trunk of the
    #: servers that all others wait for.
    compute: float
    #: float64 [n] each: seconds in which each direction of a link is in use, over all layers.
    out_n: np.ndarray
    in_n: np.ndarray


class Exchange(NamedTuple):
    """Seconds that one step's messages take on each server's link."""

    #: float64 [l, n] each: for rows that the server sends, and rows that it receives.
    send_ln: np.ndarray
    take_ln: np.ndarray
    #: float64 [l, n] each: for sums that the server returns, and sums that it gets back.
    give_ln: np.ndarray
    get_ln: np.ndarray
    #: As in `StepTime`.
    out_n: np.ndarray
    in_n: np.ndarray


class Moment(NamedTuple):
    """How far each server is in a step; a server waits for messages, not for other servers."""

    #: float64 [n]: seconds since the step began.
    now_n: np.ndarray
    #: float64 [n]: seconds of computation among them, on the path that led here.
    compute_n: np.ndarray

    @classmethod
    def zero(cls, servers: int) -> Moment:
        """The begin of a step."""
        return cls(np.zeros(servers), np.zeros(servers))

    def heard(self, seconds_nm: np.ndarray) -> Moment:
        """After the last message has arrived; messages take `seconds_nm` from n to m."""
        there_nm = self.now_n[:, None] + seconds_nm
        from_m = there_nm.argmax(0)
        return Moment(there_nm[from_m, np.arange(len(from_m))], self.compute_n[from_m])

    def computed(self, seconds_n: np.ndarray) -> Moment:
        """After each server has computed for `seconds_n`."""
        return Moment(self.now_n + seconds_n, self.compute_n + seconds_n)


class Wires:
    """The links of all servers, and the bytes and seconds of what they carry."""

    def __init__(self, scenario: Scenario) -> None:
        servers, model = scenario.servers, scenario.model
        num = len(servers)
        #: Bytes of the head of every dispatch, and of a return with sums.
        self.head, self.reply_head = 16 + 4 * (num + 1), 16
        self.row, self.reply = model.row_bytes, model.reply_bytes
        self.second_per_byte = np.array([8 / server.bandwidth for server in servers])
        self.second_per_row = np.array([server.speed.row for server in servers])
        self.round = np.array([server.speed.round for server in servers])
        delay_n = np.array([server.delay for server in servers])
        #: float64 [n, m]: from n to m.
        self.delay = delay_n[:, None] + delay_n[None, :]
        np.fill_diagonal(self.delay, 0)
        #: float64 [n]: seconds until the head of the furthest server arrives.
        self.furthest = self.delay.max(0)

    def occupied(self, bytes_ln: np.ndarray, rows_ln: np.ndarray) -> np.ndarray:
        """Seconds that these bytes and rows take on the servers' links in one direction."""
        return bytes_ln * self.second_per_byte + rows_ln * self.second_per_row

    def bytes_nm(self, rows_lnm: np.ndarray) -> np.ndarray:
        """Payload bytes from n to m in a step: heads, rows, and the sums of rows from m."""
        layers, num, _ = rows_lnm.shape
        rows_nm, returns_nm = rows_lnm.sum(0), (rows_lnm > 0).sum(0)
        back_nm = rows_nm.T * self.reply + returns_nm.T * self.reply_head
        heads_nm = layers * self.head * (1 - np.eye(num, dtype=np.int64))
        return heads_nm + rows_nm * self.row + back_nm


class Clock:
    """How long steps of a scenario take."""

    def __init__(self, scenario: Scenario) -> None:
        self.wires = Wires(scenario)
        self.cores = scenario.cores
        self.devices = np.array(scenario.devices)
        self.first = np.cumsum(self.devices) - self.devices
        self.step_n = np.array([server.speed.step for server in scenario.servers])
        self.shares = Shares([server.speed for server in scenario.servers])

    def time(self, layers: Layers, began: float) -> StepTime:
        """How long a step takes.

        Args:
            layers: what the step moves and computes.
            began: when it begins, in seconds; never less than in an earlier call.
        """
        experts_ld = self._stretched(layers.experts_ld)
        experts_ln = np.maximum.reduceat(experts_ld, self.first, axis=1)
        processor_ln = np.add.reduceat(experts_ld, self.first, axis=1)
        trunk_d = np.repeat(layers.trunk_n, self.devices)[None]
        trunk_n = np.maximum.reduceat(self._stretched(trunk_d), self.first, axis=1)[0]
        sends_lnm = layers.rows_lnm > 0
        exchange = self._exchange(layers.rows_lnm, sends_lnm)
        moment = Moment.zero(len(trunk_n))

        def compute(seconds_n: np.ndarray, processor_n: np.ndarray) -> None:
            nonlocal moment
            taken_n = self._taken(began + moment.now_n, seconds_n, processor_n)
            moment = moment.computed(taken_n)

        for dispatch_nm, back_nm, *experts in zip(
            self._dispatch(exchange, sends_lnm), self._back(exchange, sends_lnm), experts_ln,
            processor_ln, strict=True,
        ):  # fmt: skip
            moment = moment.heard(dispatch_nm)
            compute(*experts)
            moment = moment.heard(back_nm)
            compute(trunk_n, trunk_n * self.devices)
        compute(self.step_n, self.step_n)
        last = moment.now_n.argmax()
        return StepTime(
            seconds=float(moment.now_n[last]),
            compute=float(moment.compute_n[last]),
            out_n=exchange.out_n,
            in_n=exchange.in_n,
        )

    def _taken(
        self, now_n: np.ndarray, seconds_n: np.ndarray, processor_n: np.ndarray
    ) -> np.ndarray:
        """`Shares.spend` of all servers."""
        if not any(self.shares.limited):
            return seconds_n
        turns = zip(now_n.tolist(), seconds_n.tolist(), processor_n.tolist(), strict=True)
        return np.array(
            [
                self.shares.spend(n, *turn) if self.shares.limited[n] else turn[1]
                for n, turn in enumerate(turns)
            ]
        )

    def _dispatch(self, exchange: Exchange, sends_lnm: np.ndarray) -> np.ndarray:
        """Seconds from a server's begin of a layer until its rows have arrived: [l, n, m], n to m.

        A server sends to all others at the same time, so all get their last row at the end.
        """
        rows_lnm = np.maximum(exchange.send_ln[:, :, None], exchange.take_ln[:, None, :])
        seconds_lnm = np.where(sends_lnm, rows_lnm, 0) + self.wires.delay + self.wires.round
        return self._own(seconds_lnm, exchange.send_ln)

    def _back(self, exchange: Exchange, sends_lnm: np.ndarray) -> np.ndarray:
        """Seconds from a server's computation until its sums arrive: [l, n, m], n back to m."""
        sums_lnm = np.maximum(exchange.give_ln[:, :, None], exchange.get_ln[:, None, :])
        seconds_lnm = sums_lnm + self.wires.delay + self.wires.round
        waits_lnm = np.where(sends_lnm.transpose(0, 2, 1), seconds_lnm, -np.inf)
        return self._own(waits_lnm, 0.0)

    @staticmethod
    def _own(seconds_lnm: np.ndarray, own: np.ndarray | float) -> np.ndarray:
        """`seconds_lnm`, with `own` from each server to itself."""
        server = np.arange(seconds_lnm.shape[1])
        seconds_lnm[:, server, server] = own
        return seconds_lnm

    def _exchange(self, rows_lnm: np.ndarray, sends_lnm: np.ndarray) -> Exchange:
        wires, peers = self.wires, len(self.devices) - 1
        if not peers:
            none_ln, none_n = np.zeros((len(rows_lnm), 1)), np.zeros(1)
            return Exchange(*[none_ln] * 4, *[none_n] * 2)
        out_ln, in_ln = rows_lnm.sum(2), rows_lnm.sum(1)
        heads = peers * wires.head
        sent_ln, taken_ln = out_ln * wires.row + heads, in_ln * wires.row + heads
        send_ln, take_ln = wires.occupied(sent_ln, out_ln), wires.occupied(taken_ln, in_ln)
        given_ln = in_ln * wires.reply + sends_lnm.sum(1) * wires.reply_head
        back_ln = out_ln * wires.reply + sends_lnm.sum(2) * wires.reply_head
        give_ln, get_ln = wires.occupied(given_ln, in_ln), wires.occupied(back_ln, out_ln)
        return Exchange(
            send_ln,
            take_ln,
            give_ln,
            get_ln,
            (send_ln + give_ln).sum(0),
            (take_ln + get_ln).sum(0),
        )

    def _stretched(self, seconds_ld: np.ndarray) -> np.ndarray:
        """Seconds of devices that compute at the same time and share the machine's cores.

        The last device ends when the cores have done all work, or when its own work is done,
        whichever is later. The others are delayed in proportion.
        """
        if self.cores is None:
            return seconds_ld
        longest_l1 = seconds_ld.max(1, keepdims=True)
        last_l1 = np.maximum(longest_l1, seconds_ld.sum(1, keepdims=True) / self.cores)
        return seconds_ld * (last_l1 / np.where(longest_l1 > 0, longest_l1, 1))


class Cluster:
    """The servers between two steps."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.flows, self.clock = Flows.of(scenario), Clock(scenario)
        self.book = Book(scenario)
        self.batches = [Batches(scenario.config, devices) for devices in scenario.devices]
        model, num = scenario.model, len(scenario.servers)
        self._shape_nlm = (num, model.layers, num)
        self._shape_lne = (model.layers, num, model.experts)
        self._call = np.array([s.speed.call for s in scenario.servers])[None, :, None]
        self._expert = np.array([s.speed.expert for s in scenario.servers])[None, :, None]

    @property
    def active(self) -> bool:
        """Whether some server has work."""
        return any(batches.active for batches in self.batches)

    def step(self, now: float, others_decode: bool) -> tuple[float, list[Plan]]:
        """Does one step; returns when it ends, and the plan of each server."""
        plans = [batches.schedule(others_decode) for batches in self.batches]
        tokens = self.flows.tokens(each for plan in plans for each in plan.work)
        layers = Layers(self._rows(tokens), self._experts(self._calls(tokens)), self._trunks(plans))
        time = self.clock.time(layers, now)
        for batches, plan in zip(self.batches, plans, strict=True):
            self.book.tokens(batches.commit(plan), now + time.seconds)
        self._record(layers, time)
        return now + time.seconds, plans

    def _calls(self, tokens: np.ndarray) -> np.ndarray:
        """Calls of each expert on each server in a step: int64 [l, n, e]."""
        calls = np.bincount(self.flows.calls[tokens].ravel(), minlength=np.prod(self._shape_lne))
        return calls.reshape(self._shape_lne)

    def _rows(self, tokens: np.ndarray) -> np.ndarray:
        """`Layers.rows_lnm`."""
        rows = np.bincount(self.flows.rows[tokens].ravel(), minlength=np.prod(self._shape_nlm))
        rows_lnm = rows.reshape(self._shape_nlm).transpose(1, 0, 2)
        own = np.arange(len(self.batches))
        rows_lnm[:, own, own] = 0
        return rows_lnm

    def _experts(self, calls_lne: np.ndarray) -> np.ndarray:
        """`Layers.experts_ld`."""
        layers, devices = self.scenario.model.layers, sum(self.scenario.devices)
        seconds_lne = calls_lne * self._call + (calls_lne > 0) * self._expert
        return np.bincount(
            self.flows.device, weights=seconds_lne.ravel(), minlength=layers * devices
        ).reshape(layers, devices)

    def _trunks(self, plans: list[Plan]) -> np.ndarray:
        """`Layers.trunk_n`."""
        config = self.scenario.config
        seconds = [
            server.speed.trunk(
                self._bucket(plan), max(plan.positions, default=0), config.block_size
            )
            for server, plan in zip(self.scenario.servers, plans, strict=True)
        ]
        return np.array(seconds) / self.scenario.model.layers

    def _bucket(self, plan: Plan) -> Bucket:
        """The bucket of a server's step; a server without work takes part in the smallest."""
        return plan.bucket if plan.work else self.scenario.config.buckets[0]

    def _record(self, layers: Layers, time: StepTime) -> None:
        book = self.book
        book.steps += 1
        book.bytes_nn += self.clock.wires.bytes_nm(layers.rows_lnm)
        book.rows += layers.rows_lnm.sum((1, 2))
        trunk_n = layers.trunk_n * self.scenario.model.layers
        book.device_busy += layers.experts_ld.sum(0) + np.repeat(trunk_n, self.clock.devices)
        book.out_busy += time.out_n
        book.in_busy += time.in_n
        book.compute += time.compute
        book.communicate += time.seconds - time.compute


def run(scenario: Scenario) -> Result:
    """Serves all requests.

    Servers are idle when none had work in the last step. A server that then gets a request begins
    the next step and rings the others.
    """
    cluster, requests = Cluster(scenario), scenario.requests
    order = np.argsort(requests.at, kind="stable").tolist()
    ring = float(cluster.clock.wires.furthest.max())
    now, arrived, busy, decoding = 0.0, 0, False, False

    def arrive() -> None:
        nonlocal arrived
        while arrived < len(order) and requests.at[order[arrived]] <= now:
            r = order[arrived]
            sequence = Sequence(r, int(requests.prompt[r]), int(requests.output[r]))
            cluster.batches[requests.server[r]].add(sequence)
            arrived += 1

    while arrived < len(order) or cluster.active:
        if not (busy or cluster.active):
            now = max(now, float(requests.at[order[arrived]])) + ring
        arrive()
        now, plans = cluster.step(now, decoding)
        busy = any(plan.work for plan in plans)
        decoding = any(plan.decoding for plan in plans)
    return cluster.book.result()
