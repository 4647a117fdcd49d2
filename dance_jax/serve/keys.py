"""The API keys of a server."""

from __future__ import annotations

import hmac
from collections.abc import Iterable


class Keys:
    """The bearer tokens, one of which requests must carry; they may change.

    Args:
        keys: none: requests need no key.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self.change(keys)

    def change(self, keys: Iterable[str]) -> None:
        """Take other keys from now on."""
        self._keys = [key.encode() for key in keys]

    @property
    def needed(self) -> bool:
        """Whether requests need a key."""
        return bool(self._keys)

    def number(self, given: bytes) -> int | None:
        """Number of the key that a request carries.

        Args:
            given: the header Authorization.

        Returns:
            None if the request carries none; -1 if it needs none, or if there is only one.
        """
        if not self._keys:
            return -1
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        # Constant-time comparisons: the time must not reveal where the keys differ.
        same = [hmac.compare_digest(key.strip(), each) for each in self._keys]
        if not any(same):
            return None
        return same.index(True) if len(same) > 1 else -1
