"""The verdict on a run, and its rendering for people and for machines."""

import json
from dataclasses import dataclass
from typing import Any

import polars as pl
from rich import box
from rich.markup import escape
from rich.table import Table

from lake.queries import AccountingLine
from replay.scores import Scores, rendered_scores
from replay.verify.accounting import BALANCE
from replay.verify.apart import LATE_RECORDS
from schemas.closed_lists import Bucket

SIGNS = {"sent": "", "stored": "=", "reordered": ""}
"""Before each number, so that the sums read as an equation: sent + redelivered = stored + …"""


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        run_id: the run.
        is_whole: False for a run that was stopped before its end.
        totals: `BALANCE`, and reordered, over all meters.
        stages: the accounting of the run's stages.
        meters: one row a meter: `BALANCE`, reordered, wrong (sentences; empty where all holds).
        faults: one row a fault: fault_id, kind, meter_id (the first), records, outcome, is_explained, detail.
        scores: precision and recall per reason and alarm type.
        findings: columns `FINDINGS`; empty when the run is proven.
        expected: windows and alarms → how many the readings and events that arrived make, and how many are found so.
        notes: what could not be checked, and why.
        unfinished: which stages have not received all yet; empty when the accounting is closed.
    """

    run_id: str
    is_whole: bool
    totals: dict[str, int]
    stages: list[AccountingLine]
    meters: pl.DataFrame
    faults: pl.DataFrame
    scores: Scores
    findings: pl.DataFrame
    expected: dict[str, tuple[int, int]]
    notes: list[str]
    unfinished: list[str]

    @property
    def is_balanced(self) -> bool:
        """Whether nothing is left to explain, and no precision or recall is low."""
        is_explained = bool(self.faults.get_column("is_explained").all())
        return not self.unfinished and not len(self.findings) and is_explained and not len(self.scores.low)

    def kinds(self) -> dict[str, dict[str, Any]]:
        """Per kind of fault how many were injected and unexplained, and the outcomes of their records."""
        found: dict[str, dict[str, Any]] = {}
        for row in self.faults.iter_rows(named=True):
            each = found.setdefault(row["kind"], {"injected": 0, "unexplained": 0, "outcomes": {}})
            each["injected"] += 1
            each["unexplained"] += not row["is_explained"]
            for outcome, count in json.loads(row["outcomes"]).items():
                each["outcomes"][outcome] = each["outcomes"].get(outcome, 0) + count
        return dict(sorted(found.items()))

    def as_json(self, named: int) -> dict[str, Any]:
        """For machines; the first `named` findings and unexplained faults."""
        wrong = self.faults.filter(~pl.col("is_explained"))
        return {
            "run_id": self.run_id,
            "is_balanced": self.is_balanced,
            "is_whole": self.is_whole,
            "unfinished": self.unfinished,
            "totals": self.totals,
            "expected": {name: {"expected": made, "found": found} for name, (made, found) in self.expected.items()},
            "stages": {each.stage: vars(each) for each in self.stages},
            "faults": self.kinds(),
            "scores": self.scores.table.to_dicts(),
            "undecidable": self.scores.undecidable.to_dicts(),
            "findings_total": len(self.findings),
            "findings": self.findings.head(named).to_dicts(),
            "unexplained_total": len(wrong),
            "unexplained": wrong.head(named).drop("outcomes", "is_explained").to_dicts(),
            "notes": self.notes,
        }


def rendered(verdict: Verdict, named: int) -> list[Table | str]:
    """For people: what is not finished yet, else the sums; accounting, faults, and the first findings.

    Args:
        verdict: on the run.
        named: how many of what does not hold are named.
    """
    sums = Table.grid(padding=(0, 1), pad_edge=True)
    sums.add_row(f"run {escape(verdict.run_id)}", f"{len(verdict.meters):,}", "meters")
    for name in (*BALANCE, "reordered"):
        sums.add_row(SIGNS.get(name, "+"), f"{verdict.totals[name]:,}", name)
    sums.columns[0].justify = sums.columns[1].justify = "right"
    stages = _table("stage", "received", *[bucket.value for bucket in Bucket])
    for line in verdict.stages:
        numbers = [getattr(line, name) for name in ("received", *[bucket.value for bucket in Bucket])]
        stages.add_row(line.stage, *[f"{number:,}" for number in numbers])
    found: list[Table | str] = [sums, stages]
    fewer = "[yellow]![/]" if verdict.is_balanced else "[red]✗[/]"  # of a fault that is late they may be
    found += [
        f"{'[green]✓[/]' if made == there else fewer} {name}: {there:,} of {made:,} expected"
        for name, (made, there) in verdict.expected.items()
    ]
    if verdict.unfinished:  # sums over tables of which each is at another record would be false
        found = [
            f"[red]✗[/] not finished yet: {escape('; '.join(verdict.unfinished))}",
            "  bridge and jobs may still be at work: verify again (--wait SECONDS); where nothing runs, make up first: "
            "what broker and Kafka keep still comes",
            stages,
        ]
    if len(verdict.faults):
        kinds = Table("fault", "injected", "what became of its records", "unexplained", box=box.SIMPLE, padding=(0, 1))
        for kind, each in verdict.kinds().items():
            became = ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(each["outcomes"].items()))
            wrong = f"[red]{each['unexplained']:,}[/]" if each["unexplained"] else "0"
            kinds.add_row(kind, f"{each['injected']:,}", became, wrong)
        found.append(kinds)
    if not verdict.unfinished:
        found += rendered_scores(verdict.scores)
    whole = verdict.findings.filter(pl.col("meter_id").is_null())
    is_said_of_all = pl.col("place").str.starts_with("late_") & bool(whole.get_column("place").eq(LATE_RECORDS).any())
    meters = (  # what the whole run's finding on late records says of all of them is not said of each
        verdict.findings.filter(pl.col("meter_id").is_not_null() & ~is_said_of_all)
        .group_by("meter_id", maintain_order=True)
        .agg(wrong=pl.format("{}: {}", "place", "finding").str.join("; "))
    )
    faults = verdict.faults.filter(~pl.col("is_explained")).select("fault_id", "kind", "detail")
    for lines in (
        [f"{place}: {what}" for place, what in whole.select("place", "finding").iter_rows()],
        [f"{meter}: {wrong}" for meter, wrong in meters.select("meter_id", "wrong").iter_rows()],
        [f"fault {number} {kind}: {detail}" for number, kind, detail in faults.iter_rows()],
    ):
        found += [f"[red]✗[/] {escape(line)}" for line in lines[:named]]
        if len(lines) > named:
            found.append(f"  and {len(lines) - named:,} more")
    found += [f"[yellow]![/] {escape(note)}" for note in verdict.notes]
    if verdict.is_balanced:
        found.append(
            "[green]✓[/] every record that was sent is accounted for, in every table and stage"
            + (f"; all {len(verdict.faults):,} faults are explained" if len(verdict.faults) else "")
        )
    else:
        found.append(f"[red]✗[/] run {escape(verdict.run_id)} does not hold: {escape(_first_reason(verdict))}")
    return found


def _first_reason(verdict: Verdict) -> str:
    """Why a run does not hold, in one sentence: the gravest of what is said above."""
    whole = verdict.findings.filter(pl.col("meter_id").is_null())
    if verdict.unfinished:
        return f"not finished yet, {verdict.unfinished[0]}: wait (--wait SECONDS), or make up first"
    if len(whole):
        return str(whole.sort(pl.col("place") != LATE_RECORDS, maintain_order=True).row(0, named=True)["finding"])
    if len(verdict.findings):
        return f"{verdict.findings.get_column('meter_id').n_unique():,} meters have something wrong, see above"
    return "a fault is not explained, or a precision or recall is too low, see above"


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 0))
    table.add_column(first, no_wrap=True, min_width=19)
    for name in others:
        table.add_column(name, justify="right")
    return table
