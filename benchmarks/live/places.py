"""Places to run servers: processes on this machine, or the hosts of a testbed."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import subprocess
from collections.abc import Iterator, Sequence

from benchmarks.command import ROOT
from benchmarks.namespaces import Testbed
from dance_jax.bench.cluster import LAUNCHER, RunError, StartedCluster, started
from dance_jax.bench.http import Address
from dance_jax.config import ClusterSpec
from dance_jax.launch.planning.hosts import read_hosts


@dataclasses.dataclass(frozen=True)
class Place:
    """A place to run the servers of a measurement.

    Attributes:
        hosts: a hosts file whose servers are all on this machine, for runs that are not measured.
        bed: the testbed; if None, the servers run where `hosts` says.
        root: the checkout whose code serves.
        port: of all servers on a testbed, where each server has its own address.
    """

    hosts: pathlib.Path
    bed: Testbed | None = None
    root: pathlib.Path = ROOT
    port: int = 8100

    @property
    def spec(self) -> ClusterSpec:
        return read_hosts(self.hosts)

    @contextlib.contextmanager
    def serving(self, arguments: Sequence[str]) -> Iterator[StartedCluster]:
        """Run a service for the block, started by the launcher with these arguments."""
        if self.bed is None:
            words = ["--hosts", str(self.hosts), *arguments]
            with started(self.spec, words, root=self.root) as cluster:
                yield cluster
            return
        words = ["--hosts", str(self.bed.write_hosts(measure=False))]
        words += ["--ssh-config", str(self.bed.ssh_config), "--bind", "0.0.0.0", *arguments]
        addresses = [Address(host.address, self.port) for host in self.bed.hosts.values()]
        with started(self.spec, words, addresses, self.root) as cluster:
            yield cluster

    def sent(self) -> list[float]:
        """Return the bytes sent through each host's interface so far; empty without a testbed."""
        return [] if self.bed is None else [sent for _, sent in self.bed.counters().values()]


def count_activations(
    hosts: pathlib.Path,
    prompts: pathlib.Path,
    result: pathlib.Path,
    tokens: int,
    arguments: Sequence[str],
) -> None:
    """Run prompts as a batch on this machine and save which experts they activated.

    Args:
        hosts: the hosts file.
        prompts: the file of prompts.
        result: where the activations are written.
        tokens: maximum tokens per answer.
        arguments: further arguments of the launcher.

    Raises:
        RunError: the batch failed.
    """
    words = ["--hosts", str(hosts), "--prompts", str(prompts), "--max-tokens", str(tokens)]
    words += ["--save-activations", str(result), "--policy", "uniform"]
    words += ["--output", str(result.with_suffix(".answers.jsonl")), *arguments]
    run = subprocess.run(
        [*LAUNCHER, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if run.returncode:
        raise RunError(f"counting activations failed:\n{(run.stdout + run.stderr)[-3000:]}")
