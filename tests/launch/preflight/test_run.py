"""Preflights with real processes, on this machine and through a fake ssh."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dance_jax.config import ClusterSpec, UserError
from dance_jax.launch.agent.network import Network
from dance_jax.launch.agent.process import MARK
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.launch.preflight import probe
from dance_jax.launch.preflight import run as preflight
from dance_jax.launch.preflight.asker import ProbeAsker, Unreachable, explanation
from dance_jax.launch.preflight.messages import AskClock
from dance_jax.launch.preflight.report import format_rate
from tests.launch.fake_ssh import FakeSsh
from tests.launch.launched import eventually, gone
from tests.launch.preflight.helpers import LOCAL, run, text
from tests.launch.tiny import write_model


@pytest.fixture
def ssh(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> FakeSsh:
    fake = FakeSsh(tmp_path / "ssh")
    monkeypatch.setenv("PATH", fake.path)
    return fake


@pytest.fixture
def no_children() -> Callable[[], bool]:
    """Whether every process that the test started is gone; other tests' servers may run."""
    before = set(psutil.Process().children(recursive=True))

    def look() -> bool:
        started = set(psutil.Process().children(recursive=True)) - before
        _, alive = psutil.wait_procs(started, timeout=5)
        return not alive

    return look


# Servers of this machine.


def test_three_servers_here(no_children: Callable[[], bool]) -> None:
    found = run(LOCAL)
    found.check()
    assert not found.findings
    assert found.coordinator_port > 0 and found.client_addresses == (None, None, None)
    assert set(found.links) == set(itertools.permutations(range(3), 2))
    for one, other in itertools.combinations(range(3), 2):
        trip = found.rtt(one, other)
        assert trip and 0 < trip < 1 and trip == found.rtt(other, one)
        assert found.rate(one, other) is None
    assert all(server.round_trip is not None for server in found.spec.servers)
    servers = (
        dataclasses.replace(each, round_trip=None, read_rate=None) for each in found.spec.servers
    )
    assert ClusterSpec(tuple(servers)) == parse_hosts(LOCAL)
    shown = text(found)
    assert "all servers can work together" in shown and "127.0.0.3" in shown
    assert all(len(line) <= 120 for line in shown.splitlines())
    assert no_children()


def test_rates_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dance_jax.launch.preflight.link_pairs.LONGEST_RATE_S", 0.1)
    monkeypatch.setattr("dance_jax.launch.preflight.link_pairs.SHORTEST_RATE_S", 0.1)
    hosts = LOCAL.replace("experts=5\n", "experts=5 bandwidth=auto\n", 1)
    found = run(hosts)
    alpha, beta, gamma = found.spec.servers
    assert alpha.bandwidth and alpha.bandwidth > 1e6
    assert beta.bandwidth is gamma.bandwidth is None
    assert found.rate(0, 1) and found.rate(1, 0) and found.rate(1, 2) is None
    assert format_rate(alpha.bandwidth) in text(found)
    given = hosts.replace("bandwidth=auto", "bandwidth=3Mbps")
    everything = run(given, measure_all=True)
    assert all(everything.rate(*pair) for pair in itertools.permutations(range(3), 2))
    assert everything.spec.servers[0].bandwidth == 3e6  # the hosts file takes precedence


def test_rates_that_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dance_jax.launch.preflight.link_pairs.RATES_DEADLINE_S", -1.0)
    found = run(LOCAL.replace("experts=5\n", "experts=5 bandwidth=auto\n", 1))
    assert not found.errors and found.spec.servers[0].bandwidth is None
    one, links = (finding.message for finding in found.findings)
    assert "alpha has bandwidth=auto, but no time was left" in one
    assert "the rates of 2 links were not measured" in links


def test_servers_at_one_address_have_no_link() -> None:
    hosts = "a address=localhost experts=1 bandwidth=auto\nb address=localhost experts=1"
    found = run(hosts, measure_all=True)
    found.check()
    assert not found.links and found.spec.servers[0].bandwidth is None
    (only,) = found.findings
    assert not only.error and "bandwidth=auto" in only.message


def test_ports_that_are_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = run(LOCAL, network=Network(coordinator_port=port))
        with pytest.raises(UserError, match=rf"on alpha, port {port} of 127.0.0.1 cannot be used"):
            found.check()
        assert f"! {port}" in text(found)
    assert run(LOCAL, network=Network(coordinator_port=port)).coordinator_port == port


def test_models_that_are_missing_or_different(tmp_path: pathlib.Path) -> None:
    model, other = write_model(tmp_path / "one"), write_model(tmp_path / "two", seed=1)
    (other / "generation_config.json").write_text('{"eos_token_id": 7}')
    spec = parse_hosts(LOCAL)
    alpha, beta, gamma = spec.servers
    spec = ClusterSpec(
        (
            alpha,
            dataclasses.replace(beta, model=str(tmp_path / "nowhere")),
            dataclasses.replace(gamma, model=str(other)),
        )
    )
    found = run(spec, model=model)
    assert len(found.errors) == 2
    assert "on beta" in found.errors[0] and "the directory does not exist" in found.errors[0]
    assert "on gamma" in found.errors[1] and "a different model" in found.errors[1]


def test_a_server_without_the_model(tmp_path: pathlib.Path) -> None:
    """The preflight does not look there for the model, nor for a place to convert it."""
    hosts = LOCAL.replace("address=127.0.0.3", "address=127.0.0.3 checkpoint=peer")
    found = run(hosts, model=tmp_path / "nowhere")
    assert [error.partition(",")[0] for error in found.errors] == ["on alpha", "on beta"]
    machine = found.surveys[2].machine
    assert machine is not None and machine.model.path == ""
    row = next(line for line in text(found).splitlines() if line.startswith("│ gamma"))
    assert "from peers" in row and "!" not in row


def test_too_little_memory_for_all_servers_of_a_machine() -> None:
    total = probe.memory_free() or 0
    need = total // 3
    run(LOCAL, needs=[need // 2] * 3).check()
    found = run(LOCAL, needs=[need] * 3)  # gamma has two devices
    assert [finding.server for finding in found.findings] == ["alpha", "beta", "gamma"]
    assert all("the machine of alpha and beta and gamma" in error for error in found.errors)


def test_a_python_that_is_missing_here() -> None:
    found = run("a address=127.0.0.1 experts=1 python=/nowhere/python")
    assert "/nowhere/python cannot be started: no such file" in found.errors[0]
    assert found.coordinator_port == 0


# Through ssh.

FAR = """\
alpha address=127.0.0.1 ssh=alpha experts=5
beta address=127.0.0.2 ssh=me@beta:2222 experts=5
"""


def test_through_ssh(ssh: FakeSsh) -> None:
    ssh.host(
        "beta",
        f"""\
        echo "Welcome to beta! It's a 'fine' machine."
        exec env -i PATH="$PATH" HOME="{ssh.folder}" sh -c "$*"
        """,
    )
    found = run(FAR, network=Network(ssh_config=pathlib.Path("/some where/config")))
    found.check()
    assert not found.findings
    assert found.client_addresses == ("10.9.8.7", None)
    assert all(not psutil.pid_exists(pid) for pid in ssh.pids)


@pytest.mark.parametrize(
    ("said", "status", "meaning"),
    [
        ("me@beta: Permission denied (publickey).", 255, "ssh-copy-id"),
        ("Host key verification failed.", 255, "accept it"),
        ("ssh: Could not resolve hostname beta: Name or service not known", 255, "correct ssh="),
        ("ssh: connect to host beta port 2222: Connection refused", 255, "no ssh server listens"),
        ("ssh: connect to host beta port 2222: Connection timed out", 255, "does not answer"),
        ("ssh: connect to host beta port 2222: No route to host", 255, "no route to the host"),
        ("something new", 255, "ssh failed (something new)"),
        ("sh: 1: /opt/python: not found", 127, "python="),
        ("ImportError: libssl.so.3", 1, "libssl.so.3"),
    ],
)
def test_ssh_that_fails(ssh: FakeSsh, said: str, status: int, meaning: str) -> None:
    ssh.host("beta", f"echo '@@@ warning @@@' >&2; echo '{said}' >&2; exit {status}")
    found = run(FAR)
    (error,) = found.errors
    assert meaning in error and "ssh me@beta:2222" in error
    if status == 255:
        assert "ssh -o BatchMode=yes -p 2222 me@beta true" in error
    assert "! no" in text(found) and found.client_addresses == ("10.9.8.7", None)


def test_a_host_that_hangs(
    ssh: FakeSsh, monkeypatch: pytest.MonkeyPatch, no_children: Callable[[], bool]
) -> None:
    """With one host only, because a second host would have to answer within the short timeout."""
    monkeypatch.setattr(preflight, "FIRST_TIMEOUT_S", 1.0)
    ssh.host("beta", "sleep 600")
    (error,) = run(FAR.splitlines()[1]).errors
    assert "no answer within 1 s" in error and "ssh -o BatchMode=yes" in error
    assert all(not psutil.pid_exists(pid) for pid in ssh.pids)
    assert no_children()


def test_pythons_that_are_not_right(ssh: FakeSsh) -> None:
    bare = ssh.python("bare", "-S")
    hosts = FAR.replace("ssh=alpha", "ssh=alpha python=/no/such/python")
    found = run(hosts.replace("2222", f"2222 python={bare}"))
    missing, lacking = found.errors
    assert "/no/such/python cannot be run" in missing
    assert f"{bare} has no dance_jax; install the same version there" in lacking


def test_no_ssh_here(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "ssh cannot be started: no such file" in run(FAR).errors[0]


def test_quoting_of_paths(ssh: FakeSsh, tmp_path: pathlib.Path) -> None:
    odd = tmp_path / 'it\'s $HOME; "x" `y` *'
    odd.mkdir()
    (odd / "python").symlink_to(ssh.python("plain"))
    spec = parse_hosts(FAR)
    servers = [dataclasses.replace(each, python=str(odd / "python")) for each in spec.servers]
    run(ClusterSpec(tuple(servers))).check()


SCRIPT = """\
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.launch.preflight.run import run_preflight
run_preflight(parse_hosts(sys.argv[1]), model=None, fingerprint="", cache_dir=None,
              needs=[1, 1])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_leaves_nothing(ssh: FakeSsh, number: signal.Signals) -> None:
    """Even if one host hangs and another has answered."""
    said = ssh.folder / "said"
    said.touch()
    ssh.host("alpha", f'sh -c "$*" | tee {said}')
    ssh.host("beta", "cat; exit 1")  # until its input ends
    launch = subprocess.Popen([sys.executable, "-c", SCRIPT, FAR], stderr=subprocess.PIPE)
    assert eventually(lambda: said.read_bytes() and len(ssh.pids) == 2)
    started = [psutil.Process(launch.pid), *psutil.Process(launch.pid).children(recursive=True)]
    assert len(started) >= 3
    launch.send_signal(number)
    launch.communicate(timeout=10)
    assert gone(started, 5)


def test_an_asker_that_was_late_is_not_asked_again(ssh: FakeSsh) -> None:
    ssh.host("alpha", "sleep 600")
    asking = ProbeAsker(0, parse_hosts(FAR).servers[0], Network())
    try:
        for _ in range(2):
            with pytest.raises(Unreachable, match="no answer within 0 s"):
                asking.ask(AskClock(), 0.2)
    finally:
        asking.close()


def test_an_answer_of_another_version(ssh: FakeSsh) -> None:
    answer = MARK.decode() + json.dumps({"type": "Other"})
    ssh.host("alpha", f"echo '{answer}'; cat")
    asking = ProbeAsker(0, parse_hosts(FAR).servers[0], Network())
    try:
        with pytest.raises(Unreachable, match="another version"):
            asking.ask(AskClock(), 5)
    finally:
        asking.close()


@given(said=st.text(), status=st.one_of(st.none(), st.integers(-15, 255)))
def test_every_end_has_an_explanation(said: str, status: int | None) -> None:
    for server in parse_hosts(
        LOCAL + "far experts=1".replace("far", "far address=127.0.0.9 ssh=x")
    ).servers[2:]:
        message = explanation(server, status, said)
        assert message and message.isprintable()
