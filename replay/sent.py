"""What a run says that it sent, and views of what the lake has of it."""

from dataclasses import dataclass

import duckdb
import polars as pl

from lake.reading import Lake
from lake.store import store
from replay.dirt import FAULTS
from replay.run.ledger import Ledger, read_ledger, run_folder
from schemas.closed_lists import Bucket, FaultKind
from schemas.errors import ConfigError
from schemas.tables import PHASES, REGISTERS, polars_schema
from schemas.topics import KINDS
from settings import home

UNKNOWN_FUSE_A = 100  # three phases of it, where no fuse is known
FUSE_FACTOR = 1.1  # a fuse carries a little more than its rating
DELTAS, VOLTAGE, ALARMS, LAKE = "consumption_deltas", "voltage_deviation", "alarms", "readings_lake"
"""The stages, by the name of their job."""
REGISTER_LIST = ", ".join(f"{register}_wh" for register in REGISTERS)
VOLTAGE_LIST = ", ".join(f"voltage_{phase.lower()}_mv" for phase in PHASES)
"""Columns of registers and voltages as lists in SQL."""
PLACE = 'topic, partition, "offset"'
"""Where a record lies in Kafka, in SQL."""


def ledger_of(run_id: str) -> Ledger:
    """What a run that has ended says of itself.

    Raises:
        ConfigError: it is not there, or not complete.
    """
    folder = run_folder(run_id)
    try:
        ledger = read_ledger(run_id)
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
    return ledger


@dataclass(frozen=True)
class Run:
    """What a run says of itself.

    Attributes:
        ledger: of run.json.
        meters: ledger.parquet.
        faults: faults.parquet with `row`, `was_sent` (its time had come when the run ended), `register` (whose steps
            show what became of it) and the meter's `max_w` and `interval_s`.
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
        folder, ledger = run_folder(run_id), ledger_of(run_id)
        if not Lake().files("readings"):
            msg = f"no lake: {store().uri('lake/readings')} has no files; METERSTREAM_HOME says where to look"
            raise ConfigError(msg)
        meters = pl.read_parquet(folder / "ledger.parquet")
        faults = pl.read_parquet(folder / "faults.parquet").cast(polars_schema(FAULTS))
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
        lake.execute(
            "CREATE TEMP TABLE apart AS "
            + " UNION ALL ".join(
                f"SELECT '{table}' AS kept_in, '{bucket}' AS bucket, stage, reason, meter_id, {PLACE} FROM {table} "
                f"WHERE run_id = '{run_id}'"
                for table, bucket in (
                    ("late_readings", Bucket.LATE),
                    ("quarantined_readings", Bucket.QUARANTINED),
                    ("late_events", Bucket.LATE),
                    ("quarantined_events", Bucket.QUARANTINED),
                )  # fmt: skip
            )
        )
        lake.register("faults", self.faults.to_arrow())
        holes = self._holes()
        lake.register("sent", self._sent(holes).to_arrow())
        lake.register("holes", holes.to_arrow())
        lake.register("ledger_meters", self.meters.select("meter_id").to_arrow())
        truth = run_folder(self.ledger.run_id) / "truth.parquet"
        lake.execute(f"CREATE VIEW truth AS FROM read_parquet('{truth}')")
        lake.execute(
            f"""CREATE TEMP TABLE limits AS SELECT meter_id, interval_s, wraps_wh,
                CASE WHEN is_unlimited THEN NULL ELSE CAST(trunc(
                    coalesce(fuse_a * coalesce(len(string_split(phases, ',')), 3), {UNKNOWN_FUSE_A} * 3)
                    * coalesce(nominal_mv, 230000) / 1000
                    * CASE jurisdiction WHEN 'ANSI-C84.1' THEN 1.058 ELSE 1.1 END * {FUSE_FACTOR}) AS BIGINT)
                END AS max_w
            FROM ledger_meters LEFT JOIN newest_registry USING (meter_id)"""
        )
        lake.execute(
            f"""CREATE TEMP TABLE shared AS
            SELECT DISTINCT meter_id FROM readings SEMI JOIN ledger_meters USING (meter_id)
            WHERE run_id IS DISTINCT FROM '{run_id}'"""
        )
        # past the bridge a dead letter names no meter, and two meters' poison may be the same bytes: then any will do
        whose, way = ("meter_id", "mqtt_topic") if self.ledger.to == "mqtt" else ("NULL", "kafka_topic")
        lake.execute(
            f"""CREATE TEMP TABLE run_letters AS
            SELECT payload, CAST({whose} AS VARCHAR) AS whose, reason FROM dead_letters WHERE {way} IS NOT NULL
                AND received_at >= TIMESTAMPTZ '{self.ledger.started_at}' - INTERVAL 1 MINUTE"""
        )
        lake.execute(
            f"""CREATE TEMP TABLE letters AS
            WITH expected AS (
                SELECT row, payload, {whose} AS whose,
                    row_number() OVER (PARTITION BY payload, {whose} ORDER BY row) AS turn,
                    count(*) OVER (PARTITION BY payload, {whose}) AS turns
                FROM faults WHERE payload IS NOT NULL AND was_sent),
            found AS (
                SELECT payload, whose, any_value(reason) AS reason, count(*) AS letters FROM run_letters GROUP BY ALL)
            SELECT row, reason, CASE WHEN turn = turns THEN letters - turns + 1 ELSE 1 END AS letters
            FROM expected e JOIN found f ON f.payload = e.payload AND f.whose IS NOT DISTINCT FROM e.whose
            WHERE turn <= letters"""
        )

    def _sent(self, holes: pl.DataFrame) -> pl.DataFrame:
        """Per topic and meter: `sent` records, `copies` among them, `end`: its seqs are 0 … end − 1 but for holes.

        Args:
            holes: seqs that were not sent: topic, meter_id, seq.
        """
        keys = ["topic", "meter_id"]
        is_copy = pl.col("was_sent") & (pl.col("kind") == FaultKind.DUPLICATE)
        copies = self.faults.filter(is_copy).group_by(keys).agg(copies=pl.len().cast(pl.Int64))
        missed = holes.group_by(keys).agg(holes=pl.len().cast(pl.Int64))
        both = pl.concat([self.meters.select("meter_id", topic=pl.lit(kind), sent=kind) for kind in KINDS])
        return (
            both.join(copies, on=keys, how="left")
            .join(missed, on=keys, how="left")
            .with_columns(pl.col("copies", "holes").fill_null(0))
            .with_columns(end=pl.col("sent") - pl.col("copies") + pl.col("holes"))
        )

    def _holes(self) -> pl.DataFrame:
        """Seqs that were never sent: topic, meter_id, seq.

        Of an interrupted run also records that were to come later than their time, where their time had come: those
        below the end that the number of records sent gives.
        """
        keys = ["topic", "meter_id"]
        withheld = (pl.col("kind") == FaultKind.POISON) | ~pl.col("is_sent")
        certain = self.faults.filter(pl.col("was_sent") & withheld).select(*keys, "seq").unique()
        if self.ledger.is_whole:
            return certain
        is_delayed = pl.col("kind").is_in([FaultKind.LATE.value, FaultKind.REORDER.value])
        open_ = (
            self.faults.filter(is_delayed & ~pl.col("was_sent"))
            .sort("seq")
            .join(self._sent(certain), on=keys, how="left")
            .with_columns(rank=pl.int_range(pl.len()).over(keys))
        )
        return pl.concat([certain, open_.filter(pl.col("seq") < pl.col("end") + pl.col("rank")).select(*keys, "seq")])
