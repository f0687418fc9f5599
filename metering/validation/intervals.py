"""Readings → validated intervals of a local day: judged, cut at their edges, gaps estimated, checked. Pure functions.

Of each register that had a reading before the day's end there is a row for each quarter hour (half hour where the
registry expects readings each half hour), so a day has 92, 96 or 100. The intervals that a register's steps cover sum
up to them exactly, in Wh; a step across midnight gives each day what belongs to it. Order of the rules: clocks (before,
`engine/night.py`), gap, estimate, then the others on what there is; they flag and change nothing: the register is
stronger than a rule of thumb.
"""

from datetime import timedelta

import polars as pl

from metering.deduplication import with_seen
from metering.energy import delta_engine
from metering.energy.agreement import agreed
from metering.energy.intervals import LONGEST_STEP_US, pieces, shares
from metering.energy.walk import GAP_FACTOR
from metering.validation.estimation import like_means, spread
from schemas import tables
from schemas.closed_lists import ACCEPTED_DELTAS, DeltaReason, EstimationMethod, IntervalQuality, ValidationRule
from schemas.markets import markets

QUARTER_S, HALF_HOUR_S = 900, 1_800
SECOND_US = 1_000_000
LONGEST_GAP = timedelta(days=7)
"""So far before and after a day a night looks for the ends of a gap: a longer step is not spread, and what it has is in
daily sums alone."""
CLOCKS = timedelta(minutes=2)
"""A meter may have said that its power failed so long before its last reading."""
LONGEST_FAIL = timedelta(days=7)
"""Nobody heard of a meter for so long after its power failed: then nobody knows."""
VALUES = [f"{register}_wh" for register in tables.REGISTERS]
IDENTITY = ["meter_id", "observed_at"]
MEASURED = {
    0: IntervalQuality.MEASURED.value,
    1: IntervalQuality.INTERPOLATED.value,
    2: IntervalQuality.ESTIMATED.value,
}
ROWS = pl.Schema(
    {
        "meter_id": pl.String(),
        "register": pl.String(),
        "interval_start": delta_engine.STAMP,
        "interval_end": delta_engine.STAMP,
        "energy_wh": pl.Int64(),
        "quality": pl.String(),
        "method": pl.String(),
        "rule": pl.String(),
        "is_reconciled": pl.Boolean(),
        "not_run": pl.List(pl.String()),
    }
)
_COVER = {"energy_wh": pl.Int64(), "covered_us": pl.Int64(), "powered_us": pl.Int64()}


def validated(readings: pl.DataFrame, power_fails: pl.DataFrame, references: pl.DataFrame) -> pl.DataFrame:
    """Intervals of one local day, columns `ROWS`.

    Args:
        readings: of the day and before and after it, with the columns of the registry that `delta_engine.with_limits`
            takes, market, time_zone, day_start and day_end.
        power_fails: columns `metering.alarms.power_fails.POWER_FAILS`, of the meters of the readings.
        references: meter_id, register, interval_start, energy_wh: quarter hours of the weeks before that were read.
    """
    marked = with_seen(delta_engine.with_limits(readings), readings.clear(), IDENTITY, [*VALUES, "equipment_id"])
    done = delta_engine.steps(marked, pl.DataFrame(schema=delta_engine.BASELINE), agreed).steps
    begins_on_it = pl.col("day_start").dt.epoch("s") % HALF_HOUR_S == 0  # not so where clocks are 45 minutes off
    is_half = (pl.col("interval_s") == HALF_HOUR_S) & begins_on_it
    length_s = pl.when(is_half).then(HALF_HOUR_S).otherwise(QUARTER_S)
    fleet = _with_rules(
        marked.group_by("meter_id").agg(
            pl.col("day_start", "day_end", "interval_s", "market", "time_zone", "max_w", "is_unlimited").first(),
            pl.col("quantum_wh").max(),
        )
    ).with_columns(length_us=length_s * SECOND_US)
    accepted = done.filter(pl.col("reason").is_in([each.value for each in ACCEPTED_DELTAS])).join(fleet, on="meter_id")
    failures = power_fails.join(fleet.select("meter_id", "max_w"), on="meter_id")
    known = _slots(accepted)
    local_references = _references(references, known, fleet)
    covered, gaps = _covered(accepted, failures, known, local_references)
    rows = known.join(covered, on=["series", "interval_start"], how="left", maintain_order="left").join(
        gaps, on=["series", "interval_start"], how="left", maintain_order="left"
    )
    sums = {name: pl.sum_horizontal(name, f"gap_{name}") for name in _COVER}
    rows = rows.with_columns(**sums, is_known=pl.any_horizontal(pl.col("energy_wh", "gap_energy_wh").is_not_null()))
    return _checked(_estimated(_judged(rows), accepted, failures, local_references)).select(ROWS.keys()).cast(ROWS)


def _with_rules(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows with the rules of their market.

    Args:
        rows: market; null is none.
    """
    known = markets().get_column("market").to_list()
    named = rows.with_columns(market=pl.when(pl.col("market").is_in(known)).then("market").otherwise(pl.lit("")))
    return named.join(markets(), on="market", how="left", maintain_order="left")


def _slots(accepted: pl.DataFrame) -> pl.DataFrame:
    """A row per register and interval of the day: series, meter_id, register, interval_start, the meter's rules."""
    at, length = pl.col("observed_at"), pl.col("length_us")
    kept = ["meter_id", "register", "time_zone", "max_w", "quantum_wh", "length_us", "like_day_table", "like_days"]
    kept += ["spike_factor", "spike_floor_quanta", "frozen_run", "zero_run"]
    begin, end = (pl.col(name).dt.epoch("us") for name in ("day_start", "day_end"))
    return (
        accepted.filter(at <= pl.col("day_end"))
        .group_by("series", maintain_order=True)
        .agg(pl.col(*kept, "day_start", "day_end").first())
        .with_columns(start_us=pl.int_ranges(begin, end, step=length))
        .explode("start_us")
        .with_columns(interval_start=pl.from_epoch("start_us", "us").dt.replace_time_zone("UTC"))
        .drop("start_us", "day_start", "day_end")
        .pipe(_with_local, local="interval_start")
    )


def _with_local(rows: pl.DataFrame, /, **stamps: str) -> pl.DataFrame:
    """Adds stamps by the clock of the meter's zone; an autumn night has an hour of labels twice.

    Args:
        rows: time_zone; null is UTC.
        stamps: new column → the one that it is made of.
    """
    zone = pl.col("time_zone").fill_null("UTC")
    found = dict.fromkeys(stamps, pl.lit(None, pl.Datetime("us")))
    for name in rows.select(zone).to_series().unique():
        for new, at in stamps.items():
            there = pl.col(at).dt.convert_time_zone(name).dt.replace_time_zone(None)
            found[new] = pl.when(zone == name).then(there).otherwise(found[new])
    return rows.with_columns(**found)


def _references(references: pl.DataFrame, slots: pl.DataFrame, fleet: pl.DataFrame) -> pl.DataFrame:
    """References by series and local time; of meters of half hours both quarters together."""
    series = slots.select("series", "meter_id", "register", "length_us", "time_zone").unique()
    start_us = pl.col("interval_start").dt.epoch("us")
    return (
        references.join(series, on=["meter_id", "register"])
        .with_columns(number=start_us // pl.col("length_us"))
        .group_by("series", "number", "length_us", "time_zone")
        .agg(pl.col("energy_wh").sum(), quarters=pl.len())
        .filter(pl.col("quarters") * QUARTER_S * SECOND_US == pl.col("length_us"))
        .with_columns(at=pl.from_epoch(pl.col("number") * pl.col("length_us"), "us").dt.replace_time_zone("UTC"))
        .pipe(_with_local, local="at")
        .select("series", "local", "energy_wh")
    )


def _covered(
    accepted: pl.DataFrame, failures: pl.DataFrame, slots: pl.DataFrame, references: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What steps give to intervals: those that were read through, and gaps."""
    span = pl.col("observed_at") - pl.col("previous_at")
    is_near = (
        (span <= LONGEST_GAP)
        & (pl.col("previous_at") < pl.col("day_end") + LONGEST_GAP)
        & (pl.col("observed_at") > pl.col("day_start") - LONGEST_GAP)
    )
    longest_s = pl.max_horizontal(LONGEST_STEP_US / SECOND_US, pl.col("interval_s") * GAP_FACTOR)
    is_gap = (pl.col("reason") == DeltaReason.GAP.value) | (span.dt.total_seconds() > longest_s)
    rules = ["length_us", "time_zone", "linear_limit_s", "is_inclusive", "like_day_table", "like_days"]
    steps = accepted.filter(is_near)
    longest_us = LONGEST_GAP // timedelta(microseconds=1)
    cut = [
        pieces(those, failures, pl.col("length_us"), longest_us, *rules[1:])
        for those in (steps.filter(~is_gap), steps.filter(is_gap))
    ]
    read = (
        shares(cut[0])
        .group_by("series", "interval_start")
        .agg(pl.col("energy_wh", "covered_us", "powered_us").sum(), pl.col("rank").max())
    )
    lengths = slots.select("series", "length_us").unique()
    is_end = (pl.col("covered_us") == pl.col("length_us")) & (pl.col("powered_us") == pl.col("length_us"))
    ends = read.join(lengths, on="series").filter(is_end & (pl.col("rank") < 2))
    start = pl.from_epoch(pl.col("number") * pl.col("length_us"), "us").dt.replace_time_zone("UTC")
    begin = pl.from_epoch("begin_us", "us").dt.replace_time_zone("UTC")
    placed = _with_local(
        cut[1].with_columns(interval_start=start, begin=begin), local="interval_start", gap_local="begin"
    )
    guessed = spread(placed, ends, references)
    gaps = guessed.group_by("series", "interval_start").agg(
        gap_energy_wh=pl.col("energy_wh").sum(),
        gap_covered_us=(pl.col("to_us") - pl.col("from_us")).sum(),
        gap_powered_us=(pl.col("powered_until") - pl.col("powered_before")).sum(),
        method=pl.col("method").first(),
        gap_rank=pl.col("rank").max(),
    )
    return read, gaps


def _judged(rows: pl.DataFrame) -> pl.DataFrame:
    """Quality and method of what steps cover."""
    is_whole = pl.col("covered_us") == pl.col("length_us")
    is_guess = (pl.col("gap_rank") == 2).fill_null(False)
    quality = (
        pl.when(is_whole & (pl.col("powered_us") < SECOND_US))
        .then(pl.lit(IntervalQuality.POWER_FAIL.value))
        .when(is_whole & is_guess)
        .then(pl.lit(IntervalQuality.ESTIMATED.value))
        .when(is_whole)
        .then(pl.max_horizontal("rank", "gap_rank").replace_strict(MEASURED, return_dtype=pl.String))
        .when("is_known")
        .then(pl.lit(IntervalQuality.INCOMPLETE.value))
        .otherwise(pl.lit(IntervalQuality.MISSING.value))
    )
    method = (
        pl.when(is_whole & (pl.col("powered_us") < SECOND_US))
        .then(pl.lit(EstimationMethod.ZERO.value))
        .when(is_guess)
        .then("method")
        .when("is_known")
        .then(pl.lit(EstimationMethod.REGISTER.value))
    )
    return rows.with_columns(
        energy_wh=pl.when("is_known").then("energy_wh"),
        quality=quality,
        method=method,
        is_reconciled=pl.col("is_known"),
    )


def _estimated(
    rows: pl.DataFrame, accepted: pl.DataFrame, failures: pl.DataFrame, references: pl.DataFrame
) -> pl.DataFrame:
    """Estimates for what no step covers: 0 while a meter has no power, like days after its last reading."""
    is_open = pl.col("covered_us") < pl.col("length_us")
    if not rows.select(is_open.any()).item():
        return rows.with_columns(has_reference=pl.lit(True))
    last = accepted.select("series", before_at="observed_at").sort("before_at")
    begun = rows.sort("interval_start").join_asof(
        last, left_on="interval_start", right_on="before_at", by="series", strategy="backward", check_sortedness=False
    )
    begun = _with_local(begun, gap_local="before_at")
    asked = like_means(begun.filter(is_open & pl.col("before_at").is_not_null()), references)
    down, up = pl.col("down_at"), pl.col("up_at")
    start, length = pl.col("interval_start"), pl.duration(microseconds="length_us")
    dark = (
        asked.select("series", "meter_id", "interval_start", "length_us", "before_at")
        .join(failures, on="meter_id")
        .filter(
            (down <= start) & (up.is_null() | (up >= start + length)) & (start - down <= LONGEST_FAIL)
            & (down >= pl.col("before_at") - CLOCKS)
        )
        .select("series", "interval_start", is_dark=pl.lit(True))
        .unique()
    )  # fmt: skip
    found = begun.join(
        asked.select("series", "interval_start", "like_wh"), on=["series", "interval_start"], how="left"
    ).join(dark, on=["series", "interval_start"], how="left")
    is_dark = pl.col("is_dark").fill_null(False)
    left = (pl.col("length_us") - pl.col("covered_us")) / pl.col("length_us")
    guess_wh = (pl.col("like_wh") * left).round().cast(pl.Int64)
    is_guess = is_open & ~pl.col("is_known") & ~is_dark & guess_wh.is_not_null()
    return found.with_columns(
        energy_wh=pl.when(is_dark).then(pl.col("energy_wh").fill_null(0))
        .when(is_guess).then(guess_wh).otherwise("energy_wh"),
        quality=pl.when(is_dark).then(pl.lit(IntervalQuality.POWER_FAIL.value))
        .when(is_guess).then(pl.lit(IntervalQuality.ESTIMATED.value)).otherwise("quality"),
        method=pl.when(is_dark).then(pl.lit(EstimationMethod.ZERO.value))
        .when(is_guess).then(pl.lit(EstimationMethod.LIKE_DAY.value)).otherwise("method"),
        has_reference=~is_open | is_dark | guess_wh.is_not_null(),
    ).sort("series", "interval_start")  # fmt: skip


def _checked(rows: pl.DataFrame) -> pl.DataFrame:
    """Adds the first rule that an interval does not keep, and the rules that could not be asked."""
    wh, quality = pl.col("energy_wh"), pl.col("quality")
    is_read = quality.is_in([IntervalQuality.MEASURED.value, IntervalQuality.INTERPOLATED.value]).fill_null(False)
    most_wh = pl.col("max_w") * pl.col("length_us") / (3_600 * SECOND_US) + pl.col("quantum_wh")
    read_wh = pl.when(is_read).then(wh)
    highest, third = (
        read_wh.sort(descending=True, nulls_last=True).get(place, null_on_oob=True).over("series") for place in (0, 2)
    )
    is_spike = (
        (wh == highest)
        & (highest > pl.col("spike_floor_quanta") * pl.col("quantum_wh"))
        & (highest - third > pl.col("spike_factor") * third)
    )
    imported_wh = wh.filter(pl.col("register").is_in(tables.IMPORTS)).sum().over("meter_id", "interval_start")
    run, dead = (
        pl.len().over("series", (value.ne_missing(value.shift(1)) | ~is_read).cum_sum().over("series"))
        for value in (wh, imported_wh)
    )
    is_dead = pl.col("register").is_in(tables.IMPORTS) & (imported_wh == 0) & (dead >= pl.col("zero_run"))
    is_frozen = (wh > pl.col("quantum_wh") * pl.col("spike_floor_quanta")) & (run >= pl.col("frozen_run"))
    lacking = quality.is_in([IntervalQuality.ESTIMATED.value, IntervalQuality.INCOMPLETE.value])
    rule = (
        pl.when(lacking | (quality == IntervalQuality.MISSING.value))
        .then(pl.lit(ValidationRule.GAP.value))
        .when(is_read & (wh > most_wh))
        .then(pl.lit(ValidationRule.LIMIT.value))
        .when(is_read & is_spike)
        .then(pl.lit(ValidationRule.SPIKE.value))
        .when(is_read & is_frozen)
        .then(pl.lit(ValidationRule.FROZEN.value))
        .when(is_read & is_dead)
        .then(pl.lit(ValidationRule.ZERO.value))
    )
    not_run = pl.concat_list(
        pl.when(pl.col("max_w").is_null()).then(pl.lit(ValidationRule.LIMIT.value)),
        pl.when(third.is_null()).then(pl.lit(ValidationRule.SPIKE.value)),
        pl.when(~pl.col("has_reference")).then(pl.lit(EstimationMethod.LIKE_DAY.value)),
    ).list.drop_nulls()
    return rows.with_columns(
        rule=rule, not_run=not_run, interval_end=pl.col("interval_start") + pl.duration(microseconds="length_us")
    )
