"""What a member's day in its community costs and earns: Wh by flow and by source, money in cents.

Reads: energy_sharing_v1 of the local month up to the day; communities (currency, time zone) and community_prices,
whole.
Writes: community_bills_v1, a row per community and member with slots on the day.
Key: community_id, meter_id, date.
Money: Wh times the price of its flow and tariff that is valid when the slot begins; exact inside, cents rounded down
with carry from the begin of the month, so the days of a month add up to its money rounded down. `balance_cents` is sold
and feed-in less covered and residual. Null where energy of the month so far has no price. In Spain what is fed in earns
at most what the residual of the month so far costs.
Lateness: run the days of the month from the changed one on again, in order: the carry goes through them.
Duplicates: energy_sharing_v1 has a slot once.
Restart: run it again; the date is replaced as a whole.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path

import polars as pl
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from engine.night import BatchJob, midnight, per_community
from engine.night_run import command
from metering.sharing.money import bills
from schemas.tables import REPORTS

SOURCE, REPORT = "energy_sharing_v1", "community_bills_v1"
DAYS_BEFORE = 30
"""The longest month."""


def billed(shared: pl.DataFrame, declared: pl.DataFrame) -> pl.DataFrame:
    """A community's bills; see the module.

    Args:
        shared: its rows of the month.
        declared: its one row: prices as a list, currency, month_start and day_start.
    """
    (row,) = declared.to_dicts()
    of_month = shared.filter(pl.col("day_start").is_between(row["month_start"], row["day_start"]))
    return bills(of_month, row["prices"] or [], row["currency"], row["day_start"])


def transform(lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
    """Every community's bills of a day; see the module."""
    zone, prices = F.max("time_zone"), lake["community_prices"]
    declared = (
        lake["communities"]
        .groupBy("community_id")
        .agg(
            F.max_by("currency", F.coalesce(F.unix_seconds("valid_from"), F.lit(-(2**62)))).alias("currency"),
            midnight(date.replace(day=1), zone).alias("month_start"),
            midnight(date, zone).alias("day_start"),
        )
        .join(
            prices.groupBy("community_id").agg(F.collect_list(F.struct(*prices.columns)).alias("prices")),
            "community_id",
            "left",
        )
    )
    return per_community(lake[SOURCE], declared, billed, REPORTS[REPORT])


JOB = BatchJob(
    name=Path(__file__).stem,
    version=1,
    reads={SOURCE: DAYS_BEFORE, "communities": None, "community_prices": None},
    transform=transform,
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
