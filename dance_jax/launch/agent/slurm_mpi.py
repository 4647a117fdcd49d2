"""Detect Slurm and Open MPI jobs, and this process's rank in the job."""

from __future__ import annotations

import dataclasses
import os

from dance_jax.config import ClusterSpec, UserError

_PREFIXES = ("SLURM_", "OMPI_")


@dataclasses.dataclass(frozen=True)
class Job:
    """A job, as JAX detects it."""

    #: "slurm" or "ompi".
    scheduler: str
    #: Rank of this process in the job.
    rank: int
    #: Number of its processes.
    size: int
    #: host:port at which the first process coordinates jax.distributed.
    coordinator: str

    @property
    def host(self) -> str:
        """Host of the first process."""
        return self.coordinator.rpartition(":")[0]


def detected_job() -> Job | None:
    """The multi-process job that this process belongs to; None if there is none."""
    if not any(name.startswith(_PREFIXES) for name in os.environ):
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
    """Check that the job has one process per server.

    Raises:
        UserError: the job has more or fewer processes.
    """
    if job.size != len(spec.servers):
        raise UserError(
            f"the {job.scheduler} job has {job.size} processes, but the hosts file has "
            f"{len(spec.servers)} servers: start one process per server, in the file's order"
        )
