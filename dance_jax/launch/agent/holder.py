"""A node's launcher (`--node-rank`): it holds one process at a time for node 0.

Node 0 says which module of this package to run: the preflight's probe, then the server. The input
of the process comes from node 0, and its answers go to node 0. The launcher ends its process when
node 0 says so or becomes unreachable.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import queue
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Self

import zmq
from zmq.utils import monitor

from dance_jax import signals
from dance_jax.config import ServerSpec, UserError
from dance_jax.launch.agent.nodes import INTERRUPTED, MEET_TIMEOUT_S
from dance_jax.launch.agent.process import ChildProcess, remove_log
from dance_jax.launch.control import node_protocol
from dance_jax.launch.control.channel import RECONNECT_S, ControlConnection, node_identity

#: After so many connections lost in the handshake, the key counts as wrong.
_REFUSALS = 3
#: Seconds that a process has to end by itself once its input is closed.
_END_S = 1.0
#: Exit status of a process that could not be started, as in a shell.
_NOT_STARTED = 127


def run_node(
    server: ServerSpec,
    rank: int,
    endpoint: str,
    key: bytes,
    log_dir: pathlib.Path | None,
    progress: Callable[[str], None],
) -> int:
    """Hold the processes of one server for node 0, until node 0 ends or is gone.

    Args:
        server: the server; python= says how its processes are run.
        rank: of the server.
        endpoint: ZeroMQ endpoint of node 0.
        key: of the launch.
        log_dir: directory that keeps the server's log; None: the log is removed at the end.
        progress: called with messages for the operator.

    Returns:
        Exit code: 0 if node 0 ended the server, 1 if the server failed by itself or node 0 is gone.

    Raises:
        UserError: node 0 refuses the key.
    """
    connection = ControlConnection(endpoint, key, node_identity(rank))
    contact = _Contact(connection.socket)
    connection.send(node_protocol.encode(node_protocol.Hello(os.getpid())))
    progress(f"node {rank} ({server.name}): connecting to node 0 at {endpoint}")
    with (
        contextlib.closing(connection),
        contextlib.closing(contact),
        _Holder(server, connection, log_dir, progress) as holder,
    ):
        poller = zmq.Poller()
        for source in (connection.socket, holder.changes):
            poller.register(source, zmq.POLLIN)
        while contact.alive():
            poller.poll(100)
            holder.report()
            while connection.waits():
                command = node_protocol.decode_command(connection.receive())
                if isinstance(command, node_protocol.End):
                    return 1 if holder.failed else 0
                holder.obey(command)
        if holder.told_to_end:  # node 0 had already told the process to end
            return 0
        progress("node 0 cannot be reached any more; the server is stopped")
        return 1


class _Holder:
    """Holds the process that node 0 asked for, and reports its answers and its end.

    Args:
        server, log_dir, progress: as for `run_node`.
        channel: to node 0.
    """

    def __init__(
        self,
        server: ServerSpec,
        channel: ControlConnection,
        log_dir: pathlib.Path | None,
        progress: Callable[[str], None],
    ) -> None:
        # This is the server's own machine, so ssh= does not apply.
        self._server = ServerSpec(server.name, "", python=server.python)
        self._channel = channel
        self._log_dir = log_dir
        if log_dir is not None:
            remove_log(log_dir / f"{server.name}.log")
        #: Directory that the server removes if this launcher is killed. The probe needs none.
        self._private: tempfile.TemporaryDirectory[str] | None = None
        self._progress = progress
        self._process: ChildProcess | None = None
        self._start = node_protocol.Start(0, "", False, False)
        #: Node 0 asked for the end.
        self.told_to_end = False
        #: The process ended with an error unasked.
        self.failed = False
        #: Readable when the process has answered or ended.
        self.changes, self._noted = socket.socketpair()
        self.changes.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if (process := self._process) is not None:
            if kind is KeyboardInterrupt:
                # Before the end of the process, so that node 0 learns the cause first.
                number, place = self._start.number, process.log_place
                self._send(node_protocol.Ended(number, INTERRUPTED, process.last_lines(), place))
            process.end(0.0)
        if self._private is not None:
            self._private.cleanup()
        self.changes.close()
        self._noted.close()

    def obey(self, command: node_protocol.Command) -> None:
        """Carry out a command about the process."""
        match command:
            case node_protocol.Start():
                self._begin(command)
            case node_protocol.Input(bytes() as line) if self._process is not None:
                self._process.write(line)
            case node_protocol.Input(None) if self._process is not None:
                self.told_to_end = True
                self._process.let_go()
            case node_protocol.Signal(number) if self._process is not None:
                self.told_to_end = True
                self._process.kill(signal.Signals(number))

    def report(self) -> None:
        """Send node 0 the answers of the process, and its end."""
        with contextlib.suppress(BlockingIOError):
            self.changes.recv(4096)
        process, number = self._process, self._start.number
        if process is None:
            return
        ended = process.ended is not None  # read first, so that no answer is sent after the end
        with contextlib.suppress(queue.Empty):
            while (answer := process.answers.get_nowait()) is not None:
                self._send(node_protocol.Answer(number, answer))
        if ended:
            status = process.status
            assert status is not None
            self._send(node_protocol.Ended(number, status, process.last_lines(), process.log_place))
            self._process = None
            if not self._start.answers:
                self.failed = status != 0 and not self.told_to_end
                self._progress(f"the server {process.fate()}")

    def _begin(self, start: node_protocol.Start) -> None:
        if self._process is not None:
            self._process.end(_END_S)
        self._start, self.told_to_end, self.failed = start, False, False
        private, log_path = "", None
        if not start.answers:
            self._private = self._private or tempfile.TemporaryDirectory(prefix="dance-jax-")
            private = self._private.name
            log_path = (self._log_dir or pathlib.Path(private)) / f"{self._server.name}.log"
        try:
            self._process = ChildProcess(
                self._server,
                start.module,
                log_path=log_path,
                answers=start.answers,
                private=private,
                on_change=self._note,
            )
        except UserError as error:
            self._send(node_protocol.Ended(start.number, _NOT_STARTED, [str(error)], ""))
            return
        if start.drains:
            # Forward SIGTERM; the front end asks node 0 to drain all servers.
            signals.handle(signal.SIGTERM, self._pass_on)
        if not start.answers:
            self._progress("the server starts")

    def _note(self) -> None:
        """Wake the loop of `run_node`; called by threads of the process."""
        with contextlib.suppress(OSError):  # closed: nobody waits any more
            self._noted.send(b"\0")

    def _pass_on(self, number: int, frame: object) -> None:
        if self._process is not None:
            self._process.kill(signal.Signals(number))

    def _send(self, event: node_protocol.Event) -> None:
        self._channel.send(node_protocol.encode(event))


class _Contact:
    """Watches the connection to node 0, which may be interrupted for RECONNECT_S."""

    def __init__(self, socket: zmq.Socket) -> None:
        self._socket = socket
        self._events = socket.get_monitor_socket()
        self._met = False
        self._refused = 0
        self._since = time.monotonic()

    def alive(self) -> bool:
        while self._events.poll(0):
            match monitor.recv_monitor_message(self._events)["event"]:
                case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self._met, self._since = True, float("inf")
                case zmq.EVENT_DISCONNECTED:
                    self._since = min(self._since, time.monotonic())
                    self._refused += not self._met
        if self._refused >= _REFUSALS:
            raise UserError("node 0 refuses this node's key: give all nodes the same key")
        allowed = RECONNECT_S if self._met else MEET_TIMEOUT_S
        return time.monotonic() - self._since < allowed

    def close(self) -> None:
        self._socket.disable_monitor()
        self._events.close()
