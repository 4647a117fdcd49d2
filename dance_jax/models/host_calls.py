"""Expert calls by the host, for servers with accelerators or without the C++ library.

The protocol is that of native/wire.h, so one cluster can have servers of both kinds. The host runs
the parts of a step (engine/step.py): it copies a layer's rows from the devices, calls other servers
for experts that are not local, lets the devices compute the local experts, and waits only for the
answers to its own calls (host_caller.py). A thread answers calls from other servers, independently
of the step (host_answerer.py). This thread makes no calls, so two servers cannot deadlock.
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
    """`ExpertCalls` by the host.

    Args:
        devices: number of devices of this server.
        compute: computes local experts.
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
        """Weighted sums of the experts of each device's rows, local and remote.

        Only one thread at a time may call this.

        Returns:
            For each device float32 [t, d]; and bool [t], rows that failed because no server
            answered for an expert.
        """
        if len(rows) == 1:
            return [self.callers[0].run(rows[0])]
        return list(self._threads.map(HostCaller.run, self.callers, rows))

    def close(self) -> None:
        self._answerer.close()
        self._threads.shutdown()
        for caller in self.callers:
            caller.close()
