"""Indices of reliability of a local day, by transformer, feeder and fleet: SAIFI, SAIDI, CAIDI, MAIFI, major events.

Reads: outages and alarms of the local day and of the five years before it; registry (customers served, jurisdiction,
time zone).
Writes: outage_report_v1.
Key: group_id, level, date; a group has a row when the registry has customers of it on that day.
What is counted: each power failure of a member of an outage, customer by customer, on the local day in which it began,
with its whole length; a failure that no outage has (a fuse) is none. Whether it is momentary or sustained is decided by
the limit of the meter's jurisdiction (`metering/alarms/reliability.py`), `momentary_limit_s`, null where a group has
several. One that goes on when the night runs is in `open_interruptions` alone: run the date again when power is back.
Customers served: meters of the registry that are valid on the day, on an earlier day those of then. Transformer and
feeder of an interruption are those that its outage had.
Major-event day: SAIDI above T_MED = exp(α + 2.5 β) (IEEE 1366) of the days with interruptions in the five years before,
worked out anew each night: so a night depends on the tables alone, not on which nights have run. Provisional: fewer
than 30 such days, or the first of them less than four years back.
Lateness: run the date again when events of it came after its night.
Duplicates: of an outage the highest revision counts, of an alarm one interruption.
Restart: run it again; the date is replaced as a whole.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path

import polars as pl
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from engine.night import DEFAULT_ZONE, BatchJob, per_shard
from engine.night_run import command
from metering.alarms.outages import POWER_FAILURE
from metering.alarms.reliability import COUNTS, GROUP, HISTORY_DAYS, MOMENTARY, ROWS, SUMS, momentary_of, of_day, sums
from schemas.closed_lists import ReliabilityLevel
from schemas.tables import arrow_of

FLEET = "fleet"
PLACES = ["transformer_id", "feeder_id"]


def transform(lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
    """A day's indices; see the module."""
    first, day = date - datetime.timedelta(days=HISTORY_DAYS), F.lit(date)
    known = registry.select("meter_id", "jurisdiction", "time_zone")
    interruptions = (
        _interruptions(lake["outages"], lake["alarms"])
        .join(F.broadcast(known), "meter_id", "left")
        .withColumn("day", _local_day(F.col("down_at")))
        .where(F.col("day").between(F.lit(first), day))
    )
    totals = [F.sum(name).alias(name) for name in COUNTS]
    by_place = per_shard(interruptions, sums, arrow_of(SUMS)).groupBy(*PLACES, "day").agg(*totals)
    by_day = by_place.select(_group(), "day", *COUNTS).select("group.*", "day", *COUNTS).where("group_id is not null")
    daily = by_day.groupBy(*GROUP, "day").agg(*totals)
    served = _served(registry)
    has_come = F.coalesce(F.col("from_day") <= F.col("day"), F.lit(True))
    is_there = F.coalesce(F.col("to_day") >= F.col("day"), F.lit(True))
    customers = (
        daily.select(*GROUP, "day")
        .union(served.select(*GROUP, day.alias("day")))
        .distinct()
        .join(F.broadcast(served), GROUP)
        .where(has_come & is_there)
        .groupBy(*GROUP, "day")
        .agg(F.sum("meters").alias("customers_served"), *_limits())
    )
    counted = customers.join(daily, [*GROUP, "day"], "left").fillna(0, list(COUNTS))
    limits = customers.where(F.col("day") == day).select(*GROUP, "momentary_limit_s")

    def engine(rows: pl.DataFrame) -> pl.DataFrame:
        return of_day(rows, date)

    rows = per_shard(counted.drop("momentary_limit_s"), engine, arrow_of(ROWS), by="group_id")
    return rows.join(limits, GROUP).drop("alpha", "beta")


def _interruptions(outages: DataFrame, alarms: DataFrame) -> DataFrame:
    """Power failures of members of outages: meter_id, transformer and feeder of the outage, down_at, up_at."""
    of_outage = F.struct("run_id", "began_at", "restored_at", *PLACES, "meters")
    newest = outages.groupBy("outage_id").agg(F.max_by(of_outage, "revision").alias("last")).select("last.*")
    members = newest.select("run_id", "began_at", "restored_at", *PLACES, F.explode("meters").alias("member_id"))
    failures = (
        alarms.where(F.col("alarm_type") == POWER_FAILURE)
        .groupBy("alarm_id", "meter_id", F.col("run_id").alias("of_run"))
        .agg(F.min("raised_at").alias("down_at"), F.max("cleared_at").alias("up_at"))
    )
    is_of = (
        (F.col("meter_id") == F.col("member_id"))
        & F.col("of_run").eqNullSafe(F.col("run_id"))
        & (F.col("down_at") >= F.col("began_at"))
        & F.coalesce(F.col("down_at") <= F.col("restored_at"), F.lit(True))
    )
    return (
        failures.join(members, is_of)
        .dropDuplicates(["alarm_id"])
        .select("meter_id", *PLACES, "down_at", "up_at")
    )  # fmt: skip


def _served(registry: DataFrame) -> DataFrame:
    """How many meters each group has, by the local days in which they are there: from_day, to_day, meters, limits."""
    limit = F.lit(_seconds(None))
    for jurisdiction in MOMENTARY:
        if jurisdiction is not None:
            limit = F.when(F.col("jurisdiction") == jurisdiction, _seconds(jurisdiction)).otherwise(limit)
    return (
        registry.select(
            _group(),
            _local_day(F.col("valid_from")).alias("from_day"),
            _local_day(F.col("valid_to") - F.expr("interval 1 microsecond")).alias("to_day"),
            limit.alias("limit_s"),
        )
        .select("group.*", "from_day", "to_day", "limit_s")
        .where("group_id is not null")
        .groupBy(*GROUP, "from_day", "to_day")
        .agg(F.count("*").alias("meters"), F.min("limit_s").alias("low_s"), F.max("limit_s").alias("high_s"))
    )


def _limits() -> list[Column]:
    low, high = F.min("low_s"), F.max("high_s")
    return [F.when(low == high, low).cast("long").alias("momentary_limit_s")]


def _seconds(jurisdiction: str | None) -> int:
    return int(momentary_of(jurisdiction).limit.total_seconds())


def _group() -> Column:
    """A row for each level that a row belongs to: group.level, group.group_id."""
    groups = [
        (ReliabilityLevel.TRANSFORMER, F.col("transformer_id")),
        (ReliabilityLevel.FEEDER, F.col("feeder_id")),
        (ReliabilityLevel.FLEET, F.lit(FLEET)),
    ]
    each = [F.struct(F.lit(level.value).alias("level"), name.alias("group_id")) for level, name in groups]
    return F.explode(F.array(*each)).alias("group")


def _local_day(at: Column) -> Column:
    return F.to_date(F.from_utc_timestamp(at, F.coalesce("time_zone", F.lit(DEFAULT_ZONE))))


JOB = BatchJob(
    name=Path(__file__).stem,
    version=1,
    reads={"outages": HISTORY_DAYS, "alarms": HISTORY_DAYS},
    transform=transform,
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
