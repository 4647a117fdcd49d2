"""Where the servers of a run are: processes here, or hosts of a testbed."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import subprocess
from collections.abc import Iterator, Sequence

from benchmarks.namespaces import Testbed
from benchmarks.serving.cluster import LAUNCHER, ROOT, Cluster, ClusterError, started
from benchmarks.serving.http import Address
from dance_jax.config import ClusterSpec
from dance_jax.launch.planning.hosts import read_hosts


@dataclasses.dataclass(frozen=True)
class Place:
    """Attributes:
    hosts: a hosts file whose servers are all on this machine, for what is not measured.
    bed: the testbed; None: servers run where `hosts` says.
    root: of the checkout that serves.
    port: of servers of a testbed, each of which has an address of its own.
    """

    hosts: pathlib.Path
    bed: Testbed | None = None
    root: pathlib.Path = ROOT
    port: int = 8100

    @property
    def spec(self) -> ClusterSpec:
        return read_hosts(self.hosts)

    @contextlib.contextmanager
    def serving(self, arguments: Sequence[str]) -> Iterator[Cluster]:
        """A service with these arguments of the launcher; it ends with the block."""
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
        """Bytes sent through each host's interface so far; none where there are no interfaces."""
        return [] if self.bed is None else [sent for _, sent in self.bed.counters().values()]


def count_activations(
    hosts: pathlib.Path,
    prompts: pathlib.Path,
    result: pathlib.Path,
    tokens: int,
    arguments: Sequence[str],
) -> None:
    """Runs prompts as a batch on this machine, and keeps which experts they used.

    Raises:
        ClusterError: the batch failed.
    """
    words = ["--hosts", str(hosts), "--prompts", str(prompts), "--max-tokens", str(tokens)]
    words += ["--save-activations", str(result), "--policy", "uniform"]
    words += ["--output", str(result.with_suffix(".answers.jsonl")), *arguments]
    run = subprocess.run(
        [*LAUNCHER, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if run.returncode:
        raise ClusterError(f"activations cannot be counted:\n{(run.stdout + run.stderr)[-3000:]}")
