"""Voltage samples → 10-minute windows per meter and phase, with deviation and band. Pure functions over Polars frames.

`windows` says what a window holds, for the stream and the night; `advance` says when a window is over, for the stream.

deviation % = (V − Vn) / Vn × 100 with Vn per meter, each phase on its own (domain reference, section 4).
"""

from datetime import timedelta
from typing import NamedTuple

import polars as pl

from lake.delta_engine import BUCKETS
from lake.seen_before import PLACE, is_recent, with_seen
from schemas.closed_lists import Band, Bucket, DeltaReason
from schemas.tables import PHASES, VOLTAGE_WINDOWS, polars_schema

WINDOW = timedelta(minutes=10)  # EN 50160 judges means over ten minutes
NOMINAL_MV = 230_000  # where the registry has none: European low voltage
JURISDICTION = "EN50160"  # where the registry has none, or one that BANDS does not know

BANDS = pl.DataFrame(
    [
        # jurisdiction, limits in % deviation: beyond the outer is very low / very high, beyond the inner low / high
        ("EN50160", -15.0, -10.0, 10.0, 10.0),
        ("ANSI-C84.1", -8.3, -5.0, 5.0, 5.8),
    ],
    schema=["jurisdiction", "very_low_pct", "low_pct", "high_pct", "very_high_pct"],
    orient="row",
)
"""EN 50160: 95 % of windows within ±10 %, all within +10 / −15 %. ANSI C84.1: service range A, then B."""

VOLTAGES = [f"voltage_{phase.lower()}_mv" for phase in PHASES]
WINDOWS = polars_schema(VOLTAGE_WINDOWS)


class Advance(NamedTuple):
    """What `advance` returns.

    Attributes:
        windows: windows that are over now, columns `WINDOWS`.
        readings: the readings with `bucket` and `why`.
        samples: the new state: what open windows hold, and what tells a redelivered record.
        closed: the new state: windows that were closed before their time, by a flush.
    """

    windows: pl.DataFrame
    readings: pl.DataFrame
    samples: pl.DataFrame
    closed: pl.DataFrame


def advance(
    readings: pl.DataFrame,
    samples: pl.DataFrame,
    closed: pl.DataFrame,
    bounds: pl.DataFrame,
    horizon: int,
    close_all: bool = False,
) -> Advance:
    """Puts a batch of readings into windows and closes those that are over.

    A window is over when the bound of its run (newest arrival − allowed lateness) has reached its end.

    Args:
        readings: meter_id, observed_at, run_id, topic, partition, offset, voltages, nominal_mv, jurisdiction.
        samples: the state so far, the same columns.
        closed: the state so far: meter_id, run_id, window_start.
        bounds: per run_id `bound_before` this batch and `bound_after` it.
        horizon: offsets within which a redelivered record is recognised.
        close_all: at the end of a run: every window is over.
    """
    window = ["meter_id", "run_id", "window_start"]
    known = _with_bounds(closed, bounds)
    early = known.select(*window, is_early=pl.lit(True))
    marked = with_seen(readings, samples, ["meter_id", "observed_at"], VOLTAGES)
    state = pl.concat(
        [
            samples.with_columns(fresh=pl.lit(False)),
            marked.filter(pl.col("seen").is_null()).select(*samples.columns, fresh=pl.lit(True)),
        ]
    )
    end = pl.col("window_start") + WINDOW
    placed = (
        _with_bounds(state.with_columns(window_start=window_start()), bounds)
        .join(early, on=window, how="left", nulls_equal=True)
        .with_columns(was_over=(end <= pl.col("bound_before")).fill_null(False) | pl.col("is_early").fill_null(False))
    )
    late = placed.filter(pl.col("fresh") & pl.col("was_over")).select(*PLACE, is_late=pl.lit(True))
    why = (
        pl.when(pl.col("seen").is_not_null())
        .then(pl.col("seen"))
        .when(pl.col("is_late").fill_null(False))
        .then(pl.lit(DeltaReason.OUT_OF_ORDER.value))
    )
    judged = (
        marked.join(late, on=PLACE, how="left")
        .with_columns(why=why)
        .with_columns(bucket=pl.col("why").replace_strict(BUCKETS, default=Bucket.STORED.value, return_dtype=pl.String))
    )
    is_over = pl.lit(True) if close_all else (end <= pl.col("bound_after")).fill_null(False)
    closing = placed.filter(is_over & ~pl.col("was_over"))
    newly_early = closing.select(window).unique() if close_all else closed.clear()
    still_early = known.filter(~(end <= pl.col("bound_after")).fill_null(False)).select(window)
    return Advance(
        windows(closing),
        judged,
        placed.filter(~(is_over | pl.col("was_over")) | is_recent(horizon)).select(samples.columns),
        pl.concat([still_early, newly_early]),
    )


def _with_bounds(frame: pl.DataFrame, bounds: pl.DataFrame) -> pl.DataFrame:
    return frame.join(bounds, on="run_id", how="left", nulls_equal=True)


def window_start(column: str = "observed_at") -> pl.Expr:
    """Begin of the ten minutes that a time lies in; the end is exclusive."""
    return pl.col(column).dt.truncate("10m")


def windows(samples: pl.DataFrame) -> pl.DataFrame:
    """Windows of distinct samples.

    Args:
        samples: meter_id, observed_at, run_id, voltages in mV per phase, nominal_mv, jurisdiction (null: the defaults
            above).

    Returns:
        Columns `WINDOWS`; the standard deviation is the population's, so one sample has 0.
    """
    of = ["meter_id", "phase", "window_start"]
    each = (
        samples.select("meter_id", "observed_at", "run_id", "nominal_mv", "jurisdiction", *VOLTAGES)
        .rename(dict(zip(VOLTAGES, PHASES, strict=True)))
        .unpivot(
            on=list(PHASES),
            index=["meter_id", "observed_at", "run_id", "nominal_mv", "jurisdiction"],
            variable_name="phase",
            value_name="mv",
        )
        .filter(pl.col("mv").is_not_null())
        .with_columns(window_start=window_start())
    )
    mv = pl.col("mv")
    totals = (
        each.sort("observed_at")
        .group_by(of)
        .agg(
            sample_count=pl.len().cast(pl.Int64),
            exact_mv=mv.mean(),
            min_mv=mv.min(),
            max_mv=mv.max(),
            stddev_mv=mv.std(ddof=0),
            nominal_mv=pl.col("nominal_mv").last(),
            jurisdiction=pl.col("jurisdiction").last(),
            run_id=pl.col("run_id").last(),
        )
        .with_columns(
            nominal_mv=pl.col("nominal_mv").fill_null(NOMINAL_MV),
            jurisdiction=pl.col("jurisdiction").fill_null(JURISDICTION),
        )
        .with_columns(
            rules=pl.when(pl.col("jurisdiction").is_in(BANDS.get_column("jurisdiction").to_list()))
            .then("jurisdiction")
            .otherwise(pl.lit(JURISDICTION))
        )
        .join(BANDS, left_on="rules", right_on="jurisdiction", how="left")
    )
    deviation = (pl.col("exact_mv") - pl.col("nominal_mv")) / pl.col("nominal_mv") * 100
    return (
        totals.with_columns(
            window_end=pl.col("window_start") + WINDOW,
            mean_mv=pl.col("exact_mv").round(0).cast(pl.Int64),
            deviation_pct=deviation,
        )
        .with_columns(band=_band())
        .select(WINDOWS.keys())
        .cast(WINDOWS)
        .sort(of)
    )


def _band() -> pl.Expr:
    deviation = pl.col("deviation_pct").round(9)  # a voltage on the limit is within it, whatever a float makes of it
    return (
        pl.when(deviation < pl.col("very_low_pct"))
        .then(pl.lit(Band.VERY_LOW.value))
        .when(deviation > pl.col("very_high_pct"))
        .then(pl.lit(Band.VERY_HIGH.value))
        .when(deviation < pl.col("low_pct"))
        .then(pl.lit(Band.LOW.value))
        .when(deviation > pl.col("high_pct"))
        .then(pl.lit(Band.HIGH.value))
        .otherwise(pl.lit(Band.NORMAL.value))
    )
