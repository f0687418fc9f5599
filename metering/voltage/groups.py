"""Voltage of meters that hang together: roll-ups per transformer and feeder, and meters out of step with the others.

Pure functions over Polars frames. Meters under one transformer move together, with a correlation of 0.9 and more
(docs/domain.md, Voltage); one that does not has a wrong place in the registry, a wrong phase, or a measurement that
cannot be trusted. It is found by the correlation of its ten-minute means with the median of its transformer's on the
same phase, over about a day: means and products with a weight that fades, so that a phase's state is a few numbers.
"""

from datetime import datetime
from typing import NamedTuple

import polars as pl

from metering.energy.delta_engine import STAMP
from schemas.closed_lists import GridLevel
from schemas.tables import SUSPICIOUS_METERS, VOLTAGE_ROLLUPS, polars_schema

ROLLUPS = polars_schema(VOLTAGE_ROLLUPS)
SUSPICIOUS = polars_schema(SUSPICIOUS_METERS)
FEWEST_METERS = 4  # below, one meter makes the median
FEWEST_WINDOWS = 36  # six hours
MEMORY_WINDOWS = 144  # a day
OUT_OF_STEP, IN_STEP = 0.5, 0.6  # below, above: far from the 0.9 of neighbours, and apart so that nobody flickers
STILL_PCT2 = 1e-6  # variance of a voltage that does not move, %²
MOVEMENT = pl.Schema(
    {
        "meter_id": pl.String(),
        "phase": pl.String(),
        "group": pl.String(),
        "window_count": pl.Int64(),
        "mean_pct": pl.Float64(),
        "group_mean_pct": pl.Float64(),
        "var_pct2": pl.Float64(),
        "group_var_pct2": pl.Float64(),
        "cov_pct2": pl.Float64(),
        "is_suspicious": pl.Boolean(),
    }
)
"""State: how a meter's phase moved, and how the median of its transformer did."""
OF = ["level", "group_id", "phase", "window_start", "run_id"]


class Rollups(NamedTuple):
    """What `roll_up` returns.

    Attributes:
        rollups: one row per group, phase and window, columns `ROLLUPS`.
        suspicious: one row per meter and phase that begins or ceases to be out of step, columns `SUSPICIOUS`.
        movement: the new state, columns `MOVEMENT`.
    """

    rollups: pl.DataFrame
    suspicious: pl.DataFrame
    movement: pl.DataFrame


def roll_up(windows: pl.DataFrame, movement: pl.DataFrame) -> Rollups:
    """Sums windows up by group and follows how each meter moves with its transformer.

    Args:
        windows: columns of voltage_windows, each once per group that its meter belongs to: `level` (GridLevel),
            `group_id`, `group` (both in one name).
        movement: the state so far, columns `MOVEMENT`.
    """
    changes = [pl.DataFrame(schema=SUSPICIOUS)]
    is_judged = pl.col("deviation_pct").is_not_null()
    under = windows.filter(is_judged & (pl.col("level") == GridLevel.TRANSFORMER.value))
    for start in sorted(under.get_column("window_start").unique()):
        after = _after(under.filter(pl.col("window_start") == start), movement)
        changes.append(_changes(after, start))
        states = after.select(MOVEMENT.keys()).cast(MOVEMENT)
        movement = pl.concat([movement.join(states, on=["meter_id", "phase"], how="anti"), states])
    return Rollups(rollups(windows), pl.concat(changes), movement)


def rollups(windows: pl.DataFrame) -> pl.DataFrame:
    """One row per group, phase, window and run; see `roll_up`."""
    low, high = pl.col("min_mv").min(), pl.col("max_mv").max()
    # a mean is of sorted values and rounded: the same in whatever order and batch they come
    return (
        windows.group_by(OF)
        .agg(
            window_end=pl.col("window_end").first(),
            meter_count=pl.col("meter_id").n_unique(),
            sample_count=pl.col("sample_count").sum(),
            mean_mv=pl.col("mean_mv").mean().round(0),
            min_mv=low,
            min_meter_id=pl.col("meter_id").filter(pl.col("min_mv") == low).min(),
            max_mv=high,
            max_meter_id=pl.col("meter_id").filter(pl.col("max_mv") == high).min(),
            deviation_pct=pl.col("deviation_pct").sort().mean().round(9),
            low_count=pl.col("band").is_in(["low", "very_low"]).sum(),
            high_count=pl.col("band").is_in(["high", "very_high"]).sum(),
        )
        .select(ROLLUPS.keys())
        .cast(ROLLUPS)
        .sort(OF)
    )


def _after(windows: pl.DataFrame, movement: pl.DataFrame) -> pl.DataFrame:
    """The state after one window of all meters of large enough groups, with `was_suspicious` and `correlation`."""
    beside = ["group", "phase", "run_id"]
    of_one = (
        windows.with_columns(group_pct=pl.col("deviation_pct").median().over(beside), meter_count=pl.len().over(beside))
        .filter(pl.col("meter_count") >= FEWEST_METERS)
        .unique(["meter_id", "phase"], keep="last", maintain_order=True)
        .select("meter_id", "phase", "group", "group_id", "run_id", "deviation_pct", "group_pct")
        .join(movement.rename({"group": "group_before"}), on=["meter_id", "phase"], how="left")
    )
    is_new = pl.col("group").ne_missing(pl.col("group_before"))  # under another transformer it begins anew
    numbers = [name for name, kind in MOVEMENT.items() if kind.is_numeric()]
    kept = of_one.with_columns(
        *[pl.when(is_new).then(0).otherwise(pl.col(name)).alias(name) for name in numbers],
        was_suspicious=~is_new & pl.col("is_suspicious").fill_null(False),
    ).with_columns(window_count=pl.col("window_count") + 1)
    weight = pl.max_horizontal(1 / pl.col("window_count"), pl.lit(1 / MEMORY_WINDOWS))
    own, others = pl.col("deviation_pct") - pl.col("mean_pct"), pl.col("group_pct") - pl.col("group_mean_pct")
    after = kept.with_columns(
        mean_pct=pl.col("mean_pct") + weight * own,
        group_mean_pct=pl.col("group_mean_pct") + weight * others,
        var_pct2=(1 - weight) * (pl.col("var_pct2") + weight * own**2),
        group_var_pct2=(1 - weight) * (pl.col("group_var_pct2") + weight * others**2),
        cov_pct2=(1 - weight) * (pl.col("cov_pct2") + weight * own * others),
    )
    correlation = (
        pl.when(pl.col("group_var_pct2") <= STILL_PCT2)
        .then(None)  # nothing moves: nothing can be said
        .when(pl.col("var_pct2") <= STILL_PCT2)
        .then(0.0)
        .otherwise(pl.col("cov_pct2") / (pl.col("var_pct2") * pl.col("group_var_pct2")).sqrt())
    )
    is_out = pl.when("was_suspicious").then(pl.col("correlation") <= IN_STEP).otherwise(
        pl.col("correlation") < OUT_OF_STEP
    )  # fmt: skip
    is_told = (pl.col("window_count") >= FEWEST_WINDOWS) & pl.col("correlation").is_not_null()
    return after.with_columns(correlation=correlation).with_columns(
        is_suspicious=pl.when(is_told).then(is_out).otherwise("was_suspicious")
    )


def _changes(after: pl.DataFrame, start: datetime) -> pl.DataFrame:
    return (
        after.filter(pl.col("is_suspicious") != pl.col("was_suspicious"))
        .with_columns(
            window_start=pl.lit(start, STAMP),
            transformer_id="group_id",
            offset_pct=pl.col("mean_pct") - pl.col("group_mean_pct"),
        )
        .select(SUSPICIOUS.keys())
        .cast(SUSPICIOUS)
    )
