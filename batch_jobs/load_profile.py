"""How much a meter imports in each hour of the day: statistics over the four weeks that end with a local day.

The window slides by a day a night (Theodolite's third use case, with a meter for its sensor). An hour counts where the
energy of all its four quarters is known and none was without power, so a gap or a power failure makes a profile of
fewer days, never a lower one. An hour that an autumn night has twice counts twice, one that a spring night lacks not at
all.

Reads: interval_readings of the day and the 27 days before it; registry (usage point, time zone).
Writes: load_profile_v1.
Key: meter_id, hour_of_day, date.
Lateness: run the date again when readings of its window came after its night.
Duplicates: the stream gives each quarter hour once.
Restart: run it again; the date is replaced as a whole.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from engine.night import DEFAULT_ZONE, BatchJob, midnight, with_local_day
from engine.night_run import command
from schemas.closed_lists import IntervalQuality
from schemas.tables import IMPORTS

DAYS_BEFORE = 27
"""With the day itself four weeks: each day of the week has the same weight."""
HOUR_S = 3600


def transform(lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
    """The profiles of four weeks; see the module."""
    zone = F.coalesce("time_zone", F.lit(DEFAULT_ZONE))
    quarters = (
        with_local_day(lake["interval_readings"], registry, date, "usage_point_id", "time_zone")
        .where(F.col("register").isin(*IMPORTS))
        .withColumn("window_start", midnight(date - datetime.timedelta(days=DAYS_BEFORE), F.col("time_zone")))
        .where(~F.col("quality").eqNullSafe(IntervalQuality.POWER_FAIL.value))
        .where((F.col("interval_start") >= F.col("window_start")) & (F.col("interval_start") < F.col("day_end")))
        .withColumn("local", F.from_utc_timestamp("interval_start", zone))
        .withColumn("offset_s", F.unix_seconds("local") - F.unix_seconds("interval_start"))
    )
    hour: list[Column | str] = [
        "meter_id",
        "usage_point_id",
        "window_start",
        "day_end",
        F.date_trunc("hour", "local").alias("hour"),
    ]
    hours = (
        quarters.groupBy([*hour, "offset_s", "register"])
        .agg(F.sum("energy_wh").alias("wh"), F.sum("covered_s").alias("covered_s"))
        .groupBy("meter_id", "usage_point_id", "window_start", "day_end", "hour", "offset_s")
        .agg(F.sum("wh").alias("wh"), F.min("covered_s").alias("covered_s"))
        .where(F.col("covered_s") == HOUR_S)
    )
    return (
        hours.groupBy("meter_id", "usage_point_id", "window_start", "day_end", F.hour("hour").alias("hour_of_day"))
        .agg(
            F.count("wh").alias("hours"),
            F.avg("wh").alias("mean_wh"),
            F.min("wh").alias("min_wh"),
            F.max("wh").alias("max_wh"),
            F.stddev_pop("wh").alias("stddev_wh"),
        )
        .select(
            "meter_id",
            "usage_point_id",
            "hour_of_day",
            "window_start",
            F.col("day_end").alias("window_end"),
            "hours",
            "mean_wh",
            "min_wh",
            "max_wh",
            "stddev_wh",
        )
    )


JOB = BatchJob(name=Path(__file__).stem, version=1, reads={"interval_readings": DAYS_BEFORE}, transform=transform)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
