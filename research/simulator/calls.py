"""Expert calls of servers that step on their own: which calls a step makes, and what they cost."""

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

#: A computation: for each device that takes part, its number, counted through all servers, and its
#: seconds.
Jobs = list[tuple[int, float]]

# As in native/caller.cc:

#: Rows for one server go in at most MOST_PIECES calls of at least PIECE_BYTES each.
MOST_PIECES, PIECE_BYTES = 4, 64 * 1024
#: The weight of the latest answer in what is expected, the multiple of the expected time to which
#: an answer's time is cut, and the bytes up to which an answer counts as small.
LEARN, MOST_TIMES, SMALL = 0.2, 10, 8192


@dataclasses.dataclass(slots=True, eq=False)
class Group:
    """Rows of a layer whose calls go out together."""

    server: int
    #: The server's own experts.
    own: Jobs = dataclasses.field(default_factory=list)
    calls: list[Call] = dataclasses.field(default_factory=list)
    #: Calls whose sums have no known time of arrival yet.
    left: int = 0
    #: The server is idle until all sums are there.
    waits: bool = False

    @property
    def last(self) -> Call:
        """The call whose sums arrive last."""
        return max(self.calls, key=_over)


@dataclasses.dataclass(slots=True, eq=False)
class Call:
    """A message from a group to another server that holds experts."""

    group: Group
    layer: int
    server: int
    #: Hidden states.
    rows: int
    jobs: Jobs
    #: Keys as in `Flows.calls`, each once; and the number of expert calls, all together.
    experts: list[int]
    count: int
    #: The late call that this one repeats, and the calls that repeat this one.
    instead_of: Call | None = None
    instead: Sequence[Call] = ()
    sent: float = 0.0
    #: Seconds that the call and its answer travel; the rest of the time it waits or is computed.
    moving: float = 0.0
    #: When its sums are there; infinite while that is not known.
    over: float = math.inf
    line: Line | None = None
    #: When it counts as late; infinite once it has been repeated.
    late: float = math.inf
    #: Bytes, there and back, of this call and the unanswered calls before it on the same line.
    queued: int = 0


@dataclasses.dataclass(slots=True)
class Line:
    """What a caller knows of a server that it calls."""

    #: Unanswered calls, and their bytes.
    calls: int = 0
    size: int = 0
    #: Seconds that a small answer takes, and each byte.
    base_s: float = 0.02
    byte_s: float = 1e-6

    def expected(self, size: int) -> float:
        """Seconds until an answer is expected, for calls of `size` bytes."""
        return self.base_s + self.byte_s * size

    def learn(self, size: int, seconds: float) -> None:
        """Adjusts what is expected by an answer that took `seconds`."""
        seconds = min(seconds, MOST_TIMES * self.expected(size))
        if size <= SMALL:
            self.base_s += LEARN * (seconds - self.base_s)
        else:
            self.byte_s += LEARN * (max(0.0, seconds - self.base_s) / size - self.byte_s)


_over = operator.attrgetter("over")


class Planner:
    """Turns plans into groups of calls, and counts expert calls."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.flows = scenario, Flows.of(scenario)
        num = len(scenario.servers)
        #: int64 [servers]: expert calls on each server's devices, repeats left out.
        self.computed = np.zeros(num, np.int64)
        self._devices = sum(scenario.devices)
        self._server_of = np.repeat(np.arange(num), scenario.devices)
        self._call = np.array([server.speed.call for server in scenario.servers])
        self._expert = np.array([server.speed.expert for server in scenario.servers])
        self._cuts = scenario.messages == "server"
        #: The fewest rows of a call when a server gets several.
        self._piece = PIECE_BYTES // scenario.model.state_bytes + 1

    def layers(self, server: int, plan: Plan) -> list[tuple[Group, ...]]:
        """The groups of rows of each layer of a step."""
        # On other devices than CPUs the host sends all calls of a layer at once.
        cut = self._cuts and self.scenario.servers[server].beside
        parts = self._halves(plan) if cut else [self.flows.tokens(plan.work)]
        return list(zip(*(self._groups(server, tokens) for tokens in parts), strict=True))

    def _halves(self, plan: Plan) -> list[np.ndarray]:
        """Cuts the tokens of a step as the engine does, on each device: a long slice in two halves,
        the decodes with its first half."""
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
        """One group for each layer, of these tokens."""
        model, num = self.scenario.model, len(self.scenario.servers)
        rows_ln = self._rows(server, tokens)
        keys, calls = np.unique(self.flows.calls[tokens].ravel(), return_counts=True)
        runs = keys // model.experts % num
        self.computed += np.bincount(runs, weights=calls, minlength=num).astype(np.int64)
        groups = [Group(server) for _ in range(model.layers)]
        # For each pair of layer and server, where its experts begin and end in `keys`.
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
        """Hidden states sent to each server: int64 [l, n]."""
        num, layers = len(self.scenario.servers), self.scenario.model.layers
        keys = self.flows.rows[tokens].ravel() - server * layers * num
        rows_ln = np.bincount(keys, minlength=layers * num).reshape(layers, num)
        rows_ln[:, server] = 0
        return rows_ln

    def _jobs(self, keys: np.ndarray, seconds: np.ndarray) -> dict[tuple[int, int], Jobs]:
        """The jobs of each (layer, server), for experts that take `seconds`."""
        places, place_of = np.unique(self.flows.device[keys], return_inverse=True)
        layer_p, device_p = np.divmod(places, self._devices)
        columns = (layer_p, self._server_of[device_p], device_p, np.bincount(place_of, seconds))
        jobs: dict[tuple[int, int], Jobs] = {}
        for layer, server, device, each in zip(*(c.tolist() for c in columns), strict=True):
            jobs.setdefault((layer, server), []).append((device, each))
        return jobs

    def _pieces(self, call: Call) -> list[Call]:
        """Cuts a long call into equal ones, each of which reads the weights of all its experts."""
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
        """Seconds that each device takes to read the weights of experts of one layer and server."""
        keys = np.fromiter(experts, np.int64)
        read = self._expert[keys // self.scenario.model.experts % len(self._expert)]
        return dict(itertools.chain.from_iterable(self._jobs(keys, read).values()))

    def together(self, calls: Sequence[Call]) -> Jobs:
        """The jobs of calls for one layer that are computed at once: weights are read once."""
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
        """Calls to other holders in place of a call; [] if some expert has no other holder.

        All rows go to each of them, because the experts of each row are not known any more.

        Args:
            call: a late call, or one to a server that owes answers.
            asked: servers that must not be called.
        """
        model, num = self.scenario.model, len(self.scenario.servers)
        resident = self.scenario.placement.resident
        place_n = places(self.scenario.order[call.group.server])
        missing = {key: key % model.experts for key in call.experts}
        holders = {
            key: set(np.flatnonzero(resident[:, call.layer, expert]).tolist()) - asked
            for key, expert in missing.items()
        }
        if not all(holders.values()):
            return []
        found = []
        while missing:
            wanted = collections.Counter(n for key in missing for n in holders[key])
            to = min(wanted, key=lambda n: (-wanted[n], place_n[n]))
            experts = [key for key in missing if to in holders[key]]
            own = [(call.layer * num + to) * model.experts + missing.pop(key) for key in experts]
            count = -(-call.count * len(own) // len(call.experts))
            seconds = np.full(len(own), self._call[to] * count / len(own) + self._expert[to])
            jobs = self._jobs(np.array(own), seconds)[call.layer, to]
            found.append(Call(call.group, call.layer, to, call.rows, jobs, own, count))
        return found
