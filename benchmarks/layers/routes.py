"""What is exchanged: who holds which expert, which experts tokens choose, and the fewest bytes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from dance_jax.config import UserError
from dance_jax.placement.core import Placement


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The MoE layers of a step, and the servers that run them."""

    #: Values of a hidden state, and of an expert's inner activation.
    hidden: int
    width: int
    #: Experts of a layer, and how many of them a token chooses.
    experts: int
    top_k: int
    #: MoE layers in one step.
    layers: int
    #: Devices of each server.
    devices: tuple[int, ...]

    def __post_init__(self):
        if min(self.hidden, self.width, self.experts, self.top_k, self.layers) < 1:
            raise UserError("hidden, width, experts, top-k and layers are 1 at least")
        if (fewest := min(map(len, self.homes()))) < self.top_k:
            raise UserError(
                f"{self.experts} experts leave a server {fewest}; with top-k {self.top_k} a token "
                "that stays at home needs as many"
            )

    @property
    def servers(self) -> int:
        return len(self.devices)

    def homes(self) -> list[range]:
        """The experts of each server, in every layer; each has one server.

        >>> Sizes(8, 8, 8, 2, 1, (1, 1, 2)).homes()
        [range(0, 2), range(2, 4), range(4, 8)]
        """
        ends = np.cumsum((0, *self.devices)) * self.experts // sum(self.devices)
        return [range(first, last) for first, last in itertools.pairwise(ends)]

    def placement(self) -> Placement:
        resident = np.zeros((self.servers, self.layers, self.experts), bool)
        for server, home in enumerate(self.homes()):
            resident[server, :, home] = True
        return Placement(resident)

    def slots(self) -> list[int]:
        """Slots on each device of each server that its experts fill."""
        held = (len(home) * self.layers for home in self.homes())
        return [-(-count // devices) for count, devices in zip(held, self.devices, strict=True)]


def draw_routes(
    sizes: Sizes, rank: int, tokens: int, local_share: float, rng: np.random.Generator
) -> np.ndarray:
    """Experts that a server's tokens choose: int32 [tokens, layers, k].

    Of all (token, layer) pairs exactly round(share x pairs) find all experts at home; the k experts
    of each other are dealt out to the other servers in turn, so that it visits min(k, servers - 1).
    """
    homes, k, pairs = sizes.homes(), sizes.top_k, tokens * sizes.layers
    # The first experts of a random order of each server's.
    orders = [
        rng.permuted(np.tile(np.array(home), (pairs, 1)), axis=1)[:, :k].astype(np.int32)
        for home in homes
    ]
    at_home = np.zeros(pairs, bool)
    at_home[rng.permutation(pairs)[: round(local_share * pairs)]] = True
    peers = np.delete(np.arange(sizes.servers), rank)
    turn_pk = rng.integers(len(peers), size=(pairs, 1)) + np.arange(k)
    away_pk = np.zeros((pairs, k), np.int32)
    for index, peer in enumerate(peers):
        chosen_pk = turn_pk % len(peers) == index
        # The how-manieth of this peer's.
        place_pk = np.maximum(np.cumsum(chosen_pk, axis=1) - 1, 0)
        away_pk = np.where(chosen_pk, np.take_along_axis(orders[peer], place_pk, 1), away_pk)
    routes_pk = np.where(at_home[:, None], orders[rank], away_pk)
    return routes_pk.reshape(tokens, sizes.layers, k)


def transfers_per_token(sizes: Sizes, local_share: float) -> float:
    """Servers a token visits in a layer, on average, with these routes."""
    return min(sizes.top_k, sizes.servers - 1) * (1 - local_share)


def bound(rows_nn: np.ndarray, hidden: int, value_bytes: int) -> np.ndarray:
    """Fewest bytes each server must send, and receive (they are as many): int64 [n].

    Args:
        rows_nn: [n, n], hidden states from server (first axis) to server (second axis); a sum comes
            back for each.
        hidden: values of a hidden state and of a sum.
        value_bytes: of one of them.
    """
    rows_nn = np.asarray(rows_nn, np.int64)
    return (rows_nn.sum(1) + rows_nn.sum(0)) * hidden * value_bytes


def wire_bytes(wire_dtype: str) -> int:
    """Bytes of a value between servers that compute in float32."""
    return {"compute": 4, "bfloat16": 2, "int8": 1}[wire_dtype]


def deal(texts: Sequence[list[int]], places: Sequence[int]) -> list[list[list[list[int]]]]:
    """Texts in waves: per wave, per server, the texts it runs at once; longest first.

    Texts of one wave run in lock step, so they should be about as long.

    >>> deal([[1], [1, 2, 3], [1, 2]], [1, 1])
    [[[[1, 2, 3]], [[1, 2]]], [[[1]], []]]
    """
    ordered = sorted(texts, key=len, reverse=True)
    waves, ends = [], np.cumsum((0, *places))
    for first in range(0, len(ordered), int(ends[-1])):
        wave = ordered[first : first + int(ends[-1])]
        waves.append([wave[a:b] for a, b in itertools.pairwise(ends)])
    return waves
