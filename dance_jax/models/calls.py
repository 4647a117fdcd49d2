"""Expert calls between servers that step on their own, on CPUs: native/calls.h.

A step hands a layer's rows to `send`, which asks other servers for experts that are not here. While
they compute, the step goes on. `receive` computes the experts that are here, and adds what the
others answer. Each server answers the others' calls in a thread of the C++ library, whatever its
own step does.
"""

from __future__ import annotations

import ctypes
import dataclasses
import socket
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dance_jax.models import native
from dance_jax.models.connections import Key, PeerListener, dial, pace
from dance_jax.models.counters import Counters, Moved, PeerCounters, Sums
from dance_jax.models.kernels_cpu import NativePool
from dance_jax.placement.visit import places

#: Kinds of a wire by their numbers in C++.
_WIRES = ("float32", "bfloat16", "int8")
#: Seconds after which a call is sent to another holder as well, and after which it fails; both are
#: longer where calls are expected to take long.
REPEAT_S, FAIL_S = 0.2, 2.0
#: A device's caller is its server's number times this, and the device.
_MOST_DEVICES = 1024
#: Servers in a set of them, and layers and experts of two bytes, in C++.
_MOST_SERVERS, _MOST_NAMED = 256, 1 << 16


#: Fields of `Sums` but for the last one, whose fields are so many.
_OWN_SUMS, _MOVED = len(dataclasses.fields(Sums)) - 1, len(dataclasses.fields(Moved))


def check_named(order: Sequence[int], layers: int, experts: int) -> None:
    """Raises ValueError if there are more servers, layers or experts than a call can name, or if
    the order does not list each server once."""
    servers = len(order)
    places(np.array(order))
    if servers > _MOST_SERVERS or max(layers, experts) > _MOST_NAMED:
        raise ValueError(
            f"{servers} servers, {layers} layers, {experts} experts: expert calls can name"
            f" {_MOST_SERVERS} servers, and {_MOST_NAMED} layers of as many experts"
        )


#: Events of a trace that are kept until they are taken.
TRACE_EVENTS = 1 << 16
#: Kinds of them, and outcomes of calls, by number.
TRACE_KINDS = ("layer", "call", "served")
TRACE_OUTCOMES = ("answered", "refused", "lost", "late")


class TraceEvent(NamedTuple):
    """What a layer or a call took; native/trace.h says what each field is. Times are in ns."""

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
    """One server's part in the calls of all."""

    @property
    def callers(self) -> Sequence[object]:
        """One for each device."""
        ...

    def use(self, version: int, resident_nle: np.ndarray) -> None:
        """From now on experts are looked for where `resident_nle`, bool [n, l, e], says.

        Args:
            version: of the placement, the same on all servers, and greater than that before.
        """
        ...

    def stage(self, version: int, resident_nle: np.ndarray) -> None:
        """A placement will be in force, and may be on other servers: what those refuse by it is
        looked for where it says, in the middle of a step too."""
        ...

    def drop(self, version: int) -> None:
        """A staged placement, and those after it, will not be in force."""
        ...

    def cancel(self) -> None:
        """All calls under way fail within 0.1 s, and later ones at once; any thread may say so."""
        ...

    def dial(self, device: int, peer: int, connection: socket.socket) -> None:
        """Hands over a connection on which a device calls a peer, in place of the one before."""
        ...

    def accept(self, peer: int, connection: socket.socket) -> None:
        """Hands over a connection on which a peer calls this server."""
        ...

    def counters(self) -> Counters:
        """What was counted so far."""
        ...

    def sums(self) -> Sums:
        """`Counters.sums` alone."""
        ...

    def begin_step(self, step: int) -> None:
        """Calls carry the number of this step from here on, by which traces find its requests."""
        ...

    def start_trace(self, most: int = TRACE_EVENTS) -> None:
        """Records calls and layers from here on; once, before there are connections.

        Args:
            most: events that are kept until they are taken; what comes then is lost.
        """
        ...

    def take_trace(self) -> tuple[list[TraceEvent], int]:
        """Events since the last time, in the order of their ends; and how many were lost."""
        ...

    def close(self) -> None:
        """Ends all connections; no step may be under way."""
        ...


class CallServer:
    """The `ExpertCalls` of the C++ library.

    Args:
        rank: this server's.
        order: all servers in the order in which this one prefers to call them
            (placement/visit.py).
        layers: with routed experts, of so many `experts` each.
        wire: type in which hidden states travel.
        most_rows: of a call: tokens of one device in a step.
        pools: of this server's devices.
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
        library.CallServerNew.restype = ctypes.c_int64
        limits = (most_rows, int(repeat_s * 1e9), int(fail_s * 1e9))
        numbers = np.array([rank, *self._shape, _WIRES.index(wire), *limits], np.int64)
        preferred = np.array(order, np.int32)
        own = np.array([pool.number for pool in pools], np.int64)
        self._number: int = library.CallServerNew(
            _pointer(numbers), _pointer(preferred), ctypes.c_int64(len(pools)), _pointer(own)
        )
        #: By which the steps of each device name it.
        self.callers = [self._number * _MOST_DEVICES + device for device in range(len(pools))]
        # The library computes with the pools until it is gone.
        self._events = np.zeros(0, _EVENT)
        self._end = weakref.finalize(self, library.CallServerDelete, ctypes.c_int64(self._number))

    def use(self, version: int, resident_nle: np.ndarray) -> None:
        self._tell(self._library.CallServerTable, version, resident_nle)

    def stage(self, version: int, resident_nle: np.ndarray) -> None:
        self._tell(self._library.CallServerStage, version, resident_nle)

    def drop(self, version: int) -> None:
        self._library.CallServerDrop(ctypes.c_int64(self._number), ctypes.c_int64(version))

    def cancel(self) -> None:
        self._library.CallServerCancel(ctypes.c_int64(self._number))

    def _tell(self, function: Any, version: int, resident_nle: np.ndarray) -> None:
        resident = np.ascontiguousarray(resident_nle, np.bool_)
        if resident.shape != self._shape:
            raise ValueError(f"a placement of shape {resident.shape}, not {self._shape}")
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
        """Ends all connections once no call runs; later ones are errors."""
        self._end()


class Lines:
    """A server's connections for expert calls: its own to the others, and theirs to it.

    Args:
        rank: this server's.
        names: of all servers, by rank.
        listener: this server's; from now on the others' connections are let in.
        key: of the servers.
        topic: tells the connections of several `CallServer`s apart.
        rates: of all servers' links, by rank, in bits per second; None: unknown.
    """

    def __init__(
        self,
        rank: int,
        names: Sequence[str],
        listener: PeerListener,
        key: Key,
        topic: str = "calls",
        rates: Sequence[float | None] = (),
    ) -> None:
        self._rank, self._names, self._key, self._topic = rank, names, key, topic
        self._rates = rates or (None,) * len(names)
        self._lock = threading.Lock()
        self._server: ExpertCalls | None = None
        #: What came before there was a server.
        self._early: list[tuple[int, socket.socket]] = []
        listener.on(topic, self._admit)

    def _admit(self, peer: int, _: int, connection: socket.socket) -> None:
        with self._lock:
            if self._server is None:
                self._early.append((peer, connection))
            else:
                self._accept(self._server, peer, connection)

    def _accept(self, server: ExpertCalls, peer: int, connection: socket.socket) -> None:
        self._pace(peer, connection)
        server.accept(peer, connection)

    def _pace(self, peer: int, connection: socket.socket) -> None:
        pace(connection, self._rates[self._rank], self._rates[peer])

    def connect(self, server: ExpertCalls, endpoints: Sequence[str]) -> None:
        """Lets the others call a server, and dials all of them.

        Args:
            endpoints: where servers listen, by rank; "": one does not yet, it is dialled later.

        Raises:
            RuntimeError: one cannot be reached.
        """
        with self._lock:
            self._server = server
            for peer, connection in self._early:
                self._accept(server, peer, connection)
            self._early.clear()
        for peer, endpoint in enumerate(endpoints):
            if peer != self._rank and endpoint:
                self.dial(peer, endpoint)

    def dial(self, peer: int, endpoint: str) -> None:
        """Connects with a server, perhaps anew.

        Raises:
            RuntimeError: it cannot be reached.
        """
        assert self._server is not None
        for device in range(len(self._server.callers)):
            connection = dial(
                self._rank, peer, self._names[peer], endpoint, self._key, self._topic, device
            )
            self._pace(peer, connection)
            self._server.dial(device, peer, connection)


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
    """Sends calls for a group of a layer's rows.

    Args:
        caller: int32 [], of `CallServer.callers`.
        layer: int32 [], which of the layers with routed experts.
        x_td: [t, d] of any float type.
        expert_tk: int32 [t, k]; weight_tk: float32 [t, k].
        valid_t: bool [t], False for rows that are routed nowhere.
        then: any array.
        first: rows of the layer in the groups before it.

    Returns:
        `then`: what is computed from it is computed when the calls are sent.
    """
    # Not as a call with side effects: JAX would drive such a program from Python. The arrays that
    # go through say what comes before what.
    result = jax.ShapeDtypeStruct(then.shape, then.dtype)
    call = jax.ffi.ffi_call(native.target("SendCalls"), result)
    rows = (x_td.astype(jnp.float32), expert_tk, weight_tk, valid_t)
    return call(caller, layer, *rows, then, first=np.int64(first))


@jax.named_scope("experts")
def receive(
    caller: Array, shape: tuple[int, int], behind: Array, first: int = 0
) -> tuple[Array, Array]:
    """Weighted sums of each row's experts, wherever they are, of a group whose calls are sent.

    Args:
        shape: t, d of the group.
        behind: any array that follows from what `send` returned, and is computed before.

    Returns:
        float32 [t, d]; and bool [t], the rows that have failed, as nobody answered for them.
    """
    sums, flags = jnp.float32, jnp.bool_
    results = jax.ShapeDtypeStruct(shape, sums), jax.ShapeDtypeStruct(shape[:1], flags)
    call = jax.ffi.ffi_call(native.target("ReceiveSums"), results)
    sums_td, failed_t = call(caller, behind, first=np.int64(first))
    return sums_td, failed_t


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
