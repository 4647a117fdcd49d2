"""A cluster for batches: the parent of one engine per server, which distributes requests."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from dance_jax.config import UserError
from dance_jax.engine.sequence import OutputDelta, Request
from dance_jax.launch.cluster.fleet import ClusterError, Fleet
from dance_jax.launch.control import protocol

if TYPE_CHECKING:
    from dance_jax.engine.report import EngineStats

#: Seconds for an aborted batch to end before the engines are stopped.
ABORT_TIMEOUT_S = 5.0


class Cluster(Fleet):
    """The servers of a hosts file, each an engine process on this machine or over ssh.

    See `Fleet` for the arguments.
    """

    module = "dance_jax.launch.worker.main"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: By rank, as of the last batch.
        self._stats: dict[int, EngineStats] = {}
        self._stopped_by = ""
        #: Samples of the running batch that have not finished.
        self._left = 0

    def generate(self, requests: Iterable[tuple[int, Request]]) -> Generator[OutputDelta]:
        """Run requests on their servers, all servers at the same time, until all have finished.

        Args:
            requests: (rank of the server, request).

        Yields:
            Deltas as the servers send them. Closing the generator early aborts the remaining
            requests.

        Raises:
            ClusterError: a server failed; all servers are stopped.
        """
        if not self.started:
            why = f": it was stopped by {self._stopped_by}" if self._stopped_by else ""
            raise RuntimeError(f"the cluster is not running{why}; start a new one")
        batches: list[list[Request]] = [[] for _ in self.spec.servers]
        for rank, request in requests:
            batches[rank].append(request)
        # Encode all batches first, so that an encoding error leaves no server with requests.
        work = [protocol.encode(protocol.Submit(batch)) for batch in batches]
        self._left = sum(request.params.n for batch in batches for request in batch)
        try:
            for rank, encoded in enumerate(work):
                self._send(rank, encoded)
            while self._left:
                yield from self._deltas()
            self._count()
        except GeneratorExit:
            self._abort()
            raise
        except BaseException as error:
            self._stopped_by = str(error).partition("\n")[0] or type(error).__name__
            self.stop()
            raise

    def stats(self) -> list[EngineStats]:
        """Each server's statistics since its start, as of the last batch."""
        return [self._stats[rank] for rank in range(len(self.spec.servers))]

    def _decode(self, rank: int, content: bytes) -> protocol.Event:
        return protocol.decode_event(content)

    def _deltas(self) -> list[OutputDelta]:
        deltas = [
            delta
            for _, event in self._events()
            if isinstance(event, protocol.Deltas)
            for delta in event.deltas
        ]
        self._left -= sum(delta.finish_reason is not None for delta in deltas)
        return deltas

    def _count(self) -> None:
        """Fetch the statistics of all servers."""
        # Imported here, because it imports JAX.
        from dance_jax.engine.report import EngineStats

        self._send_all(protocol.AskStats())
        missing = set(range(len(self.spec.servers)))
        while missing:
            for rank, event in self._events():
                if isinstance(event, protocol.Stats):
                    self._stats[rank] = msgspec.msgpack.decode(event.stats, type=EngineStats)
                    missing.discard(rank)

    def _abort(self) -> None:
        """Abort a batch; stops the cluster if the batch does not end in time."""
        deadline = time.monotonic() + ABORT_TIMEOUT_S
        with contextlib.suppress(ClusterError, UserError):
            self._send_all(protocol.Abort())
            while self._left and time.monotonic() < deadline:
                self._deltas()
            if not self._left:
                self._count()
                return
        self.stop()
