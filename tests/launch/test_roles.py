"""Which part of a launch this process is: from options, Slurm, Open MPI, and the key."""

from __future__ import annotations

import pathlib

import pytest

from dance_jax.config import UserError
from dance_jax.launch.agent.network import Network
from dance_jax.launch.agent.role import KEY_VARIABLE, NODE_PORT, read_key, role
from dance_jax.launch.planning.hosts import parse_hosts

SPEC = parse_hosts("a address=10.0.0.1 experts=1\nb address=10.0.0.2 experts=1")
KEY = "0123456789abcdef0123456789abcdef"
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "edge[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SLURM, *OPEN_MPI, KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_alone_it_launches_over_ssh() -> None:
    part = role(SPEC, Network(), None, None)
    assert (part.node_rank, part.network) == (None, Network())
    with part.gathered(SPEC, lambda name, text: None) as network:
        assert network is part.network


def test_a_node_runs_its_server_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    part = role(SPEC, Network(), 1, None)
    assert part.node_rank == 1 and part.endpoint == f"tcp://10.0.0.1:{NODE_PORT}"
    assert part.network.key == read_key(None)
    chosen = Network(control_addresses=("10.9.9.9",), control_port=5)
    assert role(SPEC, chosen, 1, None).endpoint == "tcp://10.9.9.9:5"
    with pytest.raises(UserError, match="--node-rank 2: the hosts file has 2 servers"):
        role(SPEC, Network(), 2, None)


@pytest.mark.parametrize(
    ("job", "host"), [(SLURM, "edge3"), (OPEN_MPI, "10.96.0.1")], ids=["slurm", "ompi"]
)
def test_jobs_are_detected(job: dict, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**job, KEY_VARIABLE: KEY}.items():
        monkeypatch.setenv(name, value)
    part = role(SPEC, Network(), None, None)
    assert part.node_rank == 1 and part.endpoint == f"tcp://{host}:{NODE_PORT}"
    assert part.network.coordinator is not None
    assert part.network.coordinator.startswith(f"{host}:")
    assert role(SPEC, Network(), 0, None).node_rank == 0, "an option overrides the job"
    three = parse_hosts("\n".join(f"{n} address=10.0.0.1 experts=1" for n in "abc"))
    with pytest.raises(UserError, match="job has 2 processes, but the hosts file has 3 servers"):
        role(three, Network(), None, None)


def test_a_job_of_one_process_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert role(SPEC, Network(), None, None).node_rank is None


def test_keys(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    with pytest.raises(UserError, match="other users can read the file; run chmod 600"):
        read_key(file)
    file.chmod(0o600)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert read_key(file) == read_key(None) and len(read_key(file)) == 32
    file.write_text("short")
    with pytest.raises(UserError, match="too short"):
        read_key(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_key(tmp_path / "none")
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(UserError, match=f"{KEY_VARIABLE}: the key is missing"):
        read_key(None)
    with pytest.raises(UserError, match="--key-file applies to --node-rank"):
        role(SPEC, Network(), None, file)
