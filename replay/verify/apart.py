"""What the stages kept apart: late and quarantined rows, and late records that nothing explains."""

import duckdb
import polars as pl

from replay.pace import Pace
from replay.run.ledger import Ledger
from replay.sent import PLACE
from replay.verify.findings import finding, named, number, queried
from schemas.closed_lists import Bucket, QuarantineReason
from schemas.topics import KINDS

LATE_RECORDS = "late records"  # place of the finding that speaks of all of them
WORTH_NAMING_S = 60.0  # lateness of a run on its own clock that is a cause of late records


def possible(stage: str) -> str:
    """Readings of the run less those whose clock the stage called impossible."""
    return (
        f"(SELECT * FROM run_readings ANTI JOIN (FROM apart WHERE stage = '{stage}' "
        f"AND reason = '{QuarantineReason.IMPOSSIBLE_CLOCK}') USING ({PLACE}))"
    )


def rows_apart(stage: str) -> str:
    """Per meter the rows that a stage kept apart."""
    return f"""(SELECT meter_id, count(*) FILTER (bucket = '{Bucket.LATE}') AS late,
        count(*) FILTER (bucket = '{Bucket.QUARANTINED}') AS quarantined
        FROM apart WHERE stage = '{stage}' GROUP BY meter_id)"""


def check_apart(lake: duckdb.DuckDBPyConnection) -> list[pl.DataFrame]:
    """What is kept apart is a record that the lake has, and is kept once by a stage."""
    findings = []
    for table, rows in (
        ("late_readings", "run_readings"), ("quarantined_readings", "run_readings"),
        ("late_events", "run_events"), ("quarantined_events", "run_events"),
    ):  # fmt: skip
        orphans = f"""SELECT meter_id, count(*) || ' rows of records that the lake has not' AS finding FROM apart
            ANTI JOIN {rows} USING ({PLACE}) WHERE kept_in = '{table}' GROUP BY meter_id"""
        twice = f"""SELECT meter_id, count(*) || ' records are kept twice by one stage' AS finding FROM (
            SELECT any_value(meter_id) AS meter_id FROM apart WHERE kept_in = '{table}'
            GROUP BY stage, {PLACE} HAVING count(*) > 1) GROUP BY meter_id"""
        findings += [queried(lake, table, sql) for sql in (orphans, twice)]
    return findings


def check_late(lake: duckdb.DuckDBPyConnection, ledger: Ledger) -> list[pl.DataFrame]:
    """Late records that no fault explains, nor their meter's own log: there an earlier record has a later stamp."""
    if not number(lake, f"SELECT count(*) FROM apart WHERE bucket = '{Bucket.LATE}'"):
        return []
    lake.execute(
        " UNION ALL ".join(
            f"""{"CREATE TEMP TABLE unexplained AS" if kind == "readings" else ""}
            SELECT '{kind}' AS kind, meter_id, seq FROM (
                SELECT meter_id, seq, {PLACE}, coalesce(observed_at < max(observed_at) OVER (
                    PARTITION BY meter_id ORDER BY seq ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), false)
                    AS is_behind
                FROM run_{kind} ANTI JOIN (FROM apart WHERE kept_in = 'quarantined_{kind}'
                    AND reason = '{QuarantineReason.IMPOSSIBLE_CLOCK}') USING ({PLACE}))
            SEMI JOIN (FROM apart WHERE kept_in = 'late_{kind}') USING ({PLACE})
            SEMI JOIN (SELECT meter_id, seq, place % (1::BIGINT << 40) AS "offset"
                FROM arrived WHERE topic = '{kind}') USING (meter_id, seq, "offset")
            ANTI JOIN (FROM faults WHERE topic = '{kind}') USING (meter_id, seq)
            ANTI JOIN shared USING (meter_id)
            WHERE NOT is_behind"""
            for kind in KINDS
        )
    )
    found = [
        queried(
            lake,
            f"late_{kind}",
            f"""SELECT meter_id, count(*) || ' late, which no fault explains: seq ' || {named("seq")} AS finding
            FROM unexplained WHERE kind = '{kind}' GROUP BY meter_id""",
        )
        for kind in KINDS
    ]
    late = lake.execute("SELECT count(*), count(DISTINCT meter_id) FROM unexplained").fetchone()
    if late and late[0]:
        sentence = f"{late[0]:,} records of {late[1]:,} meters are late and no fault explains it: {_why_late(ledger)}"
        found.insert(0, finding(LATE_RECORDS, sentence))
    return found


def _why_late(ledger: Ledger) -> str:
    """Why records of a run can be late, and what to do, by its ledger."""
    behind_s = ledger.late_max_s * (ledger.speed or 0)
    if ledger.pace != Pace.STEADY and behind_s > WORTH_NAMING_S:
        return (
            f"the run kept its clock and was up to {ledger.late_max_s:g} s behind it, which at speed {ledger.speed:g} "
            f"are {behind_s / 3600:.1f} h for the meters; play it with --pace steady, or slower"
        )
    return (
        "the run's clock waited for its way, so look at what was reordered on the way (above) and at "
        "METERSTREAM_ALLOWED_LATENESS_S of the jobs"
    )
