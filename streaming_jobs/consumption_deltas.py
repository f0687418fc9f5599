"""Energy per register step, as readings come.

Reads: meter-readings-v1; registry (fuse, phases, nominal voltage, interval).
Writes: consumption_deltas (one row per reading and register), quarantined_readings (impossible clock, conflict,
implausible), late_readings (out of order), latest_readings (the newest accepted registers of each meter).
Key: meter_id, register, observed_at.
Lateness: the stream says out_of_order and gives no energy; a cumulative register heals itself, and the night places the
reading.
Duplicates: told by (meter_id, observed_at) within the last offsets of a partition; later ones are out of order.
Restart: state and files are keyed by batch.
"""

from pathlib import Path

import polars as pl
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from lake import books, delta_engine
from lake.by_shard import Frames, by_shard, of_kind, state_of, state_schema
from lake.decoding import decoded, impossible_clock, only_valid
from lake.seen_before import is_recent, with_seen
from lake.streaming import Outcome, StreamingJob, StreamSettings, command
from schemas import tables
from schemas.closed_lists import Bucket
from schemas.topics import READINGS

KNOWN = ["phases", "nominal_mv", "fuse_a", "interval_s"]
VALUES = [*[f"{register}_wh" for register in tables.REGISTERS], "equipment_id"]
RECENT = pa.schema(
    [tables.READINGS.field(name) for name in ["meter_id", "observed_at", "topic", "partition", "offset", *VALUES]]
)
PLACED = ["meter_id", "observed_at", "run_id", "dialect", "topic", "partition", "offset"]
NEEDED = [*PLACED, *VALUES, "is_impossible", *KNOWN]
OUTPUTS = {
    "baseline": tables.arrow_of(delta_engine.BASELINE),
    "recent": RECENT,
    "step": tables.CONSUMPTION_DELTAS,
    "refused": books.REFUSED,
    "books": books.BOOKS,
}
STATE = ("baseline", "recent")
NAME = Path(__file__).stem


def transform(records: DataFrame, registry: DataFrame, state: DataFrame, settings: StreamSettings) -> Outcome:
    """Steps of every register; see the module."""
    rows = decoded(records, READINGS).persist()
    readings = (
        only_valid(rows)
        .withColumn("is_impossible", impossible_clock(settings.max_ahead_s, settings.max_behind_s))
        .join(F.broadcast(registry.select("meter_id", *KNOWN)), "meter_id", "left")
        .select(*NEEDED)
    )
    horizon = settings.recent_records

    def engine(readings: pl.DataFrame, known: Frames) -> Frames:
        wrong = books.impossible(readings)
        right = readings.filter(~pl.col("is_impossible"))
        right = with_seen(delta_engine.with_limits(right), known["recent"], ["meter_id", "observed_at"], VALUES)
        result = delta_engine.steps(right, known["baseline"])
        originals = pl.concat([known["recent"], right.filter(pl.col("seen").is_null()).select(RECENT.names)])
        judged = pl.concat([delta_engine.with_bucket(right, result.steps), wrong], how="diagonal")
        return {
            "baseline": result.baseline,
            "recent": originals.filter(is_recent(horizon)),
            "step": result.steps,
            "refused": books.refused(judged),
            "books": books.count(judged),
        }

    union = by_shard(readings, state, engine, OUTPUTS, STATE)
    refused = of_kind(union, "refused", books.REFUSED)
    return Outcome(
        tables={
            "consumption_deltas": of_kind(union, "step", tables.CONSUMPTION_DELTAS),
            "quarantined_readings": books.rows_refused(
                rows, refused, Bucket.QUARANTINED, NAME, tables.QUARANTINED.names
            ),
            "late_readings": books.rows_refused(rows, refused, Bucket.LATE, NAME, tables.LATE_READINGS.names),
        },
        books=of_kind(union, "books", books.BOOKS).unionByName(books.invalid(rows)),
        state=state_of(union, STATE),
        current={"latest_readings": latest(of_kind(union, "baseline", OUTPUTS["baseline"]))},
        held=(rows, union),
    )


def latest(baselines: DataFrame) -> DataFrame:
    """The newest accepted registers of each meter, wide."""
    registers = [
        F.max(F.when(F.col("register") == register, F.col("previous_wh"))).alias(f"{register}_wh")
        for register in tables.REGISTERS
    ]
    newest = [F.max_by(name, "previous_at").alias(name) for name in ("equipment_id", "run_id")]
    wide = baselines.groupBy("meter_id").agg(F.max("previous_at").alias("observed_at"), *registers, *newest)
    return wide.select(*tables.LATEST_READINGS.names)


JOB = StreamingJob(
    name=NAME,
    version=1,
    topics=(READINGS,),
    writes={"consumption_deltas": "observed_at", "quarantined_readings": "arrival_at", "late_readings": "observed_at"},
    state=state_schema(OUTPUTS, STATE),
    transform=transform,
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
