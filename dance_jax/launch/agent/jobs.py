"""Clusters with a launcher of their own: which process of a Slurm or Open MPI job this one is."""

from __future__ import annotations

import dataclasses
import os

from dance_jax.config import ClusterSpec, UserError

_SIGNS = ("SLURM_", "OMPI_")


@dataclasses.dataclass(frozen=True)
class Job:
    """What jax's own detection finds."""

    #: "slurm" or "ompi".
    launcher: str
    #: This process's number among the job's.
    rank: int
    size: int
    #: host:port where the first process coordinates jax.distributed.
    coordinator: str

    @property
    def host(self) -> str:
        """Where the first process is."""
        return self.coordinator.rpartition(":")[0]


def detected_job() -> Job | None:
    """The job of several processes that this one belongs to; None: it belongs to none."""
    if not any(name.startswith(_SIGNS) for name in os.environ):
        return None
    from jax._src.clusters import OmpiCluster, SlurmCluster

    for kind in (SlurmCluster, OmpiCluster):
        if kind.is_env_present() and kind.get_process_count() > 1:
            port = os.environ.get("JAX_COORDINATOR_PORT")
            return Job(
                kind.name,
                kind.get_process_id(),
                kind.get_process_count(),
                kind.get_coordinator_address(None, port),
            )
    return None


def check_job(job: Job, spec: ClusterSpec) -> None:
    """The job has one process per server.

    Raises:
        UserError: it has more or fewer.
    """
    if job.size != len(spec.servers):
        raise UserError(
            f"the {job.launcher} job has {job.size} processes and the hosts file has "
            f"{len(spec.servers)} servers: start one process per server, in the file's order"
        )
