"""Clocks: which time of a meter cannot be, and which days a local day touches."""

from datetime import date, timedelta

import polars as pl
import pyarrow as pa

STAMP = pl.Datetime("us", "UTC")
FEW_RUNS = 8  # so many comparisons are cheaper than a look-up


def is_impossible(max_ahead_s: int, max_behind_s: int) -> pl.Expr:
    """True where the meter's clock cannot be right against the arrival: 1970, 2099."""
    ahead_us = pl.col("observed_at").dt.epoch("us") - pl.col("arrival_at").dt.epoch("us")
    return (ahead_us > max_ahead_s * 1_000_000) | (ahead_us < -max_behind_s * 1_000_000)


def watermark_of(watermarks: pl.DataFrame) -> pl.Expr:
    """The watermark of a row's run_id; null where its run has none.

    Args:
        watermarks: run_id, watermark.
    """
    known = watermarks.select("run_id", "watermark").drop_nulls("watermark")
    runs, ends = (known.get_column(name).to_list() for name in known.columns)
    if len(runs) > FEW_RUNS:
        return pl.col("run_id").replace_strict(runs, ends, default=None, return_dtype=STAMP)
    found = pl.lit(None, STAMP)
    for run_id, end in zip(runs, ends, strict=True):
        found = (
            pl.when(pl.col("run_id").eq_missing(pl.lit(run_id, pl.String))).then(pl.lit(end, STAMP)).otherwise(found)
        )
    return found


def is_read_in_day(at: str = "observed_at") -> pl.Expr:
    """True where a reading ends a time of the local day: after its `day_start`, its `day_end` included."""
    return (pl.col(at) > pl.col("day_start")) & (pl.col(at) <= pl.col("day_end"))


def is_begun_in_day(at: pl.Expr) -> pl.Expr:
    """True where something began in the local day: its `day_start` included, its `day_end` not."""
    return (at >= pl.col("day_start")) & (at < pl.col("day_end"))


def busiest_day(stamps: pa.ChunkedArray, time_zone: str) -> date:
    """The local day with the most of these times; the first of equals."""
    local = pl.Series("at", stamps).dt.convert_time_zone(time_zone).dt.date()
    counts = local.value_counts().sort("count", "at", descending=[True, False])
    day: date = counts.get_column("at")[0]
    return day


def utc_days(local_day: date) -> list[date]:
    """The UTC days that a local day anywhere on earth can touch."""
    return [local_day + timedelta(days=shift) for shift in (-1, 0, 1)]


def event_at(max_ahead_s: int, max_behind_s: int) -> pl.Expr:
    """When an event was: by the meter's clock, or the arrival where that is impossible; see `is_impossible`."""
    is_wrong = is_impossible(max_ahead_s, max_behind_s)
    return pl.when(is_wrong).then("arrival_at").otherwise("observed_at").alias("event_at")
