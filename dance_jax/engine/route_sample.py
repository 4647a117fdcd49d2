"""A bounded random sample of tokens' routes in which old tokens fade."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

from dance_jax.placement.decay import decay_rate


class Chosen(NamedTuple):
    """The offered tokens that enter a sample."""

    #: int [chosen], ascending: indices of the tokens among those offered.
    tokens: np.ndarray
    #: float64 [chosen]: the tokens' keys.
    keys: np.ndarray


class RouteSample:
    """A random sample in which a token's probability halves with every half-life.

    This is priority sampling (Duffield, Lund and Thorup 2007) in logarithms: every token gets the
    key rate x time + exponential noise, with rate = ln 2 / half-life, and the tokens with the
    largest keys are kept. A token whose key is below rate x now has faded and is dropped as well,
    so that a share of exp(-rate x age) remains even of few tokens; otherwise a sample as large as
    the traffic of a half-life would keep old tokens for lack of new ones. Without a half-life, all
    tokens are equally likely and none fades. Equal calls give equal samples.

    Keys are drawn before routes are read: once the sample is full, most tokens cannot enter, and
    their routes need not be fetched from the device (`choose`, `put`).

    Args:
        size: maximum number of tokens; 0 keeps none.
        shape: (l, k) of one token's routes.
        seed: seed of the random choice.
        half_life: seconds; None if tokens do not fade.
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
        """Drop all tokens."""
        #: Heap of (key, index in the arrays) of every token kept, smallest key first.
        self._heap: list[tuple[float, int]] = []
        self._free = list(range(len(self._routes)))[::-1]

    @property
    def wanted(self) -> bool:
        """Whether the sample can hold any tokens."""
        return len(self._routes) > 0

    @property
    def kept(self) -> np.ndarray:
        """int16 [tokens, l, k]: routes of the tokens kept as of the last `choose` or `add`.

        Tokens of one request are adjacent: they have similar routes, so a caller that splits the
        sample should not split requests.
        """
        places = np.array([place for _, place in self._heap], np.int64)
        return self._routes[places[np.lexsort((places, self._request[places]))]]

    def choose(self, tokens: int, now: float = 0.0) -> Chosen:
        """Choose which of the next tokens enter; pass their routes to `put` afterwards.

        Args:
            tokens: number of tokens offered.
            now: time at which the tokens were computed, in seconds of any clock; has no effect
                without a half-life.
        """
        faded = self._rate * now
        while self._heap and self._heap[0][0] < faded:
            self._free.append(heapq.heappop(self._heap)[1])
        keys = faded + self._rng.exponential(size=tokens)
        least = -np.inf if self._free or not self.wanted else self._heap[0][0]
        entering = np.flatnonzero((keys > least) & self.wanted)
        return Chosen(entering, keys[entering])

    def put(self, chosen: Chosen, routes_clk: np.ndarray, request_c: np.ndarray | int = 0) -> None:
        """Keep the tokens that `choose` returned last, in place of those with the smallest keys.

        Args:
            chosen: the result of `choose`.
            routes_clk: int [chosen, l, k], routes of `chosen.tokens`, in the same order.
            request_c: int [chosen], number of each token's request; or one number for all tokens.
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
        """Offer the routes, [t, l, k], of more tokens of a request; `now` is as in `choose`."""
        chosen = self.choose(len(routes_tlk), now)
        self.put(chosen, routes_tlk[chosen.tokens], request)
