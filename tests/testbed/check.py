"""Bring a testbed up, answer the example prompts on it, and take it down: `make testbed`.

    python -m tests.testbed.check [--rate 100Mbps]    # as root, on Linux

The testbed is named after this process. Testbeds that killed checks left behind are removed first.
The check is not part of pytest, because it needs root and may install sshd. It prints every check
and ends with exit code 1 if a check fails, or 2 if the machine cannot run a testbed.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import subprocess
import sys

from benchmarks.namespaces import HEAD, Host, Testbed, down, leftovers, parse_rate, remains
from benchmarks.namespaces.cores import QUOTA
from dance_jax.config import UserError
from tests.checks import Checks
from tests.launch.launched import eventually

COMMAND = [sys.executable, "benchmarks/testbed.py"]
#: Named after the process, so that other testbeds, also of other checks, are not touched.
NAME = f"check{os.getpid()}"
#: Minimum bytes that the example prompts send and receive per host; the start-up has far fewer.
LEAST_BYTES = 1_000_000

_RECEIVE = """
import socket, time
server = socket.create_server(("", 5000))
print("ready", flush=True)
peer, _ = server.accept()
began, count = time.monotonic(), 0
while received := peer.recv(1 << 16):
    count += len(received)
print(8 * count / (time.monotonic() - began))
"""
_SEND = """
import socket, sys
socket.create_connection((sys.argv[1], 5000)).sendall(bytes(int(sys.argv[2])))
"""
_CONNECT = """
import socket, sys, time
trips = []
for _ in range(5):
    began = time.monotonic()
    socket.create_connection((sys.argv[1], 22)).close()
    trips.append(time.monotonic() - began)
print(min(trips))
"""
_BURN = """
import time
end = time.monotonic() + 1.5
while time.monotonic() < end:
    pass
print(time.process_time() / 1.5)
"""


def forsaken() -> list[str]:
    """Return the names of testbeds that earlier checks left, whose processes no longer run."""
    names = sorted(path.name for path in leftovers.STATE.glob("check*"))
    pids = {name: int(name[5:]) for name in names if re.fullmatch("check[0-9]+", name)}
    return [name for name, pid in pids.items() if not _checks(pid)]


def _checks(pid: int) -> bool:
    """Return whether a process runs this command and is not this process (pids are reused)."""
    try:
        line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"tests.testbed.check" in line.split(b"\0") and pid != os.getpid()


def output(bed: Testbed, host: str, *argv: str) -> str:
    """Run a command on a host and return its output."""
    process = bed.exec(host, argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    return process.communicate()[0].strip()


def throughput(bed: Testbed, source: str, target: str, size: int) -> float:
    """Measure the bits per second of one connection that sends `size` bytes."""
    receive = [sys.executable, "-c", _RECEIVE]
    receiver = bed.exec(target, receive, stdout=subprocess.PIPE, text=True)
    assert receiver.stdout is not None
    receiver.stdout.readline()
    output(bed, source, sys.executable, "-c", _SEND, target, str(size))
    return float(receiver.communicate()[0])


def root_links() -> list[str]:
    """Return the network interfaces of this machine itself."""
    return sorted(path.name for path in pathlib.Path("/sys/class/net").iterdir())


def inhabitants(namespaces: set[int]) -> list[str]:
    """Return the processes whose network namespace has one of these inodes."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if (process / "ns/net").stat().st_ino in namespaces:
                found.append(process.name)
        except OSError:  # the process has just ended
            continue
    return found


def check_hosts(checks: Checks, bed: Testbed, rate: int | None) -> None:
    """Check names, logins, isolation, rates and shares of cores."""
    ssh = ["ssh", "-F", str(bed.ssh_config)]
    for host in bed.hosts:
        name = output(bed, HEAD, *ssh, f"root@{host}", "--", "hostname")
        checks.check(name == host, f"{host} reports its own name over ssh")
    known = output(bed, "alpha", "getent", "hosts", "alpha", "beta").split()
    expected = [word for name in ("alpha", "beta") for word in (bed.hosts[name].address, name)]
    checks.check(known == expected, "a host resolves its own name and those of other hosts")
    routes = output(bed, HEAD, "ip", "route")
    checks.check("default" not in routes, "the testbed has no route to the outside")
    if rate is not None:
        measured = throughput(bed, "alpha", "beta", rate // 8)
        text = f"a link of {rate / 1e6:.0f} Mbit/s carries {measured / 1e6:.0f} from alpha to beta"
        checks.check(0.75 * rate < measured < 1.05 * rate, text)
    if bed.cores == QUOTA:
        share = bed.hosts["alpha"].share
        used = float(output(bed, "alpha", sys.executable, "-c", _BURN))
        assert isinstance(share, float)
        checks.check(
            used < 1.15 * min(share, 1), f"alpha may use {share:.2f} cores and uses {used:.2f}"
        )


def check_run(checks: Checks, bed: Testbed, options: list[str]) -> None:
    """Check that a launch answers prompts over the links and leaves no process."""
    idle, run = set(bed.processes()), [*COMMAND, "run", "--name", NAME]
    code = subprocess.run([*run, "--preflight"]).returncode
    checks.check(code == 0, f"the preflight, which measures the links, ends with exit code {code}")
    before = bed.counters()
    # Without measuring the links again, so that only the prompts' bytes count.
    code = subprocess.run([*run, "--bandwidth", "link", *options]).returncode
    checks.check(code == 0, f"the example prompts end with exit code {code}")
    for host, counts in bed.counters().items():
        received, sent = (now - then for now, then in zip(counts, before[host], strict=True))
        text = f"{host} received {received:,} and sent {sent:,} bytes"
        checks.check(min(received, sent) > LEAST_BYTES, text)
    left = [line for pid, line in bed.processes().items() if pid not in idle]
    checks.check(not left, f"no process is left on the hosts {left or ''}")


def check_down(checks: Checks, bed: Testbed, links: list[str]) -> None:
    """Check that `down` leaves nothing behind and does not change this machine."""
    spaces = {path.stat().st_ino for path in pathlib.Path("/run/netns").glob(f"dance-{NAME}.*")}
    checks.check(len(inhabitants(spaces)) >= len(bed.hosts), "the hosts have processes")
    # A process that ignores SIGTERM, SIGINT and SIGHUP.
    stubborn = ["sh", "-c", "trap '' TERM INT HUP; sleep 600 & wait"]
    process = bed.exec("alpha", stubborn, start_new_session=True)
    code = subprocess.run([*COMMAND, "down", "--name", NAME]).returncode
    process.wait()
    checks.check(code == 0, f"down ends with exit code {code}")
    checks.check(not (left := remains(NAME)), f"nothing is left {left or ''}")
    eventually(lambda: not inhabitants(spaces), 5)  # until killed processes are reaped
    checks.check(not (alive := inhabitants(spaces)), f"no process is left {alive or ''}")
    checks.check(root_links() == links, f"this machine's interfaces are {', '.join(links)}")


def check_distance(checks: Checks, hosts: list[Host]) -> None:
    """Check the round trip of a testbed with --round-trip."""
    seconds = 0.02
    bed = Testbed.up(NAME, hosts, cores="none", round_trip=seconds)
    measured = float(output(bed, "alpha", sys.executable, "-c", _CONNECT, "beta"))
    text = f"round trip from alpha to beta {measured * 1e3:.1f} ms, with {seconds * 1e3:g} ms added"
    checks.check(seconds < measured < 1.5 * seconds, text)
    down(NAME)
    checks.check(not (left := remains(NAME)), f"nothing is left {left or ''}")


def main() -> int:
    """Run all checks and return the exit code."""
    parser = argparse.ArgumentParser(
        description="Checks the testbed. Other options are passed to dance_jax.launch."
    )
    parser.add_argument("--rate", default="100Mbps", help="rate of the links (%(default)s)")
    options, launch_options = parser.parse_known_args()
    rate, links, checks = parse_rate(options.rate), root_links(), Checks()
    try:
        for name in forsaken():
            print(f"removing testbed {name}, whose check was killed", flush=True)
            down(name)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    up = [*COMMAND, "up", "--name", NAME, "--rate", options.rate]
    if code := subprocess.run(up).returncode:
        print("the testbed cannot be checked on this machine; `TESTBED=no .ci/run` skips it")
        return code
    try:
        again = subprocess.run(up, capture_output=True, text=True)
        checks.check(
            again.returncode == 2 and "is up already" in again.stderr, "a second `up` fails"
        )
        bed = Testbed.load(NAME)
        check_hosts(checks, bed, rate)
        check_run(checks, bed, launch_options)
        check_down(checks, bed, links)
        check_distance(checks, list(bed.hosts.values())[:2])
    finally:
        down(NAME)
    print(f"{checks.passed} passed, {checks.failed} failed")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
