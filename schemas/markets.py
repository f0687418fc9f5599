"""What markets want of validated intervals: limits and like days, as data (validation/*.csv), and its reader.

A market that the registry does not name, or that has no row, is the one without a name.
"""

import io
from functools import cache
from importlib.resources import files

import polars as pl

RULES = pl.Schema(
    {
        "market": pl.String(),
        "linear_limit_s": pl.Int64(),
        "is_inclusive": pl.Boolean(),
        "like_day_table": pl.String(),
        "like_days": pl.Int64(),
        "spike_factor": pl.Float64(),
        "spike_floor_quanta": pl.Int64(),
        "frozen_run": pl.Int64(),
        "zero_run": pl.Int64(),
    }
)
"""`linear_limit_s`: the longest gap that is filled by a straight line, itself too where `is_inclusive`; `like_days`: so
many of the nearest days before that `like_day_table` allows; spike: (highest − third) / third of a day's intervals is
above `spike_factor`, the highest more than `spike_floor_quanta` of the register; runs are intervals of one value."""
WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@cache
def markets() -> pl.DataFrame:
    """The rules of all markets, columns `RULES`; the first row is that of a market that is not named."""
    text = files("schemas").joinpath("validation", "markets.csv").read_bytes()
    return pl.read_csv(io.BytesIO(text), schema=RULES).with_columns(pl.col("market").fill_null(""))


@cache
def like_days() -> pl.DataFrame:
    """Which days may stand for which: `like_day_table`, `weekday` and `like`, ISO weekdays from 1, Monday."""
    text = files("schemas").joinpath("validation", "like_days.csv").read_bytes()
    number = {name: number for number, name in enumerate(WEEKDAYS, 1)}
    return (
        pl.read_csv(io.BytesIO(text))
        .with_columns(pl.col("like").str.split(" "))
        .explode("like")
        .select(
            like_day_table="table",
            weekday=pl.col("weekday").replace_strict(number, return_dtype=pl.Int8),
            like=pl.col("like").replace_strict(number, return_dtype=pl.Int8),
        )
    )
