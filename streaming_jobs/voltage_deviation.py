"""Ten-minute voltage windows per meter and phase, with deviation from nominal and band.

Reads: meter-readings-v1; registry (nominal voltage, jurisdiction).
Writes: voltage_windows, each once, when it is over; quarantined_readings; late_readings.
Key: meter_id, phase, window_start.
Lateness: a window is over when the newest arrival of its run is past its end by the allowed lateness, or at a flush; a
reading for a window that is over goes to late_readings.
Duplicates: told by (meter_id, observed_at), in open windows and within the last offsets of a partition.
Restart: state (the samples of open windows) and files are keyed by batch.
"""

from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from lake import books, voltage
from lake.by_shard import Frames, by_shard, of_kind, state_of, state_schema
from lake.decoding import decoded, impossible_clock, only_valid
from lake.delta_engine import STAMP
from lake.streaming import Outcome, StreamingJob, StreamSettings, command
from schemas import tables
from schemas.closed_lists import Bucket
from schemas.topics import READINGS

KNOWN = ["nominal_mv", "jurisdiction"]
SAMPLE = pa.schema(
    [
        *[
            tables.READINGS.field(name)
            for name in ["meter_id", "observed_at", "run_id", "topic", "partition", "offset", *voltage.VOLTAGES]
        ],
        *[tables.REGISTRY.field(name) for name in KNOWN],
    ]
)
CLOSED = pa.schema([*[tables.VOLTAGE_WINDOWS.field(name) for name in ["meter_id", "run_id", "window_start"]]])
CLOCK = pa.schema([tables.READINGS.field("run_id"), pa.field("newest_at", tables.TIMESTAMP)])
OUTPUTS = {
    "sample": SAMPLE,
    "closed": CLOSED,
    "clock": CLOCK,
    "window": tables.VOLTAGE_WINDOWS,
    "refused": books.REFUSED,
    "books": books.BOOKS,
}
STATE = ("sample", "closed", "clock")
NAME = Path(__file__).stem


def transform(records: DataFrame, registry: DataFrame, state: DataFrame, settings: StreamSettings) -> Outcome:
    """Windows that are over; see the module."""
    rows = decoded(records, READINGS).persist()
    readings = (
        only_valid(rows)
        .withColumn("is_impossible", impossible_clock(settings.max_ahead_s, settings.max_behind_s))
        .join(F.broadcast(registry.select("meter_id", *KNOWN)), "meter_id", "left")
        .select(*SAMPLE.names, "is_impossible")
    )
    clocks = of_kind(state, "clock", CLOCK)
    arrivals = only_valid(rows).select("run_id", F.col("arrival_at").alias("newest_at"))
    before, after = _newest(clocks), _newest(clocks.unionByName(arrivals))
    lateness = timedelta(seconds=settings.allowed_lateness_s)
    bounds = pl.DataFrame(
        [{"run_id": run, "bound_before": before.get(run), "bound_after": after[run]} for run in after],
        schema={"run_id": pl.String, "bound_before": STAMP, "bound_after": STAMP},
    ).with_columns(pl.col("bound_before", "bound_after") - lateness)
    newest = pl.DataFrame(list(after.items()), schema={"run_id": pl.String, "newest_at": STAMP}, orient="row")
    horizon, close_all = settings.recent_records, settings.close_all

    def engine(readings: pl.DataFrame, known: Frames) -> Frames:
        wrong = books.impossible(readings)
        right = readings.filter(~pl.col("is_impossible"))
        moved = voltage.advance(right, known["sample"], known["closed"], bounds, horizon, close_all)
        judged = pl.concat([moved.readings, wrong], how="diagonal")
        return {
            "sample": moved.samples,
            "closed": moved.closed,
            "clock": newest,
            "window": moved.windows,
            "refused": books.refused(judged),
            "books": books.count(judged),
        }

    union = by_shard(readings, state, engine, OUTPUTS, STATE)
    refused = of_kind(union, "refused", books.REFUSED)
    return Outcome(
        tables={
            "voltage_windows": of_kind(union, "window", tables.VOLTAGE_WINDOWS),
            "quarantined_readings": books.rows_refused(
                rows, refused, Bucket.QUARANTINED, NAME, tables.QUARANTINED.names
            ),
            "late_readings": books.rows_refused(rows, refused, Bucket.LATE, NAME, tables.LATE_READINGS.names),
        },
        books=of_kind(union, "books", books.BOOKS).unionByName(books.invalid(rows)),
        state=state_of(union, STATE),
        held=(rows, union),
    )


def _newest(clocks: DataFrame) -> dict[str | None, datetime]:
    """The newest arrival of each run."""
    newest = clocks.groupBy("run_id").agg(F.max("newest_at").alias("newest_at")).toArrow()
    return {row["run_id"]: row["newest_at"] for row in newest.to_pylist()}


JOB = StreamingJob(
    name=NAME,
    version=1,
    topics=(READINGS,),
    writes={"voltage_windows": "window_start", "quarantined_readings": "arrival_at", "late_readings": "observed_at"},
    state=state_schema(OUTPUTS, STATE),
    transform=transform,
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
