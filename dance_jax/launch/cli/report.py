"""Tables: the plan before a run and the summary after it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dance_jax.launch.cli.run import RunResult
from dance_jax.launch.planning.plan import Plan
from dance_jax.memory import format_bytes

#: With more MoE layers than this, the plan shows only the minimum and maximum over layers.
_LAYERS_SHOWN = 12


def print_plan(console: Console, plan: Plan) -> None:
    """Print each server's devices, memory, slots, experts per layer and predicted local share."""
    layers = plan.placement.resident.shape[1]
    listed = layers <= _LAYERS_SHOWN
    table = Table(
        title=f"Plan: policy {plan.policy}, {plan.placement.resident[0].size} experts "
        f"in {layers} MoE layers, {format_bytes(plan.expert_bytes)} each",
        title_justify="left",
    )
    table.add_column("server")
    states = any(server.state_bytes for server in plan.servers)
    columns = ("devices", "trunk", "KV cache", *["states"] * states, "experts", "slots", "spare")
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("resident per layer" if listed else "resident per layer (min-max)")
    table.add_column("local share", justify="right")
    for server in plan.servers:
        least, most = min(server.resident), max(server.resident)
        table.add_row(
            server.name,
            str(server.devices),
            format_bytes(server.trunk_bytes),
            format_bytes(server.kv_bytes),
            *[format_bytes(server.state_bytes)] * states,
            format_bytes(server.pool_bytes),
            str(server.slots),
            str(server.spare),
            " ".join(map(str, server.resident)) if listed else f"{least}-{most}",
            f"{server.local_share:.3f}",
        )
    console.print(table)
    console.print(
        Text(
            f"{', '.join(columns[1:-2])} and slots are per device; spare slots stay empty so that "
            f"experts can move. Predicted local share of all expert calls: "
            f"{plan.local_share:.3f}"
        ),
        soft_wrap=True,
    )
    console.print(Text(plan.weights), soft_wrap=True)
    if len(plan.servers) > 1:
        console.print(Text(f"Exchange: {plan.exchange.name}, {plan.exchange.why}."), soft_wrap=True)
    for note in plan.notes:
        console.print(Text(note), soft_wrap=True)


def print_summary(console: Console, result: RunResult) -> None:
    """Print throughput, latencies, locality, bytes per link and memory of a run."""
    outputs = result.outputs
    failed = sum(output.outputs[0].finish_reason == "error" for output in outputs)
    ran = [output for output in outputs if output.outputs[0].finish_reason != "error"]
    prompt_tokens = sum(len(output.prompt_token_ids) for output in ran)
    output_tokens = sum(len(output.outputs[0].token_ids) for output in ran)
    traffic = result.traffic
    table = Table(title="Summary", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value")
    errors = f", {failed} of them with an error" if failed else ""
    table.add_row("requests", f"{len(outputs)}{errors}, in {result.seconds:.2f} s")
    for name, tokens in (("prompt", prompt_tokens), ("output", output_tokens)):
        table.add_row(f"{name} tokens", f"{tokens:,} ({tokens / result.seconds:,.1f} per second)")
    table.add_row("time to first token", latency([o.metrics.ttft_s for o in ran]))
    table.add_row("end-to-end latency", latency([o.metrics.e2e_s for o in ran]))
    table.add_row("local share", f"{result.local_share:.3f} ({plan_note(result)})")
    table.add_row(
        "transfers", f"{traffic.transfers_per_token:.3f} remote servers per token and layer"
    )
    table.add_row(
        "layers waited for",
        f"{traffic.layers_waited:.2f} of {len(traffic.transfers)} per token "
        f"(any-miss {traffic.any_miss:.3f})",
    )
    console.print(table)
    console.print(bytes_table(result))
    console.print(_pool_table(result))


def plan_note(result: RunResult) -> str:
    """The plan's predicted local share, to print beside the measured one."""
    return f"{result.plan.local_share:.3f} predicted"


def latency(seconds: Sequence[float | None]) -> str:
    """Mean and percentiles, in seconds."""
    known = [value for value in seconds if value is not None]
    if not known:
        return "none"
    p50, p99 = np.percentile(known, [50, 99])
    return f"mean {np.mean(known):.3f} s, p50 {p50:.3f} s, p99 {p99:.3f} s"


def bytes_table(result: RunResult) -> Table:
    """Table of the bytes sent by each server to each other server."""
    names = result.plan.spec.names
    table = Table(title="Bytes sent", title_justify="left")
    table.add_column("from \\ to")
    for name in names:
        table.add_column(name, justify="right")
    for source, name in enumerate(names):
        row = result.traffic.bytes_sent[source]
        table.add_row(
            name,
            *("-" if target == source else f"{row[target]:,}" for target in range(len(names))),
        )
    return table


def _pool_table(result: RunResult) -> Table:
    table = Table(title="Expert pools", title_justify="left")
    table.add_column("server")
    table.add_column("bytes on each device")
    for server, pools in zip(result.plan.servers, result.traffic.pool_bytes, strict=True):
        table.add_row(server.name, "  ".join(f"{count:,}" for count in pools))
    return table
