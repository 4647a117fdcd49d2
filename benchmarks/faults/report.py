"""What faults cost: figures, a line and a row of the table for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from rich.console import Console

from benchmarks.faults.load import Record
from dance_jax.bench.tables import grid
from dance_jax.memory import format_bytes


@dataclasses.dataclass
class Report:
    """What a fault cost; times in seconds."""

    fault: str
    #: Servers whose engine or link, and whose front end, the fault hits.
    engines: list[str]
    fronts: list[str]
    #: Longest gap that a stream may have on other servers, and on the servers that are hit.
    limit_s: float
    own_limit_s: float
    gap_s: float = 0.0
    own_gap_s: float = 0.0
    #: From the fault until all servers run; from the start of the run.
    whole_s: float = 0.0
    at_s: float = 0.0
    #: Requests: ended, lost by living front ends, with changed tokens, refused (503), lost with
    #: their front end or out of reach, still in flight a minute later.
    requests: int = 0
    lost: int = 0
    changed: int = 0
    refused: int = 0
    cut: int = 0
    unended: int = 0
    #: What the server that was asked for a migration answered; empty: none was asked.
    migration: str = ""
    #: Processes of before that run though the service does not have them any more.
    processes_left: int = 0
    #: Bytes of memory, resident, of the launcher and of each front end.
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    reasons: list[str] = dataclasses.field(default_factory=list)

    def count(
        self, records: Sequence[Record], names: Sequence[str], hit: Collection[int], began: float
    ) -> None:
        """Add up what became of requests.

        Args:
            records: of the requests.
            names: of the servers, by rank.
            hit: ranks of the servers whose engine or link the fault hits.
            began: when the fault was made.
        """
        for record in records:
            self.requests += 1
            for outcome in ("lost", "changed", "refused", "cut"):
                if record.outcome == outcome:
                    setattr(self, outcome, getattr(self, outcome) + 1)
            if record.outcome == "lost":
                self.reasons.append(f"{names[record.rank]}: {record.why}")
            if record.outcome == "same" and record.gap_end > began:
                if record.rank in hit:
                    self.own_gap_s = max(self.own_gap_s, record.gap)
                else:
                    self.gap_s = max(self.gap_s, record.gap)

    @property
    def failed(self) -> bool:
        """Whether a living front end lost or changed a request, or a process is left."""
        return bool(self.lost or self.changed or self.unended or self.processes_left)


def show(console: Console, report: Report) -> None:
    """Print a fault's cost, as soon as it is known."""
    memory = ", ".join(f"{name} {format_bytes(size)}" for name, size in report.memory.items())
    moved = report.migration and f", {report.migration}"
    console.print(
        f"{report.at_s:.0f} s: {report.fault} ({', '.join(report.engines)}): whole after "
        f"{report.whole_s:.1f} s, longest gap {_gap(report.gap_s, report.limit_s)} s, own "
        f"{_gap(report.own_gap_s, report.own_limit_s)} s, of {report.requests} requests lost "
        f"{report.lost}, changed {report.changed}, not ended {report.unended}{moved}; {memory}",
        markup=False,
    )
    for why in report.reasons[:5]:
        console.print(f"  lost: {why}", markup=False)


def show_all(console: Console, reports: Sequence[Report]) -> None:
    """Print the table, with the worst of each kind of fault."""
    table = grid(
        *("fault", "times", "requests", "lost", "changed", "refused", "cut"),
        *("gap, s", "own gap, s", "whole, s", "processes left"),
    )
    for name in dict.fromkeys(report.fault for report in reports):
        same = [report for report in reports if report.fault == name]
        gap = max(same, key=lambda report: report.gap_s / report.limit_s)
        own = max(same, key=lambda report: report.own_gap_s / report.own_limit_s)
        table.add_row(
            name,
            str(len(same)),
            str(sum(report.requests for report in same)),
            str(sum(report.lost + report.unended for report in same)),
            *(
                str(sum(getattr(report, what) for report in same))
                for what in ("changed", "refused", "cut")
            ),
            _gap(gap.gap_s, gap.limit_s),
            _gap(own.own_gap_s, own.own_limit_s),
            f"{max(report.whole_s for report in same):.1f}",
            str(sum(report.processes_left for report in same)),
        )
    console.print(table)
    console.print("Gaps: measured / limit. Not ended requests count as lost.")
    if reports:
        first, last = reports[0].memory, reports[-1].memory
        sizes = (f"{name} {format_bytes(first[name])}, {format_bytes(last[name])}" for name in last)
        console.print(f"Memory after the first and the last fault: {'; '.join(sizes)}.")


def _gap(seconds: float, limit: float) -> str:
    return f"{seconds:.2f} / {limit:g}"
