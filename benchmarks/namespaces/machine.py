"""What a testbed needs of the machine: Linux, root, and a few programs."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

from dance_jax.config import UserError

#: Programs, and the Debian package of each.
PACKAGES = {
    "ip": "iproute2",
    "tc": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
    "taskset": "util-linux",
    "mount": "mount",
}
_POLICY = pathlib.Path("/usr/sbin/policy-rc.d")


def find(program: str) -> str | None:
    """Path of a program, also where the administrator's are not in PATH."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    return shutil.which(program, path=path)


def run(*command: str) -> str:
    """Runs a command and returns what it prints.

    Raises:
        UserError: it failed; the message is its own.
    """
    program = find(command[0]) or command[0]
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise UserError(f"`{' '.join(command)}` failed: {said}")
    return done.stdout


def check_root() -> None:
    """Raises UserError unless this is Linux and we are root."""
    if sys.platform != "linux":
        raise UserError(f"the testbed is made of Linux network namespaces; this is {sys.platform}")
    if os.geteuid() != 0:
        raise UserError("the testbed makes network namespaces, which takes root: use sudo")


def install_missing() -> None:
    """Installs the programs that are missing.

    Raises:
        UserError: there is no apt-get, or it failed.
    """
    packages = sorted({PACKAGES[program] for program in PACKAGES if not find(program)})
    if not packages:
        return
    if find("apt-get") is None:
        raise UserError(
            f"these packages are needed (by their Debian names) and apt-get is not here to "
            f"install them: {', '.join(packages)}"
        )
    print(f"installing {', '.join(packages)}", flush=True)
    with _no_services():
        run("apt-get", "-q", "update")
        quiet = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"]
        run(*quiet, "install", "--no-install-recommends", *packages)


@contextlib.contextmanager
def _no_services() -> Iterator[None]:
    """Within, installing a service does not start it: this machine gets no ssh server by us."""
    if find("sshd") is None and find("systemctl"):
        run("systemctl", "mask", "ssh.service", "ssh.socket")
        print("the system's own ssh server stays off: systemctl unmask ssh.service allows it")
    try:
        policy = _POLICY.open("x")
    except FileExistsError:  # the machine has its own
        yield
        return
    try:
        with policy:
            policy.write("#!/bin/sh\nexit 101\n")
        _POLICY.chmod(0o755)
        yield
    finally:
        _POLICY.unlink()
