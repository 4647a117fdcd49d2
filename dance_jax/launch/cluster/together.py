"""A service whose servers step together (`--exchange collectives`).

Engines that step together die together, so all of them restart; a dead front end ends the service.
No server can join or leave.
"""

from __future__ import annotations

from dance_jax.launch.cluster.members import MAX_FAILED_STARTS
from dance_jax.launch.cluster.service import EngineFailure, Service
from dance_jax.launch.control import protocol


class TogetherService(Service):
    """The servers of a hosts file, whose engines are one job."""

    #: Ranks of the servers whose engines are not ready.
    _down: frozenset[int] = frozenset()

    @property
    def present(self) -> frozenset[int]:
        """Ranks of the servers that are not restarting."""
        return frozenset(self.spec.seated) - self._down

    def _turn(self) -> None:
        if self._reload:
            self._reload = False
            self.notice("", "hosts: servers that step together cannot join or leave")
        try:
            for rank, event in self._events():
                self._handle(rank, event)
            self._rebalancer.tick()
        except EngineFailure as failure:
            self._recover(failure.rank)

    def restart(self, rank: int, why: str) -> None:
        raise RuntimeError(f"server {self.spec.names[rank]} is out of step: {why}")

    def _recover(self, dead: int) -> None:
        """Restart all engines.

        Raises:
            ClusterError: the engines died again in MAX_FAILED_STARTS starts.
        """
        for _ in range(MAX_FAILED_STARTS):
            what, _, _ = f"its engine {self._fate(dead)}".partition("\n")
            text = f"{what}; all engines restart, requests in flight wait"
            self._notice(self.spec.names[dead], text)
            self._restart()
            try:
                self._bring_up()
            except EngineFailure as failure:
                dead = failure.rank
            else:
                self._down = frozenset()
                self._notice("", "all engines are running again")
                return
        what = f"its engine {self._fate(dead)}, as in the {MAX_FAILED_STARTS - 1} starts before"
        raise self._error(dead, what)

    def _restart(self) -> None:
        """Tell front ends to restart their engines."""
        self._down = frozenset(self.spec.seated)
        self._rebalancer.engines_died(self._down)
        self._died.clear()
        for rank in self.spec.seated:
            self._starts[rank] += 1
            # The front end stays, and with it its Hello.
            self._reached[rank] = {protocol.Hello: self._reached[rank][protocol.Hello]}
            self._endpoints[rank] = ""
            self.tell(rank, protocol.Restart(self._starts[rank], self.layout.to_bytes()))
