"""What became of a run: what was sent against what lake and dead letters hold, table by table and meter by meter.

Readers of the lake use the plain globs, so this sees what everyone sees. It takes no table's word for another: the
books are compared with the rows, the steps and windows with the readings they were made of, the alarms with the events,
the lake's records byte by byte with the run's digest, and every injected fault with what was allowed to become of it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
from rich import box
from rich.markup import escape
from rich.table import Table

import schemas
from lake.locks import files_kept
from lake.paths import glob_of, table_path
from lake.reading import newest_registry, registry_files
from replay.dirt import encoding_of
from replay.outcomes import GAP_FACTOR, MAX_AHEAD, MAX_BEHIND, STEP_SLACK_WH, judged
from replay.pace import Pace
from replay.run import UNSTAMPED, Ledger, digest_of, digest_text, raw_bytes, run_folder
from replay.scores import Scores, scores, scores_told
from replay.sent import ALARMS, DELTAS, LAKE, PLACE, REGISTER_COLUMNS, VOLTAGE, VOLTAGE_COLUMNS, Run, ledger_of
from schemas.closed_lists import (
    ACCEPTED_DELTAS,
    AlarmSource,
    AlarmState,
    Bucket,
    DeltaReason,
    Edge,
    EventAction,
    FaultKind,
    FaultOutcome,
    Poison,
    QuarantineReason,
)
from schemas.codec import arrow_schema, encode_batch
from schemas.tables import REGISTERS, TABLES, polars_schema
from schemas.topics import COMMANDS, KINDS
from settings import home

JUDGING = (DELTAS, VOLTAGE, ALARMS)
"""What these make of a record depends on what they had of its meter before, from whatever run."""
NAMED_SEQS = 20  # missing records of one meter that are named
LATE_RECORDS = "late records"  # place of the finding that speaks of all of them
WORTH_NAMING_S = 60.0  # lateness of a run on its own clock that is a cause of late records
DIGEST_ROWS = 100_000  # records that are encoded at once
Step = Callable[[str], None]
"""Told what is being done."""


@dataclass(frozen=True)
class Books:
    """One stage's books, summed over batches."""

    stage: str
    received: int
    stored: int
    duplicate: int
    late: int
    quarantined: int
    invalid: int

    @property
    def balance(self) -> bool:
        """Received = stored + duplicate + late + quarantined + invalid."""
        return self.received == self.stored + self.duplicate + self.late + self.quarantined + self.invalid


def open_lake() -> duckdb.DuckDBPyConnection:
    """A connection with a view per table, over its plain glob, and `newest_registry`: the newest row of each meter."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute(f"SET temp_directory = '{home() / 'staging' / 'duckdb'}'")
    for table in TABLES:
        if any(table_path(table).glob("date=*/*.parquet")):
            connection.execute(f"CREATE VIEW {table} AS FROM read_parquet('{glob_of(table_path(table))}')")
        else:
            schema = polars_schema(TABLES[table])
            connection.register(f"no_{table}", pl.DataFrame(schema=schema).to_arrow())
            connection.execute(f"CREATE VIEW {table} AS FROM no_{table}")
    connection.register("newest_registry", newest_registry(registry_files()).to_arrow())
    return connection


def books(lake: duckdb.DuckDBPyConnection, run_id: str | None = None) -> list[Books]:
    """The books of every stage, of one run or of all; what cannot be decoded belongs to no run."""
    rows = lake.execute(
        """SELECT stage, sum(received), sum(stored), sum(duplicate), sum(late), sum(quarantined), sum(invalid)
        FROM accounting WHERE run_id = $run_id OR $run_id IS NULL GROUP BY stage ORDER BY stage""",
        {"run_id": run_id},
    ).fetchall()
    return [Books(stage, *map(int, numbers)) for stage, *numbers in rows]


def broken_segments(lake: duckdb.DuckDBPyConnection) -> list[tuple[Any, ...]]:
    """Segments whose deltas do not sum up to last − start; there must be none.

    A segment starts at its first accepted value, or at 0 after a reset; a rollover adds a full register.
    """
    return lake.execute(
        f"""WITH accepted AS (
            SELECT *,
                CASE WHEN reason = '{DeltaReason.ROLLOVER}' THEN previous_wh + delta_wh - wh ELSE 0 END AS unrolled_wh
            FROM consumption_deltas WHERE reason IN {_accepted()})
        SELECT meter_id, register, segment_id, sum(delta_wh) AS deltas_wh,
            max_by(wh, observed_at) + sum(unrolled_wh)
                - CASE WHEN min_by(reason, observed_at) = '{DeltaReason.RESET}' THEN 0 ELSE min_by(wh, observed_at) END
                AS registers_wh
        FROM accepted GROUP BY ALL HAVING deltas_wh <> registers_wh ORDER BY ALL"""
    ).fetchall()


def energy(lake: duckdb.DuckDBPyConnection, truth: Path) -> tuple[int, int, list[tuple[Any, ...]]]:
    """(Wh on the tape, Wh in the deltas, meters and registers where they differ)."""
    total = lake.execute(f"SELECT sum(energy_wh) FROM read_parquet('{truth}')").fetchone()
    found = lake.execute("SELECT coalesce(sum(delta_wh), 0) FROM consumption_deltas").fetchone()
    differing = lake.execute(
        f"""WITH deltas AS (SELECT meter_id, register, sum(delta_wh) AS found_wh FROM consumption_deltas GROUP BY ALL)
        SELECT meter_id, register, energy_wh, found_wh
        FROM read_parquet('{truth}') FULL JOIN deltas USING (meter_id, register)
        WHERE energy_wh IS DISTINCT FROM found_wh AND NOT coalesce(begins_anew, false) ORDER BY ALL LIMIT 5"""
    ).fetchall()
    return int((total or (0,))[0]), int((found or (0,))[0]), differing


def _accepted() -> str:
    """The reasons of accepted steps as a list in SQL."""
    return f"({', '.join(repr(reason.value) for reason in ACCEPTED_DELTAS)})"


FINDINGS = pl.Schema({"meter_id": pl.String(), "place": pl.String(), "told": pl.String()})
"""What does not hold: whose (null: the run's), in which table or stage, and a sentence."""
BALANCE = ("sent", "redelivered", "stored", "duplicate", "late", "quarantined", "invalid", "lost")
"""Per meter and in total: sent + redelivered = the sum of the others."""


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        run_id: the run.
        is_whole: False for a run that was stopped before its end.
        totals: `BALANCE`, and reordered, over all meters.
        stages: the books of the run's stages.
        meters: one row a meter: `BALANCE`, reordered, wrong (sentences; empty where all holds).
        faults: one row a fault: fault_id, kind, meter_id (the first), records, outcome, is_explained, detail.
        scores: precision and recall per reason and alarm type.
        findings: columns `FINDINGS`; empty when the run is proven.
        expected: windows and alarms → how many the readings and events that arrived make, and how many are found so.
        notes: what could not be checked, and why.
        unfinished: which stages have not received all yet; empty when the books are closed.
    """

    run_id: str
    is_whole: bool
    totals: dict[str, int]
    stages: list[Books]
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


def verify(run_id: str, on_step: Step = lambda _: None) -> Verdict:
    """Compares what a run sent with what the lake holds, and writes verify.parquet beside its ledger.

    Raises:
        ConfigError: there is no such run, it has no ledger yet, or there is no lake.
    """
    run = Run.read(run_id)
    with files_kept(*TABLES):
        return _compared(run, on_step)


def _compared(run: Run, on_step: Step) -> Verdict:
    run_id, lake = run.ledger.run_id, open_lake()
    on_step("what arrived")
    run.open_in(lake)
    _arrived(lake)
    counts, findings = _records(lake, run)
    for told, check in (
        ("steps of registers", _steps),
        ("windows of voltage", _windows),
        ("rows kept apart", _apart),
        ("late records", partial(_late, ledger=run.ledger)),
        ("alarms", _alarms),
        ("books", _books),
    ):
        on_step(told)
        findings += check(lake)
    on_step("faults")
    faults = judged(_facts(lake, run))
    on_step("energy")
    findings += [_broken(lake), *_energy(lake, run, faults)]
    on_step("bytes")
    findings += _digested(lake, run, counts)
    on_step("scores")
    scored = scores(lake, run)
    on_step("sums")
    every = pl.concat([FINDINGS.to_frame(), *findings]).sort("meter_id", "place", nulls_last=False)
    meters = _per_meter(lake, run, counts, every)
    verdict = Verdict(
        run_id, run.ledger.is_whole, {name: int(meters.get_column(name).sum()) for name in (*BALANCE, "reordered")},
        books(lake, run_id), meters, _per_fault(faults), scored, every, _expected(lake), _notes(lake, run, faults),
        _behind(lake, run.ledger),
    )  # fmt: skip
    for name, frame in (("verify", verdict.meters), ("verify-faults", verdict.faults)):
        staged = home() / "staging" / f"{run_id}-{name}.parquet"
        staged.parent.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(staged, compression="zstd")
        staged.rename(run_folder(run_id) / f"{name}.parquet")
    return verdict


def unfinished(run_id: str) -> list[str]:
    """Which stages have not received all that a run sent, by their books; empty when those are closed.

    Raises:
        ConfigError: there is no such run, or it has no ledger yet.
    """
    return _behind(open_lake(), ledger_of(run_id))


def _behind(lake: duckdb.DuckDBPyConnection, ledger: Ledger) -> list[str]:
    unsure = max(0, ledger.readings + ledger.events + ledger.poison - ledger.records)
    received = {line.stage: line.received for line in books(lake, ledger.run_id)}
    sent = {
        LAKE: (ledger.readings + ledger.events, "records"),
        DELTAS: (ledger.readings, "readings"),
        VOLTAGE: (ledger.readings, "readings"),
        ALARMS: (ledger.events, "events"),
    }
    return [
        f"{stage} has received {received.get(stage, 0):,} of {count:,} {what}"
        for stage, (count, what) in sent.items()
        if received.get(stage, 0) < count - unsure
    ]


def _told(lake: duckdb.DuckDBPyConnection, place: str, sql: str) -> pl.DataFrame:
    """Findings of a query that gives meter_id and told."""
    found = _frame(lake, f"SELECT meter_id, '{place}' AS place, told FROM ({sql})")
    return found.cast(FINDINGS)


def _frame(lake: duckdb.DuckDBPyConnection, sql: str) -> pl.DataFrame:
    """Rows of a query."""
    return pl.DataFrame(lake.sql(sql).to_arrow_table())


def _number(lake: duckdb.DuckDBPyConnection, sql: str) -> int:
    """What a query gives that has one row of one number."""
    return int((lake.execute(sql).fetchone() or (0,))[0])


def _finding(place: str, told: str) -> pl.DataFrame:
    """One finding of the whole run."""
    return pl.DataFrame([{"meter_id": None, "place": place, "told": told}], schema=FINDINGS)


def _named(values: str) -> str:
    """The first values of a group as text in SQL, sorted, and how many more there are."""
    return (
        f"array_to_string(list_sort(list({values}))[:{NAMED_SEQS}], ', ') "
        f"|| CASE WHEN count(*) > {NAMED_SEQS} THEN ' and ' || (count(*) - {NAMED_SEQS}) || ' more' ELSE '' END"
    )


def _arrived(lake: duckdb.DuckDBPyConnection) -> None:
    """Table `arrived`: a row per record of the run that the lake has.

    topic, meter_id, seq, copies; `place`, where its first copy lies in Kafka: it grows with the arrival, since all of a
    meter's records are in one partition; `is_reordered`, whether a record with a higher seq arrived before it.
    """
    lake.execute(
        """CREATE TEMP TABLE arrived AS
        SELECT *, coalesce(seq < max(seq) OVER (
            PARTITION BY topic, meter_id ORDER BY place ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ), false) AS is_reordered
        FROM (
            SELECT 'readings' AS topic, meter_id, seq, count(*) AS copies, min(partition << 40 | "offset") AS place
            FROM run_readings GROUP BY ALL
            UNION ALL
            SELECT 'events', meter_id, seq, count(*), min(partition << 40 | "offset") FROM run_events GROUP BY ALL)"""
    )


def _records(lake: duckdb.DuckDBPyConnection, run: Run) -> tuple[pl.DataFrame, list[pl.DataFrame]]:
    """Per topic and meter: sent, copies, rows, records, lost, surplus, reordered; and what does not hold."""
    lake.execute(
        """CREATE TEMP TABLE surplus AS
        SELECT a.topic, a.meter_id, a.seq FROM arrived a
        LEFT JOIN sent s ON s.topic = a.topic AND s.meter_id = a.meter_id
        LEFT JOIN holes h ON h.topic = a.topic AND h.meter_id = a.meter_id AND h.seq = a.seq
        WHERE s.meter_id IS NULL OR a.seq < 0 OR a.seq >= s."end" OR h.seq IS NOT NULL"""
    )
    counts = _frame(
        lake,
        """WITH found AS (
            SELECT topic, meter_id, count(*) AS records, sum(copies) AS rows,
                count(*) FILTER (is_reordered) AS reordered
            FROM arrived GROUP BY ALL),
        more AS (SELECT topic, meter_id, count(*) AS surplus FROM surplus GROUP BY ALL)
        SELECT coalesce(s.topic, f.topic) AS topic, coalesce(s.meter_id, f.meter_id) AS meter_id,
            CAST(coalesce(sent, 0) AS BIGINT) AS sent, CAST(coalesce(s.copies, 0) AS BIGINT) AS copies,
            CAST(coalesce(rows, 0) AS BIGINT) AS rows, CAST(coalesce(records, 0) AS BIGINT) AS records,
            coalesce(reordered, 0) AS reordered, coalesce(surplus, 0) AS surplus,
            CAST(coalesce(sent, 0) - coalesce(s.copies, 0) - (coalesce(records, 0) - coalesce(surplus, 0)) AS BIGINT)
                AS lost
        FROM sent s FULL JOIN found f ON f.topic = s.topic AND f.meter_id = s.meter_id
        LEFT JOIN more m ON m.topic = coalesce(s.topic, f.topic) AND m.meter_id = coalesce(s.meter_id, f.meter_id)""",
    )
    lake.register("counts", counts.to_arrow())
    missing = """SELECT meter_id, count(*) || ' of ' || any_value(sent) || ' lost: seq ' || {named} AS told FROM (
            SELECT topic, meter_id, sent, unnest(range("end")) AS seq FROM sent
            SEMI JOIN (FROM counts WHERE lost <> 0) USING (topic, meter_id))
        ANTI JOIN arrived USING (topic, meter_id, seq) ANTI JOIN holes USING (topic, meter_id, seq)
        WHERE topic = '{kind}' GROUP BY meter_id"""
    never = "SELECT meter_id, 'never sent by the run: seq ' || {named} AS told FROM surplus WHERE topic = '{kind}' \
        GROUP BY meter_id"
    torn = """SELECT meter_id, 'not in the order they were sent in: seq ' || {named} AS told FROM arrived
        ANTI JOIN (SELECT topic, meter_id, seq FROM faults WHERE kind IN ('late', 'reorder'))
            USING (topic, meter_id, seq)
        WHERE is_reordered AND topic = '{kind}' GROUP BY meter_id"""
    fewer = """SELECT c.meter_id, count(*) || ' injected copies lost: seq ' || {named} AS told FROM (
            SELECT topic, meter_id, seq, count(*) AS copies FROM faults
            WHERE kind = 'duplicate' AND was_sent GROUP BY ALL) c
        JOIN arrived a ON a.topic = c.topic AND a.meter_id = c.meter_id AND a.seq = c.seq
        WHERE a.copies <= c.copies AND c.topic = '{kind}' GROUP BY c.meter_id"""
    findings = [
        _told(lake, kind, sql.format(kind=kind, named=_named("c.seq" if sql is fewer else "seq")))
        for sql in (missing, never, torn, fewer)
        for kind in KINDS
    ]
    return counts, findings


def _possible(stage: str) -> str:
    """Readings of the run less those whose clock the stage called impossible."""
    return (
        f"(SELECT * FROM run_readings ANTI JOIN (FROM apart WHERE stage = '{stage}' "
        f"AND reason = '{QuarantineReason.IMPOSSIBLE_CLOCK}') USING ({PLACE}))"
    )


def _rows_apart(stage: str) -> str:
    """Per meter the rows that a stage kept apart."""
    return f"""(SELECT meter_id, count(*) FILTER (bucket = '{Bucket.LATE}') AS late,
        count(*) FILTER (bucket = '{Bucket.QUARANTINED}') AS quarantined
        FROM apart WHERE stage = '{stage}' GROUP BY meter_id)"""


UNACCOUNTED = """SELECT meter_id, received || ' readings were received, of which ' || stored || ' stored, ' ||
        duplicate || ' duplicate, ' || late || ' late and ' || quarantined || ' quarantined' AS told
    FROM {} ANTI JOIN shared USING (meter_id) WHERE received <> stored + duplicate + late + quarantined"""


def _steps(lake: duckdb.DuckDBPyConnection) -> list[pl.DataFrame]:
    """A step for each register value that was received, and each reading in one bucket.

    Table `delta_account`: per meter received, stored, duplicate, late, quarantined.
    """
    lake.execute(
        f"""CREATE TEMP TABLE delta_account AS
        WITH accepted AS (
            SELECT meter_id, count(*) AS stored FROM (
                SELECT meter_id, bool_or(reason IN {_accepted()}) AND NOT bool_or(reason = '{DeltaReason.IMPLAUSIBLE}')
                    AS is_stored
                FROM run_deltas GROUP BY meter_id, observed_at) WHERE is_stored GROUP BY meter_id),
        again AS (
            SELECT meter_id, sum(copies) AS duplicate FROM (
                SELECT meter_id, observed_at, max(copies) AS copies FROM (
                    SELECT meter_id, observed_at, register, count(*) AS copies FROM run_deltas
                    WHERE reason = '{DeltaReason.DUPLICATE}' GROUP BY ALL) GROUP BY ALL) GROUP BY meter_id),
        bare AS (
            SELECT meter_id, count(DISTINCT observed_at) AS stored, count(*) - count(DISTINCT observed_at) AS duplicate
            FROM {_possible(DELTAS)} ANTI JOIN apart USING ({PLACE})
            WHERE coalesce({REGISTER_COLUMNS}) IS NULL GROUP BY meter_id),
        received AS (SELECT meter_id, count(*) AS received FROM run_readings GROUP BY meter_id)
        SELECT meter_id, received,
            CAST(coalesce(accepted.stored, 0) + coalesce(bare.stored, 0) AS BIGINT) AS stored,
            CAST(coalesce(again.duplicate, 0) + coalesce(bare.duplicate, 0) AS BIGINT) AS duplicate,
            coalesce(late, 0) AS late, coalesce(quarantined, 0) AS quarantined
        FROM received LEFT JOIN accepted USING (meter_id) LEFT JOIN again USING (meter_id)
        LEFT JOIN bare USING (meter_id) LEFT JOIN {_rows_apart(DELTAS)} USING (meter_id)"""
    )
    values = f"""SELECT meter_id, replace(name, '_wh', '') AS register, count(*) AS n,
            sum(hash(observed_at, wh)) AS print
        FROM (UNPIVOT (SELECT meter_id, observed_at, {REGISTER_COLUMNS} FROM {_possible(DELTAS)})
            ON {REGISTER_COLUMNS} INTO NAME name VALUE wh) GROUP BY ALL"""
    steps = """SELECT meter_id, register, count(*) AS n, sum(hash(observed_at, wh)) AS print FROM run_deltas
        GROUP BY ALL"""
    differing = f"""SELECT meter_id, string_agg(register || ': ' || coalesce(s.n, 0) || ' steps for '
            || coalesce(v.n, 0) || ' values'
            || CASE WHEN s.n = v.n THEN ', of other times or values' ELSE '' END, '; ' ORDER BY register) AS told
        FROM ({values}) v FULL JOIN ({steps}) s USING (meter_id, register)
        WHERE s.n IS DISTINCT FROM v.n OR s.print IS DISTINCT FROM v.print GROUP BY meter_id"""
    unaccounted = UNACCOUNTED.format("delta_account")
    return [_told(lake, "consumption_deltas", sql) for sql in (differing, unaccounted, _wrong_steps())]


def _wrong_steps() -> str:
    """Accepted steps that do not follow from the one before: its time and value, the energy, the reason.

    The rules are those of docs/domain.md, Register steps, written down once more: no code is shared with the stream.
    """
    at = "register || ' ' || strftime(observed_at, '%Y-%m-%d %H:%M:%S')"
    wh_max = f"max_w * (epoch(observed_at) - epoch(previous_at)) / 3600 + {STEP_SLACK_WH}"
    full = "CAST(power(10, greatest(length(CAST(previous_wh AS VARCHAR)), 6)) AS BIGINT)"
    return f"""WITH accepted AS (
            SELECT d.*, l.max_w, l.interval_s,
                lag(observed_at) OVER series AS before_at, lag(wh) OVER series AS before_wh,
                last_value(nullif(equipment_id, '') IGNORE NULLS) OVER (
                    PARTITION BY d.meter_id, register ORDER BY observed_at
                    ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS box
            FROM (FROM run_deltas ANTI JOIN shared USING (meter_id)) d LEFT JOIN limits l ON l.meter_id = d.meter_id
            WHERE reason IN {_accepted()}
            WINDOW series AS (PARTITION BY d.meter_id, register ORDER BY observed_at)),
        followed AS (
            SELECT *, CASE
                    WHEN previous_at IS NULL THEN '{DeltaReason.FIRST}'
                    WHEN equipment_id <> '' AND equipment_id <> box THEN '{DeltaReason.METER_EXCHANGE}'
                    WHEN wh < previous_wh AND reason = '{DeltaReason.ROLLOVER}' THEN reason
                    WHEN wh < previous_wh THEN '{DeltaReason.RESET}'
                    WHEN epoch(observed_at) - epoch(previous_at) > {GAP_FACTOR} * interval_s THEN '{DeltaReason.GAP}'
                    ELSE '{DeltaReason.OK}' END AS made_reason,
                CASE reason WHEN '{DeltaReason.FIRST}' THEN 0 WHEN '{DeltaReason.METER_EXCHANGE}' THEN 0
                    WHEN '{DeltaReason.RESET}' THEN wh WHEN '{DeltaReason.ROLLOVER}' THEN {full} - previous_wh + wh
                    ELSE wh - previous_wh END AS made_wh
            FROM accepted)
        SELECT meter_id, 'steps that do not follow from the one before: ' || {_named(at)} AS told
        FROM followed
        WHERE previous_at IS DISTINCT FROM before_at OR previous_wh IS DISTINCT FROM before_wh
            OR delta_wh IS DISTINCT FROM made_wh OR reason <> made_reason
            OR coalesce(reason <> '{DeltaReason.METER_EXCHANGE}' AND delta_wh > {wh_max}, false)
        GROUP BY meter_id"""


def _windows(lake: duckdb.DuckDBPyConnection) -> list[pl.DataFrame]:
    """Each window again, from the readings less what the stage kept apart; meters of several runs are left out.

    Table `voltage_account`: the same as `delta_account`.
    """
    lake.execute(
        f"""CREATE TEMP TABLE all_voltages AS
        SELECT meter_id, observed_at, {VOLTAGE_COLUMNS}, {PLACE}, row_number() OVER same AS turn,
            row({VOLTAGE_COLUMNS}) IS NOT DISTINCT FROM first_value(row({VOLTAGE_COLUMNS})) OVER same AS is_same
        FROM {_possible(VOLTAGE)}
        WINDOW same AS (PARTITION BY meter_id, observed_at ORDER BY partition, "offset")"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE placed AS
        FROM all_voltages
        ANTI JOIN (FROM apart WHERE stage = '{VOLTAGE}' AND bucket = '{Bucket.LATE}') USING ({PLACE})"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE voltage_account AS
        SELECT meter_id, received, coalesce(stored, 0) AS stored, coalesce(duplicate, 0) AS duplicate,
            coalesce(late, 0) AS late, coalesce(quarantined, 0) AS quarantined
        FROM (SELECT meter_id, count(*) AS received FROM run_readings GROUP BY meter_id)
        LEFT JOIN (SELECT meter_id, count(*) FILTER (turn = 1) AS stored,
                count(*) FILTER (turn > 1 AND is_same) AS duplicate
            FROM placed GROUP BY meter_id) USING (meter_id)
        LEFT JOIN {_rows_apart(VOLTAGE)} USING (meter_id)"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE wrong_windows AS
        WITH made AS (
            {_made_windows("placed")}),
        found AS (
            SELECT *, count(*) OVER (PARTITION BY meter_id, phase, window_start) AS times
            FROM run_windows ANTI JOIN shared USING (meter_id))
        SELECT meter_id, phase, window_start, m.n, f.sample_count
        FROM made m FULL JOIN found f USING (meter_id, phase, window_start)
        WHERE f.times > 1 OR f.sample_count IS DISTINCT FROM m.n OR f.min_mv IS DISTINCT FROM m.low
            OR f.max_mv IS DISTINCT FROM m.high OR abs(f.mean_mv - m.mean) > 1"""
    )
    at = "phase || ' ' || strftime(window_start, '%Y-%m-%d %H:%M')"
    differing = f"""SELECT meter_id, coalesce(CAST(sum(sample_count) AS BIGINT), 0) || ' samples for '
            || coalesce(CAST(sum(n) AS BIGINT), 0) || ' voltages: ' || {_named(at)} AS told
        FROM wrong_windows GROUP BY meter_id"""
    unaccounted = UNACCOUNTED.format("voltage_account")
    return [_told(lake, "voltage_windows", sql) for sql in (differing, unaccounted)]


def _made_windows(voltages: str) -> str:
    """Windows of a table's first readings of each time; meters of several runs are left out."""
    return f"""SELECT meter_id, upper(split_part(name, '_', 2)) AS phase,
            time_bucket(INTERVAL 10 MINUTE, observed_at) AS window_start,
            count(*) AS n, min(mv) AS low, max(mv) AS high, avg(mv) AS mean
        FROM (UNPIVOT (FROM {voltages} ANTI JOIN shared USING (meter_id) WHERE turn = 1) ON {VOLTAGE_COLUMNS}
            INTO NAME name VALUE mv) GROUP BY ALL"""


def _apart(lake: duckdb.DuckDBPyConnection) -> list[pl.DataFrame]:
    """What is kept apart is a record that the lake has, and is kept once by a stage."""
    findings = []
    for table, rows in (
        ("late_readings", "run_readings"), ("quarantined_readings", "run_readings"),
        ("late_events", "run_events"), ("quarantined_events", "run_events"),
    ):  # fmt: skip
        orphans = f"""SELECT meter_id, count(*) || ' rows of records that the lake has not' AS told FROM apart
            ANTI JOIN {rows} USING ({PLACE}) WHERE kept_in = '{table}' GROUP BY meter_id"""
        twice = f"""SELECT meter_id, count(*) || ' records are kept twice by one stage' AS told FROM (
            SELECT any_value(meter_id) AS meter_id FROM apart WHERE kept_in = '{table}'
            GROUP BY stage, {PLACE} HAVING count(*) > 1) GROUP BY meter_id"""
        findings += [_told(lake, table, sql) for sql in (orphans, twice)]
    return findings


def _late(lake: duckdb.DuckDBPyConnection, ledger: Ledger) -> list[pl.DataFrame]:
    """Late records that no fault explains, nor their meter's own log: there an earlier record has a later stamp."""
    if not _number(lake, f"SELECT count(*) FROM apart WHERE bucket = '{Bucket.LATE}'"):
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
        _told(
            lake,
            f"late_{kind}",
            f"""SELECT meter_id, count(*) || ' late, which no fault explains: seq ' || {_named("seq")} AS told
            FROM unexplained WHERE kind = '{kind}' GROUP BY meter_id""",
        )
        for kind in KINDS
    ]
    late = lake.execute("SELECT count(*), count(DISTINCT meter_id) FROM unexplained").fetchone()
    if late and late[0]:
        told = f"{late[0]:,} records of {late[1]:,} meters are late and no fault explains it: {_why_late(ledger)}"
        found.insert(0, _finding(LATE_RECORDS, told))
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


def _expected(lake: duckdb.DuckDBPyConnection) -> dict[str, tuple[int, int]]:
    """Windows and alarms: how many the readings and events that arrived make, late ones too, and how many are found."""
    windows = f"""SELECT count(*), count(*) FILTER (f.sample_count = m.n) FROM (
            {_made_windows("all_voltages")}) m
        LEFT JOIN run_windows f USING (meter_id, phase, window_start)"""
    raised = f"change = '{FaultOutcome.RAISED}' AND run_id IN (SELECT run_id FROM run_events)"
    alarms = f"""WITH made AS (
            SELECT meter_id, alarm_type, event_at AS at FROM changes WHERE {raised} UNION ALL
            SELECT meter_id, alarm_type, event_at FROM original_events
            WHERE is_apart AND alarm_type IS NOT NULL AND edge = '{Edge.RAISE}'
                AND run_id IN (SELECT run_id FROM run_events)),
        found AS (SELECT meter_id, alarm_type, moved_at AS at FROM alarm_rows WHERE {raised})
        SELECT (SELECT count(*) FROM made), count(*) FROM (FROM made INTERSECT ALL FROM found)"""
    found = {}
    for name, sql in (("windows", windows), ("alarms", alarms)):
        row = lake.execute(sql).fetchone() or (0, 0)
        found[name] = (int(row[0]), int(row[1]))
    return found


def _alarms(lake: duckdb.DuckDBPyConnection) -> list[pl.DataFrame]:
    """Each change of an alarm again, from the events less what the stage kept apart.

    Tables `original_events` (is_coded, alarm_type, told_edge as the table of codes has it, edge, event_at, is_apart,
    is_overtaken: a later one of its alarm came before) and `changes` (per event that moves an alarm: place, run_id,
    alarm_type, change).
    """
    codes = Path(schemas.__file__).parent / "events" / "codes.csv"
    ahead, behind = (round(limit.total_seconds()) for limit in (MAX_AHEAD, MAX_BEHIND))
    of = "meter_id, observed_at, sent_at, seq, dialect, source_table, code, argument"
    lake.execute(
        f"""CREATE TEMP TABLE original_events AS
        WITH codes AS (FROM read_csv('{codes}', all_varchar = true)),
        originals AS (
            SELECT * FROM events SEMI JOIN ledger_meters USING (meter_id)
            QUALIFY row_number() OVER (PARTITION BY {of} ORDER BY partition, "offset") = 1)
        SELECT *, alarm_type IS NOT NULL AND coalesce(max(event_at) OVER (
                PARTITION BY meter_id, alarm_type ORDER BY partition, "offset"
                ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) > event_at, false) AS is_overtaken
        FROM (
            SELECT o.*, c.code IS NOT NULL AS is_coded, c.edge AS told_edge,
                CASE WHEN c.action = '{EventAction.RAISE}' THEN c.alarm_type END AS alarm_type,
                CASE WHEN c.edge <> '{Edge.LEVEL}' THEN c.edge
                    WHEN argument = '1' THEN '{Edge.RAISE}' WHEN argument = '0' THEN '{Edge.CLEAR}' END AS edge,
                CASE WHEN epoch(observed_at) - epoch(arrival_at) BETWEEN -{behind} AND {ahead}
                    THEN observed_at ELSE arrival_at END AS event_at,
                ({PLACE}) IN (SELECT ({PLACE}) FROM late_events UNION ALL SELECT ({PLACE}) FROM quarantined_events)
                    AS is_apart
            FROM originals o LEFT JOIN codes c ON c.dialect = o.dialect AND c.source_table = o.source_table
                AND c.code = o.code AND c.dialect_version IN (o.dialect_version, '*')
            QUALIFY row_number() OVER (
                PARTITION BY o.topic, o.partition, o."offset" ORDER BY c.dialect_version = '*') = 1)"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE changes AS
        WITH moves AS (
            SELECT *, coalesce(lag(edge) OVER (
                PARTITION BY meter_id, alarm_type ORDER BY event_at, partition, "offset"), '{Edge.CLEAR}') AS before
            FROM original_events WHERE alarm_type IS NOT NULL AND NOT is_apart)
        SELECT {PLACE}, run_id, meter_id, alarm_type, event_at, arrival_at,
            CASE WHEN edge = '{Edge.RAISE}' AND before = '{Edge.RAISE}' THEN '{FaultOutcome.REPEATED}'
                WHEN edge = '{Edge.RAISE}' THEN '{FaultOutcome.RAISED}'
                WHEN before = '{Edge.RAISE}' THEN '{FaultOutcome.CLEARED}'
                ELSE '{FaultOutcome.STAYS_CLEARED}' END AS change
        FROM moves"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE alarm_rows AS
        SELECT meter_id, alarm_type, updated_at AS arrival_at, run_id,
            CASE WHEN state = '{AlarmState.CLEARED}' THEN '{FaultOutcome.CLEARED}'
                WHEN repeat_count = 0 THEN '{FaultOutcome.RAISED}' ELSE '{FaultOutcome.REPEATED}' END AS change,
            CASE WHEN state = '{AlarmState.CLEARED}' THEN cleared_at
                WHEN repeat_count = 0 THEN raised_at END AS moved_at
        FROM alarms SEMI JOIN ledger_meters USING (meter_id) WHERE source = '{AlarmSource.METER_EVENT}'"""
    )
    key = "meter_id, alarm_type, arrival_at, change, moved_at"
    differing = f"""WITH made AS (
            SELECT * REPLACE (CASE WHEN change <> '{FaultOutcome.REPEATED}' THEN moved_at END AS moved_at),
                count(*) AS n
            FROM (SELECT meter_id, alarm_type, arrival_at, change, event_at AS moved_at FROM changes
                WHERE change <> '{FaultOutcome.STAYS_CLEARED}') GROUP BY ALL),
        found AS (SELECT {key}, count(*) AS n FROM alarm_rows GROUP BY ALL),
        differing AS (
            SELECT coalesce(m.meter_id, f.meter_id) AS meter_id, coalesce(m.alarm_type, f.alarm_type) AS alarm_type,
                coalesce(m.change, f.change) AS change, coalesce(m.n, 0) AS made, coalesce(f.n, 0) AS found
            FROM made m FULL JOIN found f ON m.meter_id = f.meter_id AND m.alarm_type = f.alarm_type
                AND m.arrival_at = f.arrival_at AND m.change = f.change AND m.moved_at IS NOT DISTINCT FROM f.moved_at
            WHERE coalesce(m.n, 0) <> coalesce(f.n, 0))
        SELECT meter_id, string_agg(told, '; ' ORDER BY told) AS told FROM (
            SELECT meter_id, alarm_type || ' ' || change || ': ' || CAST(sum(found) AS BIGINT) || ' rows for '
                || CAST(sum(made) AS BIGINT) || ' events' AS told
            FROM differing GROUP BY meter_id, alarm_type, change) GROUP BY meter_id"""
    return [_told(lake, "alarms", differing)]


def _books(lake: duckdb.DuckDBPyConnection) -> list[pl.DataFrame]:
    """The books of the run, stage by stage, against the rows; and what belongs to no run against the dead letters."""
    run_id = str((lake.execute("SELECT any_value(run_id) FROM run_readings").fetchone() or [""])[0])
    sums = "sum(received), sum(stored), sum(duplicate), sum(late), sum(quarantined), 0"
    identity = "meter_id, observed_at, sent_at, seq, dialect, source_table, code, argument"
    rows = {
        LAKE: "SELECT sum(rows), sum(records), sum(rows - records), 0, 0, 0 FROM counts",
        DELTAS: f"SELECT {sums} FROM delta_account",
        VOLTAGE: f"SELECT {sums} FROM voltage_account",
        ALARMS: f"""SELECT count(*), count(DISTINCT ({identity})) - any_value(late) - any_value(quarantined),
                count(*) - count(DISTINCT ({identity})), any_value(late), any_value(quarantined), 0
            FROM run_events, (SELECT coalesce(sum(late), 0) AS late, coalesce(sum(quarantined), 0) AS quarantined
                FROM {_rows_apart(ALARMS)})""",
    }
    kept = {line.stage: line for line in books(lake, run_id)}
    is_shared = bool(_number(lake, "SELECT count(*) FROM shared"))
    findings = []
    for stage, sql in rows.items():
        expected = Books(stage, *[int(number or 0) for number in lake.execute(sql).fetchone() or ()])
        line = kept.get(stage, Books(stage, 0, 0, 0, 0, 0, 0))
        if not line.balance:
            findings.append(_finding(stage, f"the books do not balance: {line}"))
        findings += [
            _finding(stage, f"{name}: {getattr(line, name):,} in the books, {getattr(expected, name):,} in the rows")
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
        DELTAS: f"SELECT ({readings}) + (SELECT count(*) FROM readings WHERE run_id IS NULL)",
        VOLTAGE: f"SELECT ({readings}) + (SELECT count(*) FROM readings WHERE run_id IS NULL)",
        ALARMS: f"""SELECT ({events}) + (SELECT count(*) FROM events WHERE run_id IS NULL)
            + (SELECT count(*) FROM alarm_acknowledgements)
            + (SELECT count(*) FROM dead_letters WHERE kafka_topic = '{COMMANDS.name}')""",
    }
    for stage, sql in unnamed.items():
        found = _number(lake, sql)
        told = lake.execute(
            "SELECT coalesce(sum(received), 0) FROM accounting WHERE run_id IS NULL AND stage = ?", [stage]
        ).fetchone()
        if int((told or (0,))[0]) != found:
            text = f"of no run: {int((told or (0,))[0]):,} received in the books, {found:,} dead letters and readings"
            findings.append(_finding("dead_letters" if stage == LAKE else stage, text))
    return findings


def _broken(lake: duckdb.DuckDBPyConnection) -> pl.DataFrame:
    """Meters of the run with a segment whose deltas do not sum up."""
    rows = [
        {"meter_id": meter, "place": "consumption_deltas", "told": f"segment {name}: {made} Wh, registers {shown} Wh"}
        for meter, _, name, made, shown in broken_segments(lake)
    ]
    mine = pl.DataFrame(rows, schema=FINDINGS)
    return mine.filter(pl.col("meter_id").is_in(_frame(lake, "FROM ledger_meters").get_column("meter_id").implode()))


def _facts(lake: duckdb.DuckDBPyConnection, run: Run) -> pl.DataFrame:
    """What the lake says of each record that a fault touched: the columns that `RULES` speak of."""
    lake.execute(
        f"""CREATE TEMP TABLE fault_steps AS
        SELECT meter_id, register, observed_at, wh, previous_at, previous_wh, delta_wh, reason,
            CASE WHEN reason IN {_accepted()} THEN 0 WHEN reason = '{DeltaReason.IMPLAUSIBLE}' THEN 1 ELSE 2 END AS rank
        FROM run_deltas SEMI JOIN (SELECT meter_id FROM faults WHERE topic = 'readings') USING (meter_id)"""
    )
    lake.execute("CREATE TEMP TABLE accepted_steps AS FROM fault_steps WHERE rank = 0")
    lake.execute(
        f"""CREATE TEMP TABLE touched AS
        SELECT f.row, any_value(f.meter_id) AS meter_id, any_value(f.register) AS told_register,
            arg_min(r.observed_at, r."offset") AS observed_at, {_each('arg_min(r.{0}_wh, r."offset") AS {0}_wh')},
            any_value(d.reason) FILTER (d.bucket = '{Bucket.LATE}') IS NOT NULL AS is_late,
            any_value(d.reason) FILTER (d.bucket = '{Bucket.QUARANTINED}') AS quarantine,
            any_value(v.reason) FILTER (v.bucket = '{Bucket.QUARANTINED}') AS quarantine_voltage
        FROM faults f JOIN run_readings r ON r.meter_id = f.meter_id AND r.seq = f.seq
        LEFT JOIN (FROM apart WHERE stage = '{DELTAS}') d
            ON d.topic = r.topic AND d.partition = r.partition AND d."offset" = r."offset"
        LEFT JOIN (FROM apart WHERE stage = '{VOLTAGE}') v
            ON v.topic = r.topic AND v.partition = r.partition AND v."offset" = r."offset"
        WHERE f.topic = 'readings' GROUP BY f.row"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE own AS
        WITH each AS (
            SELECT v.row, v.told_register, s.*,
                s.register = v.told_register AND v.is_told AS is_named,
                s.reason = '{DeltaReason.IMPLAUSIBLE}' AND v.quarantine = '{DeltaReason.IMPLAUSIBLE}' AS is_wild,
                count(*) FILTER (s.reason = '{DeltaReason.DUPLICATE}') OVER (PARTITION BY v.row, v.register)
                    AS duplicates
            FROM (SELECT *, replace(name, '_wh', '') AS register FROM (
                UNPIVOT (FROM touched JOIN (SELECT row, detail IS NOT NULL AS is_told FROM faults) USING (row))
                ON {REGISTER_COLUMNS} INTO NAME name VALUE wh)) v
            JOIN fault_steps s ON s.meter_id = v.meter_id AND s.register = v.register
                AND s.observed_at = v.observed_at AND s.wh = v.wh)
        SELECT row, register, wh, reason, delta_wh, previous_wh, previous_at, duplicates FROM each
        QUALIFY row_number() OVER (
            PARTITION BY row ORDER BY is_named DESC, is_wild DESC, register = told_register DESC, register, rank) = 1"""
    )
    changed = """SELECT f.row, c.change, c.alarm_type,
            bool_or(a.change IS NOT NULL OR c.change = 'stays_cleared') AS is_found
        FROM faults f JOIN run_events e ON e.meter_id = f.meter_id AND e.seq = f.seq
        JOIN changes c ON c.topic = e.topic AND c.partition = e.partition AND c."offset" = e."offset"
        LEFT JOIN alarm_rows a ON a.meter_id = c.meter_id AND a.alarm_type = c.alarm_type
            AND a.arrival_at = c.arrival_at AND a.change = c.change
        WHERE f.topic = 'events' GROUP BY ALL"""
    facts = _frame(
        lake,
        f"""SELECT f.* EXCLUDE (register), coalesce(o.register, f.register) AS register,
            coalesce(a.copies, 0) AS copies, coalesce(a.is_reordered, false) AS is_reordered,
            f.meter_id IN (FROM shared) AS is_shared, l.max_w, l.interval_s, o.wh, t.observed_at AS stamped_at,
            coalesce(t.is_late, false) AS is_late, t.quarantine, t.quarantine_voltage,
            o.reason, o.delta_wh, o.previous_wh, o.previous_at, coalesce(o.duplicates, 0) AS duplicates,
            before.observed_at AS before_at, before.wh AS before_wh,
            after.observed_at AS next_at, after.wh AS next_wh, after.delta_wh AS next_delta_wh,
            after.reason AS next_reason, after.previous_at AS next_previous_at, after.previous_wh AS next_previous_wh,
            last.seq > f.seq AS has_later, coalesce(letters.letters, 0) AS letters, letters.reason AS letter_reason,
            changed.change, changed.alarm_type, coalesce(changed.is_found, false) AS is_found
        FROM faults f
        LEFT JOIN arrived a ON a.topic = f.topic AND a.meter_id = f.meter_id AND a.seq = f.seq
        LEFT JOIN limits l ON l.meter_id = f.meter_id
        LEFT JOIN touched t ON t.row = f.row
        LEFT JOIN own o ON o.row = f.row
        ASOF LEFT JOIN accepted_steps before ON before.meter_id = f.meter_id AND before.register = f.register
            AND before.observed_at < f.observed_at
        ASOF LEFT JOIN accepted_steps after ON after.meter_id = f.meter_id AND after.register = f.register
            AND after.observed_at > f.observed_at
        LEFT JOIN (SELECT topic, meter_id, max(seq) AS seq FROM arrived GROUP BY ALL) last
            ON last.topic = f.topic AND last.meter_id = f.meter_id
        LEFT JOIN letters ON letters.row = f.row
        LEFT JOIN ({changed}) changed ON changed.row = f.row
        ORDER BY f.row""",
    )
    return facts.with_columns(to=pl.lit(run.ledger.to))


def _each(column: str) -> str:
    """Columns in SQL, one a register."""
    return ", ".join(column.format(register) for register in REGISTERS)


def _per_fault(faults: pl.DataFrame) -> pl.DataFrame:
    """One row a fault: what became of its records, and of the first unexplained one what is known."""
    if not len(faults):
        schema = {
            "fault_id": pl.Int64, "kind": pl.String, "meter_id": pl.String, "records": pl.Int64,
            "outcome": pl.String, "outcomes": pl.String, "is_explained": pl.Boolean, "detail": pl.String,
        }  # fmt: skip
        return pl.DataFrame(schema=schema)
    found = [
        "topic", "seq", "copies", "is_reordered", "is_late", "quarantine", "quarantine_voltage", "reason", "wh",
        "previous_wh", "delta_wh", "next_reason", "next_delta_wh", "letters", "letter_reason", "change", "is_found",
    ]  # fmt: skip
    is_wrong = pl.col("outcome") == FaultOutcome.UNEXPLAINED.value
    known = pl.concat_str(
        pl.col("meter_id"),
        *[
            pl.when(pl.col(name).is_not_null()).then(pl.format(" {}={}", pl.lit(name), pl.col(name).cast(pl.String)))
            for name in found
        ],
        ignore_nulls=True,
    )
    counted = (
        faults.group_by("fault_id", "outcome")
        .len()
        .sort("fault_id", "outcome")
        .group_by("fault_id", maintain_order=True)
        .agg(
            outcomes=pl.concat_str(
                pl.lit("{"),
                pl.format('"{}": {}', "outcome", "len").str.join(", "),
                pl.lit("}"),
            ),
            outcome=pl.col("outcome").str.join(" + "),
        )
    )
    return (
        faults.sort("fault_id", "row")
        .group_by("fault_id", maintain_order=True)
        .agg(
            pl.col("kind").first(),
            pl.col("meter_id").first(),
            records=pl.len().cast(pl.Int64),
            is_explained=~is_wrong.any(),
            detail=known.filter(is_wrong).first(),
        )
        .join(counted, on="fault_id", how="left", maintain_order="left")
        .select("fault_id", "kind", "meter_id", "records", "outcome", "outcomes", "is_explained", "detail")
    )


def _energy(lake: duckdb.DuckDBPyConnection, run: Run, faults: pl.DataFrame) -> list[pl.DataFrame]:
    """Per meter and register the energy of the deltas is what went through the meter.

    An exchange costs the energy between the old box's last reading and the new one's first, which is the first value
    less what the new box began with. Left out: meters of several runs, those whose wild values nothing could tell,
    those whose registers begin anew in the log itself, and those whose readings come out of order there.
    """
    if not run.ledger.is_whole:
        return []
    untold = faults.filter(
        (pl.col("outcome") == FaultOutcome.PLAUSIBLE.value)
        | ((pl.col("outcome") == FaultOutcome.IMPLAUSIBLE.value) & pl.col("kind").is_in(["reset", "rollover"]))
    )
    lake.register("untold", untold.select("meter_id").unique().to_arrow())
    lake.execute(
        f"""CREATE TEMP TABLE uncompared AS FROM shared UNION FROM untold UNION
        SELECT meter_id FROM truth WHERE begins_anew UNION
        SELECT meter_id FROM (FROM run_deltas ANTI JOIN faults USING (meter_id))
        WHERE {run.ledger.clock == "original"} AND reason IN (
            '{DeltaReason.OUT_OF_ORDER}', '{DeltaReason.IMPLAUSIBLE}', '{DeltaReason.CONFLICT}')"""
    )
    lost = f"""SELECT d.meter_id, d.register,
            sum(d.wh - CASE WHEN d.previous_wh > 0 THEN f.amount ELSE 0 END) AS lost_wh
        FROM run_deltas d JOIN faults f ON f.meter_id = d.meter_id AND f.observed_at = d.observed_at
        WHERE f.kind = '{FaultKind.METER_EXCHANGE}' AND d.reason = '{DeltaReason.METER_EXCHANGE}' GROUP BY ALL"""
    differing = f"""SELECT meter_id, string_agg(
            register || ': ' || energy_wh || ' Wh went through, the deltas have ' || coalesce(found_wh, 0), '; '
            ORDER BY register) AS told
        FROM (FROM truth ANTI JOIN uncompared USING (meter_id))
        LEFT JOIN (SELECT meter_id, register, CAST(sum(delta_wh) AS BIGINT) AS found_wh FROM run_deltas GROUP BY ALL)
            USING (meter_id, register)
        LEFT JOIN ({lost}) USING (meter_id, register)
        WHERE energy_wh <> coalesce(found_wh, 0) + coalesce(lost_wh, 0) GROUP BY meter_id"""
    return [_told(lake, "consumption_deltas", differing)]


def _digested(lake: duckdb.DuckDBPyConnection, run: Run, counts: pl.DataFrame) -> list[pl.DataFrame]:
    """The lake's records have the very bytes that were sent: the run's digest, summed again; where none is missing."""
    if counts.select((pl.col("lost") != 0).any() | (pl.col("surplus") > 0).any()).item():
        return []
    total = np.zeros(2, np.uint64)
    for kind, topic in KINDS.items():
        schema = arrow_schema(topic.entity)
        names = [name for name in schema.names if name not in UNSTAMPED]

        def lanes(sql: str, schema: pa.Schema = schema, entity: str = topic.entity) -> Any:
            """Sum of the hashes of a query's records, each as often as `n` says."""
            found = np.zeros(2, np.uint64)
            for batch in lake.sql(sql).to_arrow_reader(DIGEST_ROWS):
                arrays = [
                    pa.nulls(len(batch), field.type)
                    if field.name in UNSTAMPED
                    else batch.column(field.name).cast(field.type)
                    for field in schema
                ]
                payloads = encode_batch(entity, pa.table(arrays, schema=schema))
                times = batch.column("n").to_pylist()
                found += digest_of([each for each, n in zip(payloads, times, strict=True) for _ in range(n)])
            return found

        columns = ", ".join(names)
        total += lanes(f"SELECT {columns}, 1 AS n FROM run_{kind}")
        again = f"""SELECT {", ".join(f"any_value(r.{name}) AS {name}" for name in names)},
                any_value(a.copies - 1 - coalesce(i.copies, 0)) AS n
            FROM run_{kind} r JOIN arrived a ON a.topic = '{kind}' AND a.meter_id = r.meter_id AND a.seq = r.seq
            LEFT JOIN (SELECT topic, meter_id, seq, count(*) AS copies FROM faults
                WHERE kind = '{FaultKind.DUPLICATE}' AND was_sent GROUP BY ALL) i
                ON i.topic = a.topic AND i.meter_id = a.meter_id AND i.seq = a.seq
            WHERE a.copies - 1 > coalesce(i.copies, 0) GROUP BY a.meter_id, a.seq"""
        total -= lanes(again)  # redelivered copies: sent once
    poison = run.faults.filter((pl.col("kind") == FaultKind.POISON) & pl.col("was_sent"))
    for meter_id, detail, payload in poison.select("meter_id", "detail", "payload").iter_rows():
        total += digest_of([raw_bytes(meter_id, encoding_of(Poison(detail)), payload)])
    digest = digest_text(total)
    if digest == run.ledger.digest:
        return []
    told = f"records differ from what was sent: digest {digest} in the lake, {run.ledger.digest} sent"
    return [_finding("readings", told)]


def _per_meter(lake: duckdb.DuckDBPyConnection, run: Run, counts: pl.DataFrame, findings: pl.DataFrame) -> pl.DataFrame:
    """One row a meter: `BALANCE`, reordered, wrong."""
    letters = _frame(
        lake,
        f"""SELECT meter_id, CAST(sum(coalesce(letters, 0)) AS BIGINT) AS invalid,
            count(*) FILTER (letters IS NULL) AS lost
        FROM faults LEFT JOIN letters USING (row) WHERE kind = '{FaultKind.POISON}' AND was_sent GROUP BY meter_id""",
    )
    events = _frame(lake, f"FROM {_rows_apart(ALARMS)}")
    steps = _frame(lake, "SELECT * EXCLUDE (received) FROM delta_account")
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
        wrong=pl.format("{}: {}", "place", "told").str.join("; ")
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


def _notes(lake: duckdb.DuckDBPyConnection, run: Run, faults: pl.DataFrame) -> list[str]:
    """What could not be checked, and why."""
    notes = []
    if not run.ledger.is_whole:
        unsent = faults.filter(pl.col("outcome") == FaultOutcome.NOT_SENT.value).get_column("fault_id").n_unique()
        notes.append(f"the run was stopped before its end: energy is not compared, {unsent} faults were not sent")
    unsure = run.ledger.readings + run.ledger.events + run.ledger.poison - run.ledger.records
    if unsure > 0:
        notes.append(f"{unsure} records were handed over and never acknowledged: as many may not have arrived")
    shared = _number(lake, "SELECT count(*) FROM shared")
    if shared:
        unjudged = faults.filter(pl.col("outcome") == FaultOutcome.OF_SEVERAL_RUNS.value).get_column("fault_id")
        notes.append(
            f"{shared} meters have readings of other runs too: their windows and energy are not compared, the books of "
            f"{', '.join(JUDGING)} only by what they received, {unjudged.n_unique()} faults are not judged"
        )
    if run.ledger.is_whole:
        of = "FROM uncompared ANTI JOIN shared USING (meter_id)"
        skipped = _number(lake, f"SELECT count(*) {of}")
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
    late = _number(lake, f"SELECT count(DISTINCT ({PLACE})) FROM apart WHERE bucket = '{Bucket.LATE}'")
    if late:
        notes.append(f"{late:,} records are late in all, those that faults or logs explain too")
    row = lake.execute(
        """SELECT count(*), count(*) FILTER (sample_count IS NULL AND window_start > (
            SELECT max(arrival_at) - INTERVAL 45 MINUTE FROM run_readings)) FROM wrong_windows"""
    ).fetchone()
    if row and row[0] and row[0] == row[1]:
        notes.append("windows that are missing may be open: make up, make down FLUSH=1, verify again")
    return notes


SIGNS = {"sent": "", "stored": "=", "reordered": ""}
"""Before each number, so that the sums read as an equation: sent + redelivered = stored + …"""


def told(verdict: Verdict, named: int) -> list[Table | str]:
    """For people: what is not finished yet, else the sums; books, faults, the first `named` of what does not hold."""
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
        found += scores_told(verdict.scores)
    whole = verdict.findings.filter(pl.col("meter_id").is_null())
    is_told = pl.col("place").str.starts_with("late_") & bool(whole.get_column("place").eq(LATE_RECORDS).any())
    meters = (  # what the whole run's finding on late records says of all of them is not said of each
        verdict.findings.filter(pl.col("meter_id").is_not_null() & ~is_told)
        .group_by("meter_id", maintain_order=True)
        .agg(wrong=pl.format("{}: {}", "place", "told").str.join("; "))
    )
    faults = verdict.faults.filter(~pl.col("is_explained")).select("fault_id", "kind", "detail")
    for lines in (
        [f"{place}: {what}" for place, what in whole.select("place", "told").iter_rows()],
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
        return str(whole.sort(pl.col("place") != LATE_RECORDS, maintain_order=True).row(0, named=True)["told"])
    if len(verdict.findings):
        return f"{verdict.findings.get_column('meter_id').n_unique():,} meters have something wrong, see above"
    return "a fault is not explained, or a precision or recall is too low, see above"


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 0))
    table.add_column(first, no_wrap=True, min_width=19)
    for name in others:
        table.add_column(name, justify="right")
    return table
