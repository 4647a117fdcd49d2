"""Requirements of a testbed on the machine: Linux, root, and a few programs."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator

from dance_jax.config import UserError

#: Debian package of each program.
PACKAGES = {
    "ip": "iproute2",
    "tc": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
    "taskset": "util-linux",
    "mount": "mount",
    "nft": "nftables",
    "haproxy": "haproxy",
    "chromium": "chromium",
}
#: Programs that only some checks need.
_OTHERS = ("nft", "haproxy", "chromium")
#: Programs that every testbed needs.
NEEDED = tuple(program for program in PACKAGES if program not in _OTHERS)
_POLICY = pathlib.Path("/usr/sbin/policy-rc.d")


def find(program: str) -> str | None:
    """Return the path of a program; look in /usr/sbin and /sbin too, which PATH may lack."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    return shutil.which(program, path=path)


def run(*command: str) -> str:
    """Run a command and return its standard output.

    Raises:
        UserError: the command failed; has the command's own message.
    """
    program = find(command[0]) or command[0]
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise UserError(f"`{' '.join(command)}` failed: {reason}")
    return done.stdout


def check_root() -> None:
    """Raise UserError unless this process runs as root on Linux."""
    if sys.platform != "linux":
        raise UserError(f"the testbed needs Linux network namespaces; this is {sys.platform}")
    if os.geteuid() != 0:
        raise UserError("the testbed creates network namespaces, which takes root: use sudo")


def install_missing(programs: Iterable[str] = NEEDED) -> None:
    """Install those of these programs that are missing, with apt-get.

    Raises:
        UserError: the machine has no apt-get, or apt-get failed.
    """
    packages = sorted({PACKAGES[program] for program in programs if not find(program)})
    if not packages:
        return
    if find("apt-get") is None:
        raise UserError(
            f"packages are missing (Debian names), and this machine has no apt-get: "
            f"install {', '.join(packages)}"
        )
    print(f"installing {', '.join(packages)}", flush=True)
    with _no_services():
        run("apt-get", "-q", "update")
        quiet = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"]
        run(*quiet, "install", "--no-install-recommends", *packages)


@contextlib.contextmanager
def _no_services() -> Iterator[None]:
    """Keep apt-get from starting services, an ssh server above all, for the block."""
    if find("sshd") is None and find("systemctl"):
        run("systemctl", "mask", "ssh.service", "ssh.socket")
        print(
            "masked this machine's own ssh server so that it does not start; to allow it: "
            "systemctl unmask ssh.service ssh.socket"
        )
    try:
        policy = _POLICY.open("x")
    except FileExistsError:  # the machine has its own policy
        yield
        return
    try:
        with policy:
            policy.write("#!/bin/sh\nexit 101\n")
        _POLICY.chmod(0o755)
        yield
    finally:
        _POLICY.unlink()
