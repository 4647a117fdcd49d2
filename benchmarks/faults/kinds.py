"""The faults that are made at a service."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import psutil

from benchmarks.faults.beds import Hosts

#: Seconds of a pause of a process; seconds of an engine without progress until it is restarted.
PAUSE_S, WATCHDOG_S = 5.0, 10.0
#: Seconds that a host is gone, that a link is cut for long and shortly, that a link is bad.
GONE_S, CUT_S, BLINK_S, BAD_S = 10.0, 20.0, 3.0, 20.0
#: What a bad link carries, in bits per second, and the share of packets that another one loses.
SLOW_RATE, LOST_SHARE = 1_000_000, 0.05
#: Seconds between two looks whether a process has ended.
LOOK_S = 0.2


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, made at one server or at two."""

    name: str
    #: Called with the `Bed` (`Hosts` if `hosts`) and the servers' ranks, those that are hit first.
    make: Callable[[Any, Sequence[int]], Awaitable[None]]
    #: How many of the servers have users who wait for an engine or a link to come back, and how
    #: many of these lose their front end, and so the requests of these users.
    engines: int = 1
    fronts: int = 0
    #: How many servers are out of reach for their users for a time.
    away: int = 0
    #: Seconds that the fault itself lasts for the users of the servers hit.
    lasts_s: float = 0.0
    #: It needs hosts with links; whether it hits the launcher's host, which others spare.
    hosts: bool = False
    launcher: bool = False
    #: It is made while experts migrate.
    migrating: bool = False


async def kill_engine(bed: Any, ranks: Sequence[int]) -> None:
    bed.engine(ranks[0]).kill()


async def stop_engine(bed: Any, ranks: Sequence[int]) -> None:
    engine = bed.engine(ranks[0])
    engine.suspend()
    while engine.is_running():  # until the watchdog kills it
        await asyncio.sleep(LOOK_S)


async def pause_engine(bed: Any, ranks: Sequence[int]) -> None:
    await _pause(bed.engine(ranks[0]))


async def pause_front(bed: Any, ranks: Sequence[int]) -> None:
    await _pause(bed.front(ranks[0]))


async def pause_launcher(bed: Any, ranks: Sequence[int]) -> None:
    await _pause(bed.launcher)


async def kill_launcher(bed: Any, ranks: Sequence[int]) -> None:
    """Another launcher takes over after a while."""
    bed.launcher.kill()
    await asyncio.sleep(PAUSE_S)
    await bed.launch_again()


async def kill_front(bed: Any, ranks: Sequence[int]) -> None:
    bed.front(ranks[0]).kill()


async def lose_server(bed: Any, ranks: Sequence[int]) -> None:
    front = bed.front(ranks[0])
    for process in [*front.children(recursive=True), front]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


async def two_engines(bed: Any, ranks: Sequence[int]) -> None:
    engines = [bed.engine(rank) for rank in ranks[:2]]
    for engine in engines:
        engine.kill()


async def server_and_engine(bed: Any, ranks: Sequence[int]) -> None:
    engine = bed.engine(ranks[1])
    await lose_server(bed, ranks)
    engine.kill()


async def crash_host(bed: Hosts, ranks: Sequence[int]) -> None:
    """All processes are killed, which their connections show at once."""
    await asyncio.to_thread(bed.crash, ranks[0])
    await asyncio.sleep(GONE_S)
    await asyncio.to_thread(bed.boot, ranks[0])


async def switch_host_off(bed: Hosts, ranks: Sequence[int]) -> None:
    """Nobody hears of it: the link is cut first."""
    with _cut(bed, ranks[0]):
        await asyncio.to_thread(bed.crash, ranks[0])
        await asyncio.sleep(GONE_S)
    await asyncio.to_thread(bed.boot, ranks[0])


async def host_and_engine(bed: Hosts, ranks: Sequence[int]) -> None:
    engine = bed.engine(ranks[1])
    crashed = asyncio.create_task(crash_host(bed, ranks))
    engine.kill()
    await crashed


async def cut_link(bed: Hosts, ranks: Sequence[int]) -> None:
    with _cut(bed, ranks[0]):
        await asyncio.sleep(CUT_S)


async def cut_link_shortly(bed: Hosts, ranks: Sequence[int]) -> None:
    with _cut(bed, ranks[0]):
        await asyncio.sleep(BLINK_S)


async def slow_link(bed: Hosts, ranks: Sequence[int]) -> None:
    name = bed.names[ranks[0]]
    before = bed.testbed.rates[name]
    bed.testbed.set_rate(SLOW_RATE, [name])
    try:
        await asyncio.sleep(BAD_S)
    finally:
        bed.testbed.set_rate(before, [name])


async def lossy_link(bed: Hosts, ranks: Sequence[int]) -> None:
    name = bed.names[ranks[0]]
    bed.testbed.set_loss(name, LOST_SHARE)
    try:
        await asyncio.sleep(BAD_S)
    finally:
        bed.testbed.set_loss(name, 0.0)


@contextlib.contextmanager
def _cut(bed: Hosts, rank: int):
    bed.testbed.set_link(bed.names[rank], False)
    try:
        yield
    finally:
        bed.testbed.set_link(bed.names[rank], True)


async def _pause(process: psutil.Process) -> None:
    process.suspend()
    try:
        await asyncio.sleep(PAUSE_S)
    finally:
        process.resume()


_KINDS = (
    Fault("engine killed", kill_engine),
    Fault("engine hung", stop_engine, lasts_s=WATCHDOG_S),
    Fault("engine paused", pause_engine, lasts_s=PAUSE_S),
    Fault("front end killed", kill_front, fronts=1),
    Fault("front end paused", pause_front, lasts_s=PAUSE_S),
    Fault("launcher paused", pause_launcher, engines=0),
    Fault("launcher killed", kill_launcher, engines=0),
    Fault("server lost", lose_server, fronts=1),
    Fault("two engines killed", two_engines, engines=2),
    Fault("server lost, engine killed", server_and_engine, engines=2, fronts=1),
    Fault("host crashed", crash_host, fronts=1, hosts=True),
    Fault("host switched off", switch_host_off, fronts=1, hosts=True),
    Fault("host crashed, engine killed", host_and_engine, engines=2, fronts=1, hosts=True),
    Fault("link cut", cut_link, away=1, lasts_s=CUT_S, hosts=True),
    Fault("launcher's link cut", cut_link, away=1, lasts_s=CUT_S, hosts=True, launcher=True),
    Fault("link cut for 3 s", cut_link_shortly, away=1, lasts_s=BLINK_S, hosts=True),
    Fault("link of 1 Mbps", slow_link, hosts=True),
    Fault("link loses 5 %", lossy_link, hosts=True),
)
FAULTS = {
    fault.name: fault
    for kind in _KINDS
    for fault in (
        kind,
        dataclasses.replace(kind, name=f"{kind.name}, in a migration", migrating=True),
    )
}
