"""What became of a run: what was sent against what lake and dead letters hold, table by table and meter by meter.

Readers of the lake use the plain globs, so this sees what everyone sees. It takes no table's word for another: the
books are compared with the rows, the steps and windows with the readings they were made of, the alarms with the events,
the lake's records byte by byte with the run's digest, and every injected fault with what was allowed to become of it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
from rich import box
from rich.table import Table

import schemas
from replay.dirt import FAULTS
from replay.run import UNSTAMPED, Ledger, _digest, run_folder
from schemas.closed_lists import (
    ACCEPTED_DELTAS,
    AlarmState,
    Bucket,
    DeadLetterReason,
    DeltaReason,
    Edge,
    EventAction,
    FaultKind,
    FaultOutcome,
    Poison,
    QuarantineReason,
)
from schemas.codec import arrow_schema, encode_batch
from schemas.errors import ConfigError
from schemas.tables import PHASES, REGISTERS, TABLES, glob_of, home, polars_schema, table_path
from schemas.topics import KINDS

DELTAS, VOLTAGE, ALARMS, LAKE = "consumption_deltas", "voltage_deviation", "alarms", "readings_lake"
"""The stages, by the name of their job."""
MAX_AHEAD, MAX_BEHIND = timedelta(hours=36), timedelta(days=400)
"""Where the alarms job takes the arrival for the meter's own time; the jobs' settings have the same."""
GAP_FACTOR = 1.5  # a step over more than so many intervals is a gap
NEAR_WH = 1_000  # how near to 0 a register begins again, where no fuse is known
STEP_SLACK_WH = 100  # the coarsest register counts in such steps: a step may be so much above the fuse's limit
NAMED_SEQS = 20  # missing records of one meter that are named
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
    """A connection with one view per table that has files, over its plain glob."""
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
        WHERE energy_wh IS DISTINCT FROM found_wh ORDER BY ALL LIMIT 5"""
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
        findings: columns `FINDINGS`; empty when the run is proven.
        notes: what could not be checked, and why.
    """

    run_id: str
    is_whole: bool
    totals: dict[str, int]
    stages: list[Books]
    meters: pl.DataFrame
    faults: pl.DataFrame
    findings: pl.DataFrame
    notes: list[str]

    @property
    def is_balanced(self) -> bool:
        """Whether nothing is left to explain."""
        return not len(self.findings) and bool(self.faults.get_column("is_explained").all())

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
            "totals": self.totals,
            "stages": {each.stage: vars(each) for each in self.stages},
            "faults": self.kinds(),
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
    lake = open_lake()
    on_step("what arrived")
    run.open_in(lake)
    _arrived(lake)
    counts, findings = _records(lake, run)
    for told, check in (
        ("steps of registers", _steps),
        ("windows of voltage", _windows),
        ("rows kept apart", _apart),
        ("alarms", _alarms),
        ("books", _books),
    ):
        on_step(told)
        findings += check(lake)
    on_step("faults")
    facts = _facts(lake, run)
    faults = judged(facts)
    on_step("energy")
    findings += [_broken(lake), *_energy(lake, run, facts)]
    on_step("bytes")
    findings += _digested(lake, run, counts)
    on_step("sums")
    every = pl.concat([FINDINGS.to_frame(), *findings]).sort("meter_id", "place", nulls_last=False)
    meters = _per_meter(lake, run, counts, every)
    verdict = Verdict(
        run_id, run.ledger.is_whole, {name: int(meters.get_column(name).sum()) for name in (*BALANCE, "reordered")},
        books(lake, run_id), meters, _per_fault(faults), every, _notes(lake, run, faults),
    )  # fmt: skip
    for name, frame in (("verify", verdict.meters), ("verify-faults", verdict.faults)):
        staged = home() / "staging" / f"{run_id}-{name}.parquet"
        staged.parent.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(staged, compression="zstd")
        staged.rename(run_folder(run_id) / f"{name}.parquet")
    return verdict


@dataclass(frozen=True)
class Run:
    """What a run says of itself.

    Attributes:
        ledger: of run.json.
        meters: ledger.parquet.
        faults: faults.parquet with `row`, `was_sent` (its time had come when the run ended), `register` (whose steps
            tell what became of it) and the meter's `max_w` and `interval_s`.
    """

    ledger: Ledger
    meters: pl.DataFrame
    faults: pl.DataFrame

    @classmethod
    def read(cls, run_id: str) -> "Run":
        """Reads a run's folder.

        Raises:
            ConfigError: it is not there or not complete, or the lake has no readings.
        """
        folder = run_folder(run_id)
        try:
            ledger = Ledger(**json.loads((folder / "run.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            known = sorted(path.parent.name for path in (home() / "runs").glob("*/run.json"))
            msg = f"no run {run_id} in {home() / 'runs'}; there are: {', '.join(known) or 'none'}"
            raise ConfigError(msg) from error
        if not (folder / "ledger.parquet").exists():
            msg = f"run {run_id} has no ledger: it still runs, or was killed"
            raise ConfigError(msg)
        if ledger.to not in ("mqtt", "kafka"):
            msg = f"run {run_id} was played to {ledger.to}: there is nothing to compare"
            raise ConfigError(msg)
        if not any(table_path("readings").glob("date=*/*.parquet")):
            msg = f"no lake: {table_path('readings')} has no files; METERSTREAM_HOME says where to look"
            raise ConfigError(msg)
        meters = pl.read_parquet(folder / "ledger.parquet")
        faults = pl.read_parquet(folder / "faults.parquet").cast(polars_schema(FAULTS))  # type: ignore[arg-type]
        truth = pl.read_parquet(folder / "truth.parquet", columns=["meter_id", "register"])
        order = {register: place for place, register in enumerate(REGISTERS)}
        first = (
            truth.with_columns(place=pl.col("register").replace_strict(order, return_dtype=pl.Int64))
            .group_by("meter_id")
            .agg(first_register=pl.col("register").sort_by("place").first())
        )
        own = pl.col("detail").str.strip_suffix("_wh")
        register = pl.when(own.is_in(list(REGISTERS))).then(own).otherwise("first_register")
        named = (
            faults.with_row_index("row")
            .join(meters.select("meter_id", "sent_until"), on="meter_id", how="left", maintain_order="left")
            .join(first, on="meter_id", how="left", maintain_order="left")
            .with_columns(register=register, was_sent=pl.col("due_at") < pl.col("sent_until"))
            .drop("first_register", "sent_until")
        )
        return cls(ledger, meters, named)

    def open_in(self, lake: duckdb.DuckDBPyConnection) -> None:
        """Views of the run's own rows, and tables of what it sent."""
        run_id = self.ledger.run_id.replace("'", "''")
        for view, table in (
            ("run_readings", "readings"), ("run_events", "events"), ("run_deltas", "consumption_deltas"),
            ("run_windows", "voltage_windows"),
        ):  # fmt: skip
            lake.execute(f"CREATE VIEW {view} AS SELECT * FROM {table} WHERE run_id = '{run_id}'")
        place = 'topic, partition, "offset"'
        lake.execute(
            "CREATE TEMP TABLE apart AS "
            + " UNION ALL ".join(
                f"SELECT '{table}' AS kept_in, '{bucket}' AS bucket, stage, reason, meter_id, {place} FROM {table} "
                f"WHERE run_id = '{run_id}'"
                for table, bucket in (
                    ("late_readings", Bucket.LATE), ("quarantined_readings", Bucket.QUARANTINED),
                    ("late_events", Bucket.LATE), ("quarantined_events", Bucket.QUARANTINED),
                )  # fmt: skip
            )
        )
        lake.register("faults", self.faults.to_arrow())
        lake.register("sent", self._sent().to_arrow())
        lake.register("holes", self._holes().to_arrow())
        lake.register("ledger_meters", self.meters.select("meter_id").to_arrow())
        truth = run_folder(self.ledger.run_id) / "truth.parquet"
        lake.execute(f"CREATE VIEW truth AS FROM read_parquet('{truth}')")
        lake.execute(
            """CREATE TEMP TABLE limits AS SELECT meter_id, interval_s,
                CAST(fuse_a * len(string_split(phases, ',')) * coalesce(nominal_mv, 230000) / 1000 AS BIGINT) AS max_w
            FROM registry SEMI JOIN ledger_meters USING (meter_id)
            QUALIFY row_number() OVER (
                PARTITION BY meter_id ORDER BY valid_from DESC NULLS LAST, usage_point_id) = 1"""
        )
        started = self.ledger.started_at
        lake.execute(
            f"""CREATE TEMP TABLE letters AS
            SELECT payload, reason, count(*) AS letters FROM dead_letters
            SEMI JOIN (SELECT payload FROM faults WHERE payload IS NOT NULL) USING (payload)
            WHERE received_at >= TIMESTAMPTZ '{started}' - INTERVAL 1 MINUTE GROUP BY ALL"""
        )

    def _copies(self) -> pl.DataFrame:
        """Copies that were injected: topic, meter_id, seq, copies."""
        is_copy = pl.col("was_sent") & (pl.col("kind") == FaultKind.DUPLICATE)
        return self.faults.filter(is_copy).group_by("topic", "meter_id", "seq").agg(copies=pl.len().cast(pl.Int64))

    def _sent(self) -> pl.DataFrame:
        """Per topic and meter: `sent` records, `copies` among them, `end`: its seqs are 0 … end − 1 but for holes."""
        copies = self._copies().group_by("topic", "meter_id").agg(pl.col("copies").sum())
        holes = self._holes().group_by("topic", "meter_id").agg(holes=pl.len().cast(pl.Int64))
        both = pl.concat([self.meters.select("meter_id", topic=pl.lit(kind), sent=kind) for kind in KINDS])
        return (
            both.join(copies, on=["topic", "meter_id"], how="left")
            .join(holes, on=["topic", "meter_id"], how="left")
            .with_columns(pl.col("copies", "holes").fill_null(0))
            .with_columns(end=pl.col("sent") - pl.col("copies") + pl.col("holes"))
        )

    def _holes(self) -> pl.DataFrame:
        """Seqs that were never sent: topic, meter_id, seq.

        Of an interrupted run also records that were to come later than their time, where their time had come: those
        below the end that the number of records sent gives.
        """
        of = ["topic", "meter_id"]
        withheld = (pl.col("kind") == FaultKind.POISON) | ~pl.col("is_sent")
        certain = self.faults.filter(pl.col("was_sent") & withheld).select(*of, "seq").unique()
        if self.ledger.is_whole:
            return certain
        moved = pl.col("kind").is_in([FaultKind.LATE.value, FaultKind.REORDER.value])
        sent = pl.concat([self.meters.select("meter_id", topic=pl.lit(kind), sent=kind) for kind in KINDS])
        counted = certain.group_by(of).agg(holes=pl.len())
        copies = self._copies().group_by(of).agg(pl.col("copies").sum())
        open_ = (
            self.faults.filter(moved & ~pl.col("was_sent"))
            .sort("seq")
            .join(sent, on=of, how="left")
            .join(counted, on=of, how="left")
            .join(copies, on=of, how="left")
            .with_columns(pl.col("holes", "copies").fill_null(0))
            .with_columns(rank=pl.int_range(pl.len()).over(of))
        )
        below = pl.col("seq") < pl.col("sent") - pl.col("copies") + pl.col("holes") + pl.col("rank")
        return pl.concat([certain, open_.filter(below).select(*of, "seq")])


def _told(lake: duckdb.DuckDBPyConnection, place: str, sql: str) -> pl.DataFrame:
    """Findings of a query that gives meter_id and told."""
    found = lake.execute(f"SELECT meter_id, '{place}' AS place, told FROM ({sql})").pl()
    return found.cast(FINDINGS)  # type: ignore[arg-type]


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
    counts = lake.execute(
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
        LEFT JOIN more m ON m.topic = coalesce(s.topic, f.topic) AND m.meter_id = coalesce(s.meter_id, f.meter_id)"""
    ).pl()
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
