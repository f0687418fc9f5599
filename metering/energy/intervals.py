"""Steps of a register → energy per quarter hour, boundaries interpolated and flagged. Pure functions on Polars frames.

The energy of a step is taken as even over its span, so a quarter hour that begins or ends between two readings gets its
share of the step; whole Wh, and the shares of a step sum up to it exactly. Where a power failure is known, the energy
is even over the time with power: a quarter hour without has none, and that is no guess. A step that has more than two
hours with power is left as it is in consumption_deltas: to spread it is an estimate for the night (docs/domain.md,
Quarter hours).
"""

from datetime import timedelta
from typing import NamedTuple

import polars as pl

from metering.energy.delta_engine import KEY, STAMP, coarse_wh
from schemas.closed_lists import ACCEPTED_DELTAS, DeltaReason, IntervalQuality
from schemas.tables import INTERVAL_READINGS, polars_schema

INTERVAL = timedelta(minutes=15)
INTERVAL_US = INTERVAL // timedelta(microseconds=1)
LONGEST_STEP_US = timedelta(hours=2) // timedelta(microseconds=1)
LONGEST_FAIL_US = timedelta(days=7) // timedelta(microseconds=1)
"""A power failure that is longer is left to the night: quarter hours without end, of a meter that was taken away."""
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
        "powered_us": pl.Int64(),
        "rank": pl.Int64(),
        "run_id": pl.String(),
    }
)
"""State: what is known of the quarter hour that a register's newest reading lies in."""


CLOCKS_US = timedelta(minutes=2) // timedelta(microseconds=1)
"""So far a failure's begin and end may be beyond a reading; so much earlier it may have ended than was told."""
HOUR_US = timedelta(hours=1) // timedelta(microseconds=1)
UNPOWERED = pl.Schema({"step": pl.UInt32(), "down_us": pl.Int64(), "up_us": pl.Int64(), "is_over": pl.Boolean()})
"""When a step's meter had no power, and whether somebody said that it was over."""


class QuarterHours(NamedTuple):
    """What `quarter_hours` returns.

    Attributes:
        rows: quarter hours that are over, columns `ROWS`.
        open: the new state, columns `OPEN`: one row a register at most.
    """

    rows: pl.DataFrame
    open: pl.DataFrame


def quarter_hours(
    steps: pl.DataFrame, open_intervals: pl.DataFrame, baseline: pl.DataFrame, power_fails: pl.DataFrame
) -> QuarterHours:
    """Puts a batch's steps into quarter hours and gives those that are over.

    A quarter hour is over when its register has an accepted reading at its end or later; as accepted readings only go
    forward in time, each is over once.

    Args:
        steps: of `delta_engine.steps`, of any reason.
        open_intervals: the state so far, columns `OPEN`.
        baseline: the last accepted value of each register after the steps, as `delta_engine.steps` gives it.
        power_fails: of `metering.alarms.power_fails.power_fails`, of the meters of the steps: when they had no power;
            and `max_w`, null where nobody knows: a failure that leaves the rise of the register no time is none.
    """
    # after an exchange the old equipment may come back, and its next step begins where it was last
    newest = pl.when(pl.col("held_segment").is_not_null()).then("held_at").otherwise("previous_at")
    before = open_intervals.join(baseline.select(*KEY, "series"), on=KEY, how="left")
    new = shares(pieces(steps, power_fails, pl.lit(INTERVAL_US), LONGEST_STEP_US))
    known = (
        pl.concat([before.filter(pl.col("series").is_not_null()).select(new.columns), new])
        .group_by("series", "interval_start", maintain_order=True)
        .agg(pl.col("energy_wh", "covered_us", "powered_us").sum(), pl.col("rank").max(), pl.col("run_id").last())
        .join(baseline.select("series", *KEY, newest_at=newest), on="series", how="left", maintain_order="left")
    )
    untouched = before.filter(pl.col("series").is_null()).select(OPEN.keys())
    is_over = pl.col("interval_start") + INTERVAL <= pl.col("newest_at")
    quality = (
        pl.when(pl.col("covered_us") < INTERVAL_US)
        .then(pl.lit(IntervalQuality.INCOMPLETE.value))
        .when(pl.col("powered_us") == 0)
        .then(pl.lit(IntervalQuality.POWER_FAIL.value))
        .otherwise(pl.col("rank").replace_strict(dict(enumerate(RANKS)), return_dtype=pl.String))
    )
    rows = known.filter(is_over).with_columns(
        interval_end=pl.col("interval_start") + INTERVAL, covered_s=pl.col("covered_us") // 1_000_000, quality=quality
    )
    return QuarterHours(
        rows.select(ROWS.keys()).cast(ROWS),
        pl.concat([untouched, known.filter(~is_over).select(OPEN.keys()).cast(OPEN)]),
    )


def pieces(
    steps: pl.DataFrame, power_fails: pl.DataFrame, length_us: pl.Expr, longest_us: int, *kept: str
) -> pl.DataFrame:
    """Steps, cut at the edges of intervals.

    Args:
        steps: of `delta_engine.steps`, of any reason.
        power_fails: see `quarter_hours`.
        length_us: of an interval, microseconds.
        longest_us: steps with more time with power are left out.
        kept: further columns of the steps.

    Returns:
        A row per step and interval that it touches: `step`, its columns, `number` of the interval since 1970, `from_us`
        and `to_us`; `powered_before` and `powered_until`, how much of the step's time with power, `powered_us`, there
        is before and up to the piece's end; and `rank`, what the piece is worth (`RANKS`).
    """
    spread = [reason.value for reason in ACCEPTED_DELTAS if reason is not DeltaReason.METER_EXCHANGE]
    begin, end, number = pl.col("begin_us"), pl.col("end_us"), pl.col("number")
    whole = (
        steps.filter(pl.col("reason").is_in(spread) & pl.col("previous_at").is_not_null())
        .select(
            "meter_id", "series", "previous_wh", "wh", "delta_wh", "reason", "run_id", *kept,
            begin_us=pl.col("previous_at").dt.epoch("us"), end_us=pl.col("observed_at").dt.epoch("us"),
            length_us=length_us,
        )
        .with_row_index("step")
    )  # fmt: skip
    length = pl.col("length_us")
    unpowered = _unpowered(whole, power_fails)
    touched = (
        _with_unpowered(whole, unpowered, end, "unpowered_us")
        .with_columns(powered_us=end - begin - pl.col("unpowered_us"))
        .filter(
            (pl.col("powered_us") <= longest_us)
            & (pl.col("unpowered_us") <= LONGEST_FAIL_US)
            & (pl.col("delta_wh") <= LARGEST_STEP_WH)
        )
        .with_columns(number=pl.int_ranges(begin // length, (end - 1) // length + 1))
        .explode("number")
        .with_columns(
            from_us=pl.max_horizontal(begin, number * length),
            to_us=pl.min_horizontal(end, (number + 1) * length),
        )
    )
    cut = touched
    for edge in ("from", "to"):
        cut = _with_unpowered(cut, unpowered, pl.col(f"{edge}_us"), f"unpowered_{edge}_us")
    before, to = (pl.col(f"{edge}_us") - begin - pl.col(f"unpowered_{edge}_us") for edge in ("from", "to"))
    is_cut = (to < pl.col("powered_us")) | (before > 0)
    is_explained = pl.col("powered_us") <= pl.min_horizontal(pl.col("unpowered_us"), length)
    is_gap = (pl.col("reason") == DeltaReason.GAP.value) & ~is_explained
    endless = unpowered.filter(~pl.col("is_over")).get_column("step").unique()
    is_guess = (
        (pl.col("reason") == DeltaReason.RESET.value) | (is_cut & is_gap) | pl.col("step").is_in(endless.implode())
    )
    rank = pl.when(to == before).then(0).when(is_guess).then(2).when(is_cut).then(1).otherwise(0)
    return cut.with_columns(powered_before=before, powered_until=to, rank=rank.cast(pl.Int64))


def shares(pieces: pl.DataFrame) -> pl.DataFrame:
    """What steps give to the intervals that they touch, even over their time with power: a row a piece.

    Args:
        pieces: of `pieces`.
    """
    until = [pl.col("delta_wh") * pl.col(name) // pl.col("powered_us") for name in ("powered_until", "powered_before")]
    return pieces.select(
        series="series",
        interval_start=pl.from_epoch(pl.col("number") * pl.col("length_us"), "us").dt.replace_time_zone("UTC"),
        energy_wh=until[0] - until[1],
        covered_us=pl.col("to_us") - pl.col("from_us"),
        powered_us=pl.col("powered_until") - pl.col("powered_before"),
        rank="rank",
        run_id="run_id",
    )


def _unpowered(steps: pl.DataFrame, power_fails: pl.DataFrame) -> pl.DataFrame:
    """When the meters of steps had no power within them: columns `UNPOWERED`.

    A reading says that there was power: a failure lies within the step in which it begins, but for clocks two minutes
    apart. One whose end nobody said, or said only of a later one, counts up to the end of a short gap. Where the
    register's rise needs more time with power than is left, by the connection's limit, the last failure ended earlier.
    """
    if steps.is_empty() or power_fails.is_empty():
        return UNPOWERED.to_frame()
    earliest = pl.lit(steps.get_column("begin_us")).min() - CLOCKS_US
    begun = power_fails.filter(pl.col("down_at").dt.epoch("us") >= earliest)
    down, up = pl.col("down_at").dt.epoch("us"), pl.col("up_at").dt.epoch("us")
    begin, end = pl.col("begin_us"), pl.col("end_us")
    is_over = (up <= end + CLOCKS_US).fill_null(False)
    is_short_gap = (pl.col("reason") == DeltaReason.GAP.value) & (end - begin <= LONGEST_STEP_US)
    within = pl.col("down_us").filter(pl.col("down_us") >= begin).min()
    rise = pl.col("delta_wh") - coarse_wh(pl.col("previous_wh"), pl.col("wh")) + 1
    need_us = pl.when(pl.col("max_w") > 0).then(rise.cast(pl.Float64) * HOUR_US / pl.col("max_w")).ceil().fill_null(0)
    gone_us = (pl.col("up_us") - pl.col("down_us")).sum().over("step")
    short_us = (pl.col("need_us") - (end - begin - gone_us)).clip(0)
    is_last = pl.col("up_us") == pl.col("up_us").max().over("step")
    earlier = pl.col("up_us") - pl.when(is_last).then("short_us").otherwise(0).cast(pl.Int64)
    by_step = ["step", "begin_us", "end_us", "need_us"]
    crossed = steps.join(begun, on="meter_id").filter(
        down < end, (is_over & (down >= begin - CLOCKS_US) & (up > begin)) | (is_short_gap & (down >= begin))
    )
    up_us = pl.when(is_over).then(pl.min_horizontal(up, end - 1)).otherwise(end - 1)
    return (
        crossed.with_columns(down_us=down, up_us=up_us, need_us=need_us, is_over=is_over)
        .group_by(*by_step, "up_us")
        .agg(within.fill_null(begin.first()), pl.col("is_over").all())
        .filter(pl.col("down_us") < pl.col("up_us"))
        .with_columns(short_us=short_us)
        .filter((pl.col("short_us") <= CLOCKS_US) | ~pl.col("is_over").all().over("step"))
        .with_columns(up_us=earlier)
        .filter(pl.col("down_us") < pl.col("up_us"))
        .select(UNPOWERED.keys())
    )


def _with_unpowered(rows: pl.DataFrame, unpowered: pl.DataFrame, until: pl.Expr, name: str) -> pl.DataFrame:
    """Rows with how much of their step, up to a time, was without power, microseconds."""
    if unpowered.is_empty():
        return rows.with_columns(pl.lit(0, pl.Int64).alias(name))
    numbered = rows.with_row_index("row")
    gone = pl.min_horizontal("up_us", "until_us") - pl.col("down_us")
    sums = (
        numbered.select("row", "step", until_us=until)
        .join(unpowered, on="step")
        .group_by("row")
        .agg(gone.clip(0).sum().alias(name))
    )
    return numbered.join(sums, on="row", how="left", maintain_order="left").with_columns(
        pl.col(name).fill_null(0)
    ).drop("row")  # fmt: skip
