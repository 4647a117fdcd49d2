"""Expert calls between servers that step independently, on CPUs (native/calls.h).

A step passes the rows of a layer to `send`, which calls other servers for experts that are not
local. The step goes on while these servers compute. `receive` computes the local experts and adds
the sums from the answers. Each server answers calls from other servers in a thread of the C++
library, independently of its own step.
"""

from __future__ import annotations

import ctypes
import dataclasses
import socket
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dance_jax.models import native
from dance_jax.models.connections import Connections, pace
from dance_jax.models.counters import Counters, Moved, PeerCounters, Sums
from dance_jax.models.kernels_cpu import NativePool
from dance_jax.placement.visit import places

#: Wire types, in the order of their numbers in C++.
_WIRES = ("float32", "bfloat16", "int8")
#: Seconds after which a call is also sent to another holder of the experts, and after which the
#: call fails. Both are longer where calls are expected to take long.
REPEAT_S, FAIL_S = 0.2, 2.0
#: The number of a device's caller is this times the number of its server, plus the device.
_MOST_DEVICES = 1024
#: Limits of the C++ library: servers in a bit set; layers and experts in two bytes each.
_MOST_SERVERS, _MOST_NAMED = 256, 1 << 16


#: Number of the fields of `Sums` without `moved`, the last one, and number of fields in `moved`.
_OWN_SUMS, _MOVED = len(dataclasses.fields(Sums)) - 1, len(dataclasses.fields(Moved))


def check_named(order: Sequence[int], layers: int, experts: int) -> None:
    """Check that expert calls can name all servers, layers and experts.

    Raises:
        ValueError: there are too many of them, or `order` does not list each server once.
    """
    servers = len(order)
    places(np.array(order))
    if servers > _MOST_SERVERS or max(layers, experts) > _MOST_NAMED:
        raise ValueError(
            f"{servers} servers, {layers} layers, {experts} experts: expert calls support at most"
            f" {_MOST_SERVERS} servers, and {_MOST_NAMED} layers of as many experts"
        )


#: Most trace events that are kept until they are taken; later events are lost.
TRACE_EVENTS = 1 << 16
#: Kinds of trace events, and outcomes of calls, by number.
TRACE_KINDS = ("layer", "call", "served")
TRACE_OUTCOMES = ("answered", "refused", "lost", "late")


class TraceEvent(NamedTuple):
    """Timing of a layer or a call, in ns; native/trace.h describes the fields."""

    begin: int = 0
    end: int = 0
    arrived: int = 0
    compute_begin: int = 0
    compute_end: int = 0
    step: int = 0
    id: int = 0
    kind: int = 0
    device: int = 0
    layer: int = 0
    peer: int = 0
    rows: int = 0
    calls: int = 0
    outcome: int = 0
    bytes: int = 0


_EVENT = np.dtype(
    [(name, np.int64 if n < 7 else np.int32) for n, name in enumerate(TraceEvent._fields)]
)


class ExpertCalls(Protocol):
    """One server's side of expert calls: calls to other servers and answers to theirs."""

    @property
    def callers(self) -> Sequence[object]:
        """The callers, one per device."""
        ...

    def use(self, version: int, resident_nle: np.ndarray) -> None:
        """Put a placement in force; later calls go where `resident_nle`, bool [n, l, e], says.

        Args:
            version: version of the placement, the same on all servers and above the previous one.
        """
        ...

    def stage(self, version: int, resident_nle: np.ndarray) -> None:
        """Announce a placement that comes into force later.

        The placement may already be in force on other servers. If such a server refuses a call
        because of this placement, the call goes where the placement says, also during a step.
        """
        ...

    def drop(self, version: int) -> None:
        """Discard a staged placement and those staged after it."""
        ...

    def beats(self) -> int:
        """A number that grows while a layer's calls are made and awaited; from any thread."""
        ...

    def cancel(self) -> None:
        """Make all calls in flight fail within 0.1 s, and later calls at once; from any thread."""
        ...

    def dial(self, device: int, peer: int, connection: socket.socket) -> None:
        """Hand over the connection on which a device calls a peer; replaces the previous one."""
        ...

    def accept(self, peer: int, connection: socket.socket) -> None:
        """Hand over a connection on which a peer calls this server."""
        ...

    def counters(self) -> Counters:
        """The counters so far."""
        ...

    def sums(self) -> Sums:
        """`Counters.sums` alone."""
        ...

    def begin_step(self, step: int) -> None:
        """Set the step number that later calls carry; traces find a step's requests by it."""
        ...

    def start_trace(self, most: int = TRACE_EVENTS) -> None:
        """Start to record calls and layers; call once, before there are connections.

        Args:
            most: events kept until they are taken; further events are lost.
        """
        ...

    def take_trace(self) -> tuple[list[TraceEvent], int]:
        """Events since the last call, ordered by their ends, and the number of lost events."""
        ...

    def close(self) -> None:
        """Close all connections; no step may be in flight."""
        ...


class CallServer:
    """`ExpertCalls` by the C++ library.

    Args:
        rank: rank of this server.
        order: all servers, in the order in which this one prefers to call them
            (placement/visit.py).
        layers: layers with routed experts.
        experts: routed experts of each such layer.
        wire: type of hidden states on the wire.
        most_rows: most rows of a call, which is the tokens of one device in a step.
        pools: the pools of this server's devices.
        repeat_s, fail_s: see REPEAT_S.

    Raises:
        ValueError: there are more servers, layers or experts than a call can name, or the order
            does not list each server once.
    """

    def __init__(
        self,
        rank: int,
        order: Sequence[int],
        layers: int,
        experts: int,
        wire: str,
        most_rows: int,
        pools: Sequence[NativePool],
        repeat_s: float = REPEAT_S,
        fail_s: float = FAIL_S,
    ) -> None:
        library = native.library()
        assert library is not None
        check_named(order, layers, experts)
        self._library, self._shape = library, (len(order), layers, experts)
        library.CallServerNew.restype = library.CallServerBeats.restype = ctypes.c_int64
        limits = (most_rows, int(repeat_s * 1e9), int(fail_s * 1e9))
        numbers = np.array([rank, *self._shape, _WIRES.index(wire), *limits], np.int64)
        preferred = np.array(order, np.int32)
        own = np.array([pool.number for pool in pools], np.int64)
        self._number: int = library.CallServerNew(
            _pointer(numbers), _pointer(preferred), ctypes.c_int64(len(pools)), _pointer(own)
        )
        #: Numbers by which the steps of each device refer to their caller.
        self.callers = [self._number * _MOST_DEVICES + device for device in range(len(pools))]
        self._events = np.zeros(0, _EVENT)
        # The library uses the pools until this call server is deleted.
        self._end = weakref.finalize(self, library.CallServerDelete, ctypes.c_int64(self._number))

    def use(self, version: int, resident_nle: np.ndarray) -> None:
        self._pass_table(self._library.CallServerTable, version, resident_nle)

    def stage(self, version: int, resident_nle: np.ndarray) -> None:
        self._pass_table(self._library.CallServerStage, version, resident_nle)

    def drop(self, version: int) -> None:
        self._library.CallServerDrop(ctypes.c_int64(self._number), ctypes.c_int64(version))

    def beats(self) -> int:
        return self._library.CallServerBeats(ctypes.c_int64(self._number))

    def cancel(self) -> None:
        self._library.CallServerCancel(ctypes.c_int64(self._number))

    def _pass_table(self, function: Any, version: int, resident_nle: np.ndarray) -> None:
        resident = np.ascontiguousarray(resident_nle, np.bool_)
        if resident.shape != self._shape:
            raise ValueError(f"the placement has shape {resident.shape}, expected {self._shape}")
        function(ctypes.c_int64(self._number), ctypes.c_int64(version), _pointer(resident))

    def dial(self, device: int, peer: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._library.CallServerDial(
            ctypes.c_int64(self._number), ctypes.c_int64(device), peer, connection.detach()
        )

    def accept(self, peer: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._library.CallServerAccept(ctypes.c_int64(self._number), peer, connection.detach())

    def counters(self) -> Counters:
        servers, layers, _ = self._shape
        peers = np.zeros((servers, len(dataclasses.fields(PeerCounters))), np.int64)
        rows = np.zeros((layers, servers), np.int64)
        self._library.CallServerCounters(
            ctypes.c_int64(self._number), _pointer(peers), _pointer(rows)
        )
        return Counters(tuple(PeerCounters(*each) for each in peers.tolist()), rows, self.sums())

    def sums(self) -> Sums:
        found = (ctypes.c_double * (_OWN_SUMS + _MOVED))()
        self._library.CallServerSums(ctypes.c_int64(self._number), found)
        return Sums(*found[:_OWN_SUMS], moved=Moved(*found[_OWN_SUMS:]))

    def begin_step(self, step: int) -> None:
        self._library.CallServerStep(ctypes.c_int64(self._number), ctypes.c_int64(step))

    def start_trace(self, most: int = TRACE_EVENTS) -> None:
        self._library.CallServerTrace(ctypes.c_int64(self._number), ctypes.c_int64(most))
        self._events = np.zeros(most, _EVENT)

    def take_trace(self) -> tuple[list[TraceEvent], int]:
        events, lost = self._events, np.zeros(1, np.int64)
        self._library.CallServerTakeTrace.restype = ctypes.c_int64
        count = self._library.CallServerTakeTrace(
            ctypes.c_int64(self._number),
            _pointer(events),
            ctypes.c_int64(len(events)),
            _pointer(lost),
        )
        return [*map(TraceEvent._make, events[:count].tolist())], int(lost[0])

    def close(self) -> None:
        """Close all connections once no call is running; calls after that are errors."""
        self._end()


def connect(server: ExpertCalls, connections: Connections, topic: str = "calls") -> None:
    """Let other servers call `server`, and dial all of them, again whenever one has restarted.

    Args:
        server: this server's end of the calls.
        connections: of this server.
        topic: distinguishes the connections of several `ExpertCalls`.

    Raises:
        RuntimeError: a server cannot be reached.
    """

    def paced(peer: int, connection: socket.socket) -> socket.socket:
        rates = connections.rates
        pace(connection, rates[connections.rank], rates[peer])
        return connection

    connections.handle(topic, lambda peer, _, each: server.accept(peer, paced(peer, each)))
    connections.dial_all(
        topic,
        len(server.callers),
        lambda peer, device, each: server.dial(device, peer, paced(peer, each)),
    )


def send(
    caller: Array,
    layer: Array,
    x_td: Array,
    expert_tk: Array,
    weight_tk: Array,
    valid_t: Array,
    then: Array,
    first: int = 0,
) -> Array:
    """Send the expert calls for a group of a layer's rows.

    Args:
        caller: int32 [], one of `CallServer.callers`.
        layer: int32 [], index among the layers with routed experts.
        x_td: [t, d] of any float type.
        expert_tk: int32 [t, k]; weight_tk: float32 [t, k].
        valid_t: bool [t], False for rows that are not routed.
        then: any array.
        first: number of the layer's rows in earlier groups.

    Returns:
        `then`, unchanged. Computations that use the result run after the calls are sent.
    """
    # The call is not marked as having side effects, because JAX would then run the program from
    # Python. Data dependencies through `then` fix the order instead.
    result = jax.ShapeDtypeStruct(then.shape, then.dtype)
    call = jax.ffi.ffi_call(native.target("SendCalls"), result)
    rows = (x_td.astype(jnp.float32), expert_tk, weight_tk, valid_t)
    return call(caller, layer, *rows, then, first=np.int64(first))


@jax.named_scope("experts")
def receive(
    caller: Array, shape: tuple[int, int], behind: Array, first: int = 0
) -> tuple[Array, Array]:
    """Compute a group's local experts, wait for the answers to its calls, and add all sums.

    Args:
        shape: (t, d) of the group.
        behind: any array that depends on the result of `send`; it is computed first.

    Returns:
        float32 [t, d], the weighted sums of each row's experts, local and remote; and bool [t],
        rows that failed because no server answered for an expert.
    """
    sums, flags = jnp.float32, jnp.bool_
    results = jax.ShapeDtypeStruct(shape, sums), jax.ShapeDtypeStruct(shape[:1], flags)
    call = jax.ffi.ffi_call(native.target("ReceiveSums"), results)
    sums_td, failed_t = call(caller, behind, first=np.int64(first))
    return sums_td, failed_t


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
