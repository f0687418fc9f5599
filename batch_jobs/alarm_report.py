"""Alarms of a local day: each that was raised, repeated, cleared or acknowledged in it, as it stood at the day's end.

Reads: alarms raised in the UTC days that the local day can touch and in the 30 days before: an alarm that stood longer
than that before it was cleared is not found; all of alarm_acknowledgements; registry (transformer, feeder, time zone).
Writes: alarm_report_v1.
Key: alarm_id, date. An alarm has a row in each day that touched it, so a count over days takes one row an alarm_id.
A change has the meter's time where the table keeps it (raised_at, cleared_at), else its arrival (repeats). What
happened after the day's end is not in its row: an alarm cleared tomorrow is active today, without an end. But for its
acknowledgement: that is a person's, by a clock that may be years from the alarm's (a replay), so a row has the first
that was known when it was written.
Lateness: run the date again when events of it came after its night.
Duplicates: a change that is there twice gives one row.
Restart: run it again; the date is replaced as a whole.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from engine.night import BatchJob, is_begun_in_day, with_local_day
from engine.night_run import command
from schemas import tables
from schemas.closed_lists import AlarmState

DAYS_BEFORE = 30
"""How long an alarm may stand and its end still be reported."""


def _acknowledged(given: DataFrame) -> DataFrame:
    """The first acknowledgement of each alarm."""
    first = F.min(F.struct("acknowledged_at", "acknowledged_by", "note")).alias("first")
    return given.groupBy("alarm_id").agg(first).select("alarm_id", "first.*")


def transform(lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
    """A day's alarms; see the module."""
    is_cleared = F.col("state") == AlarmState.CLEARED.value
    changed_at = (
        F.when(is_cleared, F.col("cleared_at")).when(F.col("repeat_count") == 0, F.col("raised_at")).otherwise(
            F.greatest("updated_at", "raised_at")
        )
    )  # fmt: skip
    changes = (
        with_local_day(lake["alarms"], registry, date, "usage_point_id", "transformer_id", "feeder_id")
        .withColumn("changed_at", changed_at)
        .where(F.col("changed_at") < F.col("day_end"))
    )
    # A life goes one way: repeats count up, the clear comes last. So its order needs no clock.
    newest = F.struct(is_cleared, "repeat_count", "updated_at")
    places = ["usage_point_id", "transformer_id", "feeder_id"]
    columns = [*tables.ALARMS.names, *places, "day_start", "day_end"]
    return (
        changes.groupBy("alarm_id")
        .agg(
            F.max_by(F.struct(*[name for name in columns if name != "alarm_id"]), newest).alias("last"),
            F.max(is_begun_in_day("changed_at")).alias("is_touched"),
        )
        .select("alarm_id", "last.*", "is_touched")
        .join(_acknowledged(lake["alarm_acknowledgements"]), "alarm_id", "left")
        .where(F.col("is_touched") | is_begun_in_day("acknowledged_at"))
        .select(
            "alarm_id",
            "meter_id",
            *places,
            "alarm_type",
            "severity",
            "state",
            "raised_at",
            "cleared_at",
            (F.unix_seconds("cleared_at") - F.unix_seconds("raised_at")).alias("duration_s"),
            "repeat_count",
            "source",
            "run_id",
            "updated_at",
            "acknowledged_at",
            "acknowledged_by",
            "note",
        )
    )


JOB = BatchJob(
    name=Path(__file__).stem,
    version=1,
    reads={"alarms": DAYS_BEFORE, "alarm_acknowledgements": None},
    transform=transform,
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
