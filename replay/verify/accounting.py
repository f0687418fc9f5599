"""The accounting: every record in one bucket, by stage against the rows, and by meter."""

import duckdb
import polars as pl

from lake.queries import AccountingLine, accounting_lines
from replay.run.ledger import Ledger
from replay.sent import ALARMS, DELTAS, LAKE, VOLTAGE, Run
from replay.verify.alarms import EVENT_KEY
from replay.verify.apart import rows_apart
from replay.verify.findings import finding, frame, number
from schemas.closed_lists import Bucket, FaultKind
from schemas.topics import COMMANDS, KINDS

JUDGING = (DELTAS, VOLTAGE, ALARMS)
"""What these make of a record depends on what they had of its meter before, from whatever run."""
BALANCE = ("sent", "redelivered", "stored", "duplicate", "late", "quarantined", "invalid", "lost")
"""Per meter and in total: sent + redelivered = the sum of the others."""
UNACCOUNTED = """SELECT meter_id, received || ' readings were received, of which ' || stored || ' stored, ' ||
        duplicate || ' duplicate, ' || late || ' late and ' || quarantined || ' quarantined' AS finding
    FROM {} ANTI JOIN shared USING (meter_id) WHERE received <> stored + duplicate + late + quarantined"""


def behind(lake: duckdb.DuckDBPyConnection, ledger: Ledger) -> list[str]:
    """Which stages have not received all that a run sent, a sentence each."""
    unsure = max(0, ledger.readings + ledger.events + ledger.poison - ledger.records)
    received = {line.stage: line.received for line in accounting_lines(lake, ledger.run_id)}
    sent = {
        LAKE: (ledger.readings + ledger.events, "records"),
        DELTAS: (ledger.readings + ledger.events, "records"),
        VOLTAGE: (ledger.readings, "readings"),
        ALARMS: (ledger.events, "events"),
    }
    return [
        f"{stage} has received {received.get(stage, 0):,} of {count:,} {what}"
        for stage, (count, what) in sent.items()
        if received.get(stage, 0) < count - unsure
    ]


def check_accounting(lake: duckdb.DuckDBPyConnection) -> list[pl.DataFrame]:
    """The accounting of the run by stage against the rows, and what belongs to no run against the dead letters."""
    of_both = "SELECT any_value(run_id) FROM (SELECT run_id FROM run_readings UNION ALL SELECT run_id FROM run_events)"
    run_id = str((lake.execute(of_both).fetchone() or [""])[0])
    all_events, distinct_events = (
        f"(SELECT count({what}) FROM run_events)" for what in ("*", f"DISTINCT ({EVENT_KEY})")
    )
    rows = {
        LAKE: "SELECT sum(rows), sum(records), sum(rows - records), 0, 0, 0 FROM counts",
        DELTAS: f"""SELECT coalesce(sum(received), 0) + {all_events},
                coalesce(sum(stored), 0) + {distinct_events},
                coalesce(sum(duplicate), 0) + {all_events} - {distinct_events}, sum(late), sum(quarantined), 0
            FROM delta_account""",
        VOLTAGE: """SELECT sum(received), sum(stored), sum(duplicate), sum(late), sum(quarantined), 0
            FROM voltage_account""",
        ALARMS: f"""SELECT count(*), count(DISTINCT ({EVENT_KEY})) - any_value(late) - any_value(quarantined),
                count(*) - count(DISTINCT ({EVENT_KEY})), any_value(late), any_value(quarantined), 0
            FROM run_events, (SELECT coalesce(sum(late), 0) AS late, coalesce(sum(quarantined), 0) AS quarantined
                FROM {rows_apart(ALARMS)})""",
    }
    lines = {line.stage: line for line in accounting_lines(lake, run_id)}
    is_shared = bool(number(lake, "SELECT count(*) FROM shared"))
    findings = []
    for stage, sql in rows.items():
        expected = AccountingLine(stage, *[int(count or 0) for count in lake.execute(sql).fetchone() or ()])
        line = lines.get(stage, AccountingLine(stage, 0, 0, 0, 0, 0, 0))
        if not line.balance:
            findings.append(finding(stage, f"the accounting does not balance: {line}"))
        findings += [
            finding(
                stage, f"{name}: {getattr(line, name):,} in the accounting, {getattr(expected, name):,} in the rows"
            )
            for name in ("received", *(bucket.value for bucket in Bucket if not (is_shared and stage in JUDGING)))
            if getattr(line, name) != getattr(expected, name)
        ]
    readings, events = (
        f"SELECT count(*) FROM dead_letters WHERE kafka_topic = '{topic.name}'" for topic in KINDS.values()
    )
    unnamed = {
        LAKE: f"""SELECT (SELECT count(*) FROM dead_letters WHERE kafka_topic IS DISTINCT FROM '{COMMANDS.name}')
            + (SELECT count(*) FROM readings WHERE run_id IS NULL)
            + (SELECT count(*) FROM events WHERE run_id IS NULL)""",
        DELTAS: f"""SELECT ({readings}) + ({events}) + (SELECT count(*) FROM readings WHERE run_id IS NULL)
            + (SELECT count(*) FROM events WHERE run_id IS NULL)""",
        VOLTAGE: f"SELECT ({readings}) + (SELECT count(*) FROM readings WHERE run_id IS NULL)",
        ALARMS: f"""SELECT ({events}) + (SELECT count(*) FROM events WHERE run_id IS NULL)
            + (SELECT count(*) FROM alarm_acknowledgements)
            + (SELECT count(*) FROM dead_letters WHERE kafka_topic = '{COMMANDS.name}')""",
    }
    for stage, sql in unnamed.items():
        found = number(lake, sql)
        row = lake.execute(
            "SELECT coalesce(sum(received), 0) FROM accounting WHERE run_id IS NULL AND stage = ?", [stage]
        ).fetchone()
        received = int((row or (0,))[0])
        if received != found:
            sentence = f"of no run: {received:,} received in the accounting, {found:,} dead letters and readings"
            findings.append(finding("dead_letters" if stage == LAKE else stage, sentence))
    return findings


def per_meter(lake: duckdb.DuckDBPyConnection, run: Run, counts: pl.DataFrame, findings: pl.DataFrame) -> pl.DataFrame:
    """One row a meter: `BALANCE`, reordered, wrong."""
    letters = frame(
        lake,
        f"""SELECT meter_id, CAST(sum(coalesce(letters, 0)) AS BIGINT) AS invalid,
            count(*) FILTER (letters IS NULL) AS lost
        FROM faults LEFT JOIN letters USING (row) WHERE kind = '{FaultKind.POISON}' AND was_sent GROUP BY meter_id""",
    )
    events = frame(lake, f"FROM {rows_apart(ALARMS)}")
    steps = frame(lake, "SELECT * EXCLUDE (received) FROM delta_account")
    sides = (
        counts.with_columns(redelivered=pl.max_horizontal(pl.col("rows") - pl.col("records") - pl.col("copies"), 0))
        .group_by("meter_id")
        .agg(
            pl.col("sent", "lost", "redelivered", "reordered").sum(),
            events=pl.col("records").filter(pl.col("topic") == "events").sum(),
            event_copies=(pl.col("rows") - pl.col("records")).filter(pl.col("topic") == "events").sum(),
            copies_lost=pl.min_horizontal(pl.col("rows") - pl.col("records") - pl.col("copies"), 0).sum().neg(),
        )
    )
    wrong = findings.filter(pl.col("meter_id").is_not_null()).group_by("meter_id").agg(
        wrong=pl.format("{}: {}", "place", "finding").str.join("; ")
    )  # fmt: skip
    joined = (
        sides.join(run.meters.select("meter_id", "poison"), on="meter_id", how="left")
        .join(steps, on="meter_id", how="left")
        .join(events, on="meter_id", how="left", suffix="_events")
        .join(letters, on="meter_id", how="left", suffix="_letters")
        .join(wrong, on="meter_id", how="left")
        .with_columns(pl.col("wrong").fill_null(""), pl.selectors.numeric().fill_null(0))
    )
    late, quarantined = (pl.col(name) + pl.col(f"{name}_events") for name in ("late", "quarantined"))
    stored_events = pl.col("events") - pl.col("late_events") - pl.col("quarantined_events")
    return (
        joined.select(
            "meter_id",
            sent=pl.col("sent") + pl.col("poison"),
            redelivered=pl.col("redelivered")
            + pl.max_horizontal(pl.col("invalid") + pl.col("lost_letters") - pl.col("poison"), 0),
            stored=pl.col("stored") + stored_events,
            duplicate=pl.col("duplicate") + pl.col("event_copies"),
            late=late,
            quarantined=quarantined,
            invalid=pl.col("invalid"),
            lost=pl.col("lost") + pl.col("lost_letters") + pl.col("copies_lost"),
            reordered=pl.col("reordered"),
            wrong=pl.col("wrong"),
        )
        .cast({name: pl.Int64 for name in (*BALANCE, "reordered")})
        .sort("meter_id")
    )
