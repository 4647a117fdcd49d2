"""Servers that step on their own: this engine with expert calls, and the paper's system.

In each layer a server computes the trunk, sends its calls, computes its own experts while the calls
are out, and goes on when all sums have arrived. How servers answer calls is in answering.py.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from research.simulator.answering import Answering, Callees, Devices
from research.simulator.batches import Batches
from research.simulator.batches import Sequence as Request
from research.simulator.calls import Call, Group, Jobs, Planner
from research.simulator.result import Book, Result, Work
from research.simulator.scenario import Scenario
from research.simulator.shares import Shares

#: A coroutine for a part of a server's steps. It yields the time when it goes on, or None if that
#: is not known yet, and is sent that time. It returns the time when it is done.
Steps = Generator[float | None, float, Any]


class Link:
    """One direction of a server's link, which connections share evenly.

    Args:
        burst: seconds of work that the link does at once when it has been idle for that long.
    """

    def __init__(self, burst: float) -> None:
        self._burst = self._saved = burst
        #: When the last message came, and when the link becomes idle.
        self._at = self._end = 0.0
        #: Seconds of work that each connection has got since the link was idle; and for each
        #: connection, the seconds at which its messages are through.
        self._got = 0.0
        self._through: dict[tuple[int, int], float] = {}
        #: Seconds of all work so far.
        self.busy = 0.0

    def serve(self, connection: tuple[int, int], now: float, seconds: float) -> float:
        """When a message that comes now is through, unless others come after it.

        Messages of one connection keep their order. A short message overtakes long ones of other
        connections.

        Args:
            connection: the caller and the callee.
            now: never less than in an earlier call.
            seconds: that the message takes alone.
        """
        self.busy += seconds
        if now >= self._end:
            if self._burst:
                seconds = self._at_once(now - self._end, seconds)
            self._at, self._end, self._got = now, now + seconds, 0.0
            self._through = {connection: seconds}
            return self._end
        self._go_on(now - self._at)
        self._at = now
        self._end += seconds
        through, got = self._through, self._got
        own = through[connection] = through.get(connection, got) + seconds
        shares = [each if each < own else own for each in through.values()]
        return now + sum(shares) - got * len(shares)

    def _at_once(self, rested: float, seconds: float) -> float:
        """Seconds of work that are left after the burst that `rested` idle seconds allow."""
        saved = min(self._saved + rested, self._burst)
        self._saved = max(0.0, saved - seconds)
        return max(0.0, seconds - saved)

    def _go_on(self, seconds: float) -> None:
        """Shares out the work of the seconds that have passed."""
        through = self._through
        while through:
            least = min(through.values())
            left = (least - self._got) * len(through)
            if seconds < left:
                self._got += seconds / len(through)
                return
            seconds -= left
            self._got = least
            for connection in [each for each, at in through.items() if at <= least]:
                del through[connection]


class Network:
    """The links of all servers."""

    def __init__(self, scenario: Scenario) -> None:
        servers, model = scenario.servers, scenario.model
        self.out, self.into = (
            [Link(8 * server.burst / server.bandwidth) for server in servers] for _ in range(2)
        )
        #: For each server, seconds of a row and of a sum on its link, of a message, and to the
        #: middle of the network.
        self._row = [8 * model.row_bytes / server.bandwidth for server in servers]
        self._sum = [8 * model.reply_bytes / server.bandwidth for server in servers]
        self._round = [server.speed.round for server in servers]
        self._delay = [server.delay for server in servers]

    def ask(self, call: Call, now: float) -> float:
        """When a call arrives at its server."""
        return self._send(call, call.group.server, call.server, now, self._row)

    def answer(self, call: Call, now: float) -> float:
        """When the sums arrive at the caller, on the same connection."""
        return self._send(call, call.server, call.group.server, now, self._sum)

    def _send(self, call: Call, source: int, to: int, now: float, seconds: list[float]) -> float:
        connection = call.group.server, call.server
        sent = self.out[source].serve(connection, now, call.rows * seconds[source])
        taken = self.into[to].serve(connection, now, call.rows * seconds[to])
        way = self._delay[source] + self._delay[to] + self._round[source]
        return (sent if sent > taken else taken) + way


class Servers:
    """All servers, each at its own point in its own step, and the events to come."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.planner, self.network = Planner(scenario), Network(scenario)
        self.shares = Shares([server.speed for server in scenario.servers])
        num, devices = len(scenario.servers), sum(scenario.devices)
        #: For the devices of all servers, and then for the answering thread of each server: when
        #: its jobs so far are done, one after another, and their seconds.
        self._free, self._busy = [0.0] * (devices + num), [0.0] * (devices + num)
        ends = np.cumsum(scenario.devices).tolist()
        #: The devices of each server, and its answering thread; None if its devices answer.
        self.own = [
            range(end - count, end) for end, count in zip(ends, scenario.devices, strict=True)
        ]
        self.threads = [
            devices + n if server.beside else None for n, server in enumerate(scenario.servers)
        ]
        self._speeds = [server.speed for server in scenario.servers]
        self.batches = [Batches(scenario.config, count) for count in scenario.devices]
        #: The steps of each server; None while it is idle.
        self.steps: list[Steps | None] = [None] * num
        self.book = Book(scenario)
        self.work = self.book.work = tuple(Work() for _ in scenario.servers)
        #: Hidden states from server to server, and in each layer.
        self.rows_nn = [[0] * num for _ in range(num)]
        self.rows_l = [0] * scenario.model.layers
        #: Calls from server to server.
        self.calls_nn = [[0] * num for _ in range(num)]
        #: For each server, seconds of messages on the critical path of its steps, and processor
        #: seconds.
        self.communicate, self.processor_s = [0.0] * num, [0.0] * num
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = itertools.count().__next__
        self.callees: Callees = Devices(self)
        if scenario.messages == "server":
            self.callees = Answering(self)

    def at(self, when: float, action: Callable[..., None], *arguments: Any) -> None:
        """Schedules action(when, *arguments); actions of equal times keep their order."""
        heapq.heappush(self._events, (when, self._number(), action, arguments))

    def run(self) -> Result:
        """Serves all requests."""
        for request, when in enumerate(self.scenario.requests.at.tolist()):
            self.at(when, self._arrive, request)
        while self._events:
            now, _, action, arguments = heapq.heappop(self._events)
            action(now, *arguments)
        return self._result()

    # Steps.

    def _arrive(self, now: float, request: int) -> None:
        """Adds a request, and starts the server's steps if it was idle."""
        requests = self.scenario.requests
        server = int(requests.server[request])
        sequence = Request(request, int(requests.prompt[request]), int(requests.output[request]))
        self.batches[server].add(sequence)
        if self.steps[server] is None:
            self.steps[server] = steps = self._steps(server)
            next(steps)
            self._go_on(now, server)

    def _go_on(self, now: float, server: int) -> None:
        """Resumes a server's steps."""
        steps = self.steps[server]
        assert steps is not None
        try:
            when = steps.send(now)
        except StopIteration:
            self.steps[server] = None
            return
        if when is not None:
            self.at(when, self._go_on, server)

    def _steps(self, server: int) -> Steps:
        """Does steps until there is nothing to do."""
        now = yield None
        size, layers = self.scenario.config.block_size, self.scenario.model.layers
        speed, batches, work = (
            self._speeds[server], self.batches[server], self.work[server]
        )  # fmt: skip
        while (plan := batches.schedule()).work:
            trunks = [
                speed.trunk(plan.bucket, positions, size) / layers for positions in plan.positions
            ]
            began = now
            for groups in self.planner.layers(server, plan):
                now = yield from self._layer(groups, now, trunks)
            now = yield self._own(server, now, self._host(server, now, speed.step))
            self.book.tokens(batches.commit(plan), now)
            self.book.compute[server] += now - began
            work.steps += 1
            work.buckets[plan.bucket] += 1
            work.positions += sum(plan.positions)

    def _layer(self, groups: tuple[Group, ...], now: float, trunks: list[float]) -> Steps:
        """Does one layer. While a group's calls are out, the server computes what follows.

        Args:
            groups: of the layer's rows.
            now: when the layer begins.
            trunks: seconds of the layer's trunk on each device of the server.
        """
        server, mark = groups[0].server, now
        for group in groups:
            jobs = [
                (device, trunk / len(groups))
                for device, trunk in zip(self.own[server], trunks, strict=True)
            ]
            first, part = jobs[0]
            jobs[0] = first, part + self._packing(server, group.calls)
            now = yield self._own(server, now, self.compute(server, now, jobs))
            if group.calls:
                self.callees.call(group, now)
        for group in groups:
            if group.own:
                now = yield self._own(server, now, self.compute(server, now, group.own))
            if group.calls and (group.left or group.last.over > now):
                group.waits = True
                self.callees.wait(group, now)
                if not group.left:
                    self.at(group.last.over, self._go_on_with, group)
                now = yield None
                self.communicate[server] += min(group.last.moving, now - mark)
                mark = now
            # Breaks the cycle of group and calls, so that they are freed without the collector.
            group.calls = []
        return now

    def _own(self, server: int, now: float, end: float) -> float:
        """Counts what a server computes for its own steps from now to `end`; returns `end`."""
        self.work[server].computing_s += end - now
        return end

    def _host(self, server: int, now: float, seconds: float) -> float:
        """When the host of a server has computed for `seconds`."""
        return now + seconds + self._stopped(server, now, [seconds])

    def compute(self, server: int, now: float, jobs: Jobs) -> float:
        """When a server has computed these jobs."""
        stopped = self._stopped(server, now, [seconds for _, seconds in jobs])
        free, busy, end = self._free, self._busy, now
        # Comparisons instead of max(), because this is called for every part of a layer.
        for device, seconds in jobs:
            before = free[device]
            done = (before if before > now else now) + seconds + stopped
            free[device] = done
            busy[device] += seconds + stopped
            if done > end:
                end = done
        return end

    def _stopped(self, server: int, now: float, threads: list[float]) -> float:
        """Seconds that the quota stops a server while its threads compute for these seconds."""
        processor_s = sum(threads)
        self.processor_s[server] += processor_s
        if not self.shares.limited[server]:
            return 0.0
        longest = max(threads)
        return self.shares.spend(server, now, longest, processor_s) - longest

    def answering(self, server: int, calls: list[Call]) -> Jobs:
        """The jobs of a server that answers these calls at once."""
        jobs, packing = self.planner.together(calls), self._packing(server, calls)
        thread = self.threads[server]
        if thread is None:
            (device, seconds), *others = jobs
            return [(device, seconds + packing), *others]
        return [(thread, sum([seconds for _, seconds in jobs], packing))]

    # Messages.

    def _packing(self, server: int, calls: Sequence[Call]) -> float:
        """Seconds of computation that sending or answering these calls takes."""
        speed = self._speeds[server]
        return len(calls) * speed.message + sum([call.rows for call in calls]) * speed.row

    def ask(self, call: Call, now: float) -> float:
        """Sends a call; returns when it arrives."""
        server, group = call.group.server, call.group
        group.left += call.instead_of is None
        self.rows_nn[server][call.server] += call.rows
        self.calls_nn[server][call.server] += 1
        self.rows_l[call.layer] += call.rows
        there = self.network.ask(call, now)
        call.sent, call.moving = now, there - now
        return there

    def answer(self, call: Call, now: float) -> float:
        """Sends the sums of a call; returns when they arrive."""
        there = self.network.answer(call, now)
        call.moving += there - now
        return there

    def answered(self, call: Call, when: float) -> None:
        """Notes when the sums of a call arrive, or that they arrive earlier than was known.

        Args:
            call: not one that repeats another.
        """
        group = call.group
        group.left -= call.over == math.inf
        call.over = min(call.over, when)
        if group.waits and not group.left:
            self.at(group.last.over, self._go_on_with, group)

    def _go_on_with(self, now: float, group: Group) -> None:
        """Resumes the server of a group that has all its sums, unless it was resumed before."""
        if group.waits:
            group.waits = False
            self._go_on(now, group.server)

    def _result(self) -> Result:
        book, network, model = self.book, self.network, self.scenario.model
        rows_nn = np.array(self.rows_nn)
        book.rows[:] = self.rows_l
        book.communicate[:] = self.communicate
        book.compute -= book.communicate
        book.bytes_nn[:] = rows_nn * model.row_bytes + rows_nn.T * model.reply_bytes
        book.device_busy[:] = self._busy[: len(book.device_busy)]
        book.out_busy[:] = [link.busy for link in network.out]
        book.in_busy[:] = [link.busy for link in network.into]
        calls_nn = np.array(self.calls_nn)
        for n, work in enumerate(self.work):
            work.calls = int(self.planner.computed[n])
            work.messages = int(calls_nn[n].sum() + calls_nn[:, n].sum())
            work.rows = int(rows_nn[n].sum() + rows_nn[:, n].sum())
            work.processor_s = self.processor_s[n]
        book.steps[:] = [work.steps for work in self.work]
        return book.result()


def run(scenario: Scenario) -> Result:
    """Serves all requests."""
    return Servers(scenario).run()
