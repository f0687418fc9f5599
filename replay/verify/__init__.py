"""What became of a run: what was sent against what lake and dead letters hold, table by table and meter by meter.

It takes no table's word for another: the accounting is compared with the rows, the steps and windows with the readings
they were made of, the alarms with the events, the lake's records byte by byte with the run's digest, and every injected
fault with what was allowed to become of it.
"""

from collections.abc import Callable
from functools import partial

import duckdb
import polars as pl

from lake.queries import accounting_lines
from lake.reading import Lake
from replay.outcomes import judged
from replay.run.ledger import run_folder
from replay.scores import scores
from replay.sent import PLACE, Run, ledger_of
from replay.verify.accounting import BALANCE, JUDGING, behind, check_accounting, per_meter
from replay.verify.alarms import check_alarms
from replay.verify.apart import check_apart, check_late
from replay.verify.faults import facts, per_fault
from replay.verify.findings import FINDINGS, number
from replay.verify.records import check_digest, check_records, make_arrived
from replay.verify.steps import check_energy, check_segments, check_steps
from replay.verify.verdict import Verdict
from replay.verify.windows import check_windows, made_windows
from schemas.closed_lists import Bucket, Edge, FaultOutcome
from settings import home

__all__ = ["Verdict", "unfinished", "verify"]
Step = Callable[[str], None]
"""Called with what is being done."""


def verify(run_id: str, on_step: Step = lambda _: None) -> Verdict:
    """Compares what a run sent with what the lake holds, and writes verify.parquet beside its ledger.

    Raises:
        ConfigError: there is no such run, it has no ledger yet, or there is no lake.
    """
    run, lake = Run.read(run_id), Lake().duckdb()
    on_step("what arrived")
    run.open_in(lake)
    make_arrived(lake)
    counts, findings = check_records(lake, run)
    for step, check in (
        ("steps of registers", check_steps),
        ("windows of voltage", check_windows),
        ("rows kept apart", check_apart),
        ("late records", partial(check_late, ledger=run.ledger)),
        ("alarms", check_alarms),
        ("accounting", check_accounting),
    ):
        on_step(step)
        findings += check(lake)
    on_step("faults")
    faults = judged(facts(lake, run))
    on_step("energy")
    findings += [check_segments(lake), *check_energy(lake, run, faults)]
    on_step("bytes")
    findings += check_digest(lake, run, counts)
    on_step("scores")
    scored = scores(lake, run)
    on_step("sums")
    every = pl.concat([FINDINGS.to_frame(), *findings]).sort("meter_id", "place", nulls_last=False)
    meters = per_meter(lake, run, counts, every)
    verdict = Verdict(
        run_id, run.ledger.is_whole, {name: int(meters.get_column(name).sum()) for name in (*BALANCE, "reordered")},
        accounting_lines(lake, run_id), meters, per_fault(faults), scored, every, _expected(lake),
        _notes(lake, run, faults), behind(lake, run.ledger),
    )  # fmt: skip
    for name, frame in (("verify", verdict.meters), ("verify-faults", verdict.faults)):
        staged = home() / "staging" / f"{run_id}-{name}.parquet"
        staged.parent.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(staged, compression="zstd")
        staged.rename(run_folder(run_id) / f"{name}.parquet")
    return verdict


def unfinished(run_id: str) -> list[str]:
    """Which stages have not received all that a run sent, by their accounting; empty when that is closed.

    Raises:
        ConfigError: there is no such run, or it has no ledger yet.
    """
    return behind(Lake().duckdb(), ledger_of(run_id))


def _expected(lake: duckdb.DuckDBPyConnection) -> dict[str, tuple[int, int]]:
    """Windows and alarms: how many the readings and events that arrived make, late ones too, and how many are found."""
    windows = f"""SELECT count(*), count(*) FILTER (f.sample_count = m.n) FROM (
            {made_windows("all_voltages")}) m
        LEFT JOIN run_windows f USING (meter_id, phase, window_start)"""
    raised = f"change = '{FaultOutcome.RAISED}' AND run_id IN (SELECT run_id FROM run_events)"
    alarms = f"""WITH made AS (
            SELECT meter_id, alarm_type, event_at AS at FROM changes WHERE {raised} UNION ALL
            SELECT meter_id, alarm_type, event_at FROM original_events
            WHERE is_apart AND alarm_type IS NOT NULL AND edge = '{Edge.RAISE}'
                AND run_id IN (SELECT run_id FROM run_events)),
        found AS (SELECT meter_id, alarm_type, changed_at AS at FROM alarm_rows WHERE {raised})
        SELECT (SELECT count(*) FROM made), count(*) FROM (FROM made INTERSECT ALL FROM found)"""
    found = {}
    for name, sql in (("windows", windows), ("alarms", alarms)):
        row = lake.execute(sql).fetchone() or (0, 0)
        found[name] = (int(row[0]), int(row[1]))
    return found


def _notes(lake: duckdb.DuckDBPyConnection, run: Run, faults: pl.DataFrame) -> list[str]:
    """What could not be checked, and why."""
    notes = []
    if not run.ledger.is_whole:
        unsent = faults.filter(pl.col("outcome") == FaultOutcome.NOT_SENT.value).get_column("fault_id").n_unique()
        notes.append(f"the run was stopped before its end: energy is not compared, {unsent} faults were not sent")
    unsure = run.ledger.readings + run.ledger.events + run.ledger.poison - run.ledger.records
    if unsure > 0:
        notes.append(f"{unsure} records were handed over and never acknowledged: as many may not have arrived")
    shared = number(lake, "SELECT count(*) FROM shared")
    if shared:
        unjudged = faults.filter(pl.col("outcome") == FaultOutcome.OF_SEVERAL_RUNS.value).get_column("fault_id")
        notes.append(
            f"{shared} meters have readings of other runs too: their windows and energy are not compared, the "
            f"accounting of {', '.join(JUDGING)} only by what they received, {unjudged.n_unique()} faults are not "
            "judged"
        )
    if run.ledger.is_whole:
        skipped = number(lake, "SELECT count(*) FROM uncompared ANTI JOIN shared USING (meter_id)")
        if skipped:
            notes.append(
                f"energy of {skipped} meters is not compared: a value that nothing can tell, or a log that begins anew"
            )
    kept = lake.execute(
        f"""SELECT count(*), count(DISTINCT meter_id) FROM apart ANTI JOIN faults USING (meter_id)
        WHERE bucket = '{Bucket.QUARANTINED}'"""
    ).fetchone()
    if kept and kept[0]:
        notes.append(f"{kept[0]} rows of quarantined records are of {kept[1]} meters without a fault")
    late = number(lake, f"SELECT count(DISTINCT ({PLACE})) FROM apart WHERE bucket = '{Bucket.LATE}'")
    if late:
        notes.append(f"{late:,} records are late in all, those that faults or logs explain too")
    row = lake.execute(
        """SELECT count(*), count(*) FILTER (sample_count IS NULL AND window_start > (
            SELECT max(arrival_at) - INTERVAL 45 MINUTE FROM run_readings)),
            count(*) FILTER (sample_count IS NULL) FROM wrong_windows"""
    ).fetchone()
    is_flushed = (home() / "run" / "streaming.flushed").exists()  # a run that is one batch has closed nothing before
    if row and row[0] and row[0] in (row[1], row[1] if is_flushed else row[2]):
        notes.append("windows that are missing may be open: make up, make down FLUSH=1, verify again")
    return notes
