"""Every server steps on its own, as the paper's system does.

A layer of a server is its trunk, then its calls: those of experts that are here on its own devices,
the others at their holders, and it ends when all sums are there. Links and devices serve one job
after the other, whosever it is, in the order in which the layers that cause them begin.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence as Many

import numpy as np

from dance_jax.placement.simulate.batches import Batches, Plan, Sequence
from dance_jax.placement.simulate.flows import Flows
from dance_jax.placement.simulate.result import Book, Result
from dance_jax.placement.simulate.scenario import Scenario


class Queues:
    """Servers of jobs in the order of their coming, by number: links or devices.

    A job may be put in line before it is there. It then holds up nobody while it is on its way: the
    line grows by its work at once, as if it were there.
    """

    def __init__(self, count: int) -> None:
        #: Seconds: when the work in line is done, and of all jobs so far.
        self.free = [0.0] * count
        self.busy = [0.0] * count

    def serve(self, number: int, now: float, there: float, seconds: float) -> float:
        """When a job is done.

        Args:
            now: when it is put in line; never less than in a call before.
            there: when it arrives, at `now` or later.
            seconds: what it takes.
        """
        # Comparisons where max() would do: this is called for every message.
        free = self.free[number]
        self.free[number] = (free if free > now else now) + seconds
        self.busy[number] += seconds
        return (free if free > there else there) + seconds


@dataclasses.dataclass(slots=True)
class Visit:
    """What one layer of a step asks of one server, itself too."""

    server: int
    #: Hidden states that go there.
    rows: int
    #: (device, of all servers counted through; seconds of its experts).
    jobs: list[tuple[int, float]]


@dataclasses.dataclass(slots=True)
class Step:
    """One server's step under way."""

    plan: Plan
    #: Seconds of each layer's trunk on each device.
    trunk: float
    #: Of each layer.
    visits: list[list[Visit]]
    #: Layers that have begun.
    layer: int = 0


class Network:
    """All links and devices, and the way of a layer through them."""

    def __init__(self, scenario: Scenario) -> None:
        servers, model = scenario.servers, scenario.model
        self.out, self.into = Queues(len(servers)), Queues(len(servers))
        self.devices = Queues(sum(scenario.devices))
        first_n = np.cumsum(scenario.devices) - scenario.devices
        #: Devices of each server.
        self.own = [
            range(first, first + count)
            for first, count in zip(first_n.tolist(), scenario.devices, strict=True)
        ]
        #: Seconds of a row and of a sum on each link, of a round, and of the way to the middle.
        self.row = [_seconds(s.bandwidth, model.row_bytes, s.speed.row) for s in servers]
        self.reply = [_seconds(s.bandwidth, model.state_bytes, s.speed.row) for s in servers]
        self.round = [server.speed.round for server in servers]
        self.delay = [server.delay for server in servers]

    def layer(
        self, server: int, now: float, trunk: float, visits: Many[Visit]
    ) -> tuple[float, float]:
        """When a server's layer ends that begins now, and how long messages took on its way there.

        That way leads through the visit that ends last.
        """
        begin = end = max([self.devices.serve(d, now, now, trunk) for d in self.own[server]])
        moved = 0.0
        for visit in visits:
            over, on_links = self._visit(server, now, begin, visit)
            if over > end:
                end, moved = over, on_links
        return end, moved

    def _visit(self, server: int, now: float, begin: float, visit: Visit) -> tuple[float, float]:
        """When the sums of a visit are there, of which the rows are ready at `begin`.

        And the seconds of it that messages took, and waited for links.
        """
        other = visit.server
        if other == server:
            return self._compute(now, begin, visit), 0.0
        way = self.delay[server] + self.delay[other]
        out, into = self.out.serve, self.into.serve
        sent = out(server, now, begin, visit.rows * self.row[server])
        taken = into(other, now, begin, visit.rows * self.row[other])
        there = (sent if sent > taken else taken) + way + self.round[server]
        done = self._compute(now, there, visit)
        sent = out(other, now, done, visit.rows * self.reply[other])
        taken = into(server, now, done, visit.rows * self.reply[server])
        over = (sent if sent > taken else taken) + way + self.round[other]
        return over, there - begin + over - done

    def _compute(self, now: float, there: float, visit: Visit) -> float:
        """When all its devices are done."""
        if len(visit.jobs) == 1:
            device, seconds = visit.jobs[0]
            return self.devices.serve(device, now, there, seconds)
        return max([self.devices.serve(device, now, there, each) for device, each in visit.jobs])


def _seconds(bandwidth: float, size: int, fixed: float) -> float:
    return 8 * size / bandwidth + fixed


class Planner:
    """Turns plans into visits."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.flows = scenario, Flows.of(scenario)
        self._devices = sum(scenario.devices)
        self._server_of = np.repeat(np.arange(len(scenario.servers)), scenario.devices)
        self._call = np.array([server.speed.call for server in scenario.servers])
        self._expert = np.array([server.speed.expert for server in scenario.servers])

    def rows(self, server: int, tokens: np.ndarray) -> np.ndarray:
        """Hidden states of a server's step to each server: int64 [l, n]."""
        num, layers = len(self.scenario.servers), self.scenario.model.layers
        keys = self.flows.rows[tokens].ravel() - server * layers * num
        rows_ln = np.bincount(keys, minlength=layers * num).reshape(layers, num)
        rows_ln[:, server] = 0
        return rows_ln

    def visits(self, rows_ln: np.ndarray, tokens: np.ndarray) -> list[list[Visit]]:
        """Of each layer of a step with these tokens."""
        model, num = self.scenario.model, len(self.scenario.servers)
        keys, calls = np.unique(self.flows.calls[tokens].ravel(), return_counts=True)
        runs = keys // model.experts % num
        seconds = calls * self._call[runs] + self._expert[runs]
        work = np.bincount(
            self.flows.device[keys], weights=seconds, minlength=model.layers * self._devices
        )
        place_p = np.unique(self.flows.device[keys])
        layer_p, device_p = np.divmod(place_p, self._devices)
        server_p = self._server_of[device_p]
        visits: list[list[Visit]] = [[] for _ in range(model.layers)]
        columns = (layer_p, server_p, rows_ln[layer_p, server_p], device_p, work[place_p])
        # In the order of devices, hence a server's are neighbours.
        for layer, server, rows, device, spent in zip(*(c.tolist() for c in columns), strict=True):
            own = visits[layer]
            if own and own[-1].server == server:
                own[-1].jobs.append((device, spent))
            else:
                own.append(Visit(server, rows, [(device, spent)]))
        return visits


class Servers:
    """All servers, each at its own place in its own step."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.planner, self.network = Planner(scenario), Network(scenario)
        self.book = Book(scenario)
        self.batches = [Batches(scenario.config, devices) for devices in scenario.devices]
        self.steps: list[Step | None] = [None] * len(scenario.servers)
        #: Seconds on the critical paths of each server's steps; lists, because each layer adds.
        self.compute = [0.0] * len(scenario.servers)
        self.communicate = [0.0] * len(scenario.servers)

    def arrive(self, request: int) -> int | None:
        """A request comes; returns its server if that has rested."""
        requests = self.scenario.requests
        server = int(requests.server[request])
        sequence = Sequence(request, int(requests.prompt[request]), int(requests.output[request]))
        rests = not self.batches[server].active
        self.batches[server].add(sequence)
        return server if rests else None

    def advance(self, server: int, now: float) -> float | None:
        """A layer of a server is over, or its rest: when the next one is; None: it rests."""
        step = self.steps[server]
        if step is not None and step.layer == len(step.visits):
            self._end(server, step, now)
            step = None
        if step is None:
            step = self.steps[server] = self._begin(server)
        if step is None:
            return None
        layer = step.layer
        step.layer += 1
        over, moved = self.network.layer(server, now, step.trunk, step.visits[layer])
        if step.layer == len(step.visits):
            over += self.scenario.servers[server].speed.step
        self.communicate[server] += moved
        self.compute[server] += over - now - moved
        return over

    def _begin(self, server: int) -> Step | None:
        plan = self.batches[server].schedule()
        if not plan.work:
            return None
        scenario, model = self.scenario, self.scenario.model
        tokens = self.planner.flows.tokens(plan.work)
        rows_ln = self.planner.rows(server, tokens)
        self.book.rows += rows_ln.sum(1)
        rows_n = rows_ln.sum(0)
        self.book.bytes_nn[server] += rows_n * model.row_bytes
        self.book.bytes_nn[:, server] += rows_n * model.state_bytes
        trunk = scenario.servers[server].speed.trunk(plan.bucket, scenario.config.block_size)
        return Step(plan, trunk / model.layers, self.planner.visits(rows_ln, tokens))

    def _end(self, server: int, step: Step, now: float) -> None:
        self.book.tokens(self.batches[server].commit(step.plan), now)
        self.book.steps[server] += 1

    def result(self) -> Result:
        book, network = self.book, self.network
        book.device_busy[:] = network.devices.busy
        book.out_busy[:], book.in_busy[:] = network.out.busy, network.into.busy
        book.compute[:], book.communicate[:] = self.compute, self.communicate
        return book.result()


def run(scenario: Scenario) -> Result:
    """Serves all requests."""
    servers, at_r = Servers(scenario), scenario.requests.at
    # (time, kind, number): arrivals come before layers that begin at the same time.
    events = [(at, 0, r) for r, at in enumerate(at_r.tolist())]
    heapq.heapify(events)
    while events:
        now, kind, number = heapq.heappop(events)
        server = servers.arrive(number) if kind == 0 else number
        if server is None:
            continue
        over = servers.advance(server, now)
        if over is not None:
            heapq.heappush(events, (over, 1, server))
    return servers.result()
