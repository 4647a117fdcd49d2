"""What the exchange has to reach, and whether it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.targets import Target

from .measure import Cell

#: Tokens of a device in a prefill at least, in a decode step at most.
PREFILL, DECODE = 64, 8
#: Bytes over the bound: of a prefill, of a whole run.
PREFILL_RATIO, RUN_RATIO = 1.5, 2.0
ROUNDS = 2
#: Bytes of a server each way in a layer that stays at home.
LOCAL_BYTES = 1000
#: Time of a layer with half the transfers, at HALVED: (bits per second, tokens per device).
HALVED_RATIO, HALVED = 0.6, (20_000_000, 256)
#: int8's bytes over float32's.
INT8_RATIO = 0.3
#: The slope of time over delay may be off by so much; a round more adds 1.
SLOPE_TOLERANCE = 0.3


def halved(cells: Sequence[Cell]) -> list[tuple[float, str]]:
    """Time of a layer over that of one with twice the transfers, where HALVED says."""
    here = {
        cell.local_share: cell
        for cell in cells
        if (cell.rate, cell.tokens) == HALVED and cell.wire_dtype == "compute"
    }
    return [
        (half.layer_s / whole.layer_s, f"local share {whole.local_share} to {half.local_share}")
        for whole in here.values()
        for half in here.values()
        if whole.transfers_per_token == 2 * half.transfers_per_token > 0
    ]


def targets(result: dict[str, Any]) -> list[Target]:
    """All of them; where two transports are compared, of the servers' own.

    Args:
        result: of `__main__.measure`.
    """
    ours: list[Cell] = [c for c in result["cells"] if c.transport == result["transport"]]
    exact = [cell for cell in ours if cell.wire_dtype == result["wire_dtype"]]
    wire = {cell.wire_dtype: cell for cell in result["wire"]}
    decode = [cell for cell in exact if cell.tokens <= DECODE and cell.local_share < 1]
    run = result["prompts"]

    def named(cell: Cell) -> str:
        return f"{cell.tokens} tokens, local share {cell.local_share}"

    return [
        Target.of_worst(
            f"prefill ({PREFILL} tokens and more): bytes over the bound",
            PREFILL_RATIO,
            ((cell.ratio, named(cell)) for cell in exact if cell.tokens >= PREFILL),
        ),
        Target("example prompts: bytes over the bound", RUN_RATIO, run and run["ratio"]),
        Target.of_worst(
            f"decode (to {DECODE} tokens): exchanges of messages in a layer",
            ROUNDS,
            ((cell.rounds, named(cell)) for cell in decode),
        ),
        Target.of_worst(
            "decode: delays of the links by which a layer is later",
            ROUNDS + SLOPE_TOLERANCE,
            ((each["rounds"], f"{each['tokens']} tokens") for each in result["latency"]),
        ),
        Target.of_worst(
            "a layer that stays at home: bytes of a server one way",
            LOCAL_BYTES,
            ((cell.worst_bytes, named(cell)) for cell in exact if cell.local_share == 1),
        ),
        Target.of_worst("half the transfers: time over that of all", HALVED_RATIO, halved(exact)),
        Target(
            "int8: bytes over float32's",
            INT8_RATIO,
            wire["int8"].sent_bytes / wire["compute"].sent_bytes if "int8" in wire else None,
        ),
    ]
