"""What the commands on a running service have in common: it is named by its state directory."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable

from dance_jax.config import UserError

#: Seconds between two looks at what the launcher does.
LOOK_S = 0.1


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser of a command's arguments that has --state-dir."""
    found = argparse.ArgumentParser(prog=prog, description=description)
    found.add_argument(
        "--state-dir", type=existing, required=True, metavar="DIR", help="of the service"
    )
    return found


def existing(text: str) -> pathlib.Path:
    """The type of an argument that names an existing directory."""
    path = pathlib.Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such directory")
    return path


def run(command: Callable[[], int], interrupted: str) -> int:
    """Run a command, and print why it fails.

    Args:
        command: returns the exit code.
        interrupted: what to tell the user after Ctrl-C.
    """
    try:
        return command()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return 130
