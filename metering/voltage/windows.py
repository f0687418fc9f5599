"""Voltage samples → 10-minute windows per meter and phase, with deviation and band. Pure functions over Polars frames.

`windows` says what a window holds, for the stream and the night; `close_windows` when it is over, for the stream.

deviation % = (V − Vn) / Vn × 100 with Vn per meter, each phase on its own (docs/domain.md, Voltage).
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import polars as pl

from metering.clocks import STAMP, watermark_of
from metering.deduplication import PLACE, with_seen
from schemas.closed_lists import Band, DeltaReason, VoltageEvent
from schemas.tables import PHASES, VOLTAGE_EVENTS, VOLTAGE_WINDOWS, polars_schema

WINDOW = timedelta(minutes=10)  # EN 50160 judges means over ten minutes
SAME = 1e-9  # of sums of times that are evenly apart: rounding makes no more of it
A_VOLTAGE_MV = 50_000  # what an unconnected terminal reads is less
HIGHEST_PCT = 10.0  # the highest legal deviation where the jurisdiction is not known

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

JURISDICTIONS = BANDS.get_column("jurisdiction").to_list()
VOLTAGES = [f"voltage_{phase.lower()}_mv" for phase in PHASES]
STATISTICS: dict[str, Callable[[pl.Expr], pl.Expr]] = {
    "sample_count": pl.Expr.count,
    "exact_mv": pl.Expr.mean,
    "min_mv": pl.Expr.min,
    "max_mv": pl.Expr.max,
    "stddev_mv": lambda mv: mv.std(ddof=0),
}
WINDOWS = polars_schema(VOLTAGE_WINDOWS)
VOLTAGE_EVENT_ROWS = polars_schema(VOLTAGE_EVENTS)
COUNTERS = {
    f"{kind.value}_count_{phase.lower()}": (phase, kind.value) for kind in VoltageEvent for phase in PHASES
}  # fmt: skip
COUNTER = pl.Schema(
    {
        "meter_id": pl.String(),
        "phase": pl.String(),
        "kind": pl.String(),
        "observed_at": STAMP,
        "counter": pl.Int64(),
        "equipment_id": pl.String(),
        "run_id": pl.String(),
    }
)
"""State: the newest value of each counter."""
NEVER = datetime(1, 1, 1, tzinfo=UTC)
SINCE = [f"{phase.lower()}_since" for phase in PHASES]
LIVE = pl.Schema({"meter_id": pl.String(), **dict.fromkeys(SINCE, STAMP)})
"""State: since when each phase of a meter has had a voltage; one that never had is an unconnected terminal."""
ALL_PHASES = (1 << len(PHASES)) - 1


class ClosedWindows(NamedTuple):
    """What `close_windows` returns.

    Attributes:
        windows: windows that are over now, columns `WINDOWS`.
        readings: the readings with `seen`, and `why` they were not stored.
        samples: the new state: what open windows hold.
        closed: the new state: windows that were closed before their time, by a flush.
    """

    windows: pl.DataFrame
    readings: pl.DataFrame
    samples: pl.DataFrame
    closed: pl.DataFrame


def is_over(watermarks: pl.DataFrame, start: pl.Expr) -> pl.Expr:
    """True of a window whose end the watermark of its run has reached.

    Args:
        watermarks: per run_id `watermark`.
        start: begin of the window: of a sample `window_start()`.
    """
    return (start + WINDOW <= watermark_of(watermarks)).fill_null(False)


def with_live(readings: pl.DataFrame, live: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Adds `live`: a bit for each phase that has a voltage, or had one before the reading.

    Args:
        readings: meter_id, observed_at, voltages.
        live: the state so far, columns `LIVE`: at least of the meters of the readings.

    Returns:
        The readings, and the new state: the same frame where nothing is new.
    """
    at = pl.col("observed_at")
    whole = live.filter(pl.all_horizontal(pl.col(SINCE).is_not_null())) if sum(live.null_count().row(0)) else live
    is_known = readings.get_column("meter_id").is_in(whole.get_column("meter_id").implode())
    if not is_known.all():
        first = (
            readings.filter(~is_known)
            .group_by("meter_id")
            .agg(
                at.filter(has_voltage(voltage)).min().alias(f"new_{since}")
                for since, voltage in zip(SINCE, VOLTAGES, strict=True)
            )
        )
        both = live.join(first, on="meter_id", how="full", coalesce=True, maintain_order="left_right")
        is_new = [pl.col(since).is_null() & pl.col(f"new_{since}").is_not_null() for since in SINCE]
        if both.select(pl.any_horizontal(is_new).any()).item():
            known = [pl.coalesce(since, f"new_{since}").alias(since) for since in SINCE]
            live = both.select("meter_id", *known).filter(pl.any_horizontal(pl.col(SINCE).is_not_null()))
    is_plain = readings.select(pl.all_horizontal(has_voltage(name).all() for name in VOLTAGES)).item()
    if is_plain:
        return readings.with_columns(live=pl.lit(ALL_PHASES, pl.Int64)), live
    bits = [
        pl.when(has_voltage(voltage) | (pl.col(since) <= at)).then(1 << number).otherwise(0)
        for number, (since, voltage) in enumerate(zip(SINCE, VOLTAGES, strict=True))
    ]
    since_when = readings.join(live, on="meter_id", how="left", maintain_order="left")
    return since_when.with_columns(live=pl.sum_horizontal(bits).cast(pl.Int64)).drop(SINCE), live


def close_windows(
    readings: pl.DataFrame,
    samples: pl.DataFrame,
    closed: pl.DataFrame,
    watermarks: pl.DataFrame,
    registry: pl.DataFrame,
    close_all: bool = False,
) -> ClosedWindows:
    """Closes the windows that are over, then puts a batch of readings into the others.

    A window is over when its run's watermark (arrivals before the batch − allowed lateness) has reached its end.

    Args:
        readings: of `with_live`: meter_id, observed_at, run_id, topic, partition, offset, voltages, live; `seen`, of
            those that repeat one.
        samples: the state so far, without `seen`: at least those of a reading's meter and time, and of windows that
            are over.
        closed: the state so far, meter_id, run_id, window_start: at least of the meters of the readings.
        watermarks: per run_id `watermark`, up to which windows are over now.
        registry: meter_id, phases, nominal_mv, jurisdiction: which windows there are when they are over, and what they
            are judged by.
        close_all: at the end of a run: every window is over.
    """
    window = ["meter_id", "run_id", "window_start"]
    unseen = readings.filter(pl.col("seen").is_null())
    again = with_seen(unseen.select(samples.columns), samples, ["meter_id", "observed_at"], VOLTAGES)
    marked, fresh = readings, unseen
    if again.get_column("seen").count():
        marked = readings.join(again.select(*PLACE, again="seen"), on=PLACE, how="left", maintain_order="left")
        marked = marked.with_columns(seen=pl.coalesce("seen", "again")).drop("again")
        fresh = marked.filter(pl.col("seen").is_null())
    fresh = fresh.select(*samples.columns, window_start=window_start())
    is_past = is_over(watermarks, pl.col("window_start"))
    was_over = fresh.select(is_past).to_series()
    if len(closed):
        early = fresh.join(closed.select(*window, is_early=pl.lit(True)), on=window, how="left", nulls_equal=True,
                           maintain_order="left")  # fmt: skip
        was_over |= early.get_column("is_early").fill_null(False)
    late = fresh.filter(was_over).select(*PLACE, is_late=pl.lit(True))
    held = pl.concat([samples.with_columns(window_start=window_start()), fresh.filter(~was_over)])
    ends = pl.lit(True) if close_all else is_past
    closing = held.filter(ends)
    newly_early = closing.select(window).unique() if close_all else closed.clear()
    still_early = closed.filter(~is_past)
    return ClosedWindows(
        windows(closing.join(registry, on="meter_id", how="left")),
        marked.join(late, on=PLACE, how="left").with_columns(
            why=pl.coalesce("seen", pl.when("is_late").then(pl.lit(DeltaReason.OUT_OF_ORDER.value)))
        ),
        held.filter(~ends).select(samples.columns),
        pl.concat([still_early, newly_early]),
    )


def counted(readings: pl.DataFrame, counters: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Sags and swells: an event is the increase of a meter's own counter.

    A reading that is older than the newest one counted changes nothing; a counter that falls, or that of other
    equipment, begins anew.

    Args:
        readings: originals: meter_id, observed_at, run_id, equipment_id and `COUNTERS`.
        counters: the state so far, columns `COUNTER`.

    Returns:
        Events, columns `VOLTAGE_EVENT_ROWS`, and the new state.
    """
    keys, equipment = ["meter_id", "phase", "kind"], pl.col("equipment_id")
    counting = {
        column: phase_and_kind for column, phase_and_kind in COUNTERS.items() if readings.get_column(column).count()
    }
    each = [
        readings.filter(pl.col(column).is_not_null()).select(
            "meter_id", "observed_at", "run_id", "equipment_id",
            phase=pl.lit(phase), kind=pl.lit(kind), counter=pl.col(column), is_new=pl.lit(True),
        )
        for column, (phase, kind) in counting.items()
    ]  # fmt: skip
    if not each:
        return pl.DataFrame(schema=VOLTAGE_EVENT_ROWS), counters
    known = counters.select(*COUNTER.keys(), is_new=pl.lit(False))
    counted_at = pl.col("observed_at").filter(~pl.col("is_new")).max().over(keys).fill_null(NEVER)
    series = (
        pl.concat([known, *[frame.select(known.columns) for frame in each]])
        .sort(*keys, "observed_at", "is_new")
        .filter(pl.col("observed_at") >= counted_at)
        .with_columns(
            previous_at=pl.col("observed_at").shift(1).over(keys),
            event_count=pl.col("counter").diff().over(keys),
            is_same=equipment.eq_missing(equipment.shift(1).over(keys)),
        )
    )
    events = series.filter((pl.col("event_count") > 0) & pl.col("is_same"))
    state = series.unique(keys, keep="last", maintain_order=True).select(COUNTER.keys())
    return events.select(VOLTAGE_EVENT_ROWS.keys()).cast(VOLTAGE_EVENT_ROWS), state


def window_start(column: str = "observed_at") -> pl.Expr:
    """Begin of the ten minutes that a time lies in; the end is exclusive."""
    return pl.col(column).dt.truncate("10m")


def windows(samples: pl.DataFrame) -> pl.DataFrame:
    """Windows of distinct samples.

    Args:
        samples: of `with_live`: meter_id, observed_at, run_id, voltages in mV per phase, live; phases, nominal_mv,
            jurisdiction: what is null there is judged by nothing.

    Returns:
        Columns `WINDOWS`; the standard deviation is the population's, so one sample has 0.
    """
    of_phases = [
        pl.when(((pl.col("live") & (1 << number)) > 0) & has_phase(phase)).then(voltage).alias(voltage)
        for number, (phase, voltage) in enumerate(zip(PHASES, VOLTAGES, strict=True))
    ]
    into = pl.col("observed_at").dt.epoch("us") % (WINDOW // timedelta(microseconds=1))
    ordered = samples.with_columns(of_phases).sort("observed_at").with_columns(into_us=into.cast(pl.Float64))
    wide = ordered.group_by("meter_id", window_start=window_start()).agg(
        pl.col("nominal_mv", "jurisdiction", "run_id").last(),
        rows=pl.len(),
        first_us=pl.col("into_us").min(),
        last_us=pl.col("into_us").max(),
        sum_us=pl.col("into_us").sum(),
        squares_us2=(pl.col("into_us") ** 2).sum(),
        **{
            f"{name}_{phase}": statistic(pl.col(voltage))
            for phase, voltage in zip(PHASES, VOLTAGES, strict=True)
            for name, statistic in STATISTICS.items()
        },
    )
    wide = _with_means_over_time(wide, ordered).sort("meter_id", "window_start")
    wide = wide.with_columns(place=pl.col("meter_id").rle_id() * len(PHASES))
    keys = ["meter_id", "window_start", "nominal_mv", "jurisdiction", "run_id"]
    totals = pl.concat(
        [
            wide.select(
                *keys, pl.col("place") + number, phase=pl.lit(phase), **{name: f"{name}_{phase}" for name in STATISTICS}
            )
            for number, phase in enumerate(PHASES)
        ]
    )
    totals = totals.filter(pl.col("sample_count") > 0).sort("place", maintain_order=True)  # by texts it takes twice
    deviation = (pl.col("exact_mv") - pl.col("nominal_mv")) / pl.col("nominal_mv") * 100
    return (
        with_rules(totals)
        .with_columns(
            window_end=pl.col("window_start") + WINDOW,
            mean_mv=pl.col("exact_mv").round(0).cast(pl.Int64),
            deviation_pct=deviation,
        )
        .with_columns(band=_band())
        .select(WINDOWS.keys())
        .cast(WINDOWS)
    )


def _with_means_over_time(wide: pl.DataFrame, ordered: pl.DataFrame) -> pl.DataFrame:
    """Puts the means of windows right whose samples are not evenly apart: by how long each stands.

    A sample stands for half the time to each of its neighbours in the window, at the ends as long on the outer side as
    on the inner one. So a burst counts no more than a single sample, and of evenly spaced ones it is the plain mean.

    Args:
        wide: of `windows`: a row a meter and window, with `rows`, first, last, sum and sum of squares of the samples'
            times in the window, and of each phase sample_count and exact_mv.
        ordered: the samples in the order of time.
    """
    window = ["meter_id", "window_start"]
    first, rows = pl.col("first_us"), pl.col("rows").cast(pl.Float64)
    step = (pl.col("last_us") - first) / pl.max_horizontal(rows - 1, 1)
    even_sum = rows * (first + pl.col("last_us")) / 2
    even_squares = rows * first**2 + first * step * rows * (rows - 1) + step**2 * rows * (rows - 1) * (2 * rows - 1) / 6
    is_even = [
        (found - even).abs() <= even * SAME
        for found, even in ((pl.col("sum_us"), even_sum), (pl.col("squares_us2"), even_squares))
    ]
    is_cut = [pl.col(f"sample_count_{phase}").is_between(1, pl.col("rows") - 1) for phase in PHASES]
    uneven = wide.filter(~pl.all_horizontal(is_even) | pl.any_horizontal(is_cut)).select(window)
    if uneven.is_empty():
        return wide
    concerned = ordered.with_columns(window_start=window_start()).join(
        uneven, on=window, how="semi", maintain_order="left"
    )
    for phase, voltage in zip(PHASES, VOLTAGES, strict=True):
        gap = pl.col("observed_at").diff().dt.total_microseconds().cast(pl.Float64)
        after = gap.shift(-1)
        stands = gap.fill_null(after) + after.fill_null(gap)
        mean = (pl.col(voltage) * stands).sum() / stands.sum()
        means = (
            concerned.drop_nulls(voltage)
            .group_by(window)
            .agg(over_time=pl.when(gap.min() < gap.max()).then(mean))
            .drop_nulls("over_time")
        )
        exact = pl.coalesce("over_time", f"exact_mv_{phase}").alias(f"exact_mv_{phase}")
        wide = wide.join(means, on=window, how="left", maintain_order="left").with_columns(exact).drop("over_time")
    return wide


def has_phase(phase: str) -> pl.Expr:
    """True where the registry has the phase, or says nothing of phases."""
    return pl.col("phases").str.contains(phase, literal=True).fill_null(True)


def has_voltage(column: str) -> pl.Expr:
    """True where a phase has a voltage, not what an unconnected terminal reads."""
    return pl.col(column) >= A_VOLTAGE_MV


def highest_pct() -> pl.Expr:
    """The highest deviation that a row's jurisdiction allows, %; `HIGHEST_PCT` where it is not known."""
    known = dict(BANDS.select("jurisdiction", "very_high_pct").iter_rows())
    return pl.col("jurisdiction").replace_strict(known, default=HIGHEST_PCT, return_dtype=pl.Float64)


def with_rules(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows with the limits of their jurisdiction, columns `BANDS`; null where it is not known.

    Args:
        rows: jurisdiction.
    """
    return rows.join(BANDS, on="jurisdiction", how="left", maintain_order="left")


def _band() -> pl.Expr:
    deviation = pl.col("deviation_pct").round(9)  # a voltage on the limit is within it, whatever a float makes of it
    return (
        pl.when(deviation.is_null() | pl.col("very_low_pct").is_null())
        .then(None)
        .when(deviation < pl.col("very_low_pct"))
        .then(pl.lit(Band.VERY_LOW.value))
        .when(deviation > pl.col("very_high_pct"))
        .then(pl.lit(Band.VERY_HIGH.value))
        .when(deviation < pl.col("low_pct"))
        .then(pl.lit(Band.LOW.value))
        .when(deviation > pl.col("high_pct"))
        .then(pl.lit(Band.HIGH.value))
        .otherwise(pl.lit(Band.NORMAL.value))
    )
