"""Makes one fault after another under load, and measures what each cost."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.faults.beds import Bed
from benchmarks.faults.kinds import FAULTS, Fault
from benchmarks.faults.load import Case, Load
from benchmarks.faults.report import Report
from dance_jax.bench.cluster import RunError
from dance_jax.bench.http import HttpError
from dance_jax.bench.texts import passage

#: Different requests.
CASES = 12
#: Seconds for everything to be whole after a fault, and for the requests in flight then to end.
WHOLE_S, SETTLE_S = 180.0, 60.0
#: Seconds between two looks whether a server runs.
LOOK_S = 0.2
#: Seconds for experts to return after a loss, until a migration can begin.
RETURN_S = 20.0
#: Seconds from the decision for a migration, which takes some seconds, to the fault.
UNDER_WAY_S = 0.3
#: Longest gaps of a stream, in seconds: where all experts have another holder, where others load
#: them, and where the stream's own engine starts anew.
COVERED_S, LOADED_S, OWN_S = 2.0, 5.0, 6.0


async def run(
    bed: Bed,
    names: Sequence[str],
    seed: int,
    seconds: float,
    every_s: float,
    in_flight: int,
    say: Callable[[Report], None],
    note: Callable[[str], None],
) -> list[Report]:
    """Make faults under load, one after another, in an order that the seed decides.

    Args:
        bed: the service.
        names: of the faults.
        seed: of the schedule and of the prompts.
        seconds: after which no fault is made any more.
        every_s: seconds from one fault to the next, or more if the first takes longer.
        in_flight: requests on each server.
        say: called with what each fault cost.
        note: called with messages.
    """
    chance = random.Random(seed)
    texts = np.random.default_rng(seed)
    cases = (
        Case(passage(texts), None if n % 2 else n, stream=n % 4 < 2) for n in itertools.count()
    )
    load = Load(bed.addresses, in_flight)
    if left_out := await load.learn(cases, CASES):
        note(f"left out: {left_out} requests that the servers answer differently, by rounding")
    if any(FAULTS[name].migrating for name in names):
        await bed.migrate(0, chance)  # the first decision starts the process that decides
    reports: list[Report] = []
    async with load.running():
        began = time.monotonic()
        await asyncio.sleep(2)
        while time.monotonic() - began < seconds:
            for fault in _shuffled(chance, names):
                due = time.monotonic() + every_s
                report = await _one(bed, load, fault, chance)
                report.at_s = time.monotonic() - began
                reports.append(report)
                say(report)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if time.monotonic() - began > seconds:
                    break
    return reports


def _shuffled(chance: random.Random, names: Sequence[str]) -> list[Fault]:
    """All faults in random order."""
    chosen = [FAULTS[name] for name in names]
    chance.shuffle(chosen)
    return chosen


def _ranks(bed: Bed, fault: Fault, chance: random.Random) -> list[int]:
    """The servers in random order, those that are hit first."""
    ranks = list(range(len(bed.names)))
    chance.shuffle(ranks)
    if fault.hosts:  # the launcher is on the first host
        ranks.sort(key=lambda rank: (rank == 0) != fault.launcher)
    return ranks


async def _one(bed: Bed, load: Load, fault: Fault, chance: random.Random) -> Report:
    ranks = _ranks(bed, fault, chance)
    hit = ranks[: fault.engines]
    report = Report(
        fault.name,
        [bed.names[rank] for rank in hit],
        [bed.names[rank] for rank in ranks[: fault.fronts]],
        limit_s=COVERED_S if await bed.covered(hit) else LOADED_S,
        own_limit_s=OWN_S + fault.lasts_s,
    )
    if fault.migrating:
        report.migration = await _migrate(bed, ranks[-1], chance)
    before = bed.processes()
    load.records.clear()
    load.dead, load.away = set(ranks[: fault.fronts]), set(ranks[: fault.away])
    began = time.monotonic()
    await fault.make(bed, ranks)
    await asyncio.sleep(1.0)
    while not await bed.whole():
        if time.monotonic() - began > WHOLE_S:
            raise RunError(f"{fault.name}: not whole after {WHOLE_S:g} s")
        await asyncio.sleep(LOOK_S)
    report.whole_s = time.monotonic() - began
    # A stream's gap is known when it has ended.
    report.unended = await load.settled(SETTLE_S)
    load.dead, load.away = set(), set()
    report.count(load.records, bed.names, ranks[: fault.engines], began)
    now = bed.processes()
    report.processes_left = sum(each.is_running() for each in before - now)
    report.memory = bed.memory()
    return report


async def _migrate(bed: Bed, rank: int, chance: random.Random) -> str:
    """Have experts migrate, which begins when this returns; returns how many, or why none do."""
    until = time.monotonic() + RETURN_S
    while True:
        try:
            moved = await bed.migrate(rank, chance)
        except TimeoutError:
            return "no migration: no answer in time"
        except HttpError as error:
            # Servers that have loaded experts of a lost one may hold too many until it has its own.
            if time.monotonic() > until:
                return f"no migration: {error}"
            await asyncio.sleep(LOOK_S)
            continue
        await asyncio.sleep(UNDER_WAY_S)
        return f"{moved} experts to move"
