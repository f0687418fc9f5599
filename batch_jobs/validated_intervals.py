"""Energy per quarter hour and register of a local day, validated: what reports and bills are made of.

Reads: readings of the UTC days that the local day can touch, of the week before and after it the last and the first of
each; consumption_deltas of the day, for what a register stood at longer ago; events of these days, for power failures;
interval_readings of the 35 days before, for like days; registry (fuse, phases, interval, market, time zone).
Writes: validated_intervals_v1, a row per register and quarter hour of each meter that had a reading in the week before
the day's end; half hours where the registry expects readings each half hour; 92, 96 or 100 a day.
Key: meter_id, register, interval_start.
Energy: steps are judged from both sides, cut at the edges of intervals and even over their time with power; a gap is
filled by a straight line between its neighbours, by like days, or evenly, as the market wants (docs/domain.md,
Validated intervals), and scaled to the register: over all days the rows with `is_reconciled` sum up to it exactly.
Quality: measured, read at both ends · interpolated, cut · estimated · power_fail, 0 Wh · incomplete, only a part is
known · missing, energy_wh null. `method` says how the energy is known, `rule` what the interval did not keep, `not_run`
what could not be asked, for want of a fuse, of three intervals, of like days.
Lateness: run the date again when readings of it, or of what ends its gap, came after its night.
Duplicates: of one (meter_id, observed_at) the first received counts; impossible clocks are left out.
Restart: run it again; the date is replaced as a whole.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from engine.day_readings import DAYS_BEFORE, readings_around
from engine.night import SHARDS, BatchJob, per_shard
from engine.night_run import command
from metering.alarms import power_fails
from metering.alarms.outages import POWER_FAILURE
from metering.validation.intervals import ROWS, validated
from schemas.closed_lists import IntervalQuality
from schemas.event_codes import code_table
from schemas.tables import REPORTS

REFERENCE_DAYS = 35
"""A week for the gap to begin in, and four weeks of like days before it."""
EVENT = ["meter_id", "observed_at", "arrival_at", "dialect", "dialect_version", "source_table", "code", "argument"]
COLUMNS = pa.schema([REPORTS["validated_intervals_v1"].field(name) for name in ROWS])
READ = [IntervalQuality.MEASURED.value, IntervalQuality.INTERPOLATED.value]


def intervals(readings: pl.DataFrame, events: pl.DataFrame, references: pl.DataFrame) -> pl.DataFrame:
    """Validated intervals of some meters, columns `metering.validation.intervals.ROWS`.

    Args:
        readings: of `engine.day_readings.readings_around`.
        events: of these meters, columns `EVENT`.
        references: see `metering.validation.intervals.validated`.
    """
    stamped = events.with_columns(event_at="observed_at")
    failures = power_fails.power_fails(power_fails.edges(stamped, pl.DataFrame(schema=power_fails.EDGE)))
    return validated(readings, failures, references)


def transform(lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
    """A day's intervals; see the module."""
    readings = readings_around(lake, registry, date, "market", "time_zone")
    codes = code_table().filter(pl.col("alarm_type") == POWER_FAILURE).get_column("code").unique().to_list()
    events = lake["events"].where(F.col("code").isin(codes)).select(*EVENT)
    references = (
        lake["interval_readings"]
        .where(F.col("quality").isin(READ))
        .where(F.col("interval_start") < F.lit((date + datetime.timedelta(days=1)).isoformat()).cast("timestamp"))
        .select("meter_id", "register", "interval_start", "energy_wh")
    )
    rows = per_shard(readings, intervals, COLUMNS, events, references, shards=SHARDS * 4)
    return rows.join(F.broadcast(registry.select("meter_id", "usage_point_id")), "meter_id", "left")


JOB = BatchJob(
    name=Path(__file__).stem,
    version=1,
    reads={
        "readings": DAYS_BEFORE,
        "consumption_deltas": 0,
        "events": DAYS_BEFORE,
        "interval_readings": REFERENCE_DAYS,
    },
    reads_after={"readings": DAYS_BEFORE, "events": DAYS_BEFORE},
    transform=transform,
    refuses_impossible_clocks=("readings",),
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
