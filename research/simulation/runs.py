"""The sections of the benchmark: their scenarios, and the figures of each run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from dance_jax.bench import arrivals
from dance_jax.placement.core import Placement
from dance_jax.placement.policies import POLICIES, place
from research.policies.setups import Part, halves
from research.policies.traces import read_trace
from research.simulator import Model, Requests, Scenario, Server, cost_of, simulate
from research.simulator.scenario import Messages

from . import clusters
from .clusters import Tasks

#: The policy with which others are compared.
BASELINE = "eplb"
#: Of `parts`: bits per second of links, mean seconds between two requests of a server.
REFERENCE_BPS, REFERENCE_INTERVAL_S = 500e6, 10.0
#: Whether servers step together, and what a message is sent for.
Way = tuple[bool, Messages]
WAYS: tuple[Way, ...] = (
    (False, "expert"),
    (False, "server"),
    (True, "expert"),
    (True, "server"),
)
#: The ways that a sweep covers, without lock step (False) and in lock step (True).
SWEPT: dict[bool, tuple[Way, ...]] = {False: WAYS[:2], True: WAYS[3:]}
#: Requests of a run, and the fewest requests of each server in a sweep.
REQUESTS, EACH = 300, 5
#: Requests of a recorded trace, and the mean seconds between two requests of a server to which they
#: are slowed down: the recorded services have more machines and no slow links.
RECORDED, RECORDED_INTERVAL_S = 300, 60.0


def way(lock_step: bool, messages: str) -> str:
    """A way of serving in words.

    >>> way(True, "server")
    'lock step, per server'
    """
    return f"{'lock step' if lock_step else 'independent'}, per {messages}"


@dataclasses.dataclass(frozen=True)
class Run:
    """One simulated scenario and its figures; times in seconds."""

    section: str
    #: Where requests come from.
    workload: str
    policy: str
    devices: int
    servers: int
    #: Bits per second of every link.
    bandwidth: float
    #: Mean seconds between two requests of one server.
    interval_s: float
    lock_step: bool
    messages: Messages
    requests: int
    mean: float
    p50: float
    p99: float
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    simulated_s: float
    steps: int
    #: Seconds on the critical path of the steps of all servers; in lock step all share one path.
    compute_s: float
    communicate_s: float
    #: The share of communication in these.
    network: float
    #: Shares of time in use, of each server's devices and of each direction of each link.
    device_use: list[list[float]]
    out_use: list[float]
    in_use: list[float]
    #: Payload bytes of each server's link.
    sent_bytes: list[int]
    received_bytes: list[int]
    #: Seconds that the simulation took.
    wall_s: float

    @property
    def serving(self) -> Way:
        """How servers step and what they send."""
        return self.lock_step, self.messages

    @property
    def way(self) -> str:
        """`serving` in words."""
        return way(*self.serving)

    @property
    def busiest_device(self) -> float:
        """The share of time that the busiest device is in use."""
        return max(map(max, self.device_use))

    @property
    def busiest_link(self) -> float:
        """The share of time that the busiest link is in use, in its busier direction."""
        return max(*self.out_use, *self.in_use)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A cluster with its tasks."""

    section: str
    workload: str
    servers: tuple[Server, ...]
    model: Model
    tasks: Tasks
    seed: int
    _placements: dict[tuple[str, bool], Placement] = dataclasses.field(default_factory=dict)

    @property
    def devices(self) -> list[int]:
        """Devices of each server."""
        return [server.devices for server in self.servers]

    def placement(self, policy: str, lock_step: bool) -> Placement:
        """The placement of a policy; policies that weigh cost have another one in lock step."""
        key = policy, lock_step and POLICIES[policy].weighs_cost
        if key not in self._placements:
            self._placements[key] = place(
                policy,
                self.tasks.counts,
                [server.devices * server.slots for server in self.servers],
                routes=self.tasks.fit,
                devices=self.devices,
                cost=cost_of(self.servers, self.model, lock_step),
                seed=self.seed,
            )
        return self._placements[key]

    def run(
        self,
        policy: str,
        requests: Requests,
        interval_s: float,
        lock_step: bool,
        messages: Messages,
    ) -> Run:
        """Simulates requests; `interval_s` only goes into the results."""
        scenario = Scenario(
            self.servers,
            self.model,
            clusters.CONFIG,
            self.placement(policy, lock_step),
            self.tasks.served,
            requests,
            lock_step=lock_step,
            messages=messages,
            counts=self.tasks.counts,
            seed=self.seed,
        )
        began = time.perf_counter()
        result = simulate(scenario)
        wall_s = time.perf_counter() - began
        paths = slice(0, 1) if lock_step else slice(None)
        latency, ttft = result.latency, result.ttft
        return Run(
            section=self.section,
            workload=self.workload,
            policy=policy,
            devices=sum(self.devices),
            servers=len(self.servers),
            bandwidth=self.servers[0].bandwidth,
            interval_s=interval_s,
            lock_step=lock_step,
            messages=messages,
            requests=len(requests),
            mean=latency.mean,
            p50=latency.p50,
            p99=latency.p99,
            ttft_mean=ttft.mean,
            ttft_p50=ttft.p50,
            ttft_p99=ttft.p99,
            simulated_s=result.seconds,
            steps=int(result.steps.max()),
            compute_s=float(result.compute_seconds[paths].sum()),
            communicate_s=float(result.communicate_seconds[paths].sum()),
            network=result.network,
            device_use=[each.tolist() for each in result.device_utilisation],
            out_use=result.out_utilisation.tolist(),
            in_use=result.in_utilisation.tolist(),
            sent_bytes=result.sent_bytes.tolist(),
            received_bytes=result.received_bytes.tolist(),
            wall_s=wall_s,
        )


def parts(policies: Sequence[str], seed: int, say: Callable[[str], None]) -> Iterator[Run]:
    """Runs of the paper's servers, with every policy and way."""
    model = clusters.DEEPSEEK_V2_LITE
    servers = clusters.servers_with(clusters.PATTERN, model, REFERENCE_BPS)
    tasks = clusters.skewed_tasks(len(servers), model, seed)
    case = Case("parts", "skewed tasks", servers, model, tasks, seed)
    requests = clusters.poisson_requests(len(servers), REFERENCE_INTERVAL_S, REQUESTS, seed)
    yield from _all_ways(case, policies, requests, REFERENCE_INTERVAL_S, say)


def recorded(
    directory: pathlib.Path, policies: Sequence[str], seed: int, say: Callable[[str], None]
) -> Iterator[Run]:
    """Runs of the paper's servers with measured routes, and arrivals at both services of Azure."""
    trace, model = read_trace(directory), clusters.GPT_OSS_20B
    workloads = [[Part(topic) for topic in topics] for topics in trace.workloads]
    pairs = [halves(trace, workload) for workload in workloads]
    fit, served = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    tasks = Tasks.of(fit, served, model.experts)
    servers = clusters.servers_with(clusters.PATTERN, model, REFERENCE_BPS)
    for name in ("code", "conv"):
        read = arrivals.read_trace(directory / f"azure_{name}.csv", len(servers))[:RECORDED]
        slower = RECORDED_INTERVAL_S * len(read) / len(servers) / read[-1].at_s
        slowed = [dataclasses.replace(each, at_s=each.at_s * slower) for each in read]
        requests = clusters.requests_of(slowed)
        case = Case("recorded", f"azure {name}", servers, model, tasks, seed)
        yield from _all_ways(case, policies, requests, RECORDED_INTERVAL_S, say)


def _all_ways(
    case: Case,
    policies: Sequence[str],
    requests: Requests,
    interval_s: float,
    say: Callable[[str], None],
) -> Iterator[Run]:
    for policy in policies:
        say(f"{case.section}: {case.workload}, {policy}")
        for lock_step, messages in WAYS:
            yield case.run(policy, requests, interval_s, lock_step, messages)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The values that a sweep combines."""

    devices: tuple[int, ...] = (4, 16, 64, 256)
    #: Bits per second.
    bandwidths: tuple[float, ...] = (100e6, 300e6, 1000e6)
    intervals_s: tuple[float, ...] = (8.0, 10.0, 15.0)
    policies: tuple[str, ...] = (BASELINE, "dance", "latency")
    #: Requests of each run at least.
    requests: int = REQUESTS
    #: In lock step as well, with at most MOST_DEVICES devices.
    lock_step: bool = False

    def cells(self) -> list[tuple[bool, int, float]]:
        """Lock step, devices and bandwidth of each cluster, the largest cluster first, because it
        takes longest."""
        sizes = {(False, count) for count in self.devices}
        if self.lock_step:
            sizes |= {(True, min(count, clusters.MOST_DEVICES)) for count in self.devices}
        cells = [(*size, bandwidth) for size in sizes for bandwidth in self.bandwidths]
        return sorted(cells, key=lambda cell: cell[1], reverse=True)


def sweep(what: Sweep, seed: int, say: Callable[[str], None], jobs: int = 1) -> Iterator[Run]:
    """All runs: first as the paper's system serves, then as this engine does, then in lock step.

    Args:
        what: the clusters, rates and policies.
        seed: of tasks, requests and policies.
        say: prints progress.
        jobs: number of processes that simulate clusters; 1: this process alone.
    """
    cells, found = what.cells(), []
    with contextlib.ExitStack() as stack:
        map_cells = map
        if jobs > 1:
            # A fork would copy the locks of jax's threads.
            spawn = multiprocessing.get_context("spawn")
            map_cells = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=spawn)).map
        results = map_cells(functools.partial(_cell, what, seed), cells)
        for (_, count, bandwidth), runs in zip(cells, results, strict=True):
            found += runs
            say(f"sweep: {count} devices, {bandwidth / 1e6:g} Mbps: {len(runs)} runs")
    yield from sorted(found, key=lambda run: (WAYS.index(run.serving), run.devices, run.bandwidth))


def _cell(what: Sweep, seed: int, cell: tuple[bool, int, float]) -> list[Run]:
    """All runs of one cluster, whose tasks and placements are made once."""
    lock_step, count, bandwidth = cell
    devices, model = clusters.devices_of(count), clusters.DEEPSEEK_V2_LITE
    tasks = clusters.skewed_tasks(len(devices), model, seed)
    servers = clusters.servers_with(devices, model, bandwidth)
    case = Case("sweep", "skewed tasks", servers, model, tasks, seed)
    number = max(what.requests, EACH * len(devices))
    found = []
    for interval_s in what.intervals_s:
        requests = clusters.poisson_requests(len(devices), interval_s, number, seed)
        for serving in SWEPT[lock_step]:
            found += [case.run(p, requests, interval_s, *serving) for p in what.policies]
    return found
