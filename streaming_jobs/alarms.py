"""Alarms from what meters say: one alarm per meter and type, raised, repeated, cleared.

Reads: meter-events-v1.
Writes: alarms (one row per change; the newest updated_at of an alarm_id is its state), topic alarms-v1 (the same rows),
quarantined_events (no table has the code, or a status bit is neither set nor clear), late_events.
Key: alarm_id = f(meter, type, begin).
Lateness: an event older than the newest change of its alarm is late and changes nothing.
Duplicates: told by meter, time, sender's stamp and number, table, code and argument within the last offsets of a
partition.
Restart: state (the newest alarm of each meter and type) and files are keyed by batch; alarms-v1 may get a batch twice.
A meter without a clock stamps 1970: the arrival is taken for its time.
"""

from pathlib import Path

import polars as pl
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from lake import alarm_life, books
from lake.by_shard import Frames, by_shard, of_kind, state_of, state_schema
from lake.decoding import decoded, impossible_clock, only_valid
from lake.seen_before import is_recent, with_seen
from lake.streaming import Outcome, StreamingJob, StreamSettings, command
from schemas import tables
from schemas.closed_lists import Bucket
from schemas.topics import ALARMS, EVENTS

IDENTITY = ["meter_id", "observed_at", "sent_at", "seq", "dialect", "source_table", "code", "argument"]
RECENT = pa.schema([tables.EVENTS.field(name) for name in [*IDENTITY, "topic", "partition", "offset"]])
NEEDED = [*IDENTITY, "dialect_version", "run_id", "arrival_at", "event_at", "topic", "partition", "offset"]
OUTPUTS = {
    "open": tables.arrow_of(alarm_life.OPEN),
    "recent": RECENT,
    "alarm": tables.ALARMS,
    "refused": books.REFUSED,
    "books": books.BOOKS,
}
STATE = ("open", "recent")
NAME = Path(__file__).stem


def transform(records: DataFrame, registry: DataFrame, state: DataFrame, settings: StreamSettings) -> Outcome:
    """Changes of alarms; see the module."""
    rows = decoded(records, EVENTS).persist()
    is_impossible = impossible_clock(settings.max_ahead_s, settings.max_behind_s)
    event_at = F.when(is_impossible, F.col("arrival_at")).otherwise(F.col("observed_at"))
    events = only_valid(rows).withColumn("event_at", event_at).select(*NEEDED)
    horizon = settings.recent_records

    def engine(events: pl.DataFrame, known: Frames) -> Frames:
        marked = with_seen(events, known["recent"], IDENTITY, [])
        result = alarm_life.lives(marked, known["open"])
        originals = pl.concat([known["recent"], marked.filter(pl.col("seen").is_null()).select(RECENT.names)])
        return {
            "open": result.open,
            "recent": originals.filter(is_recent(horizon)),
            "alarm": result.alarms,
            "refused": books.refused(result.events),
            "books": books.count(result.events),
        }

    union = by_shard(events, state, engine, OUTPUTS, STATE)
    refused = of_kind(union, "refused", books.REFUSED)
    changes = of_kind(union, "alarm", tables.ALARMS)
    return Outcome(
        tables={
            "alarms": changes,
            "quarantined_events": books.rows_refused(
                rows, refused, Bucket.QUARANTINED, NAME, tables.QUARANTINED_EVENTS.names
            ),
            "late_events": books.rows_refused(rows, refused, Bucket.LATE, NAME, tables.LATE_EVENTS.names),
        },
        books=of_kind(union, "books", books.BOOKS).unionByName(books.invalid(rows)),
        state=state_of(union, STATE),
        topics={ALARMS: changes},
        held=(rows, union),
    )


JOB = StreamingJob(
    name=NAME,
    version=1,
    topics=(EVENTS,),
    writes={"alarms": "raised_at", "quarantined_events": "arrival_at", "late_events": "arrival_at"},
    state=state_schema(OUTPUTS, STATE),
    transform=transform,
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
