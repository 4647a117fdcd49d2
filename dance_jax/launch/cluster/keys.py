"""The file with the keys of users (--api-key-file), which may change while the service runs."""

from __future__ import annotations

import pathlib
import re
import time

from dance_jax.config import UserError

#: Seconds between two looks at the file.
LOOK_S = 1.0
#: A key that a request can carry.
KEY = re.compile(r"[!-~]+")


class KeyFile:
    """A file with one key per line; blank lines and those that begin with # are left out.

    Args:
        path: of the file.

    Raises:
        UserError: the file cannot be read, has no key, or a line is none.
    """

    def __init__(self, path: str) -> None:
        self._path = pathlib.Path(path)
        self._seen, self._looked = self._stamp(), time.monotonic()
        #: The keys at the last look.
        self.keys = self._read()

    def changed(self) -> bool:
        """Look whether the file has changed, at most once in LOOK_S; `keys` are then the new ones.

        Raises:
            UserError: the changed file is wrong; the keys stay.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return False
        self._looked = now
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        self._seen = stamp
        before, self.keys = self.keys, self._read()
        return self.keys != before

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            state = self._path.stat()
        except OSError:
            return None
        return state.st_mtime_ns, state.st_size, state.st_ino

    def _read(self) -> list[str]:
        where = f"--api-key-file {self._path}"
        try:
            lines = self._path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: cannot be read: {error}") from error
        keys = []
        for number, line in enumerate(lines, 1):
            key = line.strip()
            if not key or key.startswith("#"):
                continue
            if not KEY.fullmatch(key):
                raise UserError(
                    f"{where}, line {number}: a key must be visible ASCII characters without spaces"
                )
            keys.append(key)
        if not keys:
            raise UserError(f"{where}: has no key; write one per line")
        return keys
