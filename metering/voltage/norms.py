"""Ten-minute windows of a day or a week → what norms of voltage say of them. Pure functions over Polars frames.

Norms and their limits are data: `NORMS`; which of them a jurisdiction is judged by: `NORMS_OF`. EN 50160 and PRODIST
(module 8) count windows outside of bands, AS 61000.3.100 wants percentiles within limits. Of ANSI C84.1 the shares
outside ranges A and B are counted; it says of A that excursions are infrequent and gives no share, so that all windows
within B comply is a convention (docs/domain.md, Voltage).

A percentile is linear between ranks: of n sorted means the p-th lies at rank p / 100 × (n − 1), counted from 0.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

import polars as pl

from metering.clocks import STAMP
from metering.voltage.windows import WINDOW
from schemas.closed_lists import ComplianceLevel, Period

SET_WINDOWS = 1008  # of a week of seven times 24 hours
ENOUGH_PCT = 95  # of a week's windows that are known, else it is incomplete (convention)
REPLACED_WITHIN = WINDOW * 144  # PRODIST's set reaches so much further back: so many invalid windows can be replaced
PERCENTILES = {"p1_mv": 0.01, "p5_mv": 0.05, "p50_mv": 0.5, "p95_mv": 0.95, "p99_mv": 0.99}
PRODIST_K1, PRODIST_K2 = 3, 7  # factors of precarious and critical shares, low voltage
PRODIST_DRP_PCT, PRODIST_DRC_PCT = 3.0, 0.5


class Norm(NamedTuple):
    """Limits and rule of a norm.

    Attributes:
        norm: its name.
        of_nominal_mv: for which nominal voltage, and then the limits are in mV; None: for any, in % of it.
        low: lower limit of the inner band, itself within.
        high: upper limit of the inner band, itself within.
        very_low: lower limit of the outer band.
        very_high: upper limit of the outer band.
        most_outside_pct: largest share of windows outside the inner band; None: no rule.
        most_beyond_pct: largest share beyond the outer band; None: no rule.
        is_nested: what is beyond the outer band counts as outside the inner one, too.
        by_percentiles: 1st and 99th percentile must lie within the inner band.
        set_windows: so many valid windows are judged, no fewer, the newest ones; None: those of the period.
    """

    norm: str
    of_nominal_mv: int | None
    low: float
    high: float
    very_low: float
    very_high: float
    most_outside_pct: float | None
    most_beyond_pct: float | None
    is_nested: bool
    by_percentiles: bool
    set_windows: int | None


EN50160, ANSI, AS61000, PRODIST = "EN50160", "ANSI-C84.1", "AS61000.3.100", "PRODIST"
DRP_DRC = (PRODIST_DRP_PCT, PRODIST_DRC_PCT, False, False, SET_WINDOWS)
NORMS = pl.DataFrame(
    [
        Norm(EN50160, None, -10.0, 10.0, -15.0, 10.0, 5.0, 0.0, True, False, None),
        Norm(ANSI, None, -5.0, 5.0, -8.3, 5.8, None, 0.0, True, False, None),
        Norm(AS61000, 230_000, 216_000, 253_000, 216_000, 253_000, None, None, True, True, None),
        Norm(PRODIST, 220_000, 202_000, 231_000, 191_000, 233_000, *DRP_DRC),
        Norm(PRODIST, 127_000, 117_000, 133_000, 110_000, 135_000, *DRP_DRC),
    ],
    schema={
        "norm": pl.String(),
        "of_nominal_mv": pl.Int64(),
        **dict.fromkeys(["low", "high", "very_low", "very_high", "most_outside_pct", "most_beyond_pct"], pl.Float64()),
        "is_nested": pl.Boolean(),
        "by_percentiles": pl.Boolean(),
        "set_windows": pl.Int64(),
    },
    orient="row",
)
NORMS_OF = {name: (name,) for name in (EN50160, ANSI, AS61000, PRODIST)}
"""Jurisdiction → norms that its meters are judged by."""
NO_NORM, ALL_PHASES = "", ""
"""In the rows below: of a meter whose jurisdiction has none, and of a meter's phases together."""

FAILURES = pl.Schema({"meter_id": pl.String(), "begin_at": STAMP, "end_at": STAMP})
PERIODS = pl.Schema({"meter_id": pl.String(), "period": pl.String(), "period_start": STAMP, "period_end": STAMP})
JUDGED = pl.Schema(
    {
        "level": pl.String(),
        "meter_id": pl.String(),
        "phase": pl.String(),
        "period": pl.String(),
        "norm": pl.String(),
        "windows": pl.Int64(),
        "valid_windows": pl.Int64(),
        "min_mv": pl.Int64(),
        "max_mv": pl.Int64(),
        "mean_mv": pl.Int64(),
        **dict.fromkeys(PERCENTILES, pl.Float64()),
        "is_complete": pl.Boolean(),
        "judged_windows": pl.Int64(),
        "outside_windows": pl.Int64(),
        "beyond_windows": pl.Int64(),
        "outside_pct": pl.Float64(),
        "beyond_pct": pl.Float64(),
        "complies": pl.Boolean(),
        "worst_phase": pl.String(),
    }
)
OF_PHASE = ["meter_id", "phase", "period"]
RULES = NORMS.select("norm", "most_outside_pct", "most_beyond_pct", "by_percentiles", "set_windows").unique("norm")
WINDOW_COLUMNS = [
    "meter_id", "phase", "window_start", "min_mv", "max_mv", "exact_mv", "is_valid", "nominal_mv", "jurisdiction",
]  # fmt: skip


def judged(
    windows: pl.DataFrame,
    failures: pl.DataFrame,
    periods: pl.DataFrame,
    norms_of: Mapping[str, tuple[str, ...]] = NORMS_OF,
) -> pl.DataFrame:
    """What norms say of each phase and each meter, in each period.

    A phase complies with a norm or not, or nobody knows (null): a week with less than 95 % of its windows, a set that
    is not full, no valid window, no nominal voltage or one that the norm has no limits for, no jurisdiction. Of a day
    it is a view on the windows there are: norms are rules over a week.

    Args:
        windows: meter_id, phase, window_start, min_mv, max_mv, exact_mv (mean, float), is_valid (false where it had an
            interruption), nominal_mv, jurisdiction; of the periods and of a day before them.
        failures: meter_id, begin_at, end_at: spans of whole windows without power, which are known without samples.
        periods: meter_id, period (`Period`), period_start, period_end.
        norms_of: jurisdiction → norms.

    Returns:
        Columns `JUDGED`, a row per meter, phase, period and norm, and `of_meters` of them.
    """
    ordered = windows.select(WINDOW_COLUMNS).sort("meter_id", "phase", "window_start")
    names = norm_names(windows, norms_of)
    each = [_of_period(ordered, names, periods.filter(period=period.value)) for period in Period]
    facts, counts = pl.concat([facts for facts, _ in each]), pl.concat([counts for _, counts in each])
    dark = _windows_without_power(failures, periods)
    known = pl.col("windows") + pl.col("dark_windows").fill_null(0)
    is_complete = known * 100 >= pl.col("expected") * ENOUGH_PCT
    facts = facts.join(dark, on=["meter_id", "period"], how="left").with_columns(is_complete=is_complete)
    phases = facts.join(names, on="meter_id").join(counts, on=[*OF_PHASE, "norm"], how="left")
    phases = phases.with_columns(pl.col("judged_windows").fill_null(0))
    outside, beyond, judged_windows = (pl.col(f"{name}_windows") for name in ("outside", "beyond", "judged"))
    is_full = (judged_windows > 0) & (judged_windows >= pl.col("set_windows").fill_null(0))
    needs_a_week = (pl.col("period") == Period.WEEK.value) & pl.col("set_windows").is_null()
    is_known = is_full & (pl.col("is_complete") | ~needs_a_week)
    has_percentiles = (pl.col("p1_mv") >= pl.col("low_mv")) & (pl.col("p99_mv") <= pl.col("high_mv"))
    is_within = (
        (outside * 100 <= pl.col("most_outside_pct").fill_null(100) * judged_windows)
        & (beyond * 100 <= pl.col("most_beyond_pct").fill_null(100) * judged_windows)
        & (has_percentiles | ~pl.col("by_percentiles"))
    )
    phases = phases.with_columns(
        level=pl.lit(ComplianceLevel.PHASE.value),
        outside_pct=pl.when(is_full).then(outside / judged_windows * 100),
        beyond_pct=pl.when(is_full).then(beyond / judged_windows * 100),
        complies=pl.when(is_known).then(is_within),
        worst_phase=pl.lit(None, pl.String),
    )
    phases = phases.select(JUDGED.keys()).cast(JUDGED)
    return pl.concat([phases, of_meters(phases)]).sort("meter_id", "level", "phase", "period", "norm")


def of_meters(phases: pl.DataFrame) -> pl.DataFrame:
    """The phases of each meter together: it complies where all do that had a voltage, its counts are its worst phase's.

    Args:
        phases: columns `JUDGED`, level phase.

    Returns:
        Columns `JUDGED`, level meter; mean and percentiles between the outermost are null.
    """
    fails, is_unknown = (~pl.col("complies")).any(), pl.col("complies").is_null().any()
    wrong = pl.col("outside_windows") + pl.col("beyond_windows")
    meters = phases.sort("phase").group_by("meter_id", "period", "norm", maintain_order=True).agg(
        pl.col("windows", "valid_windows", "judged_windows", "min_mv", "p1_mv").min(),
        pl.col("max_mv", "p99_mv", "outside_windows", "beyond_windows", "outside_pct", "beyond_pct").max(),
        is_complete=pl.col("is_complete").all(),
        complies=pl.when(fails).then(False).when(is_unknown).then(None).otherwise(True),
        worst_phase=pl.when(wrong.max() > 0).then(pl.col("phase").filter(wrong == wrong.max()).first()),
    )  # fmt: skip
    missing = [pl.lit(None, kind).alias(name) for name, kind in JUDGED.items() if name not in meters.columns]
    rows = meters.with_columns(missing).with_columns(
        level=pl.lit(ComplianceLevel.METER.value), phase=pl.lit(ALL_PHASES)
    )
    return rows.select(JUDGED.keys()).cast(JUDGED)


def prodist_compensation(drp_pct: float, drc_pct: float, grid_charge: float) -> float:
    """What a customer is paid back of the grid charge (PRODIST module 8): ((DRP − 3) k1 + (DRC − 0.5) k2) / 100 of it.

    Args:
        drp_pct: share of windows in the precarious band, %, worst phase.
        drc_pct: share in the critical band, %.
        grid_charge: of the month, in its currency.
    """
    precarious = max(drp_pct - PRODIST_DRP_PCT, 0) * PRODIST_K1
    critical = max(drc_pct - PRODIST_DRC_PCT, 0) * PRODIST_K2
    return (precarious + critical) / 100 * grid_charge


def norm_names(meters: pl.DataFrame, norms_of: Mapping[str, tuple[str, ...]] = NORMS_OF) -> pl.DataFrame:
    """Which norms each meter is judged by.

    Args:
        meters: meter_id, jurisdiction.
        norms_of: jurisdiction → norms.

    Returns:
        meter_id, norm: a row each, `NO_NORM` where the jurisdiction is not known.
    """
    pairs = [(jurisdiction, norm) for jurisdiction, norms in norms_of.items() for norm in norms]
    known = pl.DataFrame(pairs, schema={"jurisdiction": pl.String, "norm": pl.String}, orient="row")
    each = meters.select("meter_id", "jurisdiction").unique("meter_id").join(known, on="jurisdiction", how="left")
    return each.select("meter_id", pl.col("norm").fill_null(NO_NORM))


def _of_period(ordered: pl.DataFrame, names: pl.DataFrame, periods: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Facts and counts of one period: it is taken alone, since a week of windows is large."""
    first = pl.col("period_start") - REPLACED_WITHIN
    at = pl.col("window_start")
    near = ordered.join(periods, on="meter_id", maintain_order="left").filter(
        (at >= first) & (at < pl.col("period_end"))
    )
    valid = pl.col("is_valid")
    facts = near.filter(at >= pl.col("period_start")).group_by(OF_PHASE, maintain_order=True).agg(
        windows=pl.len(),
        valid_windows=valid.sum(),
        min_mv=pl.col("min_mv").filter(valid).min(),
        max_mv=pl.col("max_mv").filter(valid).max(),
        mean_mv=pl.col("exact_mv").filter(valid).mean().round(0).cast(pl.Int64),
        **{
            name: pl.col("exact_mv").filter(valid).quantile(share, "linear").round(3)
            for name, share in PERCENTILES.items()
        },
        expected=(pl.col("period_end").first() - pl.col("period_start").first()) / WINDOW,
    )  # fmt: skip
    return facts, _counts(near.filter(valid).drop("min_mv", "max_mv", "jurisdiction", "period_end"), names)


def _counts(ordered: pl.DataFrame, names: pl.DataFrame) -> pl.DataFrame:
    """N, windows outside and beyond of each phase, period and norm, of the windows that the norm judges.

    Args:
        ordered: valid windows with their period, those of the day before it too, in the order of time.
        names: meter_id, norm.

    Returns:
        Their counts, with the rule and the limits in mV of the norm.
    """
    of_norm, nominal = [*OF_PHASE, "norm"], pl.col("of_nominal_mv")
    is_back = pl.col("set_windows").is_not_null() & (pl.col("period") == Period.WEEK.value)
    first = pl.col("period_start") - pl.when(is_back).then(REPLACED_WITHIN).otherwise(timedelta())
    is_of = (nominal.is_null() | (nominal == pl.col("nominal_mv"))) & pl.col("nominal_mv").is_not_null()
    limits = ["low", "high", "very_low", "very_high"]
    needed = NORMS.select("norm", "of_nominal_mv", "set_windows", "is_nested", *limits)
    valid = (
        ordered.join(names, on="meter_id", maintain_order="left")
        .join(needed, on="norm", maintain_order="left")
        .filter(is_of & (pl.col("window_start") >= first))
    )
    age = pl.len().over(of_norm) - pl.int_range(pl.len()).over(of_norm)
    in_set = valid.filter((age <= pl.col("set_windows")).fill_null(True))
    share_mv = [pl.col("nominal_mv") * (100 + pl.col(name)) / 100 for name in limits]
    limit_mv = [
        pl.when(nominal.is_null()).then(share).otherwise(name).round(6).alias(f"{name}_mv")
        for name, share in zip(limits, share_mv, strict=True)
    ]
    mean_mv = pl.col("exact_mv").round(6)  # a voltage on the limit is within it, whatever a float makes of it
    is_beyond = ~mean_mv.is_between("very_low_mv", "very_high_mv")
    is_outside = ~mean_mv.is_between("low_mv", "high_mv") & (pl.col("is_nested") | ~is_beyond)
    return (
        in_set.with_columns(limit_mv)
        .group_by(of_norm)
        .agg(
            pl.col("low_mv", "high_mv").first(),
            judged_windows=pl.len(),
            outside_windows=is_outside.sum(),
            beyond_windows=is_beyond.sum(),
        )
        .join(RULES, on="norm")
    )


def _windows_without_power(failures: pl.DataFrame, periods: pl.DataFrame) -> pl.DataFrame:
    """Whole windows of each meter and period that lie within power failures: meter_id, period, dark_windows."""
    begin = pl.max_horizontal("begin_at", "period_start")
    length = pl.max_horizontal(pl.min_horizontal("end_at", "period_end") - begin, pl.duration())
    return (
        failures.join(periods, on="meter_id")
        .group_by("meter_id", "period")
        .agg(dark_windows=(length.sum() / WINDOW).cast(pl.Int64))
    )
