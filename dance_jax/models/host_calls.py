"""Expert calls by the host: for servers with accelerators, or without the C++ library.

The protocol is that of native/wire.h, so that servers of both forms are in one cluster. The host
drives the parts of a step (engine/step.py): it takes a layer's rows from the devices, asks other
servers for the experts that are not here, has the devices compute those that are, and waits for
its own answers alone (host_caller.py). One thread answers the others' calls, whatever the step
does (host_answerer.py); it makes no call, so no two servers can wait for each other.
"""

from __future__ import annotations

import concurrent.futures
import socket
from collections.abc import Sequence

import numpy as np

from dance_jax.models.host_answerer import HostAnswerer
from dance_jax.models.host_caller import HostCaller, HostRows
from dance_jax.models.host_state import CallSpec, Compute, HostState


class HostCallServer(HostState):
    """The `ExpertCalls` that the host does itself.

    Args:
        devices: of this server.
        compute: the experts that are here.
    """

    def __init__(self, spec: CallSpec, devices: int, compute: Compute) -> None:
        super().__init__(spec, compute)
        self.callers = [HostCaller(self, device) for device in range(devices)]
        self._threads = concurrent.futures.ThreadPoolExecutor(devices, "caller")
        self._answerer = HostAnswerer(self)

    def dial(self, device: int, peer: int, connection: socket.socket) -> None:
        self.callers[device].dial(peer, connection)

    def accept(self, peer: int, connection: socket.socket) -> None:
        self._answerer.accept(peer, connection)

    def run(self, rows: Sequence[HostRows]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Weighted sums of the experts of each device's rows, wherever they are; one thread at a
        time.

        Returns:
            Of each device float32 [t, d]; and bool [t], the rows that have failed, as nobody
            answered for them.
        """
        if len(rows) == 1:
            return [self.callers[0].run(rows[0])]
        return list(self._threads.map(HostCaller.run, self.callers, rows))

    def close(self) -> None:
        self._answerer.close()
        self._threads.shutdown()
        for caller in self.callers:
            caller.close()
