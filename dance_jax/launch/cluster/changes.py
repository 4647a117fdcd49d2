"""A changed hosts file of a running service: servers leave and join, one after the other.

A server that leaves accepts no new requests and finishes those it has, while the others load the
experts that only it has; then it ends. A server that joins takes a vacant seat and starts without
experts; the next decision moves some to it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
import pathlib
import time
from collections.abc import Callable
from typing import Protocol

from dance_jax.config import ClusterSpec, ServerSpec, UserError
from dance_jax.launch.agent.network import Network

#: Name of the file in the user's --state-dir that tells how a change goes on; its last line begins
#: with one of END.
FILE_NAME = "hosts.log"
END = DONE, FAILED = "done", "failed"

#: Surveys a server that is to join: returns it with what was measured, and the network.
Survey = Callable[[ServerSpec], tuple[ServerSpec, Network]]


def _keep() -> None:
    """Undo nothing."""


class Actions(Protocol):
    """What changes need of the service."""

    #: The servers and vacant seats, by rank.
    spec: ClusterSpec

    @property
    def present(self) -> frozenset[int]:
        """Ranks of the servers that run."""
        ...

    @property
    def settled(self) -> bool:
        """Whether nothing moves, and all servers that run have the placement in force."""
        ...

    def dismiss(self, rank: int) -> str:
        """Have a server finish its requests, and others load its experts; or say why it cannot."""
        ...

    def dismissed(self, rank: int) -> bool:
        """Whether that is done."""
        ...

    def unseat(self, rank: int) -> None:
        """End a server."""
        ...

    def seat(self, rank: int, server: ServerSpec, network: Network) -> None:
        """Start a server; raises UserError if that is not possible."""
        ...

    def fails(self, rank: int) -> str:
        """Why a server's starts fail again and again; "": they do not."""
        ...

    def notice(self, name: str, text: str) -> None:
        """Pass a message to the operator."""
        ...


class Changes:
    """Brings the servers of a service in line with its hosts file.

    Args:
        hosts: the hosts file of the servers that run.
        actions: on the service.
        survey: of servers that are to join.
        state_dir: directory for a file that tells how a change goes on; None: none is written.
        patience_s: seconds that a server has to finish its requests.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        hosts: ClusterSpec,
        actions: Actions,
        survey: Survey,
        state_dir: str | None,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        #: The servers as the hosts file has them, by name.
        self.hosts = {server.name: server for server in hosts.servers}
        self._actions, self._survey, self._patience_s = actions, survey, patience_s
        self._clock = clock
        self._file = None if state_dir is None else pathlib.Path(state_dir) / FILE_NAME
        self._leave: collections.deque[str] = collections.deque()
        self._join: collections.deque[ServerSpec] = collections.deque()
        #: The server that leaves, and when its time is up; the one that starts; the survey of one
        #: that is to join.
        self._leaving: tuple[int, float] | None = None
        self._joining: int | None = None
        self._surveyed: concurrent.futures.Future[tuple[ServerSpec, Network]] | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "survey")
        self._under_way = False
        self._undo = _keep
        #: The servers of a file that was read while an earlier change was under way.
        self._next: ClusterSpec | None = None
        if self._file is not None:
            # An earlier launcher may have been killed during a change.
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)

    @property
    def under_way(self) -> bool:
        """Whether a change is under way, or the next one waits."""
        return self._under_way or self._next is not None

    def want(self, hosts: ClusterSpec, undo: Callable[[], None] = _keep) -> None:
        """Begin to change to these servers, after the change under way if there is one.

        Args:
            hosts: the servers.
            undo: called if the change fails; only if no other one is under way.
        """
        if self._under_way:
            self._next = hosts
            return
        self._begin()
        self._undo = undo
        new = {server.name: server for server in hosts.servers}
        both = new.keys() & self.hosts.keys()
        if changed := sorted(name for name in both if new[name] != self.hosts[name]):
            self._end(
                f"{FAILED}: the line of {', '.join(changed)} has changed; remove the server first, "
                "then add it with its new line"
            )
            return
        self._leave += [name for name in self.hosts if name not in new]
        self._join += [server for name, server in new.items() if name not in self.hosts]

    def refuse(self, why: str) -> None:
        """The hosts file cannot be used."""
        if not self._under_way:
            self._begin()
            self._end(f"{FAILED}: {why}")

    def tick(self) -> None:
        """Do what is due; call this often."""
        if not self._under_way and self._next is not None:
            hosts, self._next = self._next, None
            self.want(hosts)
        if not self._under_way:
            return
        try:
            self._go_on()
        except UserError as error:
            self._end(f"{FAILED}: {error}")

    def close(self) -> None:
        """Wait for no survey."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _go_on(self) -> None:
        actions = self._actions
        if self._leaving is not None:
            rank, until = self._leaving
            if actions.dismissed(rank) or self._clock() > until:
                self._leaving = None
                name = actions.spec.names[rank]
                # First, because the service saves the hosts with the seats.
                del self.hosts[name]
                actions.unseat(rank)
                self._say(f"{name} has left")
        elif self._joining is not None:
            self._await(self._joining)
        elif self._surveyed is not None:
            if self._surveyed.done() and self._others_settled(set()):
                future, self._surveyed = self._surveyed, None
                self._seat(self._join.popleft(), *future.result())
        elif self._leave:
            self._dismiss(self._leave[0])
        elif self._join:
            self._say(f"{self._join[0].name} is surveyed")
            self._surveyed = self._pool.submit(self._survey, self._join[0])
        else:
            self._end(f"{DONE}: the servers are {', '.join(self.hosts)}")

    def _dismiss(self, name: str) -> None:
        actions = self._actions
        rank = actions.spec.names.index(name)
        if not self._others_settled({rank}):
            return
        self._leave.popleft()
        if why := actions.dismiss(rank):
            raise UserError(f"{name} cannot leave: {why}")
        self._leaving = rank, self._clock() + self._patience_s
        self._say(f"{name} finishes its requests, the others load its experts")

    def _seat(self, line: ServerSpec, server: ServerSpec, network: Network) -> None:
        actions = self._actions
        vacant = [rank for rank, each in enumerate(actions.spec.servers) if each.vacant]
        if not vacant:
            raise UserError(
                f"{line.name} cannot join: the service has seats for {len(actions.spec.servers)} "
                "servers; start it again with the new hosts file"
            )
        self.hosts[line.name] = line
        try:
            actions.seat(vacant[0], server, network)
        except UserError:
            del self.hosts[line.name]
            raise
        self._joining = vacant[0]
        self._say(f"{line.name} starts")

    def _await(self, rank: int) -> None:
        """Wait until a server that joins runs; one that cannot start is taken out again."""
        actions, name = self._actions, self._actions.spec.names[rank]
        if rank in actions.present:
            self._joining = None
            self._say(f"{name} has joined")
        elif why := actions.fails(rank):
            self._joining = None
            del self.hosts[name]
            actions.unseat(rank)
            raise UserError(f"{name} does not start: {why}")

    def _others_settled(self, ranks: set[int]) -> bool:
        """Whether all servers but these run and nothing moves, so that the seats can change."""
        actions = self._actions
        return actions.settled and actions.present >= {*actions.spec.seated} - ranks

    def _begin(self) -> None:
        self._under_way = True
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write_text("")

    def _end(self, text: str) -> None:
        self._leave.clear()
        self._join.clear()
        self._say(text)
        self._under_way = False
        undo, self._undo = self._undo, _keep
        if text.startswith(FAILED):
            undo()

    def _say(self, text: str) -> None:
        self._actions.notice("", f"hosts: {text}")
        if self._file is not None:
            with contextlib.suppress(OSError), open(self._file, "a") as file:
                file.write(text + os.linesep)
