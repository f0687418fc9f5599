"""The readings that a local day's energy is made of: near it all, further away what tells where it begins.

A day alone does not say where its registers stood at midnight, nor whether a wild value there is one.
"""

import datetime
from collections.abc import Mapping

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from engine.night import with_local_day
from metering.clocks import utc_days
from schemas import tables
from schemas.closed_lists import DeltaReason

KNOWN = ["phases", "nominal_mv", "fuse_a", "default_fuse_a", "jurisdiction", "is_unlimited", "wraps_wh", "interval_s"]
"""Columns of the registry by which steps are judged."""
REGISTERS_WH = [f"{register}_wh" for register in tables.REGISTERS]
VALUES = [*REGISTERS_WH, "equipment_id"]
DAYS_BEFORE = 7
"""How far back readings are looked for; of a meter that was silent for longer the stream's step knows the value."""
EDGE_S, EDGE_INTERVALS, LONGEST_EDGE_S = 3 * 3600, 4, 12 * 3600
"""Before and after the day so many seconds and expected intervals are read whole, so that a wild value at midnight is
seen from both sides."""


def readings_around(lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date, *known: str) -> DataFrame:
    """Readings of a local day, all that are near, and of each further UTC day the last before and the first after it.

    Args:
        lake: readings, of the days before the date and, where they matter, after it; consumption_deltas of the date.
        registry: one row per meter.
        date: the local day.
        known: further columns of the registry.

    Returns:
        Columns of the reading that steps need, `KNOWN`, `known`, day_start and day_end.
    """
    columns = ["meter_id", "observed_at", "run_id", "dialect", "topic", "partition", "offset", *VALUES]
    of_registry = [*KNOWN, *known]
    readings = with_local_day(lake["readings"], registry, date, *of_registry)
    readings = readings.select(*columns, *of_registry, "day_start", "day_end")
    intervals_s = F.coalesce(F.col("interval_s") * EDGE_INTERVALS, F.lit(0))
    edge_s = F.least(F.greatest(F.lit(EDGE_S), intervals_s), F.lit(LONGEST_EDGE_S))
    edge = F.make_dt_interval(secs=edge_s.cast("decimal(18,6)"))
    evening, morning = F.col("day_start") - edge, F.col("day_end") + edge
    before, after = utc_days(date)[0] - datetime.timedelta(days=1), utc_days(date)[-1] + datetime.timedelta(days=2)
    earliest, latest = (F.lit(day.isoformat()).cast("timestamp") for day in (before, after))  # files are skipped
    at = F.col("observed_at")
    near = readings.where((at >= earliest) & (at < latest)).where((at > evening) & (at <= morning))
    older = _edge_of_each_day(readings.where(at <= evening), is_last=True)
    later = _edge_of_each_day(readings.where(at > morning), is_last=False)
    there = older.groupBy("meter_id").agg(*[F.max(name).isNotNull().alias(f"has_{name}") for name in REGISTERS_WH])
    oldest = with_local_day(_from_long_ago(lake["consumption_deltas"]), registry, date, *of_registry)
    unknown = {name: F.when(~F.coalesce(f"has_{name}", F.lit(False)), F.col(name)) for name in REGISTERS_WH}
    long_ago = (
        oldest.where(at <= F.col("day_start") - edge)
        .join(there, "meter_id", "left")
        .withColumns(unknown)
        .where(F.coalesce(*REGISTERS_WH).isNotNull())
    )
    return near.unionByName(older).unionByName(later).unionByName(long_ago.select(*near.columns))


def _edge_of_each_day(readings: DataFrame, is_last: bool) -> DataFrame:
    """The last, or first, reading with each register per meter and UTC day: enough, also where one is wild."""
    at = F.col("observed_at") if is_last else -F.unix_micros("observed_at")
    newest = F.struct(at, -F.col("partition"), -F.col("offset"))  # of duplicates the first received
    edges = [F.max_by(F.struct(*readings.columns), F.when(F.col(name).isNotNull(), newest)) for name in REGISTERS_WH]
    return (
        readings.where(F.coalesce(*REGISTERS_WH).isNotNull())
        .groupBy("meter_id", F.to_date("observed_at"))
        .agg(F.array_distinct(F.array_compact(F.array(*edges))).alias("edge"))
        .select(F.explode("edge").alias("edge"))
        .select("edge.*")
    )


def _from_long_ago(steps: DataFrame) -> DataFrame:
    """Where the steps of a day began, as readings: the last accepted values of registers, however old."""
    goes_on = [DeltaReason.OK.value, DeltaReason.GAP.value, DeltaReason.ROLLOVER.value]
    values = {f"{register}_wh": F.max(F.when(F.col("register") == register, F.col("previous_wh")))
              for register in tables.REGISTERS}  # fmt: skip
    began = steps.where(F.col("reason").isin(goes_on)).groupBy("meter_id", F.col("previous_at").alias("observed_at"))
    nothing = {name: F.lit(None).cast("string") for name in ("run_id", "dialect", "equipment_id")}
    place = {"topic": F.lit(""), "partition": F.lit(-1).cast("long"), "offset": F.lit(-1).cast("long")}
    return began.agg(*[value.alias(name) for name, value in values.items()]).withColumns({**nothing, **place})
