"""A fake `ssh` for tests.

The fake runs the command on this machine, as sshd would: through a shell, in a bare environment. If
there is a shell script hosts/HOST, the fake runs that script for host HOST instead.
"""

from __future__ import annotations

import os
import pathlib
import sys
import textwrap

_SSH = """\
#!/bin/sh
echo "$$" >> "{folder}/pids"
while [ "$1" != "--" ]; do shift; done
host=$2
shift 2
cd /
[ -e "{folder}/hosts/$host" ] && exec sh "{folder}/hosts/$host" "$@"
exec env -i PATH="$PATH" HOME="{folder}" SSH_CONNECTION="10.9.8.7 4711 10.9.8.6 22" sh -c "$*"
"""


class FakeSsh:
    """The fake ssh in a folder of its own."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        (folder / "hosts").mkdir(parents=True)
        self.bin.mkdir()
        self._write(self.bin / "ssh", _SSH.format(folder=folder))

    @property
    def path(self) -> str:
        """Value of $PATH with the fake ssh first."""
        return f"{self.bin}{os.pathsep}{os.environ['PATH']}"

    def host(self, name: str, script: str) -> None:
        """Lets a host run another script; the command is in "$@"."""
        (self.folder / "hosts" / name).write_text(textwrap.dedent(script))

    def python(self, name: str, *options: str, **environment: str) -> str:
        """A Python for python=, with options or another environment."""
        words = " ".join([*(f"{key}={value}" for key, value in environment.items())])
        path = self.bin / name
        self._write(
            path, f'#!/bin/sh\nexec env {words} {sys.executable} {" ".join(options)} "$@"\n'
        )
        return str(path)

    @property
    def pids(self) -> list[int]:
        """Process ids of every ssh that was started."""
        return [int(line) for line in (self.folder / "pids").read_text().split()]

    def _write(self, path: pathlib.Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)
