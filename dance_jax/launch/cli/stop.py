"""`dance-jax stop`: end a service by its --state-dir, whether its launcher still runs or not."""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import time
from collections.abc import Sequence

from dance_jax.launch.cli import running
from dance_jax.launch.cluster.succession import (
    InUse,
    OtherVersion,
    end_servers,
    find_survivors,
    kill_servers,
    launcher_pid,
    sole_launcher,
)


def main(arguments: Sequence[str], prog: str = "dance-jax stop") -> int:
    """Run the command; returns 0 once nothing is left, 1 if servers cannot be reached."""
    parser = running.parser(
        prog,
        "Ends the service that uses a state directory: its launcher and its servers, "
        "or the servers that a lost launcher has left running.",
    )
    parser.add_argument("--now", action="store_true", help="do not wait for running requests")
    options = parser.parse_args(arguments)
    return running.run(
        lambda: stop(options.state_dir, options.now), "some servers may run; call this again"
    )


def stop(directory: pathlib.Path, now: bool) -> int:
    """End the service of a state directory.

    Args:
        directory: the service's --state-dir.
        now: do not wait for running requests.

    Returns:
        0; 1 if servers cannot be reached and may run on.

    Raises:
        UserError: the files of the directory cannot be read.
        OSError: the launcher cannot be ended.
    """
    told = None
    while True:
        try:
            with sole_launcher(directory):
                return _end_survivors(directory, now)
        except InUse:
            pid = launcher_pid(directory)
            if pid not in (None, told):
                print(f"ending the launcher (process {pid}) and its servers")
                # Without the launcher, which would drain, the servers are ended here.
                os.kill(pid, signal.SIGKILL if now else signal.SIGTERM)
                told = pid
            time.sleep(running.LOOK_S)


def _end_survivors(directory: pathlib.Path, now: bool) -> int:
    try:
        survivors = find_survivors(directory)
    except OtherVersion:
        if not now:
            raise
        print("killing servers of another version")
        kill_servers(directory)
        return 0
    if survivors is None:
        print("no server of this directory runs")
        return 0
    names = ", ".join(survivors.handover.spec.names[rank] for rank in sorted(survivors.taken))
    print(f"ending {names}, whose launcher is gone")
    left = end_servers(survivors, 0.0 if now else survivors.handover.options.drain_seconds)
    survivors.forget(directory)
    if left:
        print(f"error: cannot be reached, and may run on: {', '.join(left)}", file=sys.stderr)
    return 1 if left else 0
