"""What each member of a community took, gave and got of the others, slot by slot: a row that explains itself.

Reads: validated_intervals_v1 of the day, and of those before and after it where a community and a member are of other
zones: then a date is whole when it is run again a night later; communities, community_members and community_keys,
whole. The day is of the community's time zone.
Writes: energy_sharing_v1, a row per community, member and slot (a quarter hour; an hour in Spain and Italy). A member
that joins in mid-day has rows from then on.
Key: community_id, meter_id, slot_start, date.
Energy: by the community's model (docs/domain.md, Energy sharing), in whole Wh. `metered_wh` is what the meter took,
`consumption_wh` and `surplus_wh` the part that takes part, `ideal_share_wh` what the first round offers, which may be
above it; `covered_wh` is what it gets, by producer in `sources`, which add up to it in the same row, so that a row
needs no other to be checked; `own_coverage_wh` is the part of it that is its own. consumption = covered + residual,
surplus = sold + feed-in. `operator_…_kwh` are the values as Austria's operators round them, null in other models.
`tariff` is that of most of the import.
Quality: `missing`, an energy that the meter has on the day is not known in the slot: null, it takes part with nothing,
and `missing_members` counts those, since all shares of the slot depend on them · `incomplete`, a part of it is not
there · `estimated`, a part of it is interpolated or estimated · `measured`.
Lateness: run the date again after its validated intervals.
Duplicates: validated intervals have none.
Restart: run it again; the date is replaced as a whole.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path

import polars as pl
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from engine.night import BatchJob, is_begun_in_day, midnight, per_community, quarters
from engine.night_run import command
from metering.sharing.settlement import settle
from schemas.tables import REPORTS

INTERVALS = "validated_intervals_v1"
REPORT = "energy_sharing_v1"


def shared(intervals: pl.DataFrame, declared: pl.DataFrame) -> pl.DataFrame:
    """A community's day; see the module.

    Args:
        intervals: quarter hours of its members.
        declared: its one row: communities, members and keys as lists, day_start and day_end.
    """
    (row,) = declared.to_dicts()
    day = row["day_start"], row["day_end"]
    return settle(intervals, row["communities"], row["members"] or [], row["keys"] or [], day)


def transform(lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
    """Every community's day; see the module."""
    tomorrow = date + datetime.timedelta(days=1)
    communities = lake["communities"].groupBy("community_id").agg(
        F.collect_list(F.struct(*lake["communities"].columns)).alias("communities"),
        midnight(date, F.max("time_zone")).alias("day_start"),
        midnight(tomorrow, F.max("time_zone")).alias("day_end"),
    )  # fmt: skip
    declared = communities
    for name in ("members", "keys"):
        table = lake[f"community_{name}"]
        lists = table.groupBy("community_id").agg(F.collect_list(F.struct(*table.columns)).alias(name))
        declared = declared.join(lists, "community_id", "left")
    days = communities.select("community_id", "day_start", "day_end")
    meters = lake["community_members"].select("community_id", "meter_id").distinct().join(days, "community_id")
    intervals = (
        quarters(lake[INTERVALS])
        .join(F.broadcast(meters), "meter_id")
        .where(is_begun_in_day("interval_start"))
        .select("community_id", "meter_id", "register", "interval_start", "energy_wh", "quality")
    )
    return per_community(intervals, declared, shared, REPORTS[REPORT])


JOB = BatchJob(
    name=Path(__file__).stem,
    version=1,
    reads={INTERVALS: 1, "communities": None, "community_members": None, "community_keys": None},
    transform=transform,
    reads_after={INTERVALS: 1},
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
