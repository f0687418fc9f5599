"""Days on which a meter imported or exported far more, or far less, than it used to.

Reads: daily_consumption_v1 of the day and the 28 days before it, as far as they are there; registry (time zone).
Writes: anomalies_v1, a row per meter and way of the day that is measured.
Key: meter_id, way, date.
Expected is the median of the seven days before; a robust sigma is 1.4826 times the median distance of the 28 days
before from their own median, and never less than 1 Wh; `score` is the deviation in sigmas, `is_anomaly` beyond 6 on
either side, null with fewer than 14 days before (docs/domain.md, Forecast and anomalies). Days that are not
`measured` are neither judged nor compared with. A lasting drop may be theft or an empty house: this does not say which.
Lateness: run the date again after its daily consumption; the 28 days after it, too.
Duplicates: daily consumption has none.
Restart: run it again; the date is replaced as a whole.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from engine.night import DEFAULT_ZONE, BatchJob
from engine.night_run import command

DAILY = "daily_consumption_v1"
DAYS_BEFORE, WEEK, LEAST = 28, 7, 14
SIGMA = 1.4826
"""Standard deviations of a normal distribution in a median distance from its median."""
FLOOR_WH, LIMIT = 1.0, 6.0


def transform(lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
    """A day's scores; see the module."""
    zones = registry.select("meter_id", F.coalesce("time_zone", F.lit(DEFAULT_ZONE)).alias("zone"))
    local = F.to_date(F.from_utc_timestamp("day_start", F.coalesce("zone", F.lit(DEFAULT_ZONE))))
    both = F.create_map(F.lit("import"), F.col("import_wh"), F.lit("export"), F.col("export_wh"))
    days = (
        lake[DAILY]
        .where(F.col("quality") == "measured")
        .join(F.broadcast(zones), "meter_id", "left")
        .select(
            "meter_id", "usage_point_id", "day_start", "day_end", F.datediff(F.lit(date), local).alias("back"),
            F.explode(both).alias("way", "wh"),
        )
        .where(F.col("wh").isNotNull())
    )  # fmt: skip
    key = ["meter_id", "way"]
    is_before = F.col("back").between(1, DAYS_BEFORE)
    usual = days.groupBy(key).agg(
        F.median(F.when(F.col("back").between(1, WEEK), F.col("wh"))).alias("expected_wh"),
        F.median(F.when(is_before, F.col("wh"))).alias("middle_wh"),
        F.count(F.when(is_before, F.lit(1))).alias("days"),
    )
    distance = F.median(F.when(is_before, F.abs(F.col("wh") - F.col("middle_wh"))))
    sigmas = (
        days.join(usual, key)
        .groupBy(key)
        .agg(F.when(distance.isNotNull(), F.greatest(SIGMA * distance, F.lit(FLOOR_WH))).alias("sigma_wh"))
    )
    score = (F.col("wh") - F.col("expected_wh")) / F.col("sigma_wh")
    return (
        days.where(F.col("back") == 0)
        .join(usual, key)
        .join(sigmas, key)
        .select(
            "meter_id", "usage_point_id", "day_start", "day_end", "way", "wh", "expected_wh", "sigma_wh",
            score.alias("score"), "days",
            F.when(F.col("days") >= LEAST, F.abs(score) > LIMIT).alias("is_anomaly"),
        )
    )  # fmt: skip


JOB = BatchJob(name=Path(__file__).stem, version=1, reads={DAILY: DAYS_BEFORE}, transform=transform)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
