"""Energy per meter and local day, from the registers: one wide row a meter.

Reads: readings of the UTC days that the local day can touch, and of the week before the last of each UTC day; of a
meter that was silent for longer the steps that the stream has of the day, which know its last accepted value, however
old; registry (fuse, phases, nominal voltage, interval, time zone).
Writes: daily_consumption_v1, a row for each meter with readings and each that the registry expects.
Key: meter_id, date.
Energy: the steps of `metering/energy/delta_engine.py` that end in the day, from the last accepted reading at or before
local midnight; disputed series are judged from both sides (`metering/energy/agreement.py`), and the day is not
`measured` then. A reading exactly at midnight ends the earlier day; where there is none, the whole step across midnight
counts to the day in which it ends (validated intervals interpolate). The days of a series add up to its register
exactly.
`import_wh` and `export_wh` sum the registers up; where one that the meter had before the day has no energy in it they
are null: what is absent is not 0.
`<register>_from_wh` is the value the day is counted from, `<register>_to_wh` the last in it; gaps, resets and the like
count the times at which any register has such a step.
Quality: `missing`, no energy known · `measured` · `incomplete`, energy of another time or none for part of the day: no
reading before the day, a gap across one of its midnights, a reset, a meter exchange, a glitch or a conflict; of a
register that was summed from intervals any gap, for what was lost is in none of its steps.
Lateness: the night sees a late reading in its place; run the date again when readings of it came after its night.
Duplicates: of one (meter_id, observed_at) the first received counts; impossible clocks are left out.
Restart: run it again; the date is replaced as a whole.
"""

import datetime
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import polars as pl
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from engine.day_readings import DAYS_BEFORE, REGISTERS_WH, VALUES, readings_around
from engine.night import BatchJob, day_s, per_shard, with_silent
from engine.night_run import command
from metering.clocks import is_read_in_day
from metering.deduplication import with_seen
from metering.energy import delta_engine
from metering.energy.agreement import agreed
from metering.energy.walk import GAP_FACTOR
from schemas import tables
from schemas.closed_lists import ACCEPTED_DELTAS, DeltaReason
from schemas.codec import TIMESTAMP

COUNTS = {
    "gaps": DeltaReason.GAP,
    "resets": DeltaReason.RESET,
    "rollovers": DeltaReason.ROLLOVER,
    "exchanges": DeltaReason.METER_EXCHANGE,
    "implausible": DeltaReason.GLITCH,
}
NUMBERS = ["readings", "duplicates", "conflicts", *COUNTS]
SPANS = [f"{register}_{end}_wh" for register in tables.REGISTERS for end in ("from", "to")]
DAYS = pa.schema(
    [
        pa.field("meter_id", pa.string()),
        *[pa.field(name, TIMESTAMP) for name in ("from_at", "to_at")],
        *[pa.field(name, pa.int64()) for name in [*REGISTERS_WH, *SPANS, *NUMBERS]],
        *[pa.field(name, pa.bool_()) for name in ("is_whole", "lacks_import", "lacks_export")],
    ]
)


class Quality(StrEnum):
    """What a day's energy is worth."""

    MEASURED = "measured"
    INCOMPLETE = "incomplete"
    MISSING = "missing"


def days(readings: pl.DataFrame) -> pl.DataFrame:
    """Energy and counts per meter, columns `DAYS`.

    Args:
        readings: of the day and before and after it, with the columns of the registry, day_start and day_end.
    """
    marked = with_seen(
        delta_engine.with_limits(readings), readings.clear(), ["meter_id", "observed_at"], VALUES
    )  # fmt: skip
    done = delta_engine.steps(marked, pl.DataFrame(schema=delta_engine.BASELINE), agreed).steps
    edges = readings.group_by("meter_id").agg(
        pl.col("day_start", "day_end", "interval_s").first(),
        is_summed=pl.col("dialect").is_in(delta_engine.SUMMED).any(),
    )
    at, reason = pl.col("observed_at"), pl.col("reason")
    in_day = is_read_in_day()
    steps_of_day = done.join(edges, on="meter_id").filter(in_day).sort("meter_id", "observed_at")
    is_accepted = reason.is_in([accepted.value for accepted in ACCEPTED_DELTAS])
    is_first = reason == DeltaReason.FIRST.value
    since_at = pl.coalesce("previous_at", "observed_at")
    energies, spans = [], []
    for register in tables.REGISTERS:
        mine = (pl.col("register") == register) & is_accepted
        counted = mine & ~is_first
        energies.append(pl.when(counted.any()).then(pl.col("delta_wh").filter(counted).sum()).alias(f"{register}_wh"))
        spans.append(pl.coalesce("previous_wh", "wh").filter(mine).first().alias(f"{register}_from_wh"))
        spans.append(pl.col("wh").filter(mine).last().alias(f"{register}_to_wh"))
    crosses = (reason == DeltaReason.GAP.value) & (pl.col("previous_at") < pl.col("day_start"))
    span = at - pl.col("previous_at")  # channels of one meter may have other lengths
    is_lost = pl.col("is_summed") & (span > GAP_FACTOR * span.median().over("meter_id", "register"))
    wrong = [DeltaReason.RESET, DeltaReason.METER_EXCHANGE, DeltaReason.GLITCH, DeltaReason.CONFLICT]
    breaks = is_first | crosses | is_lost | reason.is_in([each.value for each in wrong])
    left_s = (pl.col("day_end").first() - at.filter(is_accepted).max()).dt.total_seconds()
    ends_early = (left_s > GAP_FACTOR * pl.col("interval_s").first()).fill_null(False)
    energy = steps_of_day.group_by("meter_id").agg(
        *energies,
        *spans,
        *[at.filter(reason == kind.value).n_unique().alias(name) for name, kind in COUNTS.items()],
        from_at=since_at.filter(is_accepted).min(),
        to_at=at.filter(is_accepted).max(),
        is_whole=~(breaks.any() | ends_early),
    )
    seen = pl.col("seen")
    counts = (
        marked.filter(in_day)
        .group_by("meter_id")
        .agg(
            readings=seen.is_null().sum(),
            duplicates=(seen == DeltaReason.DUPLICATE.value).sum(),
            conflicts=(seen == DeltaReason.CONFLICT.value).sum(),
        )
    )
    was_there = done.join(edges, on="meter_id").filter(is_accepted & (at <= pl.col("day_start")))
    known = was_there.group_by("meter_id").agg(
        (pl.col("register") == register).any().alias(f"had_{register}") for register in tables.REGISTERS
    )
    days = counts.join(energy, on="meter_id", how="left").join(known, on="meter_id", how="left")
    lacks = {
        name: pl.any_horizontal(
            pl.col(f"had_{register}") & pl.col(f"{register}_wh").is_null() for register in registers
        )
        for name, registers in (("lacks_import", tables.IMPORTS), ("lacks_export", tables.EXPORTS))
    }
    return days.with_columns(**lacks)


def transform(lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
    """A day's energy; see the module."""
    readings = readings_around(lake, registry, date)
    results = per_shard(readings, days, DAYS)
    imports, exports = _sum(tables.IMPORTS), _sum(tables.EXPORTS)
    is_known = F.coalesce(*REGISTERS_WH).isNotNull()
    quality = (
        F.when(~is_known, Quality.MISSING.value)
        .when(F.col("is_whole") & ~F.col("lacks_import") & ~F.col("lacks_export"), Quality.MEASURED.value)
        .otherwise(Quality.INCOMPLETE.value)
    )
    return (
        with_silent(results, registry.select("meter_id"), registry, date, "usage_point_id", "interval_s")
        .fillna(0, NUMBERS)
        .fillna(False, ["lacks_import", "lacks_export"])
        .withColumn("import_wh", F.when(~F.col("lacks_import"), imports))
        .withColumn("export_wh", F.when(~F.col("lacks_export"), exports))
        .select(
            "meter_id",
            "usage_point_id",
            "day_start",
            "day_end",
            *REGISTERS_WH,
            "import_wh",
            "export_wh",
            _kwh("import_wh").alias("import_kwh"),
            _kwh("export_wh").alias("export_kwh"),
            "from_at",
            "to_at",
            *SPANS,
            "readings",
            F.floor(day_s() / F.col("interval_s")).alias("expected_readings"),
            *NUMBERS[1:],
            quality.alias("quality"),
        )
    )


def _sum(registers: Sequence[str]) -> Column:
    """Sum of registers, null where all are absent."""
    columns = [f"{register}_wh" for register in registers]
    known = [F.coalesce(F.col(name), F.lit(0)) for name in columns]
    return F.when(F.coalesce(*columns).isNotNull(), sum(known[1:], known[0]))


def _kwh(wh: str) -> Column:
    return (F.col(wh).cast("decimal(18,0)") / 1000).cast("decimal(18,3)")


JOB = BatchJob(
    name=Path(__file__).stem,
    version=1,
    reads={"readings": DAYS_BEFORE, "consumption_deltas": 0},
    transform=transform,
    refuses_impossible_clocks=("readings",),
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
