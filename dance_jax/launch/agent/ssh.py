"""The command that runs something on a server's machine: over the system's ssh, or here."""

from __future__ import annotations

import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

from dance_jax.config import ServerSpec, SshTarget

#: Seconds until a host that does not answer counts as unreachable.
CONNECT_TIMEOUT_S = 10
#: An established connection is asked for a sign of life this often, and lost after so many missed.
ALIVE_INTERVAL_S, ALIVE_COUNT = 1, 4
#: ssh's own exit status: it could not connect, or the connection was lost.
SSH_FAILED = 255


def server_command(
    server: ServerSpec, module: str, ssh_config: pathlib.Path | None = None
) -> list[str]:
    """Arguments of a process that runs `python -m module` on the server's machine.

    Standard input and output are the module's. Its exit status is passed on; a signal that ended
    it there shows as 128 + its number.

    Args:
        server: here if it has no `ssh`.
        module: dotted name.
        ssh_config: file for `ssh -F`.
    """
    command = [server.python or sys.executable, "-m", module]
    if server.ssh is None:
        return command
    return [*_ssh(server.ssh, ssh_config), _quoted(command)]


def server_environment(server: ServerSpec) -> dict[str, str]:
    """Environment of that process here: this one's, and this copy of the package is found."""
    environment = dict(os.environ)
    if server.ssh is None:
        package_parent = str(pathlib.Path(__file__).resolve().parents[3])
        paths = [package_parent, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def _ssh(target: SshTarget, config: pathlib.Path | None) -> list[str]:
    options = {
        "BatchMode": "yes",  # never a question, which nobody would see
        "ConnectTimeout": CONNECT_TIMEOUT_S,
        "ServerAliveInterval": ALIVE_INTERVAL_S,
        "ServerAliveCountMax": ALIVE_COUNT,
        "RequestTTY": "no",
        "ClearAllForwardings": "yes",
        "ControlPath": "none",  # a shared connection would outlive its process
        "LogLevel": "ERROR",
    }
    command = ["ssh"]
    if config is not None:
        command += ["-F", str(config)]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    if target.user is not None:
        command += ["-l", target.user]
    if target.port is not None:
        command += ["-p", str(target.port)]
    return [*command, "--", target.host]


def _quoted(command: Sequence[str]) -> str:
    """One line for the login shell over there, which passes the words on as they are.

    A shell of ours stays in between: sshd reports an exit status only, and it turns a signal
    into one.
    """
    return shlex.join(["sh", "-c", '"$@"; exit $?', "sh", *command])
