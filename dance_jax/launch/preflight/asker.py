"""Ask a server's machine the preflight's questions, through a process of the probe there."""

from __future__ import annotations

import pathlib
import re
import shlex
import sys
from typing import Protocol

import msgspec

from dance_jax.config import ServerSpec, UserError
from dance_jax.launch.agent.command import SSH_FAILED
from dance_jax.launch.agent.network import Network
from dance_jax.launch.agent.process import ServerProcess
from dance_jax.launch.preflight.messages import Refused, Reply, Request, decode_reply, encode

#: Module that answers.
PROBE = "dance_jax.launch.preflight.probe"
#: Seconds that a probe has to end by itself once it is closed.
_END_TIMEOUT_S = 1.0


class Unreachable(Exception):
    """A machine cannot be asked; the message says why and what to do."""


class Asker(Protocol):
    """Asks one server's machine."""

    def ask(self, request: Request, timeout_s: float) -> Reply:
        """Ask a question and return the answer; called by one thread at a time.

        Raises:
            Unreachable: no answer within `timeout_s`, or no answer is possible.
        """
        ...

    def close(self) -> None:
        """End the process that answers, and free all local resources."""
        ...


class ProbeAsker:
    """Asks a process of the probe on the server's machine.

    The probe ends when this process closes the probe's input or dies.
    """

    def __init__(self, rank: int, server: ServerSpec, network: Network) -> None:
        self._server = network.as_started(server)
        self._ssh_config = network.ssh_config
        #: Why no further question is sent; empty: questions are sent.
        self._problem = ""
        self._process: ServerProcess | None = None
        try:
            self._process = network.start(rank, server, PROBE, answers=True)
        except UserError as error:
            self._problem = str(error)

    def ask(self, request: Request, timeout_s: float) -> Reply:
        if self._process is None or self._problem:
            raise Unreachable(self._problem)
        self._process.write(encode(request))
        try:
            answer = self._process.read(timeout_s)
        except TimeoutError as error:
            # No further questions: a late answer would be taken for the answer to the next one.
            self._problem = f"{where(self._server)}: {error}"
            if self._server.ssh is not None:
                command = by_hand(self._server, self._ssh_config)
                self._problem += f"; check that this command works: {command}"
            raise Unreachable(self._problem) from None
        if answer is None:
            self._problem = self._why(self._process)
            raise Unreachable(self._problem)
        return _decoded(answer)

    def _why(self, process: ServerProcess) -> str:
        process.wait(_END_TIMEOUT_S)
        if self._server.ssh is None and (lost := process.lost()):
            return f"{self._server.name} {lost}"
        last = "\n".join(process.last_lines())
        return explanation(self._server, process.status, last, self._ssh_config)

    def close(self) -> None:
        self._problem = self._problem or "it was closed"
        if self._process is not None:
            self._process.end(_END_TIMEOUT_S)


def _decoded(answer: bytes) -> Reply:
    try:
        reply = decode_reply(answer)
    except msgspec.DecodeError as error:
        raise Unreachable(
            f"the answer cannot be parsed: the machine has another version of dance_jax ({error})"
        ) from error
    if isinstance(reply, Refused):
        raise Unreachable(reply.why)
    return reply


def where(server: ServerSpec) -> str:
    """How the server's machine is reached, as text for messages."""
    return f"ssh {server.ssh}" if server.ssh else f"the process of {server.name}"


def by_hand(server: ServerSpec, ssh_config: pathlib.Path | None) -> str:
    """A command line with which the user can test the connection."""
    assert server.ssh is not None
    config = ["-F", str(ssh_config)] if ssh_config else []
    port = ["-p", str(server.ssh.port)] if server.ssh.port else []
    target = f"{server.ssh.user}@{server.ssh.host}" if server.ssh.user else server.ssh.host
    return shlex.join(["ssh", "-o", "BatchMode=yes", *config, *port, target, "true"])


#: Error texts of ssh and their explanations. The first match is used.
_SSH_FAILURES = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "the host key has changed; if that is expected, remove the old key (ssh-keygen -R HOST)",
    ),
    (
        "Host key verification failed",
        "the host key is unknown; connect once by hand and accept it",
    ),
    (
        "Permission denied",
        "the host accepts none of this user's keys; add one there (ssh-copy-id)",
    ),
    (
        "Too many authentication failures",
        "the host refused all keys; name the right key in the ssh configuration (IdentityFile)",
    ),
    ("Could not resolve", "the host name cannot be looked up; correct ssh= or address="),
    (
        "Connection refused",
        "no ssh server listens at that port; start one, or correct the port in ssh=",
    ),
    ("No route to host", "no route to the host; check that it is on and the address is right"),
    ("Network is unreachable", "this machine has no route to the host's network"),
    (
        "timed out",
        "the host does not answer; check that it is on, that the address is right, and that no "
        "firewall drops the connection",
    ),
    ("Bad configuration option", "the ssh configuration is wrong"),
    ("Can't open user config file", "the file of --ssh-config cannot be read"),
)

_MISSING_MODULE = re.compile(r"No module named '?([A-Za-z0-9_.]+)'?")


def explanation(
    server: ServerSpec, status: int | None, stderr: str, ssh_config: pathlib.Path | None = None
) -> str:
    """Why a server's process ended before it answered, and what to do.

    Args:
        server: the server.
        status: exit status as `subprocess` and shells report it; None: the process still runs.
        stderr: the standard error of the process.
        ssh_config: for the command that the message proposes.
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = _printable(lines[-1]) if lines else "it printed nothing"
    python = server.python or sys.executable
    if server.ssh is not None and status == SSH_FAILED:
        reason = next((text for sign, text in _SSH_FAILURES if sign in stderr), "ssh failed")
        return (
            f"{where(server)}: {reason} ({last}). This command must work without a prompt: "
            f"{by_hand(server, ssh_config)}"
        )
    missing = _MISSING_MODULE.search(stderr)
    if missing:
        name = missing[1]
        package = "dance_jax" if name.startswith("dance_jax") else name
        which = "" if name.count(".") == 0 else f" (module {name} is missing: another version)"
        return (
            f"{where(server)}: {python} has no {package}{which}; install the same version there, "
            "or name the right Python with python="
        )
    if status in (126, 127):
        return (
            f"{where(server)}: {python} cannot be run ({last}); install it there, or name the "
            "right Python with python="
        )
    if "SyntaxError" in stderr or "TypeError: unsupported operand" in stderr:
        return f"{where(server)}: {python} is too old; Python 3.11 or newer is needed"
    ended = "gave no answer" if status is None else f"ended with status {status}"
    return f"{where(server)}: {python} {ended}: {last}"


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)[:300]
