"""Expert calls of servers that step on their own: what a step asks of whom, and what that costs."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Sequence

import numpy as np

from dance_jax.placement.visit import places
from research.simulator.batches import Plan
from research.simulator.flows import Flows
from research.simulator.scenario import Scenario

#: A computation: (device, of all servers counted through; its seconds) of each device it is on.
Jobs = list[tuple[int, float]]

# These are native/caller.cc's.

#: A server's rows are cut into so many calls at most, each of so many bytes at least.
MOST_PIECES, PIECE_BYTES = 4, 64 * 1024
#: Weight of the latest answer in a pace, and times what was expected that count at most; bytes up
#: to which an answer is a small one.
LEARN, MOST_TIMES, SMALL = 0.2, 10, 8192


@dataclasses.dataclass(slots=True, eq=False)
class Group:
    """Rows of a layer whose calls go out together."""

    server: int
    #: Experts that are here.
    own: Jobs = dataclasses.field(default_factory=list)
    calls: list[Call] = dataclasses.field(default_factory=list)
    #: Calls of which it is not known when their sums will be there.
    left: int = 0
    #: Its server does nothing until they are.
    waits: bool = False

    @property
    def last(self) -> Call:
        """The call whose sums come last."""
        return max(self.calls, key=_over)


@dataclasses.dataclass(slots=True, eq=False)
class Call:
    """What a group asks of another server."""

    group: Group
    layer: int
    server: int
    #: Hidden states.
    rows: int
    jobs: Jobs
    #: Keys as in `Flows.calls`, each once; and how often they are called, all together.
    experts: list[int]
    count: int
    #: It repeats that one, which is late; and those that repeat it.
    instead_of: Call | None = None
    instead: Sequence[Call] = ()
    sent: float = 0.0
    #: Seconds that its messages take; in the rest it waits and is computed there.
    moving: float = 0.0
    #: When its sums are there; infinite: nobody knows yet.
    over: float = math.inf
    line: Line | None = None
    #: When it is late; infinite: it has been repeated.
    late: float = math.inf
    #: Bytes, there and back, with those of the calls before it that were not answered.
    queued: int = 0


@dataclasses.dataclass(slots=True)
class Line:
    """What a server knows of another that it calls."""

    #: Calls without an answer, and their bytes.
    calls: int = 0
    size: int = 0
    #: How long its answers take: seconds of small ones, and of each byte.
    base_s: float = 0.02
    byte_s: float = 1e-6

    def expected(self, size: int) -> float:
        """Seconds until an answer comes."""
        return self.base_s + self.byte_s * size

    def learn(self, size: int, seconds: float) -> None:
        """An answer has come."""
        seconds = min(seconds, MOST_TIMES * self.expected(size))
        if size <= SMALL:
            self.base_s += LEARN * (seconds - self.base_s)
        else:
            self.byte_s += LEARN * (max(0.0, seconds - self.base_s) / size - self.byte_s)


_over = operator.attrgetter("over")


class Planner:
    """Turns plans into groups of calls, and counts what is computed."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.flows = scenario, Flows.of(scenario)
        num = len(scenario.servers)
        #: int64 [servers]: expert calls on each server's devices.
        self.computed = np.zeros(num, np.int64)
        self._devices = sum(scenario.devices)
        self._server_of = np.repeat(np.arange(num), scenario.devices)
        self._call = np.array([server.speed.call for server in scenario.servers])
        self._expert = np.array([server.speed.expert for server in scenario.servers])
        self._cuts = scenario.messages == "server"
        #: Rows of a call at least, where a server gets several.
        self._piece = PIECE_BYTES // scenario.model.state_bytes + 1

    def layers(self, server: int, plan: Plan) -> list[tuple[Group, ...]]:
        """Of each layer of a step the groups of its rows."""
        # On other devices the host asks for a layer's experts in one go.
        cut = self._cuts and self.scenario.servers[server].beside
        parts = self._halves(plan) if cut else [self.flows.tokens(plan.work)]
        return list(zip(*(self._groups(server, tokens) for tokens in parts), strict=True))

    def _halves(self, plan: Plan) -> list[np.ndarray]:
        """Tokens of a step as the engine's steps cut them: a long slice in two, the decodes with
        its first half; of each device."""
        half = plan.bucket[1] // 2
        if not half:
            return [self.flows.tokens(plan.work)]
        size = self.scenario.config.block_size
        left: collections.Counter[int] = collections.Counter()
        first, second = [], []
        for sequence, count in plan.work:
            most = count
            if sequence.prefilling:
                most = min(count, (half - left[sequence.device]) * size)
                left[sequence.device] += -(-most // size)
            first.append(self.flows.places(sequence, 0, most))
            second.append(self.flows.places(sequence, most, count - most))
        return [part for part in map(np.concatenate, (first, second)) if part.size]

    def _groups(self, server: int, tokens: np.ndarray) -> list[Group]:
        """Of each layer."""
        model, num = self.scenario.model, len(self.scenario.servers)
        rows_ln = self._rows(server, tokens)
        keys, calls = np.unique(self.flows.calls[tokens].ravel(), return_counts=True)
        runs = keys // model.experts % num
        self.computed += np.bincount(runs, weights=calls, minlength=num).astype(np.int64)
        groups = [Group(server) for _ in range(model.layers)]
        # By layer and server: where its experts begin and end among all.
        pairs, begins = np.unique(keys // model.experts, return_index=True)
        layer_v, server_v = np.divmod(pairs, num)
        ends = np.append(begins[1:], len(keys))
        columns = (
            layer_v, server_v, rows_ln[layer_v, server_v], begins, ends,
            np.add.reduceat(calls, begins),
        )  # fmt: skip
        experts = keys.tolist()
        jobs = self._jobs(keys, calls * self._call[runs] + self._expert[runs])
        for layer, to, rows, begin, end, count in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            own = jobs[layer, to]
            if to == server:
                groups[layer].own = own
            else:
                call = Call(groups[layer], layer, to, rows, own, experts[begin:end], count)
                groups[layer].calls += self._pieces(call)
        return groups

    def _rows(self, server: int, tokens: np.ndarray) -> np.ndarray:
        """Hidden states to each server: int64 [l, n]."""
        num, layers = len(self.scenario.servers), self.scenario.model.layers
        keys = self.flows.rows[tokens].ravel() - server * layers * num
        rows_ln = np.bincount(keys, minlength=layers * num).reshape(layers, num)
        rows_ln[:, server] = 0
        return rows_ln

    def _jobs(self, keys: np.ndarray, seconds: np.ndarray) -> dict[tuple[int, int], Jobs]:
        """Of experts that take so long: by layer and server."""
        places, place_of = np.unique(self.flows.device[keys], return_inverse=True)
        layer_p, device_p = np.divmod(places, self._devices)
        columns = (layer_p, self._server_of[device_p], device_p, np.bincount(place_of, seconds))
        jobs: dict[tuple[int, int], Jobs] = {}
        for layer, server, device, each in zip(*(c.tolist() for c in columns), strict=True):
            jobs.setdefault((layer, server), []).append((device, each))
        return jobs

    def _pieces(self, call: Call) -> list[Call]:
        """A call, or several that are alike and each read the weights of all its experts."""
        if not self._cuts or call.rows <= self._piece:
            return [call]
        most = max(self._piece, -(-call.rows // MOST_PIECES))
        number = -(-call.rows // most)
        read = self._reading(call.experts)
        jobs = [(device, (s - read[device]) / number + read[device]) for device, s in call.jobs]
        rows = [min(most, call.rows - begin) for begin in range(0, call.rows, most)]
        return [
            dataclasses.replace(call, rows=each, jobs=jobs, count=call.count // number)
            for each in rows
        ]

    def _reading(self, experts: Iterable[int]) -> dict[int, float]:
        """Seconds in which each device reads the weights of experts of one layer and server."""
        keys = np.fromiter(experts, np.int64)
        read = self._expert[keys // self.scenario.model.experts % len(self._expert)]
        return dict(itertools.chain.from_iterable(self._jobs(keys, read).values()))

    def together(self, calls: Sequence[Call]) -> Jobs:
        """Of calls for one layer that a server computes in one go: it reads weights once."""
        if len(calls) == 1:
            return calls[0].jobs
        jobs: dict[int, float] = {}
        for device, seconds in (job for call in calls for job in call.jobs):
            jobs[device] = jobs.get(device, 0.0) + seconds
        asked = collections.Counter(expert for call in calls for expert in call.experts)
        again = [expert for expert, times in asked.items() for _ in range(times - 1)]
        for device, seconds in self._reading(again).items():
            jobs[device] -= seconds
        return list(jobs.items())

    def instead(self, call: Call, asked: set[int]) -> list[Call]:
        """Calls to others that hold what a call asks for; [] where not all of it has other holders.

        All its rows go to each of them: which experts each row wants is not known any more.
        """
        model, num = self.scenario.model, len(self.scenario.servers)
        resident = self.scenario.placement.resident
        place_n = places(self.scenario.order[call.group.server])
        missing = {key: key % model.experts for key in call.experts}
        holders = {
            key: set(np.flatnonzero(resident[:, call.layer, expert]).tolist()) - asked
            for key, expert in missing.items()
        }
        found = []
        while missing:
            wanted = collections.Counter(n for key in missing for n in sorted(holders[key]))
            if not wanted or not all(holders[key] for key in missing):
                return []
            to = min(wanted, key=lambda n: (-wanted[n], place_n[n]))
            experts = [key for key in missing if to in holders[key]]
            own = [(call.layer * num + to) * model.experts + missing.pop(key) for key in experts]
            count = -(-call.count * len(own) // len(call.experts))
            seconds = np.full(len(own), self._call[to] * count / len(own) + self._expert[to])
            jobs = self._jobs(np.array(own), seconds)[call.layer, to]
            found.append(Call(call.group, call.layer, to, call.rows, jobs, own, count))
        return found
