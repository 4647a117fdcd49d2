"""What a service leaves to a later launcher, which takes over the servers that still run.

A service with --state-dir goes on when its launcher is lost. A launcher that is started again with
the same directory finds the servers by the file written here, which also holds the key of the
launch; `dance-jax stop` ends them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator

import msgspec

from dance_jax.config import ClusterSpec, EngineConfig, ServeOptions, UserError
from dance_jax.files import whole_file
from dance_jax.launch.agent.adopted import AdoptedProcess
from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import ControlListener, server_identity

#: Module of a front end's process.
FRONT_END = "dance_jax.serve.frontend"
#: Names of the files in the user's --state-dir.
FILE_NAME, LOCK_NAME = "launcher.json", "launcher.lock"
#: Seconds for servers to find a launcher that takes over, and for its ports to become free.
ANSWER_S, PORT_S = 5.0, 5.0
#: Seconds for servers to end once they are told so, beyond their time to drain.
END_S = 5.0


class Handover(msgspec.Struct, kw_only=True):
    """How to reach the servers of a service, and what they are."""

    #: The servers as the hosts file has them, and with the rates that were measured at the start.
    hosts: ClusterSpec
    spec: ClusterSpec
    config: EngineConfig
    options: ServeOptions
    #: Fingerprint of the model, and its name for servers on other machines.
    fingerprint: str
    model: str
    #: Key of the launch.
    key: bytes
    #: Port for the servers of this machine; addresses and port for the others (0: there are none).
    private_port: int
    control_addresses: tuple[str, ...]
    control_port: int
    ssh_config: str | None
    #: Directory of logs and of the servers' temporary files; directory that keeps logs.
    private: str
    log_dir: str | None
    #: By rank, process id of the front end, and port of each server.
    pids: list[int | None]
    ports: dict[int, int]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the file, which only its owner may read.

        Raises:
            OSError: the file cannot be written.
        """
        with whole_file(pathlib.Path(directory) / FILE_NAME, mode=0o600) as file:
            file.write(msgspec.json.encode(self))

    def log_path(self, rank: int) -> pathlib.Path:
        """The log of a server."""
        logs = pathlib.Path(self.log_dir) if self.log_dir else pathlib.Path(self.private) / "logs"
        return logs / f"{self.spec.names[rank]}.log"

    def processes(self) -> list[AdoptedProcess]:
        """The front ends, by rank."""
        config = None if self.ssh_config is None else pathlib.Path(self.ssh_config)
        return [
            AdoptedProcess(server, pid, self.log_path(rank), config, FRONT_END)
            for rank, (server, pid) in enumerate(zip(self.spec.servers, self.pids, strict=True))
        ]

    def misfit(self, config: EngineConfig, options: ServeOptions, fingerprint: str) -> str:
        """What differs between the servers that run and those that the user asks for; "": nothing.

        The hosts file is not compared, because it may change.

        Args:
            config: of all engines; its exchange is not compared.
            options: of serving.
            fingerprint: of the model.
        """
        if fingerprint != self.fingerprint:
            return "another model"
        pairs = ((options, self.options), (config, self.config))
        differing = [
            field.name
            for wanted, found in pairs
            for field in dataclasses.fields(wanted)
            if field.name != "exchange"
            and getattr(wanted, field.name) != getattr(found, field.name)
        ]
        return f"another {', '.join(differing)}" if differing else ""


def load(directory: str | os.PathLike[str]) -> Handover | None:
    """Load what the last launcher left; None if it ended its servers itself.

    Raises:
        UserError: the file cannot be read.
    """
    path = pathlib.Path(directory) / FILE_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Handover)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(
            f"{path}: cannot be read: {error}; end the servers of that launch, if any still run, "
            "then remove the file"
        ) from error


@contextlib.contextmanager
def sole_launcher(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Within the block, no other launcher uses the directory.

    Raises:
        InUse: another one does.
        OSError: the directory cannot be written.
    """
    path = pathlib.Path(directory) / LOCK_NAME
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(
                f"--state-dir {directory}: is in use by another launcher (process "
                f"{launcher_pid(directory)}); name another directory, or end that launcher"
            ) from None
        try:
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield
        finally:
            file.truncate(0)


class OtherVersion(UserError):
    """The servers that still run do not understand this version's messages."""


class InUse(UserError):
    """Another launcher uses the directory."""


def launcher_pid(directory: str | os.PathLike[str]) -> int | None:
    """Process id of the launcher that uses the directory; None if it is not known."""
    try:
        return int((pathlib.Path(directory) / LOCK_NAME).read_text())
    except (OSError, ValueError):
        return None


@dataclasses.dataclass(frozen=True)
class Survivors:
    """Servers that go on without their launcher, and the channel to them."""

    handover: Handover
    listener: ControlListener
    processes: list[AdoptedProcess]
    #: Messages that have arrived, as (peer, content).
    messages: list[tuple[str, bytes]]
    #: By rank, the answer of each server that has answered.
    taken: dict[int, protocol.Taken]

    @property
    def latest(self) -> protocol.Placed:
        """The latest placement that any of them knows."""
        return max((taken.placed for taken in self.taken.values()), key=lambda each: each.version)

    def forget(self, directory: str | os.PathLike[str]) -> None:
        """Remove what only the servers needed."""
        self.listener.close()
        _forget(self.handover, directory)


def find_survivors(directory: str | os.PathLike[str]) -> Survivors | None:
    """The servers that a lost launcher left running; None if there are none.

    Raises:
        OtherVersion: they run another version.
        UserError: the file of the launcher cannot be read, or its ports are taken.
    """
    handover = load(directory)
    if handover is None:
        return None
    processes = handover.processes()
    listener = _listener(handover)
    survivors = Survivors(handover, listener, processes, [], {})
    for rank in range(len(processes)):
        listener.send(server_identity(rank), protocol.encode(protocol.TakeOver()))
    deadline = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline:
        if all(process.ended or rank in survivors.taken for rank, process in enumerate(processes)):
            break
        for peer, content in listener.receive(0.1):
            survivors.messages.append((peer, content))
            try:
                event = protocol.decode_front_event(content)
            except msgspec.MsgspecError as error:
                listener.close()
                raise OtherVersion(
                    f"{pathlib.Path(directory) / FILE_NAME}: the servers of that launch still run, "
                    "but another version of dance_jax: start the launcher with that version, or "
                    f"end the servers with: dance-jax stop --now --state-dir {directory}"
                ) from error
            if isinstance(event, protocol.Taken):
                rank = int(peer.rpartition("-")[2])
                survivors.taken[rank] = event
                processes[rank].answered(event.pid)
    if any(not taken.draining for taken in survivors.taken.values()):
        return survivors
    # Those that drain or hang serve nobody any more.
    end_servers(survivors, drain_s=0.0)
    survivors.forget(directory)
    return None


def kill_servers(directory: str | os.PathLike[str]) -> None:
    """End the servers of a lost launcher without talking to them."""
    handover = load(directory)
    if handover is not None:
        for process in handover.processes():
            process.kill(signal.SIGKILL)
        _forget(handover, directory)


def end_servers(survivors: Survivors, drain_s: float) -> list[str]:
    """End servers that go on without their launcher, by force if they do not end.

    Args:
        survivors: these servers.
        drain_s: seconds that they have to finish their requests.

    Returns:
        Names of the servers that cannot be reached, and may run on.
    """
    processes, listener = survivors.processes, survivors.listener

    def within(seconds: float, done: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline:
            for peer, content in listener.receive(0.1):
                if isinstance(protocol.decode_front_event(content), protocol.Drained):
                    drained.add(int(peer.rpartition("-")[2]))
            for rank in survivors.taken:
                processes[rank].reached(listener.connected(server_identity(rank)))
        return done()

    def ended() -> bool:
        return all(processes[rank].ended is not None for rank in survivors.taken)

    drained: set[int] = set()
    if drain_s:
        for rank in survivors.taken:
            listener.send(server_identity(rank), protocol.encode(protocol.Drain()))
        within(drain_s, lambda: drained >= survivors.taken.keys() or ended())
    for rank in survivors.taken:
        listener.send(server_identity(rank), protocol.encode(protocol.Stop()))
    within(END_S, ended)
    for process in processes:
        if process.ended is None:
            process.kill(signal.SIGKILL)
    within(END_S, ended)
    return [process.name for process in processes if process.ended is None]


def _forget(handover: Handover, directory: str | os.PathLike[str]) -> None:
    shutil.rmtree(handover.private, ignore_errors=True)
    (pathlib.Path(directory) / FILE_NAME).unlink(missing_ok=True)


def _listener(handover: Handover) -> ControlListener:
    """The launcher's end of the control channel, where the servers look for it."""
    peers = [server_identity(rank) for rank in range(len(handover.spec.servers))]
    deadline = time.monotonic() + PORT_S
    while True:
        try:
            return _listening(handover, peers)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"the servers of the last launch wait for a launcher at an address that this "
                    f"one cannot have: {error}; end the process that has the port, start on the "
                    "machine of the last launcher, or end the servers on each machine"
                ) from error
            time.sleep(0.2)


def _listening(handover: Handover, peers: list[str]) -> ControlListener:
    listener = ControlListener(handover.key, peers, handover.private_port)
    try:
        if handover.control_port:
            listener.listen(handover.control_addresses, handover.control_port)
    except OSError:
        listener.close()
        raise
    return listener
