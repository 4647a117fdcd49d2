"""What a lock-step layer costs: seconds per hidden state on each link and per expert call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dance_jax.config import UserError

#: The weight of a transfer where nothing is known, in hidden states through the busiest link.
REFERENCE_TRANSFER = 0.3


@dataclasses.dataclass(frozen=True, eq=False)
class Cost:
    """Seconds of one MoE layer, of which every server waits for the slowest part.

    The time of a layer is what passes through the busiest link direction, what the busiest device
    computes, what every transfer costs besides, and a fixed part (`Traffic.layer_time`).

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
    #: Seconds of every transfer wherever it goes (packing, unpacking).
    transfer: float = 0.0
    #: Fixed seconds of every layer (latency of the links, the calls themselves).
    layer: float = 0.0

    def __post_init__(self):
        state, call = np.asarray(self.state, float), np.asarray(self.call, float)
        devices = np.asarray(self.devices)
        if state.ndim != 1 or not state.shape == call.shape == devices.shape:
            raise UserError(
                f"cost: state {state.shape}, call {call.shape} and devices {devices.shape} "
                "need one number per server each"
            )
        if devices.dtype.kind not in "iu" or (devices < 1).any():
            raise UserError(f"cost: every server needs a whole number of devices; got {devices}")
        for name, value in (
            ("state", state),
            ("call", call),
            ("transfer", self.transfer),
            ("layer", self.layer),
        ):
            if not (np.isfinite(value) & (np.asarray(value) >= 0)).all():
                raise UserError(f"cost: {name} must be finite and at least 0; got {value}")
        object.__setattr__(self, "state", state)
        object.__setattr__(self, "call", call)
        object.__setattr__(self, "devices", devices.astype(np.int64))

    def apart(self, share: float, servers: int | None = None) -> Cost:
        """The cost where servers have tokens one at a time, for a share of what crosses links.

        `state` counts on the busiest link alone, as all links carry at the same time what tokens
        of all servers send. A server that reads a long prompt while the others have little to do
        is the busiest whatever is placed on the others: then all its transfers count.

        Args:
            share: from 0 to 1, see `apart_share`.
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
    def reference(cls, devices: Sequence[int] | np.ndarray, k: int) -> Cost:
        """Weights where nothing is known: `busiest` + `load` + 0.3 `transfers`.

        The unit is a hidden state through a link; all links and all devices are equal, and one
        device that computed all calls of a layer would take as long as one state of each token.

        Args:
            devices: int [servers].
            k: experts a token chooses in a layer.
        """
        return cls.of_links(np.ones(len(devices)), devices, k)

    @classmethod
    def of_links(
        cls, state: Sequence[float] | np.ndarray, devices: Sequence[int] | np.ndarray, k: int
    ) -> Cost:
        """`reference`, on links of unequal speed: their mean takes the place of its unit.

        Args:
            state: float [servers], as in `Cost`.
            devices: int [servers].
            k: experts a token chooses in a layer.
        """
        unit = float(np.mean(state))
        call = np.full(len(devices), unit / (k * len(devices)))
        return cls(np.asarray(state), call, np.asarray(devices), REFERENCE_TRANSFER * unit)


def apart_share(observed: float, together: float) -> float:
    """How much of what crosses links does so while one server has tokens, from 0 to 1.

    Args:
        observed: hidden states through the busiest link direction of each layer, over all hidden
            states, both summed over all steps that were done.
        together: the same if all servers had their tokens at once (`Traffic.concentration`); with
            one server at a time it is 1.
    """
    return float(np.clip((observed - together) / (1.0 - together), 0, 1)) if together < 1 else 0.0
