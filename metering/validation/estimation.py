"""Gaps → energy per interval: a straight line, like days, else even; scaled to the register. Pure functions.

A gap is a step of a register that touches intervals of which nobody read the ends. Its energy is known, what is not is
when it flowed: an estimate says that, and is scaled so that the intervals sum up to the step exactly, in Wh by largest
remainder. What no step covers, since no reading has come after it, is estimated by like days alone: it is in no
register, and says so.
"""

import polars as pl

from schemas.closed_lists import EstimationMethod
from schemas.markets import like_days

SLOT = ["series", "interval_start"]
REFERENCE_DAYS = 28
"""So far before a gap's first day like days are looked for: the same for all its intervals, whichever night asks."""
REFERENCES = pl.Schema({"series": pl.UInt32(), "local": pl.Datetime("us"), "energy_wh": pl.Int64()})
"""Intervals of which the energy was read, by the local time of their begin."""


def like_means(slots: pl.DataFrame, references: pl.DataFrame) -> pl.DataFrame:
    """What intervals took on like days, as a mean.

    Args:
        slots: series, local (of the begin), gap_local (of the gap's begin), like_day_table and like_days.
        references: columns `REFERENCES`.

    Returns:
        The slots with `like_wh`; null where there is no like day.
    """
    day, clock = pl.col("local").dt.date(), pl.col("local").dt.time()
    gap_day = pl.col("gap_local").dt.date()
    known = references.select("series", "energy_wh", clock=clock, like_day=day, like=pl.col("local").dt.weekday())
    asked = slots.with_row_index("slot").with_columns(clock=clock, weekday=pl.col("local").dt.weekday())
    means = (
        asked.select("slot", "series", "clock", "weekday", "gap_local", "like_day_table", "like_days")
        .join(like_days(), on=["like_day_table", "weekday"])
        .join(known, on=["series", "clock", "like"])
        .filter((pl.col("like_day") < gap_day) & (pl.col("like_day") >= gap_day - pl.duration(days=REFERENCE_DAYS)))
        .sort("slot", "like_day", descending=[False, True])
        .filter(pl.col("like_day").rank("dense", descending=True).over("slot") <= pl.col("like_days"))
        .group_by("slot")
        .agg(like_wh=pl.col("energy_wh").mean())
    )
    return asked.join(means, on="slot", how="left", maintain_order="left").drop("slot", "clock", "weekday")


def spread(pieces: pl.DataFrame, ends: pl.DataFrame, references: pl.DataFrame) -> pl.DataFrame:
    """The energy of gaps, by interval.

    Args:
        pieces: of gaps, `metering.energy.intervals.pieces`, with local, gap_local and the rules of the market.
        ends: intervals that a line may begin or end at, series, interval_start, energy_wh: read at both ends, and no
            time without power.
        references: columns `REFERENCES`.

    Returns:
        The pieces with `energy_wh` and `method` (`EstimationMethod`).
    """
    length, first = pl.col("length_us"), pl.col("number").min().over("step")
    last = pl.col("number").max().over("step")
    at = [pl.from_epoch(each * length, "us").dt.replace_time_zone("UTC") for each in (first - 1, last + 1)]
    placed = pieces.with_columns(before_at=at[0], after_at=at[1], place=pl.col("number") - first + 1)
    known = like_means(placed, references)
    for name in ("before", "after"):
        there = {f"{name}_at": pl.col("interval_start"), f"{name}_wh": pl.col("energy_wh")}
        known = known.join(
            ends.select("series", **there),
            on=["series", f"{name}_at"],
            how="left",
            maintain_order="left",
        )
    limit_us, span_us = pl.col("linear_limit_s") * 1_000_000, pl.col("end_us") - pl.col("begin_us")
    is_short = pl.when("is_inclusive").then(span_us <= limit_us).otherwise(span_us < limit_us)
    is_line = is_short & pl.col("before_wh").is_not_null() & pl.col("after_wh").is_not_null()
    count = pl.col("number").n_unique().over("step")
    line = pl.col("before_wh") + (pl.col("after_wh") - pl.col("before_wh")) * pl.col("place") / (count + 1)
    alike = pl.coalesce("like_wh", pl.col("like_wh").mean().over("step"))
    method = (
        pl.when(is_line)
        .then(pl.lit(EstimationMethod.LINEAR.value))
        .when(alike.is_not_null())
        .then(pl.lit(EstimationMethod.LIKE_DAY.value))
        .otherwise(pl.lit(EstimationMethod.EVEN.value))
    )
    powered = pl.col("powered_until") - pl.col("powered_before")
    shape = pl.when(is_line).then(line).otherwise(alike).fill_null(1.0) * powered
    weighed = known.with_columns(method=method, weight=shape).with_columns(
        weight=pl.when(pl.col("weight").sum().over("step") > 0)
        .then("weight")
        .when(powered.sum().over("step") > 0)
        .then(powered.cast(pl.Float64))
        .otherwise((pl.col("to_us") - pl.col("from_us")).cast(pl.Float64))
    )
    return weighed.with_columns(energy_wh=largest_remainder("delta_wh", "weight", "step", "number"))


def largest_remainder(total: str, weight: str, group: str, tie: str) -> pl.Expr:
    """Whole parts of a whole total by weight, that sum up to it exactly; of equal remainders the first by `tie`.

    Args:
        total: column of the total, the same in each row of a group.
        weight: column, 0 or more, not 0 for a whole group.
        group: column.
        tie: column.
    """
    exact = pl.col(total) * pl.col(weight) / pl.col(weight).sum().over(group)
    base = exact.floor().cast(pl.Int64)
    left = pl.col(total) - base.sum().over(group)
    rank = pl.struct((base - exact).round(9), pl.col(tie)).rank("ordinal").over(group)
    return base + (rank.cast(pl.Int64) <= left).cast(pl.Int64)
