"""Energy per register step, as readings come.

Reads: meter-readings-v1; registry (fuse, phases, nominal voltage, interval).
Writes: consumption_deltas (one row per reading and register), interval_readings (energy per quarter hour, when a later
reading has come), conflicts (both values), quarantined_readings (impossible clock, conflict, implausible),
late_readings (out of order), latest_readings (the newest accepted registers of each meter: a late one changes nothing).
Key: meter_id, register, observed_at; meter_id, register, interval_start.
Lateness: the stream says out_of_order and gives no energy; a cumulative register heals itself, and the night places the
reading.
Duplicates: told by (meter_id, observed_at) within the last offsets of a partition; later ones are out of order.
Restart: state and files are keyed by batch.
"""

from pathlib import Path

import polars as pl

from engine.batch import BatchContext, Frames
from engine.stream import StreamingJob, command
from metering import accounting
from metering.accounting import only_valid
from metering.clocks import is_impossible
from metering.deduplication import PLACE, is_recent, originals, with_seen
from metering.energy import delta_engine, intervals
from schemas import tables
from schemas.closed_lists import Bucket
from schemas.topics import READINGS

KNOWN = ["phases", "nominal_mv", "fuse_a", "interval_s"]
VALUES = [*[f"{register}_wh" for register in tables.REGISTERS], "equipment_id"]
IDENTITY = ["meter_id", "observed_at"]
NEEDED = [*IDENTITY, "run_id", "dialect", *PLACE, *VALUES]
READING = tables.polars_schema(tables.READINGS)
RECENT = pl.Schema({name: READING[name] for name in [*IDENTITY, *PLACE, *VALUES]})
NAME = Path(__file__).stem


def transform(rows: pl.DataFrame, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Frames:
    """Steps of every register; see the module."""
    settings = context.settings
    impossible = is_impossible(settings.max_ahead_s, settings.max_behind_s)
    readings = (
        only_valid(rows)
        .select(*NEEDED, is_impossible=impossible)
        .join(registry.select("meter_id", *KNOWN), on="meter_id", how="left")
    )
    wrong = accounting.impossible(readings)
    right = delta_engine.with_limits(readings.filter(~pl.col("is_impossible")))
    right = with_seen(right, state["recent"], IDENTITY, VALUES)
    result = delta_engine.steps(right, state["baseline"])
    quarters = intervals.quarter_hours(result.steps, state["open"], result.baseline)
    known = originals(state["recent"], right)
    judged = pl.concat([delta_engine.with_bucket(right, result.steps), wrong], how="diagonal")
    return {
        "consumption_deltas": result.steps,
        "interval_readings": quarters.rows,
        "conflicts": delta_engine.conflicts(result.steps, known, state["baseline"]),
        "quarantined_readings": accounting.kept_apart(rows, judged, Bucket.QUARANTINED, NAME, "quarantined_readings"),
        "late_readings": accounting.kept_apart(rows, judged, Bucket.LATE, NAME, "late_readings"),
        "latest_readings": latest(result.baseline),
        "baseline": result.baseline,
        "recent": known.filter(is_recent(settings.recent_records)),
        "open": quarters.open,
        "books": pl.concat([accounting.count(judged), accounting.invalid(rows)]),
    }


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
    version=2,
    topics=(READINGS,),
    writes={
        "consumption_deltas": "observed_at",
        "interval_readings": "interval_start",
        "conflicts": "observed_at",
        "quarantined_readings": "arrival_at",
        "late_readings": "observed_at",
    },
    current=("latest_readings",),
    state={"baseline": delta_engine.BASELINE, "recent": RECENT, "open": intervals.OPEN},
    transform=transform,
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
