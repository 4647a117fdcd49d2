"""What a placement costs: the parts of a layer's predicted time, for either exchange.

`CallCost` is for servers that step on their own, `LockStepCost` for servers that step together.
"""

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

#: Weight of a transfer where no rate is known, in hidden states through the busiest link.
REFERENCE_TRANSFER = 0.3
#: Where nothing is known of steps, one of REFERENCE_SLICE rows, a slice of a prompt, is assumed for
#: every REFERENCE_STEPS steps of one row: requests whose prompt is about as long as their answer.
REFERENCE_SLICE = REFERENCE_STEPS = 64
#: Fraction of the time in which the mean device computes, where it is not known.
REFERENCE_BUSY = 0.5


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Cost(abc.ABC):
    """Seconds that the parts of a layer take on each server, and the formula of the layer's time.

    Raises:
        UserError: a number is negative or not finite, or fields disagree on the number of servers.
    """

    #: float64 [servers]: seconds that a hidden state occupies the link of a server in one
    #: direction, including its partial sum on the way back (2 x bytes / bandwidth).
    state: np.ndarray
    #: float64 [servers]: seconds of one expert call on one device of a server.
    call: np.ndarray
    #: int64 [servers]: devices of each server, which share its calls evenly.
    devices: np.ndarray
    #: int32 [servers, servers]: the order in which each server calls the others; None: the order
    #: that this cost predicts, see `preferences`.
    order: np.ndarray | None = None

    #: Servers step together: the time of a layer is that of blocks in which every server has
    #: tokens.
    together: ClassVar[bool]
    #: Fields with one number per server, besides `devices`.
    _per_server: ClassVar[tuple[str, ...]] = ("state", "call")

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
            if field.name in self._per_server:
                if value.shape != devices.shape:
                    raise UserError(
                        f"cost: {field.name} {value.shape} and devices {devices.shape} need "
                        "one number per server each"
                    )
                object.__setattr__(self, field.name, value)
        object.__setattr__(self, "devices", devices.astype(np.int64))

    @property
    def servers(self) -> int:
        """The number of servers."""
        return len(self.devices)

    @abc.abstractmethod
    def times(self, weights: np.ndarray, dtype: Any = np.float32) -> times.Times:
        """The formula of this cost, for jit.

        Args:
            weights: float [servers], tokens of each server per token of the mean server; 0 for
                servers without tokens.
            dtype: of its numbers.
        """

    def preferences(self) -> np.ndarray:
        """The order in which each server prefers to call the others: int32 [servers, servers]."""
        if self.order is not None:
            return self.order
        return call_order(self.state, self.call, self._round)

    @property
    def _round(self) -> np.ndarray | None:
        """`CallCost.round`; None in lock step."""
        return None

    @classmethod
    def of_links(
        cls, state: Sequence[float] | np.ndarray, devices: Sequence[int] | np.ndarray, k: int
    ) -> Self:
        """As `reference`, in seconds: links may be unequal, and the mean link is the unit.

        Args:
            state: float [servers], as in `Cost`.
            devices: int [servers].
            k: experts that a token chooses in a layer.
        """
        state_n, unit = np.asarray(state, float), float(np.mean(state))
        call_n = np.full(len(state_n), unit / (k * len(state_n)))
        besides = cls._besides(unit, len(state_n))
        return cls(state=state_n, call=call_n, devices=np.asarray(devices), **besides)

    @classmethod
    @abc.abstractmethod
    def _besides(cls, unit: float, servers: int) -> dict[str, Any]:
        """Values of the other fields for `of_links`; `unit` is a hidden state on the mean link."""

    @classmethod
    def reference(cls, devices: Sequence[int] | np.ndarray, k: int) -> Self:
        """The cost where nothing is known; its unit is one hidden state through a link.

        All links are equal and so are all devices. A device that computed every call of a layer
        would take as long as one hidden state of each token.

        Args:
            devices: int [servers].
            k: experts that a token chooses in a layer.
        """
        return cls.of_links(np.ones(len(devices)), devices, k)


def call_order(
    state_n: np.ndarray, call_n: np.ndarray, round_n: np.ndarray | None = None
) -> np.ndarray:
    """The order in which each server prefers to call the others: the quickest expert call first.

    Args:
        state_n, call_n, round_n: float [servers], as in `Cost` and `CallCost`; None: round trips
            take no time.

    Returns:
        int32 [servers, servers], see `visit.preferences`.
    """
    round_n = np.zeros(len(state_n)) if round_n is None else round_n
    moving_nm = np.maximum(state_n[:, None], state_n)
    return preferences(round_n[:, None] + round_n + moving_nm + call_n)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CallCost(Cost):
    """The cost of servers that step on their own and call each other's experts.

    In each layer in which any row of a step misses an expert, the step waits for the slowest of the
    servers that it calls; see `times.CallTimes`.
    """

    #: float64 [servers]: the server's part in the seconds of a call and its answer, without their
    #: bytes and the computation. Between two servers it is the sum of both parts.
    round: np.ndarray
    #: Pairs of a number of rows and how many steps have that many rows, in any unit.
    rows: tuple[tuple[float, float], ...] = (
        (1, REFERENCE_STEPS / (REFERENCE_STEPS + 1)),
        (REFERENCE_SLICE, 1 / (REFERENCE_STEPS + 1)),
    )
    #: Fraction of the time, from 0 to 1, in which the mean device computes, and the mean link moves
    #: bytes. The larger it is, the longer calls queue.
    busy: float = REFERENCE_BUSY

    together: ClassVar[bool] = False
    _per_server: ClassVar[tuple[str, ...]] = ("state", "call", "round")

    @property
    def _round(self) -> np.ndarray:
        return self.round

    def __post_init__(self):
        super().__post_init__()
        if any(rows < 1 for rows, _ in self.rows) or not sum(steps for _, steps in self.rows):
            raise UserError(f"cost: steps of at least one row are needed; got {self.rows}")
        if not self.busy <= 1:
            raise UserError(f"cost: busy is from 0 to 1; got {self.busy}")

    @classmethod
    def _besides(cls, unit: float, servers: int) -> dict[str, Any]:
        """A round trip takes as long as a hidden state."""
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
    """The cost of servers that do every step together: all wait for the slowest part of a layer.

    The time of a layer is that of the busiest link direction, of the busiest device, and of every
    transfer; see `times.LockStepTimes`.
    """

    #: Seconds of every transfer, whatever its destination (packing, unpacking).
    transfer: float = 0.0

    together: ClassVar[bool] = True

    def staggered(self, share: float, servers: int | None = None) -> LockStepCost:
        """The cost when, for a share of the transfers, only one server has tokens.

        `state` counts on the busiest link alone, because all links carry the tokens of all servers
        at the same time. A server that reads a long prompt while the others have little to do is
        the busiest wherever experts are: then all its transfers count.

        Args:
            share: from 0 to 1, see `staggered_share`.
            servers: number of servers that have tokens; None: all.

        Raises:
            UserError: the share is out of range.
        """
        if not 0 <= share <= 1:
            raise UserError(f"cost: a share is from 0 to 1; got {share}")
        one = share * (servers or len(self.state)) * float(np.mean(self.state))
        state = (1.0 - share) * self.state
        return dataclasses.replace(self, state=state, transfer=self.transfer + one)

    @classmethod
    def _besides(cls, unit: float, servers: int) -> dict[str, Any]:
        """A layer takes `busiest` + `load` + 0.3 `transfers`."""
        return {"transfer": REFERENCE_TRANSFER * unit}

    def times(self, weights: np.ndarray, dtype: Any = np.float32) -> times.LockStepTimes:
        return times.LockStepTimes(
            weight=jnp.asarray(weights, dtype),
            state=jnp.asarray(self.state, dtype),
            call=jnp.asarray(self.call / self.devices, dtype),
            transfer=jnp.asarray(self.transfer, dtype),
        )


def staggered_share(observed: float, together: float) -> float:
    """The share of transfers that were sent while only one server had tokens, from 0 to 1.

    Args:
        observed: hidden states through the busiest link direction of each layer, over all hidden
            states, both summed over all steps.
        together: the same if all servers had their tokens at the same time
            (`Traffic.concentration`). With one server at a time it is 1.
    """
    return float(np.clip((observed - together) / (1.0 - together), 0, 1)) if together < 1 else 0.0


def of_pairs(mean_n: np.ndarray) -> np.ndarray:
    """Splits the seconds of pairs of servers into a part of each server: float64 [servers].

    The seconds of a pair are the sum of its two parts. No part is below 0.

    Args:
        mean_n: float [servers], for each server the mean seconds of its pairs with all others.
    """
    servers = len(mean_n)
    if servers < 3:
        return np.asarray(mean_n) / 2
    total = np.sum(mean_n) / 2
    return np.maximum((np.asarray(mean_n) * (servers - 1) - total) / (servers - 2), 0.0)
