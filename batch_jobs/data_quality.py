"""What came and what did not, per meter and local day, so that nothing disappears without a row that counts it.

Reads: readings, late_readings, quarantined_readings and dead_letters of the UTC days that the local day can touch, and
the readings that came in these, whatever their clock says; registry (interval, validity, time zone).
Writes: data_quality_v1, a row for each meter that something came from or that the registry expects, and one with no
meter_id where there are dead letters.
Key: meter_id (null for the dead letters), date.
By the meter's time: a record with a possible clock is in exactly one day, and received = distinct_readings + duplicate
+ conflict.
Duplicates: of one (meter_id, observed_at) the first received is the distinct one, another with the same measurements a
duplicate, one with others a conflict. `late` are those that the stream took for out of order; the night has them in
their place.
By arrival: `quarantined…` are counted on the local day on which they came, whatever their own clock says; so a 2099 is
found, and one of last month too. A record that two stages refused counts once. `dead_letters` have no sure meter: they
are dated by the UTC day of received_at, wall time also for a replay.
`arrived` are all readings that came on the local day, `of_other_days` those among them that their own clock dates
elsewhere by more than an hour, and by `furthest_s` at most: a meter whose clock is wrong is seen on the day it comes.
`missing` and `completeness_pct` compare the distinct ones with the day's true length over the expected interval, null
where none is known. `longest_gap_s` is the longest time without a reading, from midnight to midnight.
`max_clock_ahead_s`: the most that a reading was dated after its own arrival (a wrong clock); `max_delay_s`: the most
that one came after its time (a slow clock or a slow way: from here they look alike); negative if there is none such.
Lateness: run the date again when readings of it came after its night.
Restart: run it again; the date is replaced as a whole.
"""

import datetime
from collections.abc import Mapping
from functools import partial, reduce
from pathlib import Path

import polars as pl
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from engine.night import BatchJob, arrived, day_s, is_read_in_day, per_shard, with_local_day, with_silent
from engine.night_run import command
from metering.deduplication import with_seen
from schemas import tables
from schemas.closed_lists import DeltaReason, QuarantineReason

ENERGY_STAGE = "consumption_deltas"  # each stage has its own idea of late: that of the energy is reported
WAY = {"sent_at", "received_at", "arrival_at", "run_id", "seq", "topic", "partition", "offset"}
"""Columns that tell how a reading came; the others are what was measured."""
QUARANTINES = {
    f"quarantined_{reason.value}": reason
    for reason in (QuarantineReason.IMPOSSIBLE_CLOCK, QuarantineReason.CONFLICT, QuarantineReason.IMPLAUSIBLE)
}
ON_ITS_WAY_S = 3_600  # so long a reading may take over midnight
COUNTS = ["received", "distinct_readings", "duplicate", "conflict"]
TIMES = ["longest_gap_s", "max_clock_ahead_s", "max_delay_s"]
DAYS = pa.schema([pa.field("meter_id", pa.string()), *[pa.field(name, pa.int64()) for name in [*COUNTS, *TIMES]]])


def days(readings: pl.DataFrame) -> pl.DataFrame:
    """Counts and times per meter, columns `DAYS`.

    Args:
        readings: of the day: meter_id, observed_at, arrival_at, topic, partition, offset, print, day_start, day_end.
    """
    at, seen = pl.col("observed_at"), pl.col("seen")
    marked = with_seen(readings, readings.clear(), ["meter_id", "observed_at"], ["print"])
    originals = marked.filter(seen.is_null()).sort("meter_id", "observed_at")
    before = at.shift(1).over("meter_id").fill_null(pl.col("day_start"))
    ahead = at - pl.col("arrival_at")
    times = (
        originals.with_columns(span=at - before, ahead=ahead)
        .group_by("meter_id")
        .agg(
            within=pl.col("span").max(),
            after=pl.col("day_end").first() - at.max(),
            ahead=pl.col("ahead").max(),
            delay=(-pl.col("ahead")).max(),
        )
        .select(
            "meter_id",
            longest_gap_s=pl.max_horizontal("within", "after").dt.total_seconds(),
            max_clock_ahead_s=pl.col("ahead").dt.total_seconds(),
            max_delay_s=pl.col("delay").dt.total_seconds(),
        )
    )
    counts = marked.group_by("meter_id").agg(
        received=pl.len(),
        distinct_readings=seen.is_null().sum(),
        duplicate=(seen == DeltaReason.DUPLICATE.value).sum(),
        conflict=(seen == DeltaReason.CONFLICT.value).sum(),
    )
    return counts.join(times, on="meter_id")


def transform(lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
    """A day's quality; see the module."""
    measured = [name for name in tables.READINGS.names if name not in WAY]
    place = ["topic", "partition", "offset"]
    readings = (
        with_local_day(lake["readings"], registry, date)
        .where(is_read_in_day("observed_at"))
        .withColumn("print", F.xxhash64(*measured))
        .select("meter_id", "observed_at", "arrival_at", *place, "print", "day_start", "day_end")
    )
    late = (
        with_local_day(lake["late_readings"].where(F.col("stage") == ENERGY_STAGE), registry, date)
        .where(is_read_in_day("observed_at"))
        .groupBy("meter_id")
        .agg(F.countDistinct(*place).alias("late"))
    )
    by_reason = [
        F.countDistinct(F.when(F.col("reason") == reason.value, F.struct(*place))).alias(name)
        for name, reason in QUARANTINES.items()
    ]
    quarantined = (
        with_local_day(lake["quarantined_readings"], registry, date)
        .where(is_read_in_day("arrival_at"))
        .groupBy("meter_id")
        .agg(F.countDistinct(*place).alias("quarantined"), *by_reason)
    )
    came = with_local_day(lake[arrived("readings")], registry, date).where(is_read_in_day("arrival_at"))
    apart_s = F.abs(F.col("observed_at").cast("double") - F.col("arrival_at").cast("double")).cast("long")
    is_other = ~is_read_in_day("observed_at") & (apart_s > ON_ITS_WAY_S)
    by_arrival = came.groupBy("meter_id").agg(
        F.countDistinct(*place).alias("arrived"),
        F.countDistinct(F.when(is_other, F.struct(*place))).alias("of_other_days"),
        F.max(F.when(is_other, apart_s)).alias("furthest_s"),
    )
    nobody = F.lit(None).cast("string").alias("meter_id")
    dead = (
        lake["dead_letters"]
        .where(F.to_date("received_at") == F.lit(date))
        .groupBy(nobody)
        .agg(F.count("*").alias("dead_letters"))
    )
    parts = [per_shard(readings, days, DAYS), late, quarantined, dead, by_arrival]
    others = ["late", "quarantined", *QUARANTINES, "dead_letters", "arrived", "of_other_days"]
    counted = (
        reduce(partial(DataFrame.unionByName, allowMissingColumns=True), parts)
        .groupBy("meter_id")
        .agg(*[F.max(name).alias(name) for name in [*COUNTS, *TIMES, *others, "furthest_s"]])
    )
    expected = F.floor(day_s() / F.col("interval_s"))
    is_known = F.col("expected") > 0  # greatest and least pass over nulls; of a longer interval no day expects one
    is_meter = F.col("meter_id").isNotNull()
    return (
        with_silent(counted, registry.select("meter_id"), registry, date, "interval_s")
        .fillna(0, [*COUNTS, *others])
        .withColumn("expected", expected)
        .select(
            "meter_id",
            "day_start",
            "day_end",
            "expected",
            *COUNTS,
            F.when(is_known, F.greatest(F.col("expected") - F.col("distinct_readings"), F.lit(0))).alias("missing"),
            F.when(is_known, F.least(F.col("distinct_readings") / F.col("expected") * 100, F.lit(100.0))).alias(
                "completeness_pct"
            ),
            F.when(is_meter, F.coalesce("longest_gap_s", day_s())).alias("longest_gap_s"),
            "max_clock_ahead_s",
            "max_delay_s",
            *others,
            "furthest_s",
        )
    )


JOB = BatchJob(
    name=Path(__file__).stem,
    version=1,
    reads={"readings": 0, "late_readings": 0, "quarantined_readings": 0, "dead_letters": 0},
    transform=transform,
    refuses_impossible_clocks=("readings",),
    by_arrival=("readings",),
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
