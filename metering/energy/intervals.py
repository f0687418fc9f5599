"""Steps of a register → energy per quarter hour, boundaries interpolated and flagged. Pure functions on Polars frames.

The energy of a step is taken as even over its span, so a quarter hour that begins or ends between two readings gets its
share of the step; whole Wh, and the shares of a step sum up to it exactly. A step that is longer than two hours is left
as it is in consumption_deltas: to spread it is an estimate for the night (docs/domain.md, Quarter hours).
"""

from datetime import timedelta
from typing import NamedTuple

import polars as pl

from metering.energy.delta_engine import KEY, STAMP
from schemas.closed_lists import ACCEPTED_DELTAS, DeltaReason, IntervalQuality
from schemas.tables import INTERVAL_READINGS, polars_schema

INTERVAL = timedelta(minutes=15)
INTERVAL_US = INTERVAL // timedelta(microseconds=1)
LONGEST_STEP_US = timedelta(hours=2) // timedelta(microseconds=1)
LARGEST_STEP_WH = 10**9  # more in two hours is no meter's; its product with the span stays a 64-bit number
RANKS = (IntervalQuality.MEASURED, IntervalQuality.INTERPOLATED, IntervalQuality.ESTIMATED)
ROWS = polars_schema(INTERVAL_READINGS)
OPEN = pl.Schema(
    {
        "meter_id": pl.String(),
        "register": pl.String(),
        "interval_start": STAMP,
        "energy_wh": pl.Int64(),
        "covered_us": pl.Int64(),
        "rank": pl.Int64(),
        "run_id": pl.String(),
    }
)
"""State: what is known of the quarter hour that a register's newest reading lies in."""


class QuarterHours(NamedTuple):
    """What `quarter_hours` returns.

    Attributes:
        rows: quarter hours that are over, columns `ROWS`.
        open: the new state, columns `OPEN`: one row a register at most.
    """

    rows: pl.DataFrame
    open: pl.DataFrame


def quarter_hours(steps: pl.DataFrame, open_intervals: pl.DataFrame, baseline: pl.DataFrame) -> QuarterHours:
    """Puts a batch's steps into quarter hours and gives those that are over.

    A quarter hour is over when its register has an accepted reading at its end or later; as accepted readings only go
    forward in time, each is over once.

    Args:
        steps: of `delta_engine.steps`, of any reason.
        open_intervals: the state so far, columns `OPEN`.
        baseline: the last accepted value of each register after the steps, as `delta_engine.steps` gives it.
    """
    # after an exchange the old equipment may come back, and its next step begins where it was last
    newest = pl.when(pl.col("held_segment").is_not_null()).then("held_at").otherwise("previous_at")
    before = open_intervals.join(baseline.select(*KEY, "series"), on=KEY, how="left")
    shares = ["series", "interval_start", "energy_wh", "covered_us", "rank", "run_id"]
    known = (
        pl.concat([before.filter(pl.col("series").is_not_null()).select(shares), _shares(steps).select(shares)])
        .group_by("series", "interval_start", maintain_order=True)
        .agg(pl.col("energy_wh", "covered_us").sum(), pl.col("rank").max(), pl.col("run_id").last())
        .join(baseline.select("series", *KEY, newest_at=newest), on="series", how="left", maintain_order="left")
    )
    untouched = before.filter(pl.col("series").is_null()).select(OPEN.keys())
    is_over = pl.col("interval_start") + INTERVAL <= pl.col("newest_at")
    quality = (
        pl.when(pl.col("covered_us") < INTERVAL_US)
        .then(pl.lit(IntervalQuality.INCOMPLETE.value))
        .otherwise(pl.col("rank").replace_strict(dict(enumerate(RANKS)), return_dtype=pl.String))
    )
    rows = known.filter(is_over).with_columns(
        interval_end=pl.col("interval_start") + INTERVAL, covered_s=pl.col("covered_us") // 1_000_000, quality=quality
    )
    return QuarterHours(
        rows.select(ROWS.keys()).cast(ROWS),
        pl.concat([untouched, known.filter(~is_over).select(OPEN.keys()).cast(OPEN)]),
    )


def _shares(steps: pl.DataFrame) -> pl.DataFrame:
    """What each step gives to each quarter hour that it touches: `OPEN`, with the number of its register."""
    spread = [reason.value for reason in ACCEPTED_DELTAS if reason is not DeltaReason.METER_EXCHANGE]
    begin, end, number = pl.col("begin_us"), pl.col("end_us"), pl.col("number")
    touched = (
        steps.filter(pl.col("reason").is_in(spread) & pl.col("previous_at").is_not_null())
        .select(
            "series", "delta_wh", "reason", "run_id",
            begin_us=pl.col("previous_at").dt.epoch("us"), end_us=pl.col("observed_at").dt.epoch("us"),
        )
        .filter((end - begin <= LONGEST_STEP_US) & (pl.col("delta_wh") <= LARGEST_STEP_WH))
        .with_columns(number=pl.int_ranges(begin // INTERVAL_US, (end - 1) // INTERVAL_US + 1))
        .explode("number")
        .with_columns(
            from_us=pl.max_horizontal(begin, number * INTERVAL_US),
            to_us=pl.min_horizontal(end, (number + 1) * INTERVAL_US),
        )
    )  # fmt: skip
    until = [pl.col("delta_wh") * (pl.col(edge) - begin) // (end - begin) for edge in ("to_us", "from_us")]
    is_cut = (pl.col("to_us") < end) | (pl.col("from_us") > begin)
    is_guess = (pl.col("reason") == DeltaReason.RESET.value) | (is_cut & (pl.col("reason") == DeltaReason.GAP.value))
    rank = pl.when(is_guess).then(2).when(is_cut).then(1).otherwise(0)
    return touched.select(
        series="series",
        interval_start=pl.from_epoch(number * INTERVAL_US, "us").dt.replace_time_zone("UTC"),
        energy_wh=until[0] - until[1],
        covered_us=pl.col("to_us") - pl.col("from_us"),
        rank=rank.cast(pl.Int64),
        run_id="run_id",
    )
