"""What a placement costs: predicted seconds of a layer, in each way in which servers can work."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np

from dance_jax.config import UserError
from dance_jax.placement import times
from dance_jax.placement.visit import preferences

#: The weight of a transfer where nothing is known, in hidden states through the busiest link.
REFERENCE_TRANSFER = 0.3
#: A step of this many rows, a slice of a prompt, for each REFERENCE_STEPS steps of one row, where
#: nothing is known: a request with a prompt about as long as its answer.
REFERENCE_SLICE = REFERENCE_STEPS = 64
#: Part of the time in which the mean device computes, where nothing is known.
REFERENCE_BUSY = 0.5


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Cost(abc.ABC):
    """Seconds of what a layer is made of, and how they make its time.

    Raises:
        UserError: a number is negative or not finite, or the numbers of servers disagree.
    """

    #: float64 [servers]: seconds that a hidden state occupies the link of a server in one
    #: direction, its partial sum on the way back included (2 x bytes / bandwidth).
    state: np.ndarray
    #: float64 [servers]: seconds of one expert call on one device of a server.
    call: np.ndarray
    #: int64 [servers]: devices of each server, which share its calls evenly.
    devices: np.ndarray
    #: int32 [servers, servers]: in which order each server calls the others; None: as this cost
    #: predicts, see `preferences`.
    order: np.ndarray | None = None

    #: Servers step together: a layer's time is that of blocks in which all of them have tokens.
    together: ClassVar[bool]

    def __post_init__(self):
        devices = np.asarray(self.devices)
        if devices.ndim != 1 or devices.dtype.kind not in "iu" or (devices < 1).any():
            raise UserError(f"cost: every server needs a whole number of devices; got {devices}")
        for field in dataclasses.fields(self):
            if field.name == "order":
                continue
            value = np.asarray(getattr(self, field.name), float)
            if not (np.isfinite(value) & (value >= 0)).all():
                raise UserError(f"cost: {field.name} must be finite and at least 0; got {value}")
            if field.type == "np.ndarray":
                object.__setattr__(self, field.name, value)
        for name in self._per_server:
            if getattr(self, name).shape != devices.shape:
                raise UserError(
                    f"cost: {name} {getattr(self, name).shape} and devices {devices.shape} need "
                    "one number per server each"
                )
        object.__setattr__(self, "devices", devices.astype(np.int64))

    @property
    def _per_server(self) -> tuple[str, ...]:
        """Fields with one number per server."""
        return ("state", "call")

    @property
    def servers(self) -> int:
        """How many there are."""
        return len(self.devices)

    @abc.abstractmethod
    def times(self, weights: np.ndarray, dtype: Any = np.float32) -> times.Times:
        """The formula of this cost.

        Args:
            weights: float [servers], tokens of each server per token of the mean server; 0 for
                servers without any.
            dtype: of its numbers.
        """

    def preferences(self) -> np.ndarray:
        """In which order each server prefers to call the others: int32 [servers, servers]."""
        if self.order is not None:
            return self.order
        return call_order(self.state, self.call, self._round)

    @property
    def _round(self) -> np.ndarray | None:
        """`CallCost.round`; None: servers do not call each other."""
        return None

    @classmethod
    def of_links(
        cls, state: Sequence[float] | np.ndarray, devices: Sequence[int] | np.ndarray, k: int
    ) -> Self:
        """`reference`, on links of unequal speed: their mean takes the place of its unit.

        Args:
            state: float [servers], as in `Cost`.
            devices: int [servers].
            k: experts a token chooses in a layer.
        """
        state_n, unit = np.asarray(state, float), float(np.mean(state))
        call_n = np.full(len(state_n), unit / (k * len(state_n)))
        besides = cls._besides(unit, len(state_n))
        return cls(state=state_n, call=call_n, devices=np.asarray(devices), **besides)

    @classmethod
    @abc.abstractmethod
    def _besides(cls, unit: float, servers: int) -> dict[str, Any]:
        """The other fields in `of_links`, where a hidden state takes `unit` on the mean link."""

    @classmethod
    def reference(cls, devices: Sequence[int] | np.ndarray, k: int) -> Self:
        """Weights where nothing is known, in hidden states through a link.

        All links and all devices are equal, and one device that computed all calls of a layer would
        take as long as one state of each token.

        Args:
            devices: int [servers].
            k: experts a token chooses in a layer.
        """
        return cls.of_links(np.ones(len(devices)), devices, k)


def call_order(
    state_n: np.ndarray, call_n: np.ndarray, round_n: np.ndarray | None = None
) -> np.ndarray:
    """In which order each server prefers to call the others: the shortest call of one expert first.

    Args:
        state_n, call_n, round_n: float [servers], as in `Cost` and `CallCost`; None: no round.

    Returns:
        int32 [servers, servers], see `visit.preferences`.
    """
    round_n = np.zeros(len(state_n)) if round_n is None else round_n
    moving_nm = np.maximum(state_n[:, None], state_n)
    return preferences(round_n[:, None] + round_n + moving_nm + call_n)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CallCost(Cost):
    """Of servers that step on their own and call each other's experts.

    What waits is a step of a server: in each layer in which any of its rows misses an expert, for
    the slowest of the servers that it calls; see `times.CallTimes`.
    """

    #: float64 [servers]: seconds of a call and its answer without their bytes and what is computed;
    #: between two servers it is the sum of both.
    round: np.ndarray
    #: Numbers of rows, and how many steps have so many, in any unit.
    rows: tuple[tuple[float, float], ...] = (
        (1, REFERENCE_STEPS / (REFERENCE_STEPS + 1)),
        (REFERENCE_SLICE, 1 / (REFERENCE_STEPS + 1)),
    )
    #: Part of the time in which the mean device computes, and the mean link moves bytes; from 0 to
    #: 1. Calls wait for others the longer the more there is of it.
    busy: float = REFERENCE_BUSY

    together: ClassVar[bool] = False

    @property
    def _per_server(self) -> tuple[str, ...]:
        return (*super()._per_server, "round")

    @property
    def _round(self) -> np.ndarray:
        return self.round

    def __post_init__(self):
        super().__post_init__()
        if not self.rows or any(rows < 1 for rows, _ in self.rows):
            raise UserError(f"cost: steps of at least one row are needed; got {self.rows}")
        if not self.busy <= 1:
            raise UserError(f"cost: busy is from 0 to 1; got {self.busy}")

    @classmethod
    def _besides(cls, unit: float, servers: int) -> dict[str, Any]:
        """A round takes as long as a hidden state."""
        return {"round": np.full(servers, unit / 2)}

    def times(self, weights: np.ndarray, dtype: Any = np.float32) -> times.CallTimes:
        rows, steps = np.array(self.rows).T
        return times.CallTimes(
            weight=jnp.asarray(weights, dtype),
            state=jnp.asarray(self.state, dtype),
            call=jnp.asarray(self.call / self.devices, dtype),
            round=jnp.asarray(self.round, dtype),
            rows=jnp.asarray(rows, dtype),
            steps=jnp.asarray(steps / steps.sum(), dtype),
            busy=jnp.asarray(self.busy, dtype),
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LockStepCost(Cost):
    """Of servers that do every step together, each waiting in each layer for the slowest part.

    The time of a layer is what passes through the busiest link direction, what the busiest device
    computes, what every transfer costs besides, and a fixed part; see `times.LockStepTimes`.
    """

    #: Seconds of every transfer wherever it goes (packing, unpacking).
    transfer: float = 0.0
    #: Fixed seconds of every layer (latency of the links, the calls themselves).
    layer: float = 0.0

    together: ClassVar[bool] = True

    def staggered(self, share: float, servers: int | None = None) -> LockStepCost:
        """The cost where servers have tokens one at a time, for a share of what crosses links.

        `state` counts on the busiest link alone, as all links carry at the same time what tokens
        of all servers send. A server that reads a long prompt while the others have little to do
        is the busiest whatever is placed on the others: then all its transfers count.

        Args:
            share: from 0 to 1, see `staggered_share`.
            servers: that have any tokens; None: all.

        Raises:
            UserError: it is not.
        """
        if not 0 <= share <= 1:
            raise UserError(f"cost: a share is from 0 to 1; got {share}")
        one = share * (servers or len(self.state)) * float(np.mean(self.state))
        state = (1.0 - share) * self.state
        return dataclasses.replace(self, state=state, transfer=self.transfer + one)

    @classmethod
    def _besides(cls, unit: float, servers: int) -> dict[str, Any]:
        """So that a layer takes `busiest` + `load` + 0.3 `transfers`."""
        return {"transfer": REFERENCE_TRANSFER * unit}

    def times(self, weights: np.ndarray, dtype: Any = np.float32) -> times.LockStepTimes:
        return times.LockStepTimes(
            weight=jnp.asarray(weights, dtype),
            state=jnp.asarray(self.state, dtype),
            call=jnp.asarray(self.call / self.devices, dtype),
            transfer=jnp.asarray(self.transfer, dtype),
            layer=jnp.asarray(self.layer, dtype),
        )


def staggered_share(observed: float, together: float) -> float:
    """How much of what crosses links does so while one server has tokens, from 0 to 1.

    Args:
        observed: hidden states through the busiest link direction of each layer, over all hidden
            states, both summed over all steps that were done.
        together: the same if all servers had their tokens at once (`Traffic.concentration`); with
            one server at a time it is 1.
    """
    return float(np.clip((observed - together) / (1.0 - together), 0, 1)) if together < 1 else 0.0


def of_pairs(mean_n: np.ndarray) -> np.ndarray:
    """Parts of servers in what pairs take: float64 [servers], at least 0.

    Args:
        mean_n: float [servers], of each server the mean over the others of both parts' sum.
    """
    servers = len(mean_n)
    if servers < 3:
        return np.asarray(mean_n) / 2
    total = np.sum(mean_n) / 2
    return np.maximum((np.asarray(mean_n) * (servers - 1) - total) / (servers - 2), 0.0)
