"""Tests of the parts of benchmarks/testbed.py that need no root; check.py has the others."""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from benchmarks.namespaces import bed, cores, hosts, leftovers, machine
from benchmarks.testbed import main, parser
from dance_jax.config import UserError
from dance_jax.launch.planning.hosts import parse_hosts
from tests.testbed.check import forsaken

ROOT = pathlib.Path(__file__).parents[2]
TEMPLATE = (ROOT / "examples/hosts.txt").read_text()


@pytest.fixture
def state(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Redirect all paths that a testbed uses to the test's directory."""
    for place in ("STATE", "NAMESPACES", "OVER_ETC"):
        directory = tmp_path / place.lower()
        directory.mkdir()
        monkeypatch.setattr(leftovers, place, directory)
    monkeypatch.setattr(leftovers, "cpu_controller", lambda: None)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("500Mbps", 500_000_000),
        ("500Mbit", 500_000_000),
        ("500mbit", 500_000_000),
        ("1.5Gbps", 1_500_000_000),
        ("250kbps", 250_000),
        ("none", None),
    ],
)
def test_rates(text: str, rate: int | None) -> None:
    assert hosts.parse_rate(text) == rate


@pytest.mark.parametrize("text", ["500", "500MB", "0Mbps", "1bps", "-5Mbps", "", "fast"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="500Mbit is 500Mbps"):
        hosts.parse_rate(text)


def test_hosts_follow_the_template_and_repeat_it() -> None:
    found = hosts.hosts_like(TEMPLATE, 5)
    assert [host.name for host in found] == ["alpha", "beta", "gamma", "delta", "epsilon"]
    assert [host.devices for host in found] == [1, 1, 2, 1, 1]
    assert found[3].keys == found[0].keys
    assert len({host.address for host in found}) == 5
    assert len(hosts.hosts_like(TEMPLATE)) == 3
    most = hosts.hosts_like("delta experts=9", hosts.MAX_HOSTS)
    assert len({host.name for host in most}) == len({host.address for host in most}) == 31


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("# nothing", "no lines"),
        ("head experts=1", "cannot be a host"),
        ("a.b experts=1", "cannot be a host"),
        ("a experts=1\na experts=1", "two lines with the same name"),
        ("a devices=many", "whole number"),
    ],
)
def test_templates_that_cannot_be_hosts_are_refused(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hosts.hosts_like(template)


def test_shares_follow_the_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(cores.cores, "available", lambda: [0, 1])
    three = hosts.hosts_like(TEMPLATE)
    monkeypatch.setattr(cores, "cpu_controller", lambda: tmp_path)
    mode, shared = cores.share_cores(three, "quota")
    assert (mode, [host.share for host in shared]) == ("quota", [0.5, 0.5, 1.0])
    assert "4 devices on 2 cores" in cores.describe(shared, mode)
    assert "alpha 0.50, beta 0.50, gamma 1.00" in cores.describe(shared, mode)
    monkeypatch.setattr(cores, "cpu_controller", lambda: None)
    mode, shared = cores.share_cores(three, "quota")
    assert (mode, [host.share for host in shared]) == ("pin", [[0], [0], [1]])
    assert "alpha core 0, beta core 0, gamma core 1" in cores.describe(shared, mode)
    mode, shared = cores.share_cores(three, "none")
    assert (mode, [host.share for host in shared]) == ("none", [None] * 3)
    assert "not shared out" in cores.describe(shared, mode)


def test_the_controller_of_either_version_is_found(tmp_path: pathlib.Path) -> None:
    mounts = tmp_path / "mounts"
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    mounts.write_text(f"cgroup {one} cgroup rw,cpu,cpuacct 0 0\ncgroup2 {two} cgroup2 rw 0 0\n")
    (two / "cgroup.controllers").write_text("memory\n")
    assert cores.cpu_controller(str(mounts)) is None
    (two / "cgroup.controllers").write_text("memory cpu\n")
    (two / "cgroup.subtree_control").write_text("memory\n")
    assert cores.cpu_controller(str(mounts)) == two
    assert (two / "cgroup.subtree_control").read_text() == "+cpu"
    (one / "cpu.cfs_quota_us").write_text("-1\n")
    assert cores.cpu_controller(str(mounts)) == one


def test_the_written_hosts_file_is_one_that_launch_reads(state: pathlib.Path) -> None:
    named = hosts.hosts_like(TEMPLATE, 4)
    testbed = bed.Testbed("main", named, {host.name: None for host in named}, "none")
    testbed.state.mkdir()
    testbed.rates["beta"] = 12_500_000
    spec = parse_hosts(testbed.write_hosts(measure=False).read_text())
    assert spec.names == ("alpha", "beta", "gamma", "delta")
    assert [server.bandwidth for server in spec.servers] == [None, 12_500_000, None, None]
    assert [server.address for server in spec.servers] == list(spec.names)
    assert [server.python for server in spec.servers] == [sys.executable] * 4
    assert str(spec.servers[0].ssh) == "root@alpha:22"
    spec = parse_hosts(testbed.write_hosts().read_text())
    assert all(server.measure_bandwidth for server in spec.servers)


def test_the_shell_of_root_reads_no_start_up_files() -> None:
    text = "root:x:0:0:root:/root:/bin/bash\nsshd:x:106:65534::/run/sshd:/usr/sbin/nologin\n"
    assert bed._passwd(text) == text.replace("/bin/bash", "/bin/sh")


def test_down_removes_its_own_and_no_other(state: pathlib.Path) -> None:
    for name in ("one", "one2"):
        (leftovers.STATE / name).mkdir()
        (leftovers.STATE / name / "key").touch()
        (
            leftovers.NAMESPACES / f"dance-{name}.alpha"
        ).touch()  # as an interrupted creation leaves it: no namespace
        (leftovers.OVER_ETC / f"dance-{name}.alpha").mkdir()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    leftovers.down("one")
    assert leftovers.remains("one") == []
    assert len(leftovers.remains("one2")) == 3
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_killed_checks_left_is_found(state: pathlib.Path) -> None:
    """Neither a running check's testbed nor any other testbed counts as left behind."""
    other = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    running, ended, foreign = (
        subprocess.Popen([*other, *word], stdin=subprocess.PIPE)
        for word in (["tests.testbed.check"], ["tests.testbed.check"], [])
    )
    try:
        ended.kill()
        ended.wait()
        names = [f"check{process.pid}" for process in (running, ended, foreign)]
        for name in (*names, f"check{os.getpid()}", "check", "checkpoint1", "main"):
            (leftovers.STATE / name).mkdir()
        assert forsaken() == sorted([names[1], names[2], f"check{os.getpid()}"])
    finally:
        for process in (running, ended, foreign):
            process.kill()
            process.communicate()


@pytest.mark.parametrize("command", [["up"], ["down"], ["run"], ["exec", "alpha", "true"]])
def test_without_root_it_says_so(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(command) == 2
    assert "takes root" in capsys.readouterr().err


def test_missing_packages_are_named_where_apt_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find", lambda program: None)
    with pytest.raises(UserError, match="iproute2, mount, openssh-client, openssh-server"):
        machine.install_missing()


def test_a_command_that_fails_is_quoted() -> None:
    with pytest.raises(UserError, match="`sh -c echo no >&2; exit 3` failed: no"):
        machine.run("sh", "-c", "echo no >&2; exit 3")


def test_options_that_run_does_not_know_keep_their_order_for_launch() -> None:
    before, after = ["--policy", "uniform"], ["--max-tokens", "-3", "--dry-run", "--output=a.jsonl"]
    options, others = parser().parse_known_args(["run", *before, "--name", "x", *after])
    assert (options.name, options.bandwidth) == ("x", "auto")
    assert others == before + after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up", "--hosts", "32"], "from 1 to 31"),
        (["up", "--rate", "5"], "not a rate"),
        (["up", "--name", "a.b"], "letters and digits"),
        (["up", "--prompts", "x"], "unknown options: --prompts x"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    command = [sys.executable, "benchmarks/testbed.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert message in done.stderr
