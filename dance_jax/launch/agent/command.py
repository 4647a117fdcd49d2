"""The command that runs a module on a server's machine: locally, or over the system's ssh."""

from __future__ import annotations

import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

from dance_jax.config import ServerSpec, SshTarget

#: Seconds until a host that does not answer counts as unreachable. A host that was switched off is
#: tried again and again, and one attempt does not see it come back: TCP waits longer and longer.
CONNECT_TIMEOUT_S = 5
#: Seconds between ssh keep-alives; number of missed ones after which the connection is lost.
ALIVE_INTERVAL_S, ALIVE_COUNT = 5, 15
#: ssh's own exit status: connecting failed, or the connection was lost.
SSH_FAILED = 255
#: Environment variable with the parent's private directory on this machine, which the child removes
#: if its parent is killed; unset if the parent is on another machine.
PRIVATE_VARIABLE = "DANCE_JAX_PRIVATE"


def server_command(
    server: ServerSpec, module: str, ssh_config: pathlib.Path | None = None
) -> list[str]:
    """The command line of a process that runs `python -m module` on the server's machine.

    Standard input and output are the module's. The exit status is passed on; a signal that ended
    the module there is reported as 128 + its number.

    Args:
        server: without ssh=, the module runs on this machine.
        module: dotted name.
        ssh_config: file for `ssh -F`.
    """
    command = [server.python or sys.executable, "-m", module]
    if server.ssh is None:
        return command
    return [*ssh_command(server.ssh, ssh_config), _quoted(command)]


def server_environment(server: ServerSpec, private: str = "") -> dict[str, str]:
    """Environment of the command: this process's; for a child here also the package's path in
    PYTHONPATH.

    Args:
        server: the server.
        private: value of PRIVATE_VARIABLE for a child here; empty: unset.
    """
    environment = dict(os.environ)
    environment.pop(PRIVATE_VARIABLE, None)
    if server.ssh is None:
        if private:
            environment[PRIVATE_VARIABLE] = private
        package_parent = str(pathlib.Path(__file__).resolve().parents[3])
        paths = [package_parent, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def ssh_command(target: SshTarget, config: pathlib.Path | None) -> list[str]:
    """The ssh client that runs a command on a machine; the command's words follow."""
    options = {
        "BatchMode": "yes",  # no prompts, which no user would see
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
    """Quote the command for the remote login shell, which passes the words on unchanged.

    The inner shell turns a signal into an exit status, because sshd reports only exit statuses.
    """
    return shlex.join(["sh", "-c", '"$@"; exit $?', "sh", *command])
