"""A bounded, uniform sample of the routes of all tokens."""

from __future__ import annotations

import numpy as np


class RouteSample:
    """Reservoir sampling (Vitter's algorithm R): every token is as likely to be kept.

    Args:
        size: tokens kept at most; 0 keeps none.
        shape: (l, k) of one token's routes.
        seed: of the choice.
    """

    def __init__(self, size: int, shape: tuple[int, int], seed: int = 0):
        self._routes = np.zeros((size, *shape), np.int16)
        self._seen = 0
        self._rng = np.random.default_rng(seed)

    @property
    def wanted(self) -> bool:
        return len(self._routes) > 0

    @property
    def kept(self) -> np.ndarray:
        """int16 [tokens, l, k]."""
        return self._routes[: min(self._seen, len(self._routes))]

    def add(self, routes_tlk: np.ndarray) -> None:
        """Offer the routes of more tokens, [t, l, k]."""
        order = self._seen + np.arange(len(routes_tlk))
        self._seen += len(routes_tlk)
        size = len(self._routes)
        place = np.where(order < size, order, self._rng.integers(0, order + 1))
        kept = place < size
        self._routes[place[kept]] = routes_tlk[kept]
