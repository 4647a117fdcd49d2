"""A bounded sample of the routes of all tokens, in which old ones fade."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

from dance_jax.placement.decay import decay_rate


class Chosen(NamedTuple):
    """Which of the tokens on offer enter a sample."""

    #: int [chosen], ascending: their numbers among those on offer.
    tokens: np.ndarray
    #: float64 [chosen]: their keys.
    keys: np.ndarray


class RouteSample:
    """A random sample in which a token's chance halves with every half-life.

    Priority sampling (Duffield, Lund and Thorup 2007) in logarithms: every token gets the key
    rate x time + exponential noise, with rate = ln 2 / half-life, and those of the largest keys are
    kept. What has a key below rate x now has faded and goes as well, so that of few tokens, too, a
    share of exp(-rate x age) is left: else a sample as large as the traffic of a half-life would
    keep old ones for want of new. Without a half-life all are as likely and none fades. Equal calls
    give equal samples.

    Keys are drawn before routes are looked at: once the sample is full most tokens cannot enter,
    and their routes need not be fetched from a device (`choose`, `put`).

    Args:
        size: tokens kept at most; 0 keeps none.
        shape: (l, k) of one token's routes.
        seed: of the choice.
        half_life: seconds; None: old tokens do not fade.
    """

    def __init__(
        self, size: int, shape: tuple[int, int], seed: int = 0, half_life: float | None = None
    ):
        self._rate = decay_rate(half_life)
        self._routes = np.zeros((size, *shape), np.int16)
        self._request = np.zeros(size, np.int64)
        self._rng = np.random.default_rng(seed)
        self.clear()

    def clear(self) -> None:
        """Keeps none of the tokens so far."""
        #: (key, place in the array) of every token kept, the least key first.
        self._heap: list[tuple[float, int]] = []
        self._free = list(range(len(self._routes)))[::-1]

    @property
    def wanted(self) -> bool:
        """It keeps any tokens at all."""
        return len(self._routes) > 0

    @property
    def kept(self) -> np.ndarray:
        """int16 [tokens, l, k]: what is left as of the last `choose` or `add`.

        Tokens of one request are neighbours: they choose alike, so who divides a sample should not
        divide requests.
        """
        places = np.array([place for _, place in self._heap], np.int64)
        return self._routes[places[np.lexsort((places, self._request[places]))]]

    def choose(self, tokens: int, now: float = 0.0) -> Chosen:
        """Which of the next tokens enter; their routes must follow with `put`.

        Args:
            tokens: number of tokens on offer.
            now: seconds of any clock, when they were computed; of no effect without a half-life.
        """
        faded = self._rate * now
        while self._heap and self._heap[0][0] < faded:
            self._free.append(heapq.heappop(self._heap)[1])
        keys = faded + self._rng.exponential(size=tokens)
        least = -np.inf if self._free or not self.wanted else self._heap[0][0]
        entering = np.flatnonzero((keys > least) & self.wanted)
        return Chosen(entering, keys[entering])

    def put(self, chosen: Chosen, routes_clk: np.ndarray, request_c: np.ndarray | int = 0) -> None:
        """Keeps the tokens that `choose` named last, in place of those with the least keys.

        Args:
            routes_clk: int [chosen, l, k], routes of `chosen.tokens` in this order.
            request_c: int [chosen], of which request they are; a number: all of that one.
        """
        request_c = np.broadcast_to(request_c, len(routes_clk))
        source: dict[int, int] = {}
        for token, key in enumerate(chosen.keys.tolist()):
            if self._free:
                place = self._free.pop()
                heapq.heappush(self._heap, (key, place))
            elif key > self._heap[0][0]:
                place = self._heap[0][1]
                heapq.heapreplace(self._heap, (key, place))
            else:
                continue
            source[place] = token
        self._routes[list(source)] = routes_clk[list(source.values())]
        self._request[list(source)] = request_c[list(source.values())]

    def add(self, routes_tlk: np.ndarray, now: float = 0.0, request: int = 0) -> None:
        """Offers the routes of more tokens of a request, [t, l, k]; `now` as in `choose`."""
        chosen = self.choose(len(routes_tlk), now)
        self.put(chosen, routes_tlk[chosen.tokens], request)
