"""Energy of the next local day, quarter hour by quarter hour: of each meter, its transformer and its feeder.

Reads: validated_intervals_v1 of the day and the six days before it, as far as they are there; registry (transformer,
feeder, time zone).
Writes: forecast_v1, a row per quarter hour of the day after the date, of each meter, transformer and feeder of which
an interval is known.
Key: level, group_id, interval_start, date.
Forecast: of a meter the median of the same local quarter hour of the seven days, of sums their mean, since medians lose
energy that comes now and then (docs/domain.md, Forecast and anomalies). An hour that an autumn night has twice is
forecast twice the same; one that a spring night lacks is not there. A sum has the meters that were known in it, and
`days` says of how many days there was a value.
Lateness: run the date again after its validated intervals.
Duplicates: validated intervals have none.
Restart: run it again; the date is replaced as a whole.
"""

import datetime
from collections.abc import Callable, Mapping
from pathlib import Path

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from engine.night import DEFAULT_ZONE, QUARTER_S, BatchJob, midnight, quarters
from engine.night_run import command
from schemas.tables import EXPORTS, IMPORTS

INTERVALS = "validated_intervals_v1"
DAYS_BEFORE = 6
LEVELS = {"transformer": "transformer_id", "feeder": "feeder_id"}
KEY = ["level", "group_id", "time_zone"]


def transform(lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
    """The next day's forecasts; see the module."""
    zone = F.coalesce("time_zone", F.lit(DEFAULT_ZONE)).alias("time_zone")
    fleet = registry.select("meter_id", zone, *LEVELS.values())
    known = (
        quarters(lake[INTERVALS])
        .join(F.broadcast(fleet), "meter_id", "left")
        .withColumn("time_zone", F.coalesce("time_zone", F.lit(DEFAULT_ZONE)))
        .groupBy("meter_id", "time_zone", *LEVELS.values(), "interval_start")
        .agg(_sum(IMPORTS).alias("import_wh"), _sum(EXPORTS).alias("export_wh"))
    )
    of_meter = known.select(F.lit("meter").alias("level"), F.col("meter_id").alias("group_id"), *_rest(known))
    usual = _usual(of_meter, F.median)
    for level, column in LEVELS.items():
        zones = fleet.groupBy(column).agg(F.max("time_zone").alias("time_zone"))  # a group has one
        of_group = (
            known.drop("time_zone")
            .join(F.broadcast(zones), column)
            .withColumns({"level": F.lit(level), "group_id": F.col(column)})
        )
        sums = of_group.groupBy(*KEY, "interval_start").agg(
            F.sum("import_wh").alias("import_wh"), F.sum("export_wh").alias("export_wh")
        )
        usual = usual.unionByName(_usual(sums, F.mean))
    begin, end = (midnight(date + datetime.timedelta(days=shift), F.col("time_zone")) for shift in (1, 2))
    last = end - F.expr(f"INTERVAL {QUARTER_S} SECONDS")
    slots = F.explode(F.sequence(begin, last, F.expr(f"INTERVAL {QUARTER_S} SECONDS")))
    asked = usual.select(*KEY).distinct().withColumn("interval_start", slots).withColumn("label", _label())
    return asked.join(usual, [*KEY, "label"]).select(
        "level",
        "group_id",
        "interval_start",
        (F.col("interval_start") + F.expr(f"INTERVAL {QUARTER_S} SECONDS")).alias("interval_end"),
        "import_wh",
        "export_wh",
        "days",
    )


def _sum(registers: tuple[str, ...]) -> Column:
    """Energy of the registers of a way; null where the meter has none of them."""
    return F.sum(F.when(F.col("register").isin(*registers), F.col("energy_wh")))


def _rest(known: DataFrame) -> list[Column]:
    return [known[name] for name in ("time_zone", "interval_start", "import_wh", "export_wh")]


def _label() -> Column:
    """The local time of day at which a quarter hour begins."""
    return F.date_format(F.from_utc_timestamp("interval_start", F.col("time_zone")), "HH:mm")


def _usual(rows: DataFrame, middle: Callable[[str], Column]) -> DataFrame:
    """The middle of each local quarter hour: its median, or mean."""
    day = F.to_date(F.from_utc_timestamp("interval_start", F.col("time_zone")))
    return (
        rows.withColumn("label", _label())
        .groupBy(*KEY, "label")
        .agg(
            middle("import_wh").cast("double").alias("import_wh"),
            middle("export_wh").cast("double").alias("export_wh"),
            F.count_distinct(day).alias("days"),
        )
    )


JOB = BatchJob(name=Path(__file__).stem, version=1, reads={INTERVALS: DAYS_BEFORE}, transform=transform)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
