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

from functools import partial
from pathlib import Path

import polars as pl

from engine.driver import command
from engine.job import SAID, BatchContext, Frames, Output, Source, StreamingJob
from schemas.topics import COMMANDS, DEAD_LETTERS, EVENTS, READINGS

TABLE_OF = {READINGS: "readings", EVENTS: "events", DEAD_LETTERS: "dead_letters"}


def transform(table: str, rows: pl.DataFrame, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Output:
    """Rows of one of the three topics; see the module."""
    return Output(tables={table: rows})


JOB = StreamingJob(
    name=Path(__file__).stem,
    version=3,
    sources=tuple(
        Source(
            topic,
            partial(transform, table),
            deduplicate_on=("meter_id", SAID),
            hands_duplicates=True,
            keeps_undecoded=True,
        )
        for topic, table in TABLE_OF.items()
    ),
    writes=tuple(TABLE_OF.values()),
    shares={"dead_letters": f"kafka_topic IS NULL OR kafka_topic <> '{COMMANDS.name}'"},
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
