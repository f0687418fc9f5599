"""Ten-minute voltage windows per meter and phase, with deviation from nominal and band; what follows from them.

Reads: meter-readings-v1; registry (phases, nominal voltage, jurisdiction, transformer, feeder): a phase that it does
not have, or that never had a voltage, has no window; what is null there judges nothing.
Writes: voltage_windows, each once, when it is over; voltage_rollups, the same per transformer and feeder;
suspicious_meters, when a meter's phase falls out of step with its transformer's others or comes back;
voltage_events, sags and swells by the meters' own counters; quarantined_readings; late_readings.
Key: meter_id, phase, window_start; level, group_id, phase, window_start; meter_id, phase, kind, observed_at.
Lateness: a window is over when the arrivals of its run are past its end by the allowed lateness, or at a flush; a
reading for a window that is over goes to late_readings. The windows of a run are over for all its meters at once, so a
roll-up is whole; what comes after a flush makes a second one. A counter that is older than the newest one seen counts
nothing: its rise is in the newer one's.
Duplicates: by (meter_id, observed_at), in open windows and within the last offsets of a partition.
Restart: state (the samples of open windows, the newest counters, which phases have a voltage, how meters move) and
files are keyed by batch.
"""

from pathlib import Path

import polars as pl

from engine.driver import command
from engine.job import BatchContext, Frames, Output, Source, StreamingJob
from metering import accounting
from metering.deduplication import PLACE
from metering.registry import is_among
from metering.voltage import groups, windows
from schemas import tables
from schemas.closed_lists import GridLevel
from schemas.topics import READINGS

SAMPLED = ["meter_id", "observed_at", "run_id", *PLACE, *windows.VOLTAGES]
READING = tables.polars_schema(tables.READINGS)
SAMPLE = pl.Schema({**{name: READING[name] for name in SAMPLED}, "live": pl.Int64()})
CLOSED = pl.Schema({name: windows.WINDOWS[name] for name in ["meter_id", "run_id", "window_start"]})
IDENTITY = ("meter_id", "observed_at")
NAME = Path(__file__).stem


def transform(rows: pl.DataFrame, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Output:
    """Windows that are over; see the module."""
    readings, live = windows.with_live(rows, state["live"])
    closed = windows.close_windows(
        readings,
        state["sample"],
        state["closed"],
        context.watermarks,
        registry.select("meter_id", "phases", "nominal_mv", "jurisdiction"),
        context.close_all,
    )
    events, counters = windows.counted(closed.readings.filter(pl.col("seen").is_null()), state["counter"])
    return Output(
        tables={"voltage_windows": closed.windows, "voltage_events": events},
        state={"sample": closed.samples, "closed": closed.closed, "counter": counters, "live": live},
        verdicts=accounting.verdicts(closed.readings, pl.col("why")),
    )


def over(context: BatchContext) -> pl.Expr:
    """Samples of windows that are over now."""
    return windows.is_over(context.watermarks, windows.window_start())


def no_longer_early(context: BatchContext) -> pl.Expr:
    """Windows closed by a flush that would be over by now."""
    return windows.is_over(context.watermarks, pl.col("window_start"))


def cross_partition(handed: Frames, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Output:
    """Roll-ups of the windows that are over, and who is out of step."""
    if handed["voltage_windows"].is_empty():
        return Output(tables={})
    known = registry.filter(is_among(handed["voltage_windows"].get_column("meter_id").unique()))
    members = pl.concat(
        [
            known.select("meter_id", level=pl.lit(level.value), group_id=f"{level.value}_id").drop_nulls("group_id")
            for level in GridLevel
        ]
    ).with_columns(group=pl.format("{}/{}", "level", "group_id"))
    rolled = groups.roll_up(handed["voltage_windows"].join(members, on="meter_id"), state["movement"])
    return Output(
        tables={"voltage_rollups": rolled.rollups, "suspicious_meters": rolled.suspicious},
        state={"movement": rolled.movement},
    )


JOB = StreamingJob(
    name=NAME,
    version=7,
    sources=(
        Source(
            READINGS,
            transform,
            columns=(*SAMPLED, "equipment_id", *windows.COUNTERS),
            state={"sample": SAMPLE, "closed": CLOSED, "counter": windows.COUNTER, "live": windows.LIVE},
            by={"sample": IDENTITY, "closed": ("meter_id",), "counter": ("meter_id",), "live": ("meter_id",)},
            due={"sample": over, "closed": no_longer_early},
            refuses_impossible_clocks=True,
            deduplicate_on=IDENTITY,
            compares=tuple(windows.VOLTAGES),
            hands_duplicates=True,
            closes_windows=True,
        ),
    ),
    writes=("voltage_windows", "voltage_rollups", "suspicious_meters", "voltage_events"),
    hands=("voltage_windows",),
    cross_partition=cross_partition,
    cross_partition_state={"movement": groups.MOVEMENT},
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
