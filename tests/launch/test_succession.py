"""What a launcher leaves to the next one; whole takeovers are in tests/serve/test_takeover.py."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from dance_jax.config import EngineConfig, ServeOptions, ServerSpec, UserError
from dance_jax.launch.agent.adopted import AdoptedProcess, runs
from dance_jax.launch.agent.child import END
from dance_jax.launch.cli.stop import stop
from dance_jax.launch.cluster import succession
from dance_jax.launch.cluster.succession import (
    FILE_NAME,
    FRONT_END,
    Handover,
    InUse,
    find_survivors,
    launcher_pid,
    load,
    sole_launcher,
)
from dance_jax.launch.control.channel import new_key
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.launch.rebalance.state import ServiceState
from dance_jax.launch.rebalance.workload import Statistics
from dance_jax.placement.core import Placement
from dance_jax.placement.devices import spread
from tests.launch.launched import eventually, free_ports
from tests.launch.tiny import HOSTS

#: A child that goes on without its parent.
CHILD = """
import types
from dance_jax.launch.agent import child
child.end_with_parent(types.SimpleNamespace(beats=False), outlives=True)
print("ready", flush=True)
import time
time.sleep(60)
"""


def handover(folder: pathlib.Path, **changes: object) -> Handover:
    """Of servers that do not run any more."""
    spec = parse_hosts(HOSTS)
    (folder / "private").mkdir()
    found = Handover(
        hosts=spec,
        spec=spec,
        config=EngineConfig(64, exchange="calls"),
        options=ServeOptions(),
        fingerprint="f00d",
        model="",
        key=new_key(),
        private_port=free_ports(1),
        control_addresses=(),
        control_port=0,
        ssh_config=None,
        private=str(folder / "private"),
        log_dir=None,
        pids=[None, None, None],
        ports={0: 8000, 1: 8001, 2: 8002},
    )
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_one_launcher_at_a_time_uses_a_directory(tmp_path: pathlib.Path) -> None:
    assert launcher_pid(tmp_path) is None
    with sole_launcher(tmp_path):
        assert launcher_pid(tmp_path) == os.getpid()
        in_use = pytest.raises(InUse, match=rf"another launcher \(process {os.getpid()}\)")
        with in_use, sole_launcher(tmp_path):
            pass
    assert launcher_pid(tmp_path) is None
    with sole_launcher(tmp_path):
        pass


def test_what_is_saved_is_read_by_its_owner_alone(tmp_path: pathlib.Path) -> None:
    assert load(tmp_path) is None
    saved = handover(tmp_path)
    saved.save(tmp_path)
    assert load(tmp_path) == saved
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o077 == 0
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        find_survivors(tmp_path)


def test_servers_that_are_gone_leave_nothing(tmp_path: pathlib.Path) -> None:
    """A process id may be another program's by now, which is left alone."""
    handover(tmp_path, pids=[os.getpid(), None, 1]).save(tmp_path)
    assert not runs(FRONT_END, os.getpid())
    began = time.monotonic()
    assert stop(tmp_path, now=True) == 0
    assert time.monotonic() - began < 4  # nobody is waited for
    assert not (tmp_path / FILE_NAME).exists() and not (tmp_path / "private").exists()


def test_a_launcher_on_another_machine_says_which_address_it_lacks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "PORT_S", 0.3)
    elsewhere = {"control_addresses": ("192.0.2.1",), "control_port": free_ports(1)}
    handover(tmp_path, **elsewhere).save(tmp_path)
    with pytest.raises(UserError, match=r"192\.0\.2\.1, port .* on the machine of the last"):
        find_survivors(tmp_path)


def test_what_differs_is_named(tmp_path: pathlib.Path) -> None:
    saved = handover(tmp_path)
    config = dataclasses.replace(saved.config, exchange="auto")
    assert saved.misfit(config, saved.options, "f00d") == ""
    assert saved.misfit(config, saved.options, "beef") == "another model"
    options = dataclasses.replace(saved.options, port=9000, api_key="k")
    config = dataclasses.replace(config, seed=5)
    assert saved.misfit(config, options, "f00d") == "another port, api_key, seed"


def test_a_process_that_ends_is_noticed() -> None:
    words = [sys.executable, "-c", "import sys; sys.stdin.read()", "dance_jax.serve.frontend"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        assert eventually(lambda: runs(FRONT_END, process.pid), 10)
        adopted = AdoptedProcess(
            ServerSpec("a", "localhost"), process.pid, pathlib.Path("/nothing"), None, FRONT_END
        )
        adopted.reached(False)
        assert adopted.ended is None
        process.kill()  # it stays as a zombie until this process looks

        def ended() -> bool:
            adopted.reached(True)
            return adopted.ended is not None

        assert eventually(ended, 10)
        assert adopted.fate() == "has ended"


@pytest.mark.parametrize("told", [False, True])
def test_a_child_that_outlives_its_parent_ends_only_when_told(told: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdin.write(b"\n" + (END + b"\n" if told else b""))
        process.stdin.close()
        if told:
            assert process.wait(10) == -9
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5)
            process.kill()


def test_a_state_is_kept_for_the_servers_that_have_a_seat() -> None:
    """In the order of the hosts file, whichever seats they have."""
    layout = spread(Placement(np.ones((3, 2, 4), bool)), [1, 2, 1], [9, 5, 8]).with_seats(5)
    counts = np.arange(5 * 2 * 4.0).reshape(5, 2, 4)
    routes = tuple(np.full((n, 2, 1), n, np.int16) for n in range(5))
    state = ServiceState(("a", "b", "c", "", ""), "f", layout, Statistics(counts, routes))
    found = state.of([2, 1])
    assert found.servers == ("c", "b")
    assert (found.layout.devices, found.layout.slots_per_device) == ((1, 2), (8, 5))
    np.testing.assert_array_equal(found.layout.slot_of, layout.slot_of[[2, 1]])
    np.testing.assert_array_equal(found.statistics.counts, counts[[2, 1]])
    assert [len(each) for each in found.statistics.routes] == [2, 1]
    again = found.statistics.with_seats(4)
    assert again.counts.shape == (4, 2, 4) and not again.counts[2:].any()
    assert [len(each) for each in again.routes] == [2, 1, 0, 0]


def test_a_seat_is_taken_and_left() -> None:
    layout = spread(Placement(np.ones((2, 2, 4), bool)), [1, 1], [9, 9]).with_seats(4)
    np.testing.assert_array_equal(layout.capacities, [8, 8, 0, 0])
    joined = layout.reseated(2, devices=2, slots=5)
    assert joined.capacities.tolist() == [8, 8, 8, 0]
    assert not joined.resident[2].any()
    left = joined.reseated(0, devices=1, slots=0)
    assert left.capacities.tolist() == [0, 8, 8, 0]
    assert left.resident[1].all() and not left.resident[0].any()
    assert left.same_experts(layout, 1) and not left.same_experts(layout, 0)
