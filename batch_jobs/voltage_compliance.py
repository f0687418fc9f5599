"""Voltage quality of a local day and of the week that ends with it: by phase, meter, transformer and feeder.

Reads: readings of the seven local days that end with the date and of the day before them; registry (nominal voltage,
jurisdiction, phases, zone, transformer, feeder). From readings and not from the stream's windows: the night sees a late
reading in its place, and the meter's own count of power failures.
Writes: voltage_compliance_v2.
Key: level, meter_id, phase (of level meter null), transformer_id, feeder_id, period, norm, date.
Period: `day` is the local day, `week` the seven local days that end with it, so each night has a verdict, and that of a
Sunday is on the ISO week (167 to 169 h where clocks change).
Levels: `phase`, one with samples and each that the registry names; `meter`, its phases together, complies where all do
that had a voltage, and its counts are its worst phase's; `transformer`, `feeder`: its meters, how many are judged and
comply, and the worst, the one with the largest share outside, if any has one.
Windows: ten minutes, by `metering/voltage/windows.py`; each belongs to the local day in which it begins. `windows`
have a sample, `valid_windows` had no interruption (no power failure counted across them, no sample below 5 % of
nominal) and are the ones judged; the voltages, percentiles and the counts per band are theirs alone. Bands are those of
the meter's jurisdiction, where the stream has some. A phase that the registry does not have, or that had no voltage in
these days, has no windows.
Norm: by `metering/voltage/norms.py`: `judged_windows` (N) of which `outside_windows` lie outside its inner band (EN
50160: N1; PRODIST: nlp, precarious) and `beyond_windows` beyond its outer (N2; nlc, critical), the shares in % (DRP,
DRC), and `complies`: null where nobody knows (a week of less than 95 % of its windows, spans without power aside; fewer
than PRODIST's 1008 valid windows, which it takes from the day before where some are invalid; no nominal voltage or no
jurisdiction that is known). Of a day it is a view on the windows there are: norms are rules over a week.
Sags and swells: the rise of the meter's own counters since the last reading before the period; null where it has none.
A dip shorter than the interval between readings cannot be seen in the voltages: only these counters tell.
Lateness: run the date again when readings of it or of its week came after its night.
Duplicates: of one (meter_id, observed_at) the first received counts; impossible clocks are left out.
Restart: run it again; the date is replaced as a whole.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path

import polars as pl
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from engine.night import SHARDS, BatchJob, midnight, per_shard, with_local_day, with_silent
from engine.night_run import command
from metering.deduplication import with_seen
from metering.voltage.norms import ALL_PHASES, JUDGED, NO_NORM, NORMS_OF, OF_PHASE, WINDOW_COLUMNS, judged, norm_names
from metering.voltage.windows import (
    A_VOLTAGE_MV,
    JURISDICTIONS,
    LIVE,
    VOLTAGES,
    WINDOW,
    window_start,
    windows,
    with_live,
)
from schemas import tables
from schemas.closed_lists import Band, ComplianceLevel, Period

DAYS_BEFORE = 7
"""Six for the week; one for the counters before it, and for windows that take the place of invalid ones."""
KNOWN = ["phases", "nominal_mv", "jurisdiction", "time_zone"]
COUNTERS = {"sags": "sag_count", "swells": "swell_count"}
COUNTER_COLUMNS = [f"{counter}_{phase.lower()}" for counter in COUNTERS.values() for phase in tables.PHASES]
BANDS = {f"{band.value}_windows": band for band in (Band.LOW, Band.HIGH, Band.VERY_LOW, Band.VERY_HIGH)}
WINDOW_S = int(WINDOW.total_seconds())
WITHIN_PCT = 10.0
INTERRUPTED_BELOW_PCT = 5  # EN 50160: an interruption is a voltage below 5 % of the reference
VOLTAGES_MV = ["min_mv", "max_mv", "mean_mv"]
OF_GROUPS = {
    "meters": "long", "judged_meters": "long", "complying_meters": "long", "complying_pct": "double",
    "worst_meter_id": "string",
}  # fmt: skip
STARTS = ["week_start", "read_from"]
FOUND = tables.arrow_of(pl.Schema({**JUDGED, **dict.fromkeys([*BANDS, "within_windows", *COUNTERS], pl.Int64())}))


def found(readings: pl.DataFrame) -> pl.DataFrame:
    """Verdicts, voltages and counters per meter, phase, period and norm, columns `FOUND`.

    Args:
        readings: of the week and before it, with the columns of the registry, day_start, day_end, week_start,
            read_from.
    """
    marked = with_seen(readings, readings.clear(), ["meter_id", "observed_at"], VOLTAGES)
    originals, _ = with_live(marked.filter(pl.col("seen").is_null()), LIVE.to_frame())
    originals = originals.sort("meter_id", "observed_at")
    samples = originals.filter((window_start() >= pl.col("read_from")) & (window_start() < pl.col("day_end")))
    failures = _rises(originals, "power_failure_count").filter(pl.col("rise") > 0)
    failed = pl.concat(
        [failures.select("meter_id", window_start=window_start(at)) for at in ("observed_at", "before_at")]
    ).unique()
    dark = failures.select("meter_id", begin_at=window_start("before_at") + WINDOW, end_at=window_start()).filter(
        pl.col("begin_at") < pl.col("end_at")
    )
    floor = (pl.col("nominal_mv").first() * INTERRUPTED_BELOW_PCT / 100).fill_null(A_VOLTAGE_MV)
    floors = readings.group_by("meter_id").agg(floor_mv=floor)
    exact_mv = (pl.col("nominal_mv") * (1 + pl.col("deviation_pct") / 100)).round(6)
    marks = (
        windows(samples)
        .join(failed.with_columns(has_failed=pl.lit(True)), on=["meter_id", "window_start"], how="left")
        .join(floors, on="meter_id")
        .join(readings.select("meter_id", "nominal_mv", "jurisdiction").unique("meter_id"), on="meter_id")
        .with_columns(
            is_valid=pl.col("has_failed").is_null() & (pl.col("min_mv") >= pl.col("floor_mv")),
            exact_mv=pl.coalesce(exact_mv, pl.col("mean_mv").cast(pl.Float64)),
        )
        .select(*WINDOW_COLUMNS, "deviation_pct", "band")
    )
    periods = _periods(readings)
    in_period = marks.join(periods, on="meter_id").filter(
        (pl.col("window_start") >= pl.col("period_start")) & (pl.col("window_start") < pl.col("period_end"))
    )
    is_valid = pl.col("is_valid")
    bands = in_period.group_by(OF_PHASE).agg(
        within_windows=(is_valid & pl.col("deviation_pct").is_between(-WITHIN_PCT, WITHIN_PCT)).sum(),
        **{name: (is_valid & (pl.col("band") == band.value)).sum() for name, band in BANDS.items()},
    )
    counters = _counted(originals, periods).join(norm_names(readings), on="meter_id")
    rows = judged(marks, dark, periods).join(bands, on=OF_PHASE, how="left")
    return rows.join(counters, on=[*OF_PHASE, "norm"], how="full", coalesce=True).with_columns(
        pl.col("level").fill_null(ComplianceLevel.PHASE.value)
    )


def _periods(readings: pl.DataFrame) -> pl.DataFrame:
    """Day and week of each meter."""
    meters = readings.unique("meter_id")
    starts = {Period.DAY: "day_start", Period.WEEK: "week_start"}
    return pl.concat(
        [
            meters.select("meter_id", period=pl.lit(period.value), period_start=start, period_end="day_end")
            for period, start in starts.items()
        ]
    )


def _counted(originals: pl.DataFrame, periods: pl.DataFrame) -> pl.DataFrame:
    """Sags and swells of each meter, phase and period; null where a phase's counter says nothing."""
    is_read = (pl.col("observed_at") > pl.col("period_start")) & (pl.col("observed_at") <= pl.col("period_end"))
    counted = [
        _rises(originals, f"{counter}_{phase.lower()}")
        .join(periods, on="meter_id")
        .filter(is_read)
        .group_by("meter_id", "period")
        .agg(pl.col("rise").sum(), phase=pl.lit(phase), kind=pl.lit(name))
        for name, counter in COUNTERS.items()
        for phase in tables.PHASES
    ]
    of_kind = [
        pl.when((pl.col("kind") == name).any()).then(pl.col("rise").filter(pl.col("kind") == name).sum()).alias(name)
        for name in COUNTERS
    ]
    return pl.concat(counted).group_by(OF_PHASE).agg(of_kind)


def _rises(readings: pl.DataFrame, counter: str) -> pl.DataFrame:
    """Rise of a counter since the reading before, 0 where it fell or the equipment changed: an event is an increase."""
    value, equipment = pl.col(counter), pl.col("equipment_id")
    rise = value.diff().over("meter_id")
    is_rise = (rise > 0) & equipment.eq_missing(equipment.shift(1).over("meter_id"))
    counted = readings.select("meter_id", "observed_at", "equipment_id", counter)
    return counted.filter(value.is_not_null()).with_columns(
        before_at=pl.col("observed_at").shift(1).over("meter_id"), rise=pl.when(is_rise).then(rise).otherwise(0)
    )


def transform(lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
    """A day's voltage; see the module."""
    columns = ["meter_id", "observed_at", "run_id", "equipment_id", "topic", "partition", "offset"]
    starts = dict(zip(STARTS, (_midnight_before(date, days) for days in (DAYS_BEFORE - 1, DAYS_BEFORE)), strict=True))
    readings = (
        with_local_day(lake["readings"], registry, date, *KNOWN)
        .withColumns(starts)
        .where(F.col("observed_at") < F.col("day_end") + F.expr(f"interval {WINDOW_S} seconds"))
        .select(*columns, *VOLTAGES, *COUNTER_COLUMNS, "power_failure_count", *KNOWN, "day_start", "day_end", *STARTS)
    )
    results = per_shard(readings, found, FOUND, shards=SHARDS * (DAYS_BEFORE + 1))
    has_nominal = F.col("nominal_mv").isNotNull()
    has_bands = has_nominal & F.col("jurisdiction").isin(JURISDICTIONS)
    is_phase, has_norm = F.col("level") == ComplianceLevel.PHASE.value, F.col("norm") != NO_NORM
    within_pct = F.col("within_windows") / F.col("valid_windows") * 100
    numbers = ["windows", "valid_windows", "judged_windows"]
    meters = (
        with_silent(results, _expected(registry), registry, date, *KNOWN, "transformer_id", "feeder_id")
        .fillna(0, [*numbers, *BANDS, "within_windows"])
        .withColumn(
            "period_start",
            F.when(F.col("period") == Period.DAY.value, F.col("day_start")).otherwise(
                _midnight_before(date, DAYS_BEFORE - 1)
            ),
        )
        .withColumns({name: F.when(is_phase & has_bands, F.col(name)) for name in BANDS})
        .withColumn("within_10pct_pct", F.when(is_phase & (F.col("valid_windows") > 0) & has_nominal, within_pct))
        .withColumn("period_s", F.unix_seconds("day_end") - F.unix_seconds("period_start"))
        .withColumn("expected_windows", F.floor(F.col("period_s") / WINDOW_S))
        .withColumn("is_complete", F.coalesce("is_complete", F.lit(False)))
        .withColumns({name.replace("_mv", "_v"): _volts(name) for name in VOLTAGES_MV})
        .withColumn("phase", F.nullif("phase", F.lit(ALL_PHASES)))
        .withColumn("norm", F.when(has_norm, F.col("norm")))
        .withColumns({name: F.lit(None).cast(kind) for name, kind in OF_GROUPS.items()})
    )
    groups = [_groups(meters, level) for level in (ComplianceLevel.TRANSFORMER, ComplianceLevel.FEEDER)]
    names = tables.REPORTS[JOB.report].names
    rows = meters.select(names)
    for group in groups:
        rows = rows.unionByName(group, allowMissingColumns=True)
    return rows.select(names)


def _midnight_before(date: datetime.date, days: int) -> Column:
    """Begin of a local day before the date, by `time_zone`."""
    return midnight(date - datetime.timedelta(days=days), F.col("time_zone"))


def _expected(registry: DataFrame) -> DataFrame:
    """A row for each phase and each meter of the registry, period and norm."""
    norms = F.lit(NO_NORM)
    of_jurisdiction = F.array(norms)
    for jurisdiction, names in NORMS_OF.items():
        those = F.array(*[F.lit(name) for name in names])
        of_jurisdiction = F.when(F.col("jurisdiction") == jurisdiction, those).otherwise(of_jurisdiction)
    meter, phase = F.lit(ComplianceLevel.METER.value), F.lit(ComplianceLevel.PHASE.value)
    phases = F.transform(F.split("phases", ","), lambda name: F.struct(phase.alias("level"), name.alias("phase")))
    whole = F.array(F.struct(meter.alias("level"), F.lit(ALL_PHASES).alias("phase")))
    each = F.concat(F.coalesce(phases, F.array().cast("array<struct<level:string,phase:string>>")), whole)
    return (
        registry.select("meter_id", F.explode(each).alias("what"), of_jurisdiction.alias("norms"))
        .select("meter_id", "what.*", F.explode("norms").alias("norm"))
        .select("*", F.explode(F.array(*[F.lit(period.value) for period in Period])).alias("period"))
    )


def _groups(meters: DataFrame, level: ComplianceLevel) -> DataFrame:
    """Meters of each transformer, or feeder, by period and norm: how many comply, and the worst of them."""
    group = f"{level.value}_id"
    of_meter = (F.col("level") == ComplianceLevel.METER.value) & F.col(group).isNotNull() & F.col("norm").isNotNull()
    share = F.col("outside_pct") + F.col("beyond_pct")
    feeder = [] if group == "feeder_id" else [F.max("feeder_id").alias("feeder_id")]
    return (
        meters.where(of_meter)
        .groupBy(group, "period", "norm")
        .agg(
            *feeder,
            *[F.min(name).alias(name) for name in ("period_start", "day_start")],
            F.max("day_end").alias("day_end"),
            F.count("meter_id").alias("meters"),
            F.count("complies").alias("judged_meters"),
            F.count_if("complies").alias("complying_meters"),
            F.min_by("meter_id", F.when(share > 0, F.struct(-share, "meter_id"))).alias("worst_meter_id"),
            *[F.max(name).alias(name) for name in ("outside_pct", "beyond_pct", "max_mv", "max_v", "p99_mv")],
            *[F.min(name).alias(name) for name in ("min_mv", "min_v", "p1_mv")],
        )
        .withColumn("level", F.lit(level.value))
        .withColumn("complying_pct", F.expr("try_divide(complying_meters, judged_meters) * 100"))
    )


def _volts(millivolts: str) -> Column:
    """Null for what no meter measures, which its millivolts show."""
    return (F.col(millivolts).try_cast("decimal(12,0)") / 1000).cast("decimal(12,3)")


JOB = BatchJob(
    name=Path(__file__).stem,
    version=2,
    reads={"readings": DAYS_BEFORE},
    transform=transform,
    refuses_impossible_clocks=("readings",),
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
