"""The command line of `python -m dance_jax.launch`."""

from __future__ import annotations

import argparse
import os
import pathlib
import re

import msgspec

from dance_jax.cache import default_cache_dir
from dance_jax.config import EXCHANGES, EXPERT_CHOICES, TRUNK_CHOICES, UserError
from dance_jax.engine.sequence import MAX_TOKENS
from dance_jax.launch.agent.role import KEY_VARIABLE
from dance_jax.launch.control.protocol import ServeOptions
from dance_jax.launch.planning.defaults import DEFAULT_NUM_SEQS, WIRE_DTYPES
from dance_jax.launch.planning.hosts import MEMORY_UNITS, quantity
from dance_jax.launch.rebalance.decision import RebalanceOptions
from dance_jax.models.hub import served_name
from dance_jax.placement.policies import DEFAULT_POLICY, POLICIES

#: Where the key of users may be, besides --api-key, which others on the machine can see.
API_KEY_VARIABLE = "DANCE_JAX_API_KEY"
#: Output tokens of a prompt of a batch that names none.
BATCH_TOKENS = 128
#: Options of one mode alone, as argparse names them.
_REBALANCE = (
    "rebalance_interval",
    "rebalance_policy",
    "half_life",
    "state_dir",
    "rebalance_dry_run",
)
_SERVING = ServeOptions.__struct_fields__ + _REBALANCE
_BATCH = ("output", "max_tokens", "save_activations")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dance_jax.launch",
        description="Starts the servers of a hosts file. Each serves OpenAI's API over HTTP; with "
        "--prompts they run these instead, and end.",
    )
    path = pathlib.Path
    parser.add_argument(
        "--hosts", type=path, required=True, help="servers, one a line: name key=value ..."
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
        help=f"where experts go: {', '.join(POLICIES)} (%(default)s)",
    )
    parser.add_argument(
        "--activations", type=path, help="npz file of expert counts and routes per server"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    parser.add_argument(
        "--experts",
        choices=EXPERT_CHOICES,
        default="keep",
        help="what the weights of routed experts are rounded to when the model is converted",
    )
    parser.add_argument(
        "--trunk",
        choices=TRUNK_CHOICES,
        default="keep",
        help="what all other matrices are rounded to; keep, for both, is the default",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of activations and KV cache (default: float32 on CPU, bfloat16 on GPU)",
    )
    parser.add_argument(
        "--wire-dtype",
        choices=WIRE_DTYPES,
        default="auto",
        help="what hidden states are rounded to before routed experts, wherever these are; int8: "
        "only those that go to another server; auto: bfloat16 where the experts' weights have 16 "
        "bits or less, else not at all (%(default)s)",
    )
    parser.add_argument(
        "--exchange",
        choices=EXCHANGES,
        default="auto",
        help="calls: each server steps on its own, and experts answer calls (CPUs with a C++ "
        "compiler); collectives: all step together; auto: calls where all can (%(default)s)",
    )
    parser.add_argument("--max-model-len", type=_positive, help="context in tokens (<= 2048)")
    parser.add_argument(
        "--max-num-seqs",
        type=_positive,
        default=DEFAULT_NUM_SEQS,
        help="sequences that run at once on each device (%(default)s)",
    )
    parser.add_argument(
        "--kv-memory",
        type=_size,
        metavar="SIZE",
        help="of each device's KV cache, e.g. 512MiB (default: all sequences at full length, at "
        "most half of what is free)",
    )
    parser.add_argument(
        "--cache-dir", type=path, help=f"converted models, compiled steps ({default_cache_dir()})"
    )
    parser.add_argument("--log-dir", type=path, help="keep each server's log here as NAME.log")
    parser.add_argument(
        "--trace",
        type=path,
        metavar="FILE",
        help="write when steps and expert calls did what, for https://ui.perfetto.dev; 256 MiB at "
        "most",
    )
    _add_serve_options(parser.add_argument_group("serving (without --prompts)"))
    _add_rebalance_options(parser.add_argument_group("moving experts while serving"))
    _add_batch_options(parser.add_argument_group("a batch instead"))
    _add_network_options(parser.add_argument_group("servers on other machines"))
    return parser


# Options of one mode have no defaults here: whether they are given decides what is refused.


def _add_serve_options(group: argparse._ArgumentGroup) -> None:
    usual = ServeOptions("")
    group.add_argument(
        "--bind",
        metavar="ADDRESS",
        help=f"where each server listens; 0.0.0.0: everywhere (default: {usual.bind})",
    )
    group.add_argument(
        "--port",
        type=_port,
        help="of each server; the second one of the same machine has the next, and so on "
        f"(default: {usual.port})",
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"what requests must carry; others see it here, not in {API_KEY_VARIABLE}",
    )
    group.add_argument(
        "--drain-seconds",
        type=_seconds,
        metavar="S",
        help=f"for what runs to finish after SIGTERM or Ctrl-C (default: {usual.drain_seconds:g})",
    )
    group.add_argument(
        "--max-queue",
        type=_positive,
        metavar="N",
        help="requests on each server that may wait for their first token "
        f"(default: {usual.max_queue})",
    )
    group.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="in requests and answers (default: org/name, the model's directory, or demo)",
    )


def _add_rebalance_options(group: argparse._ArgumentGroup) -> None:
    usual = RebalanceOptions()
    group.add_argument(
        "--rebalance-interval",
        type=_seconds,
        metavar="S",
        help="from one decision to the next; 0: only on POST /placement/rebalance "
        f"(default: {usual.interval_s:g})",
    )
    group.add_argument(
        "--rebalance-policy",
        metavar="NAME",
        choices=tuple(POLICIES),
        help=f"as --policy, for experts that move (default: {usual.policy})",
    )
    group.add_argument(
        "--half-life",
        type=_seconds,
        metavar="S",
        help="after which what users asked for counts half; 0: it never fades "
        f"(default: {usual.half_life_s:g})",
    )
    group.add_argument(
        "--state-dir",
        type=pathlib.Path,
        metavar="DIR",
        help="keep placement and statistics here, and go on with them at the next start",
    )
    group.add_argument(
        "--rebalance-dry-run",
        action="store_true",
        default=None,
        help="say what would move, and move nothing",
    )


def _add_batch_options(group: argparse._ArgumentGroup) -> None:
    path = pathlib.Path
    group.add_argument("--prompts", type=path, help="JSON Lines of prompts")
    group.add_argument("--output", type=path, help="JSON Lines of completions, in input order")
    group.add_argument(
        "--max-tokens",
        type=_positive,
        help=f"of prompts that name none (default: {BATCH_TOKENS})",
    )
    group.add_argument(
        "--save-activations", type=path, help="write the run's expert counts and routes here"
    )


def _add_network_options(group: argparse._ArgumentGroup) -> None:
    path = pathlib.Path
    group.add_argument(
        "--preflight", action="store_true", help="check every server and link, and start nothing"
    )
    group.add_argument("--ssh-config", type=path, metavar="FILE", help="for ssh -F")
    group.add_argument(
        "--control-address",
        metavar="ADDRESS",
        help="of this machine, where the servers reach it (default: where ssh comes from)",
    )
    group.add_argument(
        "--control-port", type=_port, default=0, help="of this machine (default: a free one)"
    )
    group.add_argument(
        "--coordinator-port",
        type=_port,
        default=0,
        help="of the first server's jax.distributed (default: a free one)",
    )
    group.add_argument(
        "--node-rank",
        type=_rank,
        metavar="N",
        help="run server N (from 0) of the file here, without ssh; 0 also launches. "
        "Taken from Slurm or Open MPI inside their jobs",
    )
    group.add_argument(
        "--key-file",
        type=path,
        metavar="FILE",
        help=f"the launch's key, with --node-rank; or set {KEY_VARIABLE}",
    )


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:9]) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no TCP port")
    return int(text)


def _rank(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:9]) > 30:
        raise argparse.ArgumentTypeError(f"{text!r} is no server's number; the first is 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:20]) <= MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {MAX_TOKENS}")
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, 0 to 99999")
    return float(text)


def _size(text: str) -> int:
    try:
        return int(quantity(text, "SIZE", MEMORY_UNITS, "memory"))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def check_mode(options: argparse.Namespace) -> None:
    """No option is given that the others leave without effect.

    Raises:
        UserError: naming both.
    """
    batch = options.prompts is not None
    for name in _SERVING if batch else _BATCH:
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            if batch:
                raise UserError(f"{option} is for serving and --prompts runs a batch: leave one")
            raise UserError(f"{option} needs --prompts")


def serve_options(options: argparse.Namespace) -> ServeOptions:
    """How to serve.

    Raises:
        UserError: a key that no request can carry, or more ports than there are.
    """
    given = {name: getattr(options, name) for name in ServeOptions.__struct_fields__}
    if given["api_key"] is None:
        given["api_key"] = os.environ.get(API_KEY_VARIABLE) or None
        where = API_KEY_VARIABLE
    else:
        where = "--api-key"
    if given["api_key"] is not None and not re.fullmatch(r"[!-~]+", given["api_key"]):
        raise UserError(f"{where}: visible ASCII characters are needed, without spaces")
    if given["served_model_name"] == "":
        raise UserError("--served-model-name: is empty; requests need a name")
    if given["served_model_name"] is None:
        model = options.model
        given["served_model_name"] = "demo" if model is None else served_name(model)
    return ServeOptions(**{name: value for name, value in given.items() if value is not None})


def rebalance_options(options: argparse.Namespace) -> RebalanceOptions:
    """When experts move.

    Raises:
        UserError: what is to be kept cannot be kept there.
    """
    given = {
        "interval_s": options.rebalance_interval,
        "policy": options.rebalance_policy,
        "half_life_s": options.half_life,
        "state_dir": None if options.state_dir is None else str(options.state_dir),
        "dry_run": options.rebalance_dry_run,
    }
    found = RebalanceOptions(**{name: value for name, value in given.items() if value is not None})
    if options.state_dir is not None:
        try:
            options.state_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--state-dir {options.state_dir}: cannot be made: {error}") from error
        if not os.access(options.state_dir, os.W_OK | os.X_OK):
            raise UserError(f"--state-dir {options.state_dir}: cannot be written to")
    return found if found.half_life_s else msgspec.structs.replace(found, half_life_s=None)
