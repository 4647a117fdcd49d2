"""Changes of the hosts file: a server is added, removed, or taken out for a while."""

from __future__ import annotations

import os
import pathlib

from dance_jax.config import ClusterSpec, UserError
from dance_jax.files import whole_file
from dance_jax.launch.planning.hosts import hosts_text, parse_hosts, read_hosts

#: Precedes the line of a server that was taken out with "drain".
DRAINED = "# drained: "


class HostsFile:
    """The hosts file of a service.

    Args:
        path: of the file.
        platform: as for `parse_hosts`.
    """

    def __init__(self, path: str | os.PathLike[str], platform: str) -> None:
        self._path, self._platform = pathlib.Path(path), platform

    def read(self) -> ClusterSpec:
        """The servers; raises UserError as `read_hosts`."""
        return read_hosts(self._path, self._platform)

    def change(self, action: str, server: str) -> str:
        """Change the file, as `changed`.

        Returns:
            The content before, for `restore`.

        Raises:
            UserError: the server is not in the file or is there already, its line is wrong, or the
                file cannot be read or written; it is as before.
        """
        before = hosts_text(self._path)
        text = changed(before, action, server)
        parse_hosts(text, str(self._path), self._platform)
        self.restore(text)
        return before

    def restore(self, text: str) -> None:
        """Give the file this content; raises UserError if the file cannot be written."""
        try:
            mode = self._path.stat().st_mode & 0o777
            with whole_file(self._path, mode) as file:
                file.write(text.encode())
            self._path.chmod(mode)  # also what the umask took away
        except OSError as error:
            raise UserError(f"{self._path}: the hosts file cannot be written: {error}") from error


def changed(text: str, action: str, server: str) -> str:
    """The content of a hosts file with a server added, removed or taken out.

    Args:
        text: the content.
        action: "add"; "remove"; or "drain", which keeps the server's line as a comment, so that
            "add" with the server's name brings it back.
        server: the server's name, or for a new server its line.

    Raises:
        UserError: the server is not in the file, or is there already.
    """
    name, *more = server.split(maxsplit=1)
    lines = text.splitlines()
    at = {
        words[0]: n
        for n, line in enumerate(lines)
        if (words := line.split()) and "#" not in words[0]
    }
    drained = {
        line.removeprefix(DRAINED).split()[0]: n
        for n, line in enumerate(lines)
        if line.startswith(DRAINED) and line.removeprefix(DRAINED).split()
    }
    if action == "add":
        if name in at:
            raise UserError(f"{name} is in the hosts file already")
        if more:
            lines = [line for n, line in enumerate(lines) if n != drained.get(name)] + [server]
        elif name in drained:
            lines[drained[name]] = lines[drained[name]].removeprefix(DRAINED)
        else:
            raise UserError(f"{name} is not in the hosts file: give its line, name key=value ...")
    elif more:
        raise UserError(f"{action} takes the name of one server")
    elif name not in at:
        raise UserError(f"{name} is not in the hosts file; its servers are {', '.join(at)}")
    elif action == "drain":
        lines[at[name]] = DRAINED + lines[at[name]]
    else:
        del lines[at[name]]
    return "\n".join(lines) + "\n"
