"""Raw rows for everyone: readings, events and dead letters, as they came.

Reads: meter-readings-v1, meter-events-v1, dead-letters-v1.
Writes: readings, events, dead_letters. A record that reached Kafka past the bridge and cannot be decoded becomes a dead
letter with its original bytes and its place in Kafka.
Key: topic, partition, offset. Every decoded record is kept, redelivered ones too: readers take the first of a
(meter_id, observed_at).
Lateness: none, a row is dated by its own observed_at.
Duplicates: kept, and counted as duplicate where they come within the last offsets of their partition.
Restart: files are keyed by batch.
"""

from functools import reduce
from pathlib import Path

import polars as pl
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from lake import books
from lake.by_shard import Frames, by_shard, of_kind, state_of, state_schema
from lake.decoding import decoded, only_valid
from lake.seen_before import is_recent, with_seen
from lake.streaming import Outcome, StreamingJob, StreamSettings, command
from schemas import tables
from schemas.closed_lists import Bucket
from schemas.topics import DEAD_LETTERS, EVENTS, INGESTED, READINGS

RECENT = pa.schema([pa.field("meter_id", pa.string()), pa.field("print", pa.int64()), *tables.KAFKA_PLACE])
OUTPUTS = {"recent": RECENT, "books": books.BOOKS}
STATE = ("recent",)
OURS = ("received_at", "topic", "partition", "offset", "arrival_at")
"""Columns that differ when the same message is delivered again."""


def transform(records: DataFrame, registry: DataFrame, state: DataFrame, settings: StreamSettings) -> Outcome:
    """Rows of the three topics; see the module."""
    rows = {topic: decoded(records, topic).persist() for topic in INGESTED}
    valid = {topic: only_valid(rows[topic]) for topic in INGESTED}
    prints = reduce(DataFrame.unionByName, [_with_print(valid[topic]) for topic in INGESTED])
    horizon = settings.recent_records

    def engine(prints: pl.DataFrame, known: Frames) -> Frames:
        marked = with_seen(prints, known["recent"], ["topic", "meter_id", "print"], [])
        bucket = (
            pl.when(pl.col("seen").is_not_null())
            .then(pl.lit(Bucket.DUPLICATE.value))
            .when(pl.col("topic") == DEAD_LETTERS.name)
            .then(pl.lit(Bucket.INVALID.value))
            .otherwise(pl.lit(Bucket.STORED.value))
        )
        originals = pl.concat([known["recent"], marked.filter(pl.col("seen").is_null()).select(RECENT.names)])
        return {
            "recent": originals.filter(is_recent(horizon)),
            "books": books.count(marked.with_columns(bucket=bucket)),
        }

    union = by_shard(prints, state, engine, OUTPUTS, STATE)
    letters = valid[DEAD_LETTERS].select(*tables.DEAD_LETTERS.names)
    return Outcome(
        tables={
            "readings": valid[READINGS].select(*tables.READINGS.names),
            "events": valid[EVENTS].select(*tables.EVENTS.names),
            "dead_letters": reduce(DataFrame.unionByName, [letters, *[_refused(rows[topic]) for topic in INGESTED]]),
        },
        books=reduce(
            DataFrame.unionByName,
            [of_kind(union, "books", books.BOOKS), *[books.invalid(rows[topic]) for topic in INGESTED]],
        ),
        state=state_of(union, STATE),
        held=(*rows.values(), union),
    )


def _with_print(rows: DataFrame) -> DataFrame:
    """A hash of all that the sender wrote: what tells a redelivered message."""
    sent = sorted(set(rows.columns) - set(OURS))
    run_id = F.col("run_id") if "run_id" in rows.columns else F.lit(None).cast("string").alias("run_id")
    return rows.select(
        F.coalesce("meter_id", F.lit("")).alias("meter_id"),
        F.xxhash64(*sent).alias("print"),
        "topic",
        "partition",
        "offset",
        run_id,
    )


def _refused(rows: DataFrame) -> DataFrame:
    """Dead letters of what reached Kafka another way than through the bridge."""
    return rows.where(F.col("refused_because").isNotNull()).select(
        F.col("refused_payload").alias("payload"),
        F.col("refused_because").alias("reason"),
        F.col("refused_detail").alias("detail"),
        F.col("kafka_at").alias("received_at"),
        F.lit(None).cast("string").alias("meter_id"),
        F.lit(None).cast("string").alias("mqtt_topic"),
        F.col("topic").alias("kafka_topic"),
        F.col("partition").alias("kafka_partition"),
        F.col("offset").alias("kafka_offset"),
    )


JOB = StreamingJob(
    name=Path(__file__).stem,
    version=1,
    topics=INGESTED,
    writes={"readings": "observed_at", "events": "observed_at", "dead_letters": "received_at"},
    state=state_schema(OUTPUTS, STATE),
    transform=transform,
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
