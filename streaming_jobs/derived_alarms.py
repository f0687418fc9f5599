"""Alarms that no meter raises itself: voltage out of its band, implausible load, reverse energy, silence.

Reads: meter-readings-v1; registry (nominal voltage, jurisdiction, fuse, phases, interval, transformer, feeder).
Writes: alarms (one row per change; see the table for which is an alarm's state), topic alarms-v1 (the same rows),
alarm_counts (per quarter hour, type, transformer and feeder), quarantined_readings (impossible clock), late_readings.
Key: alarm_id = f(meter, type, begin).
Lateness: a reading that is older than the newest of its meter is late; it only ends a silence.
Duplicates: by (meter_id, observed_at) within the last offsets of a partition; later ones are late.
Restart: state (the newest reading of each meter, conditions that hold, counts that were not written) and files are
keyed by batch; alarms-v1 may get a batch twice.
A meter is silent where four of its intervals (15 minutes at least) pass between two of its arrivals; until it is heard
again it is known when its run's arrivals, less the allowed lateness, are past that. When everything is silent no time
passes, so the end of a run silences nobody. A phase that the registry does not have, or that never had a voltage, is
judged by nothing.
"""

from pathlib import Path

import polars as pl

from engine.driver import command
from engine.job import BatchContext, Frames, Output, Source, StreamingJob
from metering.alarms import counts, derived
from schemas.closed_lists import AlarmSource
from schemas.topics import ALARMS, READINGS

NAME = Path(__file__).stem


def transform(rows: pl.DataFrame, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Output:
    """Changes of alarms; see the module."""
    known = registry.select(derived.KNOWN)
    result = derived.derived_alarms(rows, state["meter"], state["level"], known, context.watermarks)
    return Output(
        tables={"alarms": result.alarms},
        state={"meter": result.meters, "level": result.levels},
        verdicts=result.late,
    )


def silent(context: BatchContext) -> pl.Expr:
    """Meters that fall silent now."""
    return derived.is_silent(context.watermarks)


def cross_partition(handed: Frames, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Output:
    """Counts per transformer and feeder."""
    changes = counts.placed(handed["alarms"], registry)
    counted = counts.count_alarms(changes, state["count"], context.watermarks, AlarmSource.DERIVED, context.close_all)
    return Output(tables={"alarm_counts": counted.rows}, state={"count": counted.counts})


JOB = StreamingJob(
    name=NAME,
    version=5,
    sources=(
        Source(
            READINGS,
            transform,
            columns=tuple(derived.NEEDED),
            state={"meter": derived.METER, "level": derived.LEVEL},
            by={"meter": ("meter_id",), "level": ("meter_id",)},
            due={"meter": silent},
            refuses_impossible_clocks=True,
            deduplicate_on=("meter_id", "observed_at"),
            closes_windows=True,
        ),
    ),
    writes=("alarms", "alarm_counts"),
    sends={"alarms": ALARMS},
    hands=("alarms",),
    cross_partition=cross_partition,
    cross_partition_state={"count": counts.COUNT},
    shares=dict.fromkeys(("alarms", "alarm_counts"), f"source = '{AlarmSource.DERIVED}'"),
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
