"""What viewers of the dashboard cost: `python benchmarks/viewers.py`.

Three idle servers of the demo on this machine; 0, 1 and 10 viewers follow /events of the first.
Prints the processor time of each kind of process, as shares of one core. Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import pathlib
import sys
import tempfile

# A script's import path has only its own folder; add the repository root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Only the servers compute; this process needs no accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"

import psutil
from rich.table import Table

from benchmarks.background import background, watch
from benchmarks.command import ROOT
from dance_jax.bench.cluster import RunError, started
from dance_jax.bench.http import HttpError
from dance_jax.bench.terminal import exit_code, terminal
from dance_jax.launch.planning.hosts import read_hosts

HOSTS = "".join(f"{name} address=localhost memory=8MiB\n" for name in ("alpha", "beta", "gamma"))
VIEWERS = (0, 1, 10)
#: Seconds before a measurement, and of a measurement.
SETTLE_S, MEASURE_S = 4.0, 20.0
#: Modules of the processes by what they are called here.
KINDS = {
    "launcher": "dance_jax.launch",
    "front end": "dance_jax.serve.frontend",
    "engine": "dance_jax.launch.worker.main",
}


def main() -> int:
    """Run the benchmark and return its exit code."""
    argparse.ArgumentParser(
        prog="python benchmarks/viewers.py", description=(__doc__ or "").partition("\n\n")[2]
    ).parse_args()
    console = terminal(100)

    def work() -> int:
        table = Table(
            "viewers", *(f"{kind}, % of a core" for kind in ("watched front end", *KINDS))
        )
        for viewers, shares in asyncio.run(_measure()).items():
            table.add_row(str(viewers), *(f"{100 * share:.2f}" for share in shares))
        console.print(table)
        return 0

    return exit_code(work, RunError, HttpError)


async def _measure() -> dict[int, list[float]]:
    """By number of viewers: shares of the watched front end, and of the busiest of each kind."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = pathlib.Path(folder, "hosts.txt")
        hosts.write_text(HOSTS)
        arguments = ["--hosts", str(hosts), "--rebalance-interval", "0"]
        with started(read_hosts(hosts), arguments, root=ROOT) as cluster:
            await cluster.ready()
            found = {}
            for viewers in VIEWERS:
                async with background(watch(cluster.addresses[0]) for _ in range(viewers)):
                    await asyncio.sleep(SETTLE_S)
                    before = _seconds()
                    await asyncio.sleep(MEASURE_S)
                    found[viewers] = _shares(before, _seconds(), cluster.addresses[0].port)
            return found


def _seconds() -> dict[psutil.Process, float]:
    """Processor seconds of the service's processes."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            found[process] = times.user + times.system
    return found


def _shares(
    before: dict[psutil.Process, float], after: dict[psutil.Process, float], port: int
) -> list[float]:
    spent = {
        process: (seconds - before.get(process, 0.0)) / MEASURE_S
        for process, seconds in after.items()
    }
    watched = [
        share
        for process, share in spent.items()
        if any(each.laddr.port == port for each in process.net_connections("tcp") if each.laddr)
        and KINDS["front end"] in process.cmdline()
    ]
    kinds = [
        max((share for process, share in spent.items() if module in process.cmdline()), default=0.0)
        for module in KINDS.values()
    ]
    return [max(watched, default=0.0), *kinds]


if __name__ == "__main__":
    sys.exit(main())
