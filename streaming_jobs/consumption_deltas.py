"""Energy per register step, as readings come.

Reads: meter-readings-v1; meter-events-v1 (when power failed and returned); registry (fuse, phases, nominal voltage,
interval).
Writes: consumption_deltas (one row per reading and register), interval_readings (energy per quarter hour, when a later
reading has come; of one without power 0 and power_fail), conflicts (both values), quarantined_readings (impossible
clock, conflict, implausible), late_readings (out of order), latest_readings (the newest accepted registers of each
meter: a late one changes nothing).
Key: meter_id, register, observed_at; meter_id, register, interval_start.
Lateness: the stream says out_of_order and gives no energy; a cumulative register heals itself, and the night places the
reading. A power failure that is told after the reading that ends it changes no quarter hour that was written.
Duplicates: by (meter_id, observed_at) within the last offsets of a partition, later ones are out of order; events by
all that the meter says.
Restart: state and files are keyed by batch.
"""

from pathlib import Path

import polars as pl

from engine.driver import command
from engine.job import BatchContext, Current, Frames, Output, Source, StreamingJob
from metering import accounting
from metering.alarms import power_fails
from metering.clocks import event_at
from metering.deduplication import EVENT
from metering.energy import delta_engine, intervals
from metering.registry import is_among
from schemas import tables
from schemas.topics import EVENTS, READINGS

KNOWN = ["phases", "nominal_mv", "fuse_a", "jurisdiction", "is_unlimited", "wraps_wh", "interval_s"]
VALUES = (*[f"{register}_wh" for register in tables.REGISTERS], "equipment_id")
IDENTITY = ("meter_id", "observed_at")
NAME = Path(__file__).stem


def power(rows: pl.DataFrame, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Output:
    """When meters lost their power and had it again."""
    dated = rows.with_columns(event_at(context.settings.max_ahead_s, context.settings.max_behind_s))
    return Output(tables={}, state={"edge": power_fails.edges(dated, state["edge"])})


def transform(rows: pl.DataFrame, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Output:
    """Steps of every register; see the module."""
    known = rows.join(registry.select("meter_id", *KNOWN), on="meter_id", how="left")
    default_fuse_a = pl.lit(context.settings.default_fuse_a, pl.Int64)
    readings = delta_engine.with_limits(known.with_columns(default_fuse_a=default_fuse_a))
    result = delta_engine.steps(readings, state["baseline"])
    failures = power_fails.power_fails(state["edge"])
    concerned = readings.filter(is_among(failures.get_column("meter_id").unique()))
    limits = concerned.select("meter_id", "max_w").unique("meter_id")
    failures = failures.join(limits, on="meter_id", how="left")
    quarters = intervals.quarter_hours(result.steps, state["open"], result.baseline, failures)
    return Output(
        tables={
            "consumption_deltas": result.steps,
            "interval_readings": quarters.rows,
            "conflicts": delta_engine.conflicts(result.steps, readings, state["baseline"]),
        },
        state={"baseline": result.baseline, "open": quarters.open},
        verdicts=accounting.verdicts(delta_engine.with_why(readings, result.steps), pl.col("why")),
    )


def latest(baselines: pl.DataFrame) -> pl.DataFrame:
    """The newest accepted registers of each meter, wide."""
    registers = {
        f"{register}_wh": pl.col("previous_wh").filter(pl.col("register") == register).max()
        for register in tables.REGISTERS
    }
    newest = [pl.col(name).sort_by("previous_at").last() for name in ("equipment_id", "run_id")]
    return (
        baselines.sort("meter_id")
        .group_by("meter_id", maintain_order=True)
        .agg(*newest, observed_at=pl.col("previous_at").max(), **registers)
    )


JOB = StreamingJob(
    name=NAME,
    version=6,
    sources=(
        Source(
            EVENTS,
            power,
            columns=(*EVENT, "dialect_version", "arrival_at"),
            state={"edge": power_fails.EDGE},
            by={"edge": ("meter_id",)},
            deduplicate_on=EVENT,
        ),
        Source(
            READINGS,
            transform,
            columns=(*IDENTITY, "run_id", "dialect", *VALUES),
            state={"baseline": delta_engine.BASELINE, "open": intervals.OPEN},
            by={"baseline": ("meter_id",), "open": ("meter_id",)},
            refuses_impossible_clocks=True,
            deduplicate_on=IDENTITY,
            compares=VALUES,
            hands_duplicates=True,
            beside=("edge",),
        ),
    ),
    writes=("consumption_deltas", "interval_readings", "conflicts"),
    current={"latest_readings": Current("baseline", latest)},
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
