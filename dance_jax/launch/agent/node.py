"""Servers that launchers on other nodes start (`--node-rank`): both ends of the protocol.

Node 0 is the parent of the cluster and listens on the first server's address. Every other node
connects to node 0, answers its preflight, starts its own server with the setup from node 0, and
ends the server when node 0 says so or becomes unreachable. The launchers are connected only by this
channel, which the launch's key protects.
"""

from __future__ import annotations

import os
import pathlib
import signal
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable

import msgspec
import zmq
from zmq.utils import monitor

from dance_jax.config import ClusterSpec, ServerSpec, UserError
from dance_jax.launch.agent.process import ServerProcess, in_words, is_echo
from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import ALIVE_TIMEOUT_S, ControlConnection, ControlListener

#: Seconds that nodes wait for each other at the start.
MEET_TIMEOUT_S = 300.0
#: Seconds between pings that detect a lost node: well within the window in which the cause of a
#: failure is looked for.
_PING_S = 0.2
#: Connections that end during the handshake after which the key counts as wrong.
_REFUSALS = 3


class Nodes:
    """Node 0's view of all other nodes.

    Args:
        spec: the servers; rank 0 is this node.
        listener: the control listener, reachable by the other nodes.
    """

    def __init__(self, spec: ClusterSpec, listener: ControlListener) -> None:
        self.listener = listener
        self.servers = {
            rank: NodeServer(server, rank, listener.socket)
            for rank, server in enumerate(spec.servers)
            if rank > 0
        }
        self._lock = threading.Lock()
        self._replies: dict[int, deque[bytes]] = defaultdict(deque)

    def meet(self, progress: Callable[[str, str], None]) -> None:
        """Wait until every node has connected.

        Args:
            progress: called with (server's name, message).

        Raises:
            UserError: some nodes did not connect in time.
            UserError: some did not.
        """
        deadline = time.monotonic() + MEET_TIMEOUT_S
        missing = dict(self.servers)
        for server in missing.values():
            progress(server.name, "waiting for its node")
        while missing:
            for rank in [rank for rank, server in missing.items() if server.called]:
                progress(missing.pop(rank).name, "its node is connected")
            if time.monotonic() > deadline:
                names = ", ".join(f"{s.name} (--node-rank {s.rank})" for s in missing.values())
                raise UserError(
                    f"no connection within {MEET_TIMEOUT_S:.0f} s from {names}: start them with "
                    "the same hosts file, key and --control-port"
                )
            self._pump(200)

    def ask(self, rank: int, request: bytes, timeout_s: float) -> bytes:
        """Ask a node a preflight question (JSON both ways); may be called by any thread.

        Raises:
            TimeoutError: no answer in time.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self.servers[rank].send(protocol.NodeProbe(request))
        while not self._replies[rank]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"node {rank} does not answer")
            self._pump(20)
        return self._replies[rank].popleft()

    def _pump(self, timeout_ms: int) -> None:
        with self._lock:
            socket = self.listener.socket
            if socket.poll(timeout_ms):
                sender, content = socket.recv_multipart()
                self.receive(int(sender.rpartition(b"-")[2]), content)

    def receive(self, rank: int, content: bytes) -> None:
        """Handle a message from a node."""
        match protocol.decode_node_event(content):
            case protocol.NodeHello():
                self.servers[rank].called = True
            case protocol.NodeReply(reply):
                self._replies[rank].append(reply)
            case protocol.NodeEnded() as ended:
                self.servers[rank].has_ended(ended)

    def close(self) -> None:
        """Let all nodes end, and stop listening."""
        for server in self.servers.values():
            server.let_go()
        self.listener.close()

    def check(self) -> None:
        """Detect nodes that are gone."""
        for server in self.servers.values():
            server.check()


class NodeServer:
    """A `process.ServerHandle` for a process that a launcher on another node holds."""

    def __init__(self, server: ServerSpec, rank: int, socket: zmq.Socket) -> None:
        self.name = server.name
        self.rank = rank
        #: Module that the process runs, and whether SIGTERM drains it; set before `tell`.
        self.module, self.drains = "", False
        self.called = False
        self.ended: float | None = None
        self.failed: float | None = None
        self.failure: str | None = None
        self.user_failure = False
        self.pid: int | None = None
        self._socket = socket
        self._end: protocol.NodeEnded | None = None
        self._checked = 0.0

    def send(self, command: protocol.NodeCommand) -> None:
        try:
            message = [b"node-%d" % self.rank, protocol.encode(command)]
            self._socket.send_multipart(message, flags=zmq.DONTWAIT)
        except zmq.ZMQError:
            self.ended = self.ended or time.monotonic()

    def tell(self, line: bytes) -> None:
        self.send(protocol.NodeSetup(self.module, self.drains, line))

    def beat(self) -> None:
        """Do nothing: the connection has its own heartbeats."""

    def let_go(self) -> None:
        if self.ended is None:
            self.send(protocol.NodeEnd(kill=False))

    def kill(self, number: signal.Signals) -> None:
        if self.ended is None:
            self.send(protocol.NodeEnd(kill=number == signal.SIGKILL))

    def has_ended(self, ended: protocol.NodeEnded) -> None:
        """Record the end of the process, as reported by its launcher."""
        self._end, self.ended = ended, time.monotonic()

    def check(self) -> None:
        """Send a ping now and then; sending fails once the connection is lost."""
        if self.ended is None and time.monotonic() - self._checked > _PING_S:
            self._checked = time.monotonic()
            self.send(protocol.NodePing())

    def fate(self) -> str:
        if self.failure is not None:
            return f"failed: {self.failure}"
        if self._end is None:
            return f"is lost: its node (--node-rank {self.rank}) cannot be reached any more"
        return in_words(self._end.status)

    def last_lines(self) -> list[str]:
        return ["(its log is on its node)"] if self._end is None else self._end.last_lines

    @property
    def log(self) -> str:
        return f"on its node{f': {self._end.log}' if self._end else ''}"

    def echo(self) -> bool:
        if self._end is None:
            return self.failure is not None and is_echo(self.failure, None, ())
        return is_echo(self.failure, self._end.status, self._end.last_lines)


def run_node(
    spec: ClusterSpec,
    rank: int,
    endpoint: str,
    key: bytes,
    answer: Callable[[bytes], bytes],
    log_dir: pathlib.Path | None,
    progress: Callable[[str], None],
) -> int:
    """Run one server on this node for the launcher of node 0, until node 0 ends the server.

    Args:
        rank: of the server.
        endpoint: ZeroMQ endpoint of node 0.
        key: of the launch.
        answer: answers a preflight question, JSON to JSON.
        log_dir: directory that keeps the server's log; None: the log is removed at the end.
        progress: called with messages for the operator.

    Returns:
        Exit code: 0 if node 0 ended the server, 1 if the server ended by itself or node 0 is gone.
    """
    connection = ControlConnection(endpoint, key, f"node-{rank}")
    contact = _Contact(connection.socket)
    connection.socket.send(protocol.encode(protocol.NodeHello(os.getpid())))
    progress(f"node {rank} ({spec.servers[rank].name}): connecting to node 0 at {endpoint}")
    process: ServerProcess | None = None
    told_to_end = False
    with tempfile.TemporaryDirectory(prefix="dance-jax-") as private:
        logs = log_dir or pathlib.Path(private)
        local = ServerSpec(spec.servers[rank].name, "", python=spec.servers[rank].python)
        try:
            while contact.holds():
                if process is not None and process.ended is not None:
                    status = process.status
                    assert status is not None
                    ended = protocol.NodeEnded(status, process.last_lines(), process.log)
                    connection.socket.send(protocol.encode(ended))
                    progress(f"the server {process.fate()}")
                    return 0 if told_to_end or status == 0 else 1
                if not connection.socket.poll(100):
                    continue
                match protocol.decode_node_command(connection.socket.recv()):
                    case protocol.NodeProbe(request):
                        reply = protocol.NodeReply(answer(request))
                        connection.socket.send(protocol.encode(reply))
                    case protocol.NodeSetup(module, drains, setup):
                        log = logs / f"{local.name}.log"
                        process = ServerProcess(local, log, module)
                        process.tell(_with_private_dir(setup, private))
                        if drains:
                            _pass_on(signal.SIGTERM, process)
                        progress("the server starts")
                    case protocol.NodeEnd(kill):
                        told_to_end = True
                        if process is None:
                            return 0
                        process.kill(signal.SIGKILL) if kill else process.let_go()
            if told_to_end:  # node 0 ended before this server did
                return 0
            progress("node 0 cannot be reached any more; the server is stopped")
            return 1
        finally:
            if process is not None:
                process.let_go()
                process.kill(signal.SIGKILL)
                process.popen.wait()
            contact.close()
            connection.close()


def _with_private_dir(setup: bytes, private: str) -> bytes:
    """The setup, with a directory that the server removes if this launcher is killed."""
    content = msgspec.json.decode(setup)
    content.get("engine", content)["private_dir"] = private
    return msgspec.json.encode(content)


def _pass_on(number: signal.Signals, process: ServerProcess) -> None:
    """Pass a signal on to the server's process, which then drains together with all servers."""
    signal.signal(number, lambda *_: process.kill(number))


class _Contact:
    """Whether the connection to node 0 holds; short interruptions are tolerated."""

    def __init__(self, socket: zmq.Socket) -> None:
        self._socket = socket
        self._events = socket.get_monitor_socket()
        self._met = False
        self._refused = 0
        self._since = time.monotonic()

    def holds(self) -> bool:
        while self._events.poll(0):
            match monitor.recv_monitor_message(self._events)["event"]:
                case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self._met, self._since = True, float("inf")
                case zmq.EVENT_DISCONNECTED:
                    self._since = min(self._since, time.monotonic())
                    self._refused += not self._met
        if self._refused >= _REFUSALS:
            raise UserError("node 0 refuses this node's key: give all nodes the same key")
        allowed = ALIVE_TIMEOUT_S / 2 if self._met else MEET_TIMEOUT_S
        return time.monotonic() - self._since < allowed

    def close(self) -> None:
        self._socket.disable_monitor()
        self._events.close()
