"""Node 0's view of the other nodes: launchers that the user or a job started with `--node-rank`.

Each of them connects to node 0's control channel, which the launch's key protects, and holds one
process at a time for node 0 (`holder`): a probe for the preflight, then the server.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

from dance_jax.config import ClusterSpec, UserError
from dance_jax.launch.agent.process import ServerProcess
from dance_jax.launch.control import node_protocol
from dance_jax.launch.control.channel import RECONNECT_S, ControlListener, node_identity

#: Seconds that nodes wait for each other at the start.
MEET_TIMEOUT_S = 300.0
#: Status of a process whose node is interrupted by Ctrl-C, as in a shell.
INTERRUPTED = 128 + signal.SIGINT
#: Seconds between pings that detect a lost node: much shorter than fleet.CAUSE_WINDOW_S, so that a
#: lost node is noticed while the cause is sought.
_PING_S = 0.2
_UNREACHABLE = "cannot be reached any more; look at its terminal, and start it again there"


class Nodes:
    """All nodes but node 0.

    Args:
        spec: the servers; rank 0 is this node.
        listener: the control listener, reachable by the other nodes.
    """

    def __init__(self, spec: ClusterSpec, listener: ControlListener) -> None:
        self.listener = listener
        self._names = dict(enumerate(spec.names))
        del self._names[0]
        self._connected: set[int] = set()
        self._processes: dict[int, NodeProcess] = {}
        self._checked = 0.0
        self._lock = threading.Lock()

    def meet(self, progress: Callable[[str, str], None]) -> None:
        """Wait until every node has connected.

        Args:
            progress: called with (server's name, message).

        Raises:
            UserError: some nodes did not connect in time.
        """
        deadline = time.monotonic() + MEET_TIMEOUT_S
        missing = dict(self._names)
        for name in missing.values():
            progress(name, "waiting for its node")
        while missing:
            for rank in self._connected & missing.keys():
                progress(missing.pop(rank), "its node is connected")
            if time.monotonic() > deadline:
                names = ", ".join(f"{name} (--node-rank {n})" for n, name in missing.items())
                raise UserError(
                    f"no connection within {MEET_TIMEOUT_S:.0f} s from {names}: start them with "
                    "the same hosts file, key and --control-port"
                )
            self.pump(200)

    def has(self, rank: int) -> bool:
        """Whether another node holds this server."""
        return rank in self._names

    def start(self, rank: int, module: str, *, answers: bool, drains: bool) -> NodeProcess:
        """Start a process on a node, in place of the node's present one.

        Args:
            rank: of the server.
            module: of this package, which the process runs.
            answers: the process answers on its output, with lines that begin with `process.MARK`.
            drains: the process drains on SIGTERM.
        """
        before = self._processes.get(rank)
        number = 1 if before is None else before.number + 1
        process = self._processes[rank] = NodeProcess(self, rank, self._names[rank], number)
        # A node that is started later would not get what is sent to it now.
        if self._is_connected(rank):
            process.send(node_protocol.Start(number, module, answers, drains))
        else:
            process.is_lost("is not connected; start it again there")
        return process

    def send(self, rank: int, command: node_protocol.Command) -> None:
        """Send a command; callable by any thread."""
        with self._lock:
            self.listener.send(node_identity(rank), node_protocol.encode(command))

    def pump(self, timeout_ms: int) -> None:
        """Receive messages if any arrive in time.

        Only before servers run: it takes every message for a node's.
        """
        with self._lock:
            for sender, content in self.listener.receive(timeout_ms / 1000):
                self.receive(int(sender.rpartition("-")[2]), content)

    def receive(self, rank: int, content: bytes) -> None:
        """Handle a message from a node."""
        event = node_protocol.decode_event(content)
        if isinstance(event, node_protocol.Hello):
            self._connected.add(rank)
            if (before := self._processes.get(rank)) is not None:
                before.is_lost("was started again")
            return
        process = self._processes.get(rank)
        if process is None or process.number != event.number:
            return
        if isinstance(event, node_protocol.Answer):
            process.answers.put(event.line)
        else:
            process.has_ended(event)

    def check(self) -> None:
        """Detect nodes that are gone; looks every _PING_S at most."""
        if time.monotonic() - self._checked > _PING_S:
            self._checked = time.monotonic()
            for rank, process in self._processes.items():
                if process.ended is None:
                    process.reached(self._is_connected(rank))

    def _is_connected(self, rank: int) -> bool:
        with self._lock:
            return self.listener.connected(node_identity(rank))

    def close(self) -> None:
        """Tell all nodes to end, and stop listening."""
        for rank in self._names:
            self.send(rank, node_protocol.End())
        self.listener.close()


class NodeProcess(ServerProcess):
    """A process that the launcher of another node holds."""

    remote, beats = True, False  # the connection has its own heartbeats

    def __init__(self, nodes: Nodes, rank: int, name: str, number: int) -> None:
        super().__init__(name)
        self.number = number
        self._nodes = nodes
        self._rank = rank
        self._end: node_protocol.Ended | None = None
        #: What became of its node, if that ended it.
        self._lost = ""

    def send(self, command: node_protocol.Command) -> None:
        """Send a command to the node."""
        if self.ended is None:
            self._nodes.send(self._rank, command)

    def reached(self, connected: bool) -> None:
        """Record whether the node is connected; a node that does not come back is lost."""
        now = time.monotonic()
        if connected:
            self.unreachable = None
        elif self.unreachable is None:
            self.unreachable = now
        elif now - self.unreachable > RECONNECT_S:
            self.is_lost(_UNREACHABLE)

    def is_lost(self, why: str) -> None:
        """Record that the node does not hold the process any more, unless it has ended before."""
        if self.ended is None:
            self._lost, self.ended = why, time.monotonic()
            self.answers.put(None)

    def write(self, line: bytes) -> None:
        self.send(node_protocol.Input(line))

    def let_go(self) -> None:
        self.send(node_protocol.Input(None))

    def kill(self, number: signal.Signals) -> None:
        self.send(node_protocol.Signal(number))

    def has_ended(self, end: node_protocol.Ended) -> None:
        """Record the end of the process, as reported by its node."""
        self._end, self.ended = end, time.monotonic()
        self.answers.put(None)

    def _receive(self, seconds: float) -> float:
        self._nodes.pump(int(1000 * min(max(seconds, 0.0), 0.02)))
        self._nodes.check()
        return 0.0

    @property
    def status(self) -> int | None:
        return None if self._end is None else self._end.status

    def lost(self) -> str:
        if self.status == INTERRUPTED:
            return f"was ended by Ctrl-C on its node (--node-rank {self._rank})"
        why = self._lost or (_UNREACHABLE if self.unreachable is not None else "")
        if not why or self._end is not None:
            return ""
        return f"is lost: its node (--node-rank {self._rank}) {why}"

    def last_lines(self) -> list[str]:
        return ["(its log is on its node)"] if self._end is None else self._end.last_lines

    @property
    def log_place(self) -> str:
        return f"on its node{f': {self._end.log}' if self._end else ''}"
