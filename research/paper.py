"""The paper's evaluation on servers that run: `python research/paper.py`, as root.

What is measured, and how, is said in research/evaluation.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

# Run as a script, only this folder would be searched.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# The servers compute, this process places experts.
os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
from rich.console import Console

from benchmarks.arguments import (
    add_results,
    add_service,
    add_users,
    check_results,
    list_of,
    policy_name,
)
from benchmarks.command import EXAMPLES, ROOT, verdict
from benchmarks.live.places import Place, count_activations
from benchmarks.live.tasks import LONGEST_SALT, Askers, write_fit
from benchmarks.live.watch import load, put
from benchmarks.namespaces import Testbed, hosts_like, parse_rate, show_rate
from benchmarks.namespaces.hosts import MAX_HOSTS
from benchmarks.namespaces.temporary import add_bed, add_testbed, again_on, testbed
from benchmarks.targets import plain_targets
from dance_jax.bench.arguments import add_seed, count, positive
from dance_jax.bench.client import Api
from dance_jax.bench.cluster import RunError
from dance_jax.bench.http import HttpError
from dance_jax.bench.report import machine, write_json
from dance_jax.bench.terminal import exit_code, progress, terminal
from dance_jax.config import ClusterSpec, EngineConfig, UserError
from dance_jax.launch.cli.prompts import check_writable
from dance_jax.launch.planning.costs import cluster_cost, exchanged_bytes
from dance_jax.launch.planning.defaults import engine_config
from dance_jax.models.config import ModelConfig
from dance_jax.models.convert import outline
from dance_jax.models.directory import demo_dir
from dance_jax.models.tokenizer import Tokenizer
from dance_jax.placement.activations import Activations
from dance_jax.placement.cost import CallCost, Cost, LockStepCost
from dance_jax.placement.spare import reserve
from research.evaluation import report
from research.evaluation.cells import Cell, cell_of
from research.evaluation.predict import Measured, work_of
from research.evaluation.runs import Runs
from research.evaluation.shapes import MEMORY, SHAPES
from research.evaluation.workloads import Workload, hosts_text, placed, read_workloads
from research.simulator import Model

#: All of the paper's and ours; the first one shows what an expert call costs.
MATRIX = ("uniform", "redundance", "smartmoe", "eplb", "dance", "optimal", "layers", "latency")
#: Prompts of each server, and tokens of each answer, that placements are fitted to.
FIT_PROMPTS, FIT_TOKENS = 60, 32
WIDTH = 170
#: Bits a second of links that are not shaped, for policies that weigh them.
UNSHAPED = 10e9


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python research/paper.py",
        description="The policies of arXiv:2508.12851 and ours on servers that run, on a testbed. "
        "Root, Linux.",
        epilog="What follows -- goes to dance_jax.launch, e.g. -- --max-num-seqs 8",
    )
    add = parser.add_argument
    add_service(parser)
    made = "in place of --model: one with random weights, made for the run, in the shape of that"
    add("--shape", choices=SHAPES, help=f"{made}; locality wins less there")
    others = ", ".join(f"{shape.memory} of a {name}" for name, shape in SHAPES.items())
    add("--memory", type=positive, help=f"experts that fit, of all ({MEMORY}; {others})")
    add("--tasks", type=pathlib.Path, metavar="DIR", help="*.jsonl with prompts (examples/tasks)")
    several = "this many hosts of one device each; their users are given the tasks in turn"
    add("--hosts", type=count, metavar="N", help=f"{several} (three, of 1, 1 and 2 devices)")
    add("--workloads", type=list_of(str), metavar="A,B", help="(all)")
    add(
        "--links",
        type=list_of(parse_rate),
        default=[20_000_000],
        metavar="RATES",
        help="one after another, e.g. 500Mbps,100Mbps,20Mbps (20Mbps)",
    )
    policies = ", ".join(MATRIX)
    add("--policies", type=list_of(policy_name), default=MATRIX, metavar="A,B", help=policies)
    add("--seeds", type=count, default=3, help="runs of each policy (%(default)s)")
    add_seed(parser, "the first one")
    add_users(parser, 60, "of each server in a run")
    add("--old", type=pathlib.Path, metavar="DIR", help="the servers of another checkout instead")
    add_testbed(parser, "paper")
    add_bed(parser)
    runs = parser.add_mutually_exclusive_group()
    runs.add_argument("--save-runs", type=pathlib.Path, metavar="F", help="keep what was measured")
    again = "measure nothing, simulate these again; of other options only files' and --check count"
    runs.add_argument("--runs", type=pathlib.Path, metavar="F", help=again)
    add_results(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    options, console = parser().parse_args(words), terminal(WIDTH)

    def evaluate() -> int:
        if options.runs is not None:
            check_files(options)
            runs = Runs.load(options.runs)
            return told(options, runs.setup, runs.simulated(console), console)
        if options.bed is None:
            return outside(options, words, console)
        work = check(options, options.model or demo_dir())
        cells = Evaluation(options, work, Testbed.load(options.bed), console).run()
        return told(options, setup(options, work), cells, console)

    return exit_code(evaluate, RunError, HttpError)


def told(
    options: argparse.Namespace, setup: dict[str, Any], cells: Sequence[Cell], console: Console
) -> int:
    """Writes and shows all; returns the exit code."""
    write(options, setup, cells)
    report.show(console, cells)
    return verdict(console, report.targets(cells), options.check)


def outside(options: argparse.Namespace, words: Sequence[str], console: Console) -> int:
    """The same command on a testbed, which is made for it like the model of --shape."""
    with model_of(options) as directory:
        work = check(options, directory)
        hosts = hosts_like(work.hosts)
        made = ["--model", str(directory)] if options.shape else []
        with testbed(
            options.name, hosts, options.links[0], options.cores, console, options.round_trip
        ) as bed:
            return again_on(bed, __file__, [*made, *words])


@contextlib.contextmanager
def model_of(options: argparse.Namespace) -> Iterator[pathlib.Path]:
    """Where the model is: that of --shape is made, and removed with the block.

    Hosts of a testbed see it too: they share this machine's files.

    Raises:
        UserError: both --shape and --model are given.
    """
    if options.shape is None:
        yield options.model or demo_dir()
        return
    if options.model is not None:
        raise UserError("--shape makes a model, --model names one: give one of them")
    with tempfile.TemporaryDirectory(prefix="dance-jax-paper-") as folder:
        yield SHAPES[options.shape].write(pathlib.Path(folder) / options.shape)


@dataclasses.dataclass(frozen=True)
class Work:
    """The model, the hosts that share its experts, and what is asked of them.

    Attributes:
        memory: experts that fit, of all.
        hosts: text of a hosts file.
    """

    directory: pathlib.Path
    memory: float
    hosts: str
    model: ModelConfig
    config: EngineConfig
    workloads: list[Workload]


def check_files(options: argparse.Namespace) -> None:
    """
    Raises:
        UserError: one that is asked for cannot be made.
    """
    check_results(options)
    if options.save_runs is not None:
        check_writable(options.save_runs, "--save-runs")


def check(options: argparse.Namespace, directory: pathlib.Path) -> Work:
    """
    Args:
        directory: of the model.

    Raises:
        UserError: something is missing, or a result cannot be written.
    """
    workloads = read_workloads(options.tasks, EXAMPLES / "tasks")
    if options.workloads is not None:
        names = [workload.name for workload in workloads]
        for name in options.workloads:
            if name not in names:
                raise UserError(f"--workloads: no {name!r}; there are {', '.join(names)}")
        workloads = [each for each in workloads if each.name in options.workloads]
    check_files(options)
    usual = SHAPES[options.shape].memory if options.shape else MEMORY
    memory = usual if options.memory is None else options.memory
    model = outline(directory)
    config = engine_config(model.config, formats=model.formats)
    experts = len(model.config.moe_layers) * model.config.num_experts
    hosts = hosts_text(experts, memory, options.hosts)
    if options.hosts is not None:
        if not 2 <= options.hosts <= MAX_HOSTS:
            raise UserError(f"--hosts {options.hosts}: the evaluation takes 2 to {MAX_HOSTS}")
        workloads = [workload.on(options.hosts) for workload in workloads]
    return Work(directory, memory, hosts, model.config, config, workloads)


class Evaluation:
    """All cells, one after another in one cluster.

    Args:
        options: of the command line.
        work: what is asked.
        bed: where.
        console: for tables and progress.
    """

    def __init__(
        self, options: argparse.Namespace, work: Work, bed: Testbed, console: Console
    ) -> None:
        self._options, self._work, self._bed, self._console = options, work, bed, console
        self._cells: list[Cell] = []
        #: Of each cell.
        self._measured: list[Measured] = []
        self._tokenizer = Tokenizer.load(work.directory)
        self._about_model = ("--model", str(work.directory.absolute())) if options.model else ()

    def run(self) -> list[Cell]:
        """What was measured is written after each policy.

        Returns:
            All cells, simulated too.
        """
        with tempfile.TemporaryDirectory(prefix="dance-jax-paper-") as directory:
            folder = pathlib.Path(directory)
            hosts = folder / "hosts.txt"
            hosts.write_text(self._work.hosts)
            old = self._options.old
            self._place = Place(hosts, self._bed, ROOT if old is None else old.absolute())
            counted = [self._count(workload, folder) for workload in self._work.workloads]
            words = ["--rebalance-interval", "0", *self._about_model, *self._options.launch]
            with self._place.serving(words) as cluster:

                async def measure() -> None:
                    await cluster.ready()
                    api = await Api.connect(cluster.addresses)
                    for rate in self._options.links:
                        self._bed.set_rate(rate)
                        for workload, activations in zip(
                            self._work.workloads, counted, strict=True
                        ):
                            await self._matrix(api, rate, workload, activations)

                asyncio.run(measure())
                cluster.check()
            return self._runs().simulated(self._console)

    def _runs(self) -> Runs:
        """All so far."""
        model, spec = self._work.model, self._place.spec
        sum_bytes = 4 * model.hidden_size  # float32
        shares = [self._bed.hosts[name].share for name in spec.names]
        cores = tuple(share for share in shares if isinstance(share, float))
        return Runs(
            tuple(spec.names),
            tuple(spec.devices),
            cores if len(cores) == len(shares) else None,
            self._slots(),
            Model(
                len(model.moe_layers),
                model.num_experts,
                model.top_k,
                exchanged_bytes(model.hidden_size, self._work.config) - sum_bytes,
                sum_bytes,
            ),
            self._work.config,
            setup(self._options, self._work),
            tuple(self._cells),
            tuple(self._measured),
        )

    def _slots(self) -> int:
        """Of each device, spare ones left out."""
        slots = self._place.spec.servers[0].experts
        assert slots is not None
        return slots - reserve(slots)

    def _count(self, workload: Workload, folder: pathlib.Path) -> Activations:
        """What the tasks use, by prompts that nobody sends later."""
        prompts, result = folder / f"{workload.name}.jsonl", folder / f"{workload.name}.npz"
        write_fit(prompts, workload.tasks, self._place.spec.names, FIT_PROMPTS)
        count_activations(self._place.hosts, prompts, result, FIT_TOKENS, self._about_model)
        return Activations.load(result)

    async def _matrix(
        self, api: Api, rate: int | None, workload: Workload, activations: Activations
    ) -> None:
        """All policies and seeds at one rate."""
        spec, layers = self._place.spec, len(self._work.model.moe_layers)
        row = exchanged_bytes(self._work.model.hidden_size, self._work.config)
        for policy in self._options.policies:
            known = [
                (cell, run)
                for cell, run in zip(self._cells, self._measured, strict=True)
                if (cell.rate, cell.workload) == (rate, workload.name)
            ]
            cost = self._cost(rate, known)
            found = placed(
                policy, activations, spec.devices, self._slots(), cost, self._options.seed
            )
            resident = [
                [np.flatnonzero(held).tolist() for held in layer]
                for layer in found.placement.resident
            ]
            await put(api, spec.names, resident)
            for seed in range(self._options.seed, self._options.seed + self._options.seeds):
                salt = self._tokenizer.encode(f"{len(self._cells)} ")[:LONGEST_SALT]
                plan = self._askers(seed).plan([workload.tasks], self._options.requests, salt)
                title = f"{workload.name}, {show_rate(rate)}, {policy}, seed {seed}"
                with progress(self._console, title, len(plan.calls)) as done:
                    run = await load(api, plan.calls, done, self._place.sent)
                cell = cell_of(run, found, workload.name, rate, seed, layers, row)
                self._cells.append(cell)
                self._measured.append(
                    Measured(
                        rate,
                        found,
                        plan,
                        tuple(answer.output_tokens for answer in run.answers),
                        activations,
                        work_of(run),
                        cell.step_s / max(cell.steps, 1),
                        float(np.mean(cell.latency_s)),
                    )
                )
                self._console.print(f"{title}: mean latency {np.mean(cell.latency_s):.2f} s")
            write(self._options, setup(self._options, self._work), self._cells)
            if self._options.save_runs is not None:
                self._runs().save(self._options.save_runs)

    def _askers(self, seed: int) -> Askers:
        options, config = self._options, self._work.config
        return Askers(self._tokenizer, config.max_model_len, options.max_tokens, options.rate, seed)

    def _cost(self, rate: int | None, runs: Sequence[tuple[Cell, Measured]]) -> Cost:
        """Seconds: of links as they are shaped, of experts, of steps' rows and of servers that had
        tokens one at a time as it was measured in `runs`, of the same workload and rate."""
        spec, config = self._place.spec, self._work.config
        calls = sum(cell.expert_calls for cell, _ in runs)
        call_s = sum(cell.seconds["experts"] for cell, _ in runs) * len(spec.servers)
        servers = tuple(
            dataclasses.replace(
                server,
                bandwidth=rate or UNSHAPED,
                round_trip=self._options.round_trip or None,
                expert_time=call_s / calls if calls else None,
            )
            for server in spec.servers
        )
        if "collectives" in " ".join(self._options.launch).replace("=", " ").split():
            config = dataclasses.replace(config, exchange="collectives")
        cost = cluster_cost(ClusterSpec(servers), self._work.model, config)
        if not runs:
            return cost
        if isinstance(cost, LockStepCost):
            return cost.staggered(float(np.mean([cell.apart for cell, _ in runs])))
        assert isinstance(cost, CallCost)
        buckets: collections.Counter[tuple[int, int]] = collections.Counter()
        for _, run in runs:
            for windows in run.work:
                for window in windows:
                    buckets += window.buckets
        rows = tuple(
            (decode + slices * config.block_size, steps)
            for (decode, slices), steps in buckets.items()
        )
        return dataclasses.replace(cost, rows=rows or cost.rows)


def setup(options: argparse.Namespace, work: Work) -> dict[str, Any]:
    """What is measured, and where."""
    return vars(options) | {"memory": work.memory, "measured_on": machine()}


def write(options: argparse.Namespace, setup: dict[str, Any], cells: Sequence[Cell]) -> None:
    """The files that were asked for."""
    if options.output is not None:
        write_json(
            options.output, setup, report.plain(cells) | plain_targets(report.targets(cells))
        )
    if options.plot is not None:
        report.draw(cells, options.plot)


if __name__ == "__main__":
    sys.exit(main())
