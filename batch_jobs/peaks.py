"""The highest mean power that a meter took over an interval: of a local day, and of its month so far.

Reads: validated_intervals_v1 of the day and the 30 days before it, as far as they are there; registry (time zone).
Writes: peaks_v1, a row for each meter of which an interval of the day is known.
Key: meter_id, date.
Power: the energy of all import registers over their interval, a quarter hour or half an hour, as a mean, W, rounded
down. An interval that was estimated, or is known in part or of some registers only, counts as well, and
`day_peak_quality` or `month_peak_quality` says so of the highest; of equal ones the first counts.
`month_intervals` of `month_expected` are known: a month whose days are not all there has a peak of those that are.
Belgium's capacity tariff bills the mean of the last twelve months' peaks, each 2.5 kW at least (docs/domain.md, Peaks).
Lateness: run the date again after its validated intervals; the days after it, of the same month, too.
Duplicates: validated intervals have none.
Restart: run it again; the date is replaced as a whole.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from engine.night import BatchJob, midnight, with_local_day
from engine.night_run import command
from schemas.tables import IMPORTS

DAYS_BEFORE = 30
"""With the day itself the longest month."""
HOUR_S = 3600
INTERVALS = "validated_intervals_v1"
DOUBT = ["measured", "power_fail", "interpolated", "estimated", "incomplete"]
MISSING = "missing"
"""Of one register: what is known of the others is a part."""


def transform(lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
    """A day's peaks; see the module."""
    month_start = midnight(date.replace(day=1), F.col("time_zone"))
    start, length_s = F.col("interval_start"), F.unix_seconds("interval_end") - F.unix_seconds("interval_start")
    known = with_local_day(
        lake[INTERVALS].where(F.col("register").isin(*IMPORTS)),
        registry,
        date,
        "time_zone",
    ).withColumn("month_start", month_start)
    powers = (
        known.where((start >= F.col("month_start")) & (start < F.col("day_end")))
        .groupBy("meter_id", "usage_point_id", "day_start", "day_end", "month_start", "interval_start")
        .agg(
            F.sum("energy_wh").alias("wh"),
            F.max(length_s).alias("length_s"),
            F.max_by("quality", _doubt("quality")).alias("worst"),
        )
        .withColumn("quality", F.when(F.col("worst") == MISSING, DOUBT[-1]).otherwise(F.col("worst")))
        .where(F.col("wh").isNotNull())
        .withColumn("power_w", F.floor(F.col("wh") * HOUR_S / F.col("length_s")))
    )
    in_day = start >= F.col("day_start")
    highest = F.struct("power_w", -F.unix_micros("interval_start"))
    peaks = powers.groupBy("meter_id", "usage_point_id", "day_start", "day_end", "month_start").agg(
        *_peak("day", highest, in_day),
        *_peak("month", highest, F.lit(True)),
        F.count(F.lit(1)).alias("month_intervals"),
        F.max((F.unix_seconds("day_end") - F.unix_seconds("month_start")) / F.col("length_s"))
        .cast("long")
        .alias("month_expected"),
    )
    return peaks.where(F.col("day_peak_w").isNotNull())


def _doubt(quality: str) -> Column:
    """How far an interval's energy is from being read: of several registers the worst counts."""
    return F.array_position(F.array(*[F.lit(each) for each in (*DOUBT, MISSING)]), F.col(quality))


def _peak(name: str, highest: Column, is_counted: Column) -> list[Column]:
    """The highest power of those that count, when, and what it is worth."""
    order = F.when(is_counted, highest)
    return [
        F.max_by("power_w", order).alias(f"{name}_peak_w"),
        F.max_by("interval_start", order).alias(f"{name}_peak_at"),
        F.max_by("quality", order).alias(f"{name}_peak_quality"),
    ]


JOB = BatchJob(name=Path(__file__).stem, version=1, reads={INTERVALS: DAYS_BEFORE}, transform=transform)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
