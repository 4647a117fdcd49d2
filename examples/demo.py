"""`make demo`: answer the same prompts under three placements, and compare them.

Three servers of unequal size (here three processes, with 1, 1 and 2 devices) answer the prompts of
examples/prompts.jsonl. They serve the model that ships with the package, which none of them could
hold alone. First experts are placed uniformly, then by the paper's policy `dance`, then by the
default policy. The latter two place experts by the activations in examples/activations.npz, which
were counted on other prompts (examples/make_activations.py).

The first run is a cold start: the model is converted and every step is compiled, in a temporary
directory. The other runs find the compiled steps there. The directory is removed at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import signal
import sys
import tempfile
import time

from rich.console import Console
from rich.table import Table

from dance_jax.config import DEFAULT_POLICY, EngineConfig, UserError
from dance_jax.launch.cli.prompts import Prompt, read_prompts
from dance_jax.launch.cli.report import print_plan, print_summary
from dance_jax.launch.cli.run import RunResult, run_prompts
from dance_jax.launch.cli.stream import Startup, Stream, conversion, placing
from dance_jax.launch.cluster.batch import Cluster, ClusterError
from dance_jax.launch.planning.defaults import engine_config
from dance_jax.launch.planning.hosts import read_hosts
from dance_jax.launch.planning.plan import Plan, make_plan
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import ensure_converted
from dance_jax.models.directory import demo_dir
from dance_jax.models.tokenizer import Tokenizer
from dance_jax.placement.activations import Activations

EXAMPLES = pathlib.Path(__file__).resolve().parent
POLICIES = ("uniform", "dance", DEFAULT_POLICY)
MAX_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Run:
    """Result of one policy's run."""

    result: RunResult
    #: Seconds from the start of the servers until all are ready, and until the first token.
    ready: float
    first_token: float


def main() -> int:
    """Run the demo and return its exit code."""
    parser = argparse.ArgumentParser(
        description="Answers the same prompts under three placements and compares them."
    )
    parser.add_argument(
        "--hosts",
        type=pathlib.Path,
        default=EXAMPLES / "hosts.txt",
        help="hosts file (examples/hosts.txt)",
    )
    parser.add_argument(
        "--prompts",
        type=pathlib.Path,
        default=EXAMPLES / "prompts.jsonl",
        help="prompts to answer (examples/prompts.jsonl)",
    )
    parser.add_argument(
        "--activations",
        type=pathlib.Path,
        default=EXAMPLES / "activations.npz",
        help="activations to place experts by (examples/activations.npz)",
    )
    options = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 120))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="dance-jax-demo-") as cache:
            return demo(options, pathlib.Path(cache), console)
    except (UserError, ClusterError) as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        console.print("interrupted; all servers were stopped")
        return 130


def demo(options: argparse.Namespace, cache: pathlib.Path, console: Console) -> int:
    """Make all runs and print their comparison; all files are written to `cache`."""
    spec = read_hosts(options.hosts)
    prompts = read_prompts(options.prompts, spec, MAX_TOKENS)
    activations = Activations.load(options.activations)
    began = time.monotonic()
    with conversion(console) as progress:
        path = ensure_converted(demo_dir(), cache / "models", progress)
    converted = time.monotonic() - began
    checkpoint = Checkpoint.open(path)
    config = engine_config(checkpoint.config, platform=spec.platform, formats=checkpoint.formats)
    runs = []
    for policy in POLICIES:
        console.rule(f"policy {policy}")
        with placing(console, policy):
            plan = make_plan(spec, checkpoint, config, policy, activations)
        print_plan(console, plan)
        cluster = Cluster(spec, checkpoint, plan.layout, config, cache_dir=cache)
        runs.append(run_policy(cluster, plan, path, config, prompts, console))
        print_summary(console, runs[-1].result)
    console.rule(", ".join(POLICIES))
    console.print(comparison(runs, spec.names))
    cold, warm, *_ = (f"{run.first_token:.1f} s (ready after {run.ready:.1f} s)" for run in runs)
    for line in (
        f"Converting the model, once: {converted:.1f} s.",
        f"From the start of the servers to the first token: cold {cold}, warm {warm}.",
        agreement(runs),
    ):
        console.print(line, highlight=False, soft_wrap=True)
    return verdict(runs, console)


def run_policy(
    cluster: Cluster,
    plan: Plan,
    path: pathlib.Path,
    config: EngineConfig,
    prompts: list[Prompt],
    console: Console,
) -> Run:
    """Start the servers, run the prompts and stop the servers."""
    tokenizer = Tokenizer.load(path)
    began = time.monotonic()
    try:
        with Startup(console, plan.spec.names) as startup:
            cluster.start(startup.update)
        ready = time.monotonic() - began
        with Stream(console, plan.spec.names, prompts) as stream:
            result = run_prompts(cluster, plan, tokenizer, prompts, stream.update)
    finally:
        cluster.stop()
    if result.first_token is None:
        raise ClusterError("no prompt was answered")
    return Run(result, ready, result.first_token - began)


def comparison(runs: list[Run], names: tuple[str, ...]) -> Table:
    """Return a table with a row per measure and a column per policy.

    docs/architecture.md defines the measures.
    """
    table = Table(title=f"{len(runs[0].result.prompts)} prompts on {len(names)} servers")
    table.add_column("")
    for run in runs:
        table.add_column(run.result.plan.policy, justify="right")
    exchanges = (run.result.plan.exchange.name for run in runs)
    table.add_row("exchange", *exchanges, end_section=True)
    flows = [run.result.plan.placement.traffic(run.result.traffic.routes) for run in runs]
    table.add_row("local share of expert calls", *(f"{1 - flow.remote:.3f}" for flow in flows))
    table.add_row("transfers per token and layer", *(f"{flow.transfers:.3f}" for flow in flows))
    layers = len(runs[0].result.traffic.transfers)
    waited = (f"{run.result.traffic.layers_waited:.2f}" for run in runs)
    table.add_row(f"layers waited for per token, of {layers}", *waited)
    busiest = (f"{flow.busiest:.3f}" for flow in flows)
    table.add_row("busiest link, hidden states per token and layer", *busiest)
    for source, name in enumerate(names):
        for target, other in enumerate(names):
            if source != target:
                sent = (int(run.result.traffic.bytes_sent[source, target]) for run in runs)
                table.add_row(f"bytes {name} -> {other}", *(f"{count:,}" for count in sent))
    total = (int(run.result.traffic.bytes_sent.sum()) for run in runs)
    table.add_row("bytes, all links", *(f"{count:,}" for count in total), end_section=True)
    seconds = (f"{run.result.seconds:.1f} s" for run in runs)
    table.add_row("time for all prompts", *seconds)
    return table


def agreement(runs: list[Run]) -> str:
    """Count the answers that are the same under all policies; greedy answers should all be."""
    answers = list(zip(*(run.result.outputs for run in runs), strict=True))
    same = sum(len({tuple(each.outputs[0].token_ids) for each in group}) == 1 for group in answers)
    return f"{same} of {len(answers)} answers are the same under all policies."


def verdict(runs: list[Run], console: Console) -> int:
    """Print errors and return 1 if an answer failed or a policy is no better than uniform."""
    failed = [
        f"prompt {prompt.index}: {output.outputs[0].stop_reason}"
        for run in runs
        for prompt, output in zip(run.result.prompts, run.result.outputs, strict=True)
        if output.outputs[0].finish_reason == "error"
    ]
    uniform, *others = (run.result for run in runs)
    failed += [
        f"the local share of {each.plan.policy} ({each.local_share:.3f}) is not above that of "
        f"uniform ({uniform.local_share:.3f})"
        for each in others
        if each.local_share <= uniform.local_share
    ]
    for line in failed:
        console.print(f"error: {line}", markup=False, highlight=False, soft_wrap=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
