"""Voltage quality per meter, phase and local day, from readings and not from the stream's windows.

Reads: readings of the UTC days that the local day can touch; registry (nominal voltage, jurisdiction, phases, zone).
Writes: voltage_compliance_v1, a row for each phase with samples and each that the registry names.
Key: meter_id, phase, date.
Windows: ten minutes, by `metering/voltage/windows.py`; each belongs to the local day in which it begins. `windows`
have a sample, `valid_windows` had no interruption (no power failure counted across them, no sample below 5 % of
nominal) and are the ones judged; the voltages and the counts per band are theirs alone. Bands are those of the meter's
jurisdiction. Without a nominal voltage, or with a jurisdiction that nobody knows, nothing is judged: null. A phase that
the registry does not have, or that had no voltage in these days, has no windows.
EN 50160 is a rule over a week, `week_windows` = 1008: `en50160_day_compliant` is its one-day view on the windows there
are (at least 95 % within ±10 %, all within +10 / −15 %), null where nothing was judged or another standard applies.
Sags and swells: the rise of the meter's own counters since the last reading before the day; null where it has none.
A dip shorter than the interval between readings cannot be seen in the voltages: only these counters tell.
Lateness: the night sees a late reading in its place; run the date again when readings of it came after its night.
Duplicates: of one (meter_id, observed_at) the first received counts; impossible clocks are left out.
Restart: run it again; the date is replaced as a whole.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from engine.night import BatchJob, command, day_s, per_shard, with_local_day, with_silent
from metering.clocks import is_begun_in_day, is_read_in_day
from metering.deduplication import with_seen
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
from schemas.closed_lists import Band

KNOWN = ["phases", "nominal_mv", "jurisdiction"]
EN50160 = "EN50160"
COUNTERS = {"sags": "sag_count", "swells": "swell_count"}
COUNTER_COLUMNS = [f"{counter}_{phase.lower()}" for counter in COUNTERS.values() for phase in tables.PHASES]
BANDS = {f"{band.value}_windows": band for band in (Band.LOW, Band.HIGH, Band.VERY_LOW, Band.VERY_HIGH)}
WINDOW_S = int(WINDOW.total_seconds())
WEEK_WINDOWS = 7 * 24 * 3600 // WINDOW_S  # the N of EN 50160
WITHIN_PCT = 10.0  # EN 50160: 95 % of the windows within ±10 %
NEEDED_PCT = 95.0
INTERRUPTED_BELOW_PCT = 5  # EN 50160: an interruption is a voltage below 5 % of the reference
VOLTAGES_MV = ["min_mv", "max_mv", "mean_mv"]
NUMBERS = ["windows", "valid_windows", *BANDS, "within_windows"]
DAYS = pa.schema(
    [
        pa.field("meter_id", pa.string()),
        pa.field("phase", pa.string()),
        *[pa.field(name, pa.int64()) for name in [*NUMBERS, *VOLTAGES_MV, *COUNTERS]],
    ]
)


def days(readings: pl.DataFrame) -> pl.DataFrame:
    """Windows, voltages and counters per meter and phase, columns `DAYS`.

    Args:
        readings: of the day and before it, with the columns of the registry, day_start and day_end.
    """
    marked = with_seen(readings, readings.clear(), ["meter_id", "observed_at"], VOLTAGES)
    originals, _ = with_live(marked.filter(pl.col("seen").is_null()), LIVE.to_frame())
    originals = originals.sort("meter_id", "observed_at")
    samples = originals.filter(is_begun_in_day(window_start()))
    failures = _rises(originals, "power_failure_count").filter(pl.col("rise") > 0)
    failed = pl.concat(
        [failures.select("meter_id", window_start=window_start(at)) for at in ("observed_at", "before_at")]
    ).unique()
    floor = (pl.col("nominal_mv").first() * INTERRUPTED_BELOW_PCT / 100).fill_null(A_VOLTAGE_MV)
    floors = readings.group_by("meter_id").agg(floor_mv=floor)
    found = (
        windows(samples)
        .join(failed.with_columns(has_failed=pl.lit(True)), on=["meter_id", "window_start"], how="left")
        .join(floors, on="meter_id")
    )
    valid = pl.col("has_failed").is_null() & (pl.col("min_mv") >= pl.col("floor_mv"))
    judged = found.with_columns(valid=valid).group_by("meter_id", "phase").agg(
        windows=pl.len(),
        valid_windows=pl.col("valid").sum(),
        within_windows=(pl.col("valid") & pl.col("deviation_pct").is_between(-WITHIN_PCT, WITHIN_PCT)).sum(),
        **{name: (pl.col("valid") & (pl.col("band") == band.value)).sum() for name, band in BANDS.items()},
        min_mv=pl.col("min_mv").filter("valid").min(),
        max_mv=pl.col("max_mv").filter("valid").max(),
        mean_mv=pl.col("mean_mv").filter("valid").mean().round(0).cast(pl.Int64),
    )  # fmt: skip
    counted = [
        _rises(originals, f"{counter}_{phase.lower()}")
        .filter(is_read_in_day())
        .select("meter_id", "rise", phase=pl.lit(phase), kind=pl.lit(name))
        for name, counter in COUNTERS.items()
        for phase in tables.PHASES
    ]
    of_kind = [
        pl.when((pl.col("kind") == name).any()).then(pl.col("rise").filter(pl.col("kind") == name).sum()).alias(name)
        for name in COUNTERS
    ]
    counters = pl.concat(counted).group_by("meter_id", "phase").agg(of_kind)
    return judged.join(counters, on=["meter_id", "phase"], how="full", coalesce=True)


def _rises(readings: pl.DataFrame, counter: str) -> pl.DataFrame:
    """Rise of a counter since the reading before, 0 where it fell or the equipment changed: an event is an increase."""
    value, equipment = pl.col(counter), pl.col("equipment_id")
    rise = value.diff().over("meter_id")
    is_rise = (rise > 0) & equipment.eq_missing(equipment.shift(1).over("meter_id"))
    return readings.filter(value.is_not_null()).with_columns(
        before_at=pl.col("observed_at").shift(1).over("meter_id"), rise=pl.when(is_rise).then(rise).otherwise(0)
    )


def transform(lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
    """A day's voltage; see the module."""
    columns = ["meter_id", "observed_at", "run_id", "equipment_id", "topic", "partition", "offset"]
    readings = (
        with_local_day(lake["readings"], registry, date, *KNOWN)
        .where(F.col("observed_at") < F.col("day_end") + F.expr(f"interval {WINDOW_S} seconds"))
        .select(*columns, *VOLTAGES, *COUNTER_COLUMNS, "power_failure_count", *KNOWN, "day_start", "day_end")
    )
    results = per_shard(readings, days, DAYS)
    phases = registry.select("meter_id", F.explode(F.split("phases", ",")).alias("phase"))
    within_pct = F.col("within_windows") / F.col("valid_windows") * 100
    is_outside = (F.col("very_low_windows") > 0) | (F.col("very_high_windows") > 0)
    has_nominal = F.col("nominal_mv").isNotNull()
    is_judged = (F.col("valid_windows") > 0) & has_nominal & (F.col("jurisdiction") == EN50160)
    has_bands = has_nominal & F.col("jurisdiction").isin(JURISDICTIONS)
    return (
        with_silent(results, phases, registry, date, *KNOWN, "transformer_id", "feeder_id")
        .fillna(0, NUMBERS)
        .withColumn("within_10pct_pct", F.when((F.col("valid_windows") > 0) & has_nominal, within_pct))
        .select(
            "meter_id",
            "phase",
            "transformer_id",
            "feeder_id",
            "jurisdiction",
            "nominal_mv",
            "day_start",
            "day_end",
            "windows",
            "valid_windows",
            F.floor(day_s() / WINDOW_S).alias("expected_windows"),
            F.lit(WEEK_WINDOWS).cast("long").alias("week_windows"),
            *[F.when(has_bands, F.col(name)).alias(name) for name in BANDS],
            *VOLTAGES_MV,
            *[_volts(name).alias(name.replace("_mv", "_v")) for name in VOLTAGES_MV],
            "within_10pct_pct",
            F.when(is_judged, (F.col("within_10pct_pct") >= NEEDED_PCT) & ~is_outside).alias("en50160_day_compliant"),
            *COUNTERS,
        )
    )


def _volts(millivolts: str) -> Column:
    """Null for what no meter measures, which its millivolts show."""
    return (F.col(millivolts).try_cast("decimal(12,0)") / 1000).cast("decimal(12,3)")


JOB = BatchJob(
    name=Path(__file__).stem,
    version=1,
    reads={"readings": 0},
    transform=transform,
    refuses_impossible_clocks=("readings",),
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
