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

from pathlib import Path

import polars as pl

from engine.batch import BatchContext, Frames
from engine.stream import StreamingJob, command
from metering import accounting
from metering.accounting import only_valid
from metering.deduplication import PLACE, is_recent, originals, with_seen
from schemas import tables
from schemas.closed_lists import Bucket
from schemas.topics import DEAD_LETTERS, EVENTS, INGESTED, READINGS

RECENT = pl.Schema(
    {"meter_id": pl.String(), "print": pl.UInt64(), "topic": pl.String(), "partition": pl.Int64(), "offset": pl.Int64()}
)
TABLE_OF = {READINGS.name: "readings", EVENTS.name: "events", DEAD_LETTERS.name: "dead_letters"}
OURS = ("received_at", "arrival_at", "kafka_at", "refused_because", "refused_detail", "refused_payload", *PLACE)
"""Columns that differ when the same message is delivered again, and those that are no part of it."""


def transform(rows: pl.DataFrame, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Frames:
    """Rows of one of the three topics; see the module."""
    valid = only_valid(rows)
    sent = valid.select(sorted(set(valid.columns) - set(OURS)))
    prints = valid.select(
        pl.col("meter_id").fill_null(""),
        *PLACE,
        pl.col("run_id") if "run_id" in valid.columns else pl.lit(None, pl.String).alias("run_id"),
        print=sent.hash_rows(),
    )
    marked = with_seen(prints, state["recent"], ["meter_id", "print"], [])
    bucket = (
        pl.when(pl.col("seen").is_not_null())
        .then(pl.lit(Bucket.DUPLICATE.value))
        .when(pl.col("topic") == DEAD_LETTERS.name)
        .then(pl.lit(Bucket.INVALID.value))
        .otherwise(pl.lit(Bucket.STORED.value))
    )
    frames = {
        "recent": originals(state["recent"], marked).filter(is_recent(context.settings.recent_records)),
        "books": pl.concat([accounting.count(marked.with_columns(bucket=bucket)), accounting.invalid(rows)]),
        "dead_letters": accounting.refused(rows),
    }
    for topic in rows.get_column("topic").unique():
        table = TABLE_OF[topic]
        stored = valid.select(tables.TABLES[table].names)
        frames[table] = pl.concat([stored, frames[table]]) if table in frames else stored
    return frames


JOB = StreamingJob(
    name=Path(__file__).stem,
    version=2,
    topics=INGESTED,
    writes={"readings": "observed_at", "events": "observed_at", "dead_letters": "received_at"},
    state={"recent": RECENT},
    transform=transform,
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
