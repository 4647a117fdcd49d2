"""A cluster that is started for a run ends with the run."""

from __future__ import annotations

import pathlib

import psutil
import pytest

from dance_jax.bench import cluster
from dance_jax.bench.cluster import RunError
from dance_jax.config import UserError
from dance_jax.launch.planning.hosts import parse_hosts, read_hosts
from tests.bench.fake_cluster import HOSTS, ROOT, children, replace_launcher


@pytest.mark.parametrize("ending", [RunError("x"), KeyboardInterrupt(), SystemExit(143)])
def test_a_cluster_ends_however_the_run_ends(
    ending: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_launcher(monkeypatch, 2)
    with (
        pytest.raises(type(ending)),
        cluster.started(parse_hosts(HOSTS), [], root=ROOT) as started,
    ):
        assert psutil.pid_exists(started.pid) and len(started.addresses) == 2
        raise ending
    assert not psutil.pid_exists(started.pid) and children() == []


def test_servers_of_other_machines_are_not_started(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "hosts.txt"
    path.write_text("alpha address=192.0.2.1 experts=4\n")
    with (
        pytest.raises(UserError, match="alpha: on another machine"),
        cluster.started(read_hosts(path), []),
    ):
        pass
