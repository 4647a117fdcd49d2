"""What structured outputs cost: `python benchmarks/structured.py [--batch 8] [--model DIR]`.

One engine in this process, with all experts of the demo or of another model, decodes batches of
equally many tokens: free ones, ones that follow a JSON schema, and mixed ones. The cases take
turns, and each is compared with the free case of its own round.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
import time

# A script's import path has only its own folder; add the repository root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich.table import Table

from dance_jax.bench.terminal import exit_code, terminal
from dance_jax.config import UserError
from dance_jax.engine.sequence import SamplingParams
from dance_jax.engine.structured import StructuredOutputsParams
from dance_jax.llm import LLM

#: Objects as of an extraction task; the list is longer than any output.
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "kind": {"enum": ["person", "place", "thing"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "[a-z]{2,12}"}},
        },
        "required": ["name", "kind", "age", "tags"],
        "additionalProperties": False,
    },
}
#: Share of the batch that follows the schema in each case.
CASES = {"free": 0.0, "half with a schema": 0.5, "with a schema": 1.0}
PROMPT = "The people, places and things of this story are: "


def main() -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/structured.py", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("--model", metavar="DIR", help="model (default: the demo)")
    parser.add_argument("--batch", type=int, default=8, help="requests (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="of each (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    arguments = parser.parse_args()
    console = terminal(100)

    def work() -> int:
        rounds = _measure(arguments)
        table = Table("batch", "wall, ms per step", "to free", "CPU, ms per token", "to free")
        for case in CASES:
            walls, cpus = ([found[case][which] for found in rounds] for which in (0, 1))
            table.add_row(
                case,
                f"{1000 * statistics.median(walls) / arguments.tokens:.3f}",
                f"{_ratio(rounds, case, 0):.3f}",
                f"{1000 * statistics.median(cpus) / arguments.tokens / arguments.batch:.3f}",
                f"{_ratio(rounds, case, 1):.3f}",
            )
        console.print(table)
        return 0

    return exit_code(work, UserError)


def _ratio(rounds: list[dict[str, tuple[float, float]]], case: str, which: int) -> float:
    """Median over the rounds of a case's seconds to the free ones'."""
    return statistics.median(found[case][which] / found["free"][which] for found in rounds)


def _measure(arguments: argparse.Namespace) -> list[dict[str, tuple[float, float]]]:
    """Per round and case: seconds of wall time and of processor time."""
    with LLM(arguments.model, max_model_len=arguments.tokens + 64) as llm:
        rounds = []
        for number in range(arguments.rounds + 1):
            found = {}
            # Each case comes first, second and last equally often.
            names = [*CASES][number % len(CASES) :] + [*CASES][: number % len(CASES)]
            for case in names:
                params = _params(CASES[case], arguments)
                wall, cpu = time.perf_counter(), time.process_time()
                outputs = llm.generate([PROMPT] * arguments.batch, params)
                found[case] = time.perf_counter() - wall, time.process_time() - cpu
                lengths = {len(output.outputs[0].token_ids) for output in outputs}
                assert lengths == {arguments.tokens}, lengths
            rounds.append(found)
        return rounds[1:]  # the first one compiles


def _params(share: float, arguments: argparse.Namespace) -> list[SamplingParams]:
    count = round(share * arguments.batch)
    structure = StructuredOutputsParams(json=SCHEMA)
    return [
        SamplingParams(
            seed=number,
            max_tokens=arguments.tokens,
            ignore_eos=True,
            structured_outputs=structure if number < count else None,
        )
        for number in range(arguments.batch)
    ]


if __name__ == "__main__":
    sys.exit(main())
