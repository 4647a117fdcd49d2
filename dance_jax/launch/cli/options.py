"""The command line of `python -m dance_jax.launch`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import ipaddress
import os
import pathlib
import re
import tomllib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from dance_jax.cache import default_cache_dir
from dance_jax.config import (
    API_KEY_VARIABLE,
    DEFAULT_POLICY,
    EngineOptions,
    RebalanceOptions,
    ServeOptions,
    UserError,
)
from dance_jax.engine.sequence import MAX_TOKENS
from dance_jax.launch.agent.role import KEY_VARIABLE
from dance_jax.launch.cluster.keys import KEY
from dance_jax.launch.planning.hosts import MEMORY_UNITS, quantity
from dance_jax.models.hub import served_name
from dance_jax.placement.policies import POLICIES
from dance_jax.placement.visit import MAX_SERVERS

#: The command's name in its help.
PROG = "python -m dance_jax.launch"
#: Output tokens of a batch prompt that does not set max_tokens.
BATCH_TOKENS = 128
_BATCH = ("output", "max_tokens", "save_activations")


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The parser of the command line.

    The options that are dataclasses (`EngineOptions`, `ServeOptions`, `RebalanceOptions`) are
    declared in `config`; the others are declared here.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        # `parse` would overlook an abbreviated --config.
        allow_abbrev=False,
        description="Starts the servers of a hosts file. Each server offers OpenAI's API over "
        "HTTP; with --prompts, the servers run a batch of prompts instead and then exit.",
    )
    path = pathlib.Path
    parser.add_argument("--version", action="version", version=f"dance_jax {version('dance-jax')}")
    parser.add_argument(
        "--config",
        type=path,
        metavar="FILE",
        help='TOML file of options without the --, e.g. hosts = "hosts.txt"; options on the '
        "command line take precedence; paths are relative to the working directory",
    )
    parser.add_argument(
        "--hosts",
        type=path,
        required=True,
        help="hosts file with one server per line: name key=value ...",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="directory in Hugging Face format or converted, a .gguf file, or org/name or "
        "org/name@revision on the Hugging Face hub, downloaded on first use (default: demo)",
    )
    parser.add_argument(
        "--policy",
        metavar="NAME",
        choices=tuple(POLICIES),
        default=DEFAULT_POLICY,
        help=f"placement policy: {', '.join(POLICIES)} (%(default)s)",
    )
    parser.add_argument(
        "--activations",
        type=path,
        help="npz file of expert counts and routes per server, used by the placement policy",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan without starting servers"
    )
    _add_fields(parser, EngineOptions)
    parser.add_argument(
        "--cache-dir",
        type=path,
        help=f"directory for converted models and compiled steps ({default_cache_dir()})",
    )
    parser.add_argument(
        "--log-dir", type=path, help="keep each server's log in this directory as NAME.log"
    )
    parser.add_argument(
        "--trace",
        type=path,
        metavar="FILE",
        help="write a trace of all steps and expert calls, for https://ui.perfetto.dev; at most "
        "256 MiB",
    )
    _add_fields(parser.add_argument_group("serving (without --prompts)"), ServeOptions)
    _add_fields(parser.add_argument_group("moving experts while serving"), RebalanceOptions)
    _add_batch_options(parser.add_argument_group("running a batch (with --prompts)"))
    _add_network_options(parser.add_argument_group("servers on other machines"))
    return parser


def parse(arguments: Sequence[str] | None = None, prog: str = PROG) -> argparse.Namespace:
    """Parse the command line and the file it names with --config.

    Raises:
        UserError: the file cannot be read, or an option in it is unknown or wrong.
    """
    command_line = parser(prog)
    # Without a value, --config is left to the command line, which says so.
    file = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file.add_argument("--config", type=pathlib.Path, nargs="?")
    path = file.parse_known_args(arguments)[0].config
    if path is not None:
        found = _config_file(path, command_line)
        for action in command_line._actions:
            action.required = action.required and action.dest not in found
        command_line.set_defaults(**found)
    return command_line.parse_args(arguments)


def _config_file(path: pathlib.Path, command_line: argparse.ArgumentParser) -> dict[str, Any]:
    """Read the options of a TOML file, keyed by argparse's names."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}") from error
    actions = {
        action.option_strings[-1][2:]: action
        for action in command_line._actions
        if action.dest not in ("help", "version", "config")
    }
    found = {}
    for key, value in content.items():
        where, action = f"--config {path}: {key}", actions.get(key.replace("_", "-"))
        if action is None:
            raise UserError(f"{where}: unknown option; the options are {', '.join(actions)}")
        if "_" in key and key.replace("_", "-") in content:
            raise UserError(f"{where}: is also given as {key.replace('_', '-')}; remove one")
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{where}: must be true or false")
            found[action.dest] = value or action.default
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(f"{where}: must be a string or a number")
        if "\0" in str(value):
            raise UserError(f"{where}: must not contain a NUL character")
        try:
            found[action.dest] = command_line._get_value(action, str(value))
            command_line._check_value(action, found[action.dest])
        except argparse.ArgumentError as error:
            raise UserError(f"{where}: {error.message}") from error
    return found


def _add_fields(group: argparse._ActionsContainer, options: type) -> None:
    """Add an option for each field of a dataclass that was declared with `option`.

    The argparse defaults stay None, so that `given` can tell which options the user set.
    """
    for field in dataclasses.fields(options):
        meta = field.metadata
        more: dict[str, Any] = {"help": meta["help"].format(default=_shown(field.default))}
        if field.default is False:
            more |= {"action": "store_true", "default": None}
        else:
            more |= {"metavar": meta["metavar"], "type": _KINDS[meta["kind"]]}
            choices = tuple(POLICIES) if meta["kind"] == "policy" else meta["choices"]
            more |= {"choices": choices} if choices else {}
        group.add_argument(_flag(field), **more)


def _flag(field: dataclasses.Field[Any]) -> str:
    return field.metadata["flag"] or f"--{field.name.replace('_', '-')}"


def _shown(default: Any) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)


def given(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The fields of an options dataclass that the user set."""
    found = {
        field.name: getattr(options, _flag(field)[2:].replace("-", "_"))
        for field in dataclasses.fields(kind)
    }
    return {name: value for name, value in found.items() if value is not None}


def _add_batch_options(group: argparse._ArgumentGroup) -> None:
    path = pathlib.Path
    group.add_argument(
        "--prompts", type=path, help="JSON Lines file of prompts; runs them as a batch, then exits"
    )
    group.add_argument(
        "--output", type=path, help="JSON Lines file for the completions, in input order"
    )
    group.add_argument(
        "--max-tokens",
        type=_count,
        help=f"output tokens of prompts without max_tokens (default: {BATCH_TOKENS})",
    )
    group.add_argument(
        "--save-activations", type=path, help="npz file for the run's expert counts and routes"
    )


def _add_network_options(group: argparse._ArgumentGroup) -> None:
    path = pathlib.Path
    group.add_argument(
        "--preflight",
        action="store_true",
        help="check every server and link, without starting servers",
    )
    group.add_argument(
        "--ssh-config", type=path, metavar="FILE", help="ssh configuration file (ssh -F)"
    )
    group.add_argument(
        "--control-address",
        metavar="ADDRESS",
        help="address of this machine that the servers connect to (default: the one that ssh "
        "connects from)",
    )
    group.add_argument(
        "--control-port",
        type=_port,
        default=0,
        help="port of this machine that the servers connect to (default: a free port)",
    )
    group.add_argument(
        "--coordinator-port",
        type=_port,
        default=0,
        help="port of jax.distributed on the first server (default: a free port)",
    )
    group.add_argument(
        "--node-rank",
        type=_rank,
        metavar="N",
        help="run server N (from 0) of the hosts file on this machine, without ssh; node 0 also "
        "runs the launcher. Inside Slurm and Open MPI jobs, taken from the job",
    )
    group.add_argument(
        "--key-file",
        type=path,
        metavar="FILE",
        help=f"file with the launch's key, for --node-rank; or set {KEY_VARIABLE}",
    )


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:9]) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a TCP port (1 to 65535)")
    return int(text)


def _rank(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:9]) >= MAX_SERVERS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a server number (0 to {MAX_SERVERS - 1})"
        )
    return int(text)


def _count(text: str, least: int = 1) -> int:
    if not text.isascii() or not text.isdigit() or not least <= int(text[:20]) <= MAX_TOKENS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number from {least} to {MAX_TOKENS}"
        )
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds (0 to 99999)")
    return float(text)


def _size(text: str) -> int:
    try:
        return int(quantity(text, "size", MEMORY_UNITS, "option"))
    except UserError as error:
        # Who calls names the option.
        raise argparse.ArgumentTypeError(str(error).removeprefix("option: size=")) from error


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a value, or leave the option out")
    return text


def _networks(text: str) -> str:
    for part in text.split(","):
        try:
            ipaddress.ip_network(part.strip())
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}; give for example 10.0.0.5") from error
    return text


#: Parsers of option values, by the `kind` of `config.option`.
_KINDS: dict[str, Callable[[str], Any]] = {
    "": _text,
    "int": int,
    "whole": functools.partial(_count, least=0),
    "count": _count,
    "port": _port,
    "seconds": _seconds,
    "size": _size,
    "path": str,
    "policy": str,
    "networks": _networks,
}


def check_mode(options: argparse.Namespace) -> None:
    """Check that no option is given which the chosen mode ignores.

    Raises:
        UserError: names the option and the mode.
    """
    if options.dry_run and options.preflight:
        raise UserError("--dry-run prints the plan and --preflight checks the servers: remove one")
    if options.prompts is None:
        for name in _BATCH:
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} needs --prompts")
        return
    for kind in (ServeOptions, RebalanceOptions):
        for field in dataclasses.fields(kind):
            if field.name in given(options, kind):
                raise UserError(
                    f"{_flag(field)} applies to serving, but --prompts runs a batch: remove one "
                    "of them"
                )


def engine_options(options: argparse.Namespace) -> EngineOptions:
    """The engine options that the user set."""
    return EngineOptions(**given(options, EngineOptions))


def serve_options(options: argparse.Namespace) -> ServeOptions:
    """The options of serving.

    Raises:
        UserError: the API key has characters that no request can carry.
    """
    found, where = given(options, ServeOptions), "--api-key"
    if "api_key" not in found:
        found["api_key"], where = os.environ.get(API_KEY_VARIABLE) or None, API_KEY_VARIABLE
    if found["api_key"] is not None and not KEY.fullmatch(found["api_key"]):
        raise UserError(f"{where}: the key must be visible ASCII characters without spaces")
    model = options.model
    found.setdefault("served_model_name", "demo" if model is None else served_name(model))
    return ServeOptions(**found)


def rebalance_options(options: argparse.Namespace) -> RebalanceOptions:
    """The options of rebalancing.

    Raises:
        UserError: --state-dir cannot be created or written to.
    """
    found = RebalanceOptions(**given(options, RebalanceOptions))
    if found.state_dir is not None:
        try:
            os.makedirs(found.state_dir, exist_ok=True)
        except OSError as error:
            raise UserError(f"--state-dir {found.state_dir}: cannot be created: {error}") from error
        if not os.access(found.state_dir, os.W_OK | os.X_OK):
            raise UserError(f"--state-dir {found.state_dir}: cannot be written to")
    return found if found.half_life_s else dataclasses.replace(found, half_life_s=None)
