"""Write files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Open a file for writing that gets its name when the block ends without an exception.

    A symlink stays and its target is replaced. A path that is not a regular file (a device, a
    pipe) is written to, never replaced.

    Args:
        path: of the file.
        mode: permissions of the file, less those that the umask takes away.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    path = pathlib.Path(os.path.realpath(path))
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        try:
            yield file  # pyright: ignore[reportReturnType]
            file.close()
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(file.name, mode & ~umask)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
