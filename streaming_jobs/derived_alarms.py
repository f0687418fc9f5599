"""Alarms that no meter raises itself: voltage out of its band, implausible load, reverse energy, silence.

Reads: meter-readings-v1; registry (nominal voltage, jurisdiction, fuse, phases, interval, transformer, feeder).
Writes: alarms (one row per change; see the table for which is an alarm's state), topic alarms-v1 (the same rows),
alarm_counts (per quarter hour, type, transformer and feeder), quarantined_readings (impossible clock), late_readings.
Key: alarm_id = f(meter, type, begin).
Lateness: a reading that is older than the newest of its meter is late; it only ends a silence.
Duplicates: told by (meter_id, observed_at) within the last offsets of a partition; later ones are late.
Restart: state (the newest reading of each meter, conditions that hold, counts that were not told) and files are keyed
by batch; alarms-v1 may get a batch twice.
A meter is silent when its run's arrivals, less the allowed lateness, are past four of its intervals (15 minutes at
least) without one of its own. When everything is silent no time passes, so the end of a run silences nobody.
"""

from pathlib import Path

import polars as pl

from engine.batch import BatchContext, Frames
from engine.stream import StreamingJob, command
from engine.watermark import CLOCK, clock
from metering import accounting
from metering.accounting import only_valid
from metering.alarms import counts, derived
from metering.clocks import is_impossible
from metering.deduplication import PLACE, is_recent, originals, with_seen
from schemas import tables
from schemas.closed_lists import Bucket
from schemas.topics import ALARMS, READINGS

IDENTITY = ["meter_id", "observed_at"]
READING = tables.polars_schema(tables.READINGS)
RECENT = pl.Schema({name: READING[name] for name in [*IDENTITY, *PLACE]})
NAME = Path(__file__).stem


def transform(rows: pl.DataFrame, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Frames:
    """Changes of alarms; see the module."""
    settings = context.settings
    valid = only_valid(rows)
    impossible = is_impossible(settings.max_ahead_s, settings.max_behind_s)
    readings = valid.select(*derived.NEEDED, *PLACE, is_impossible=impossible)
    wrong = accounting.impossible(readings)
    right = with_seen(readings.filter(~pl.col("is_impossible")), state["recent"], IDENTITY, [])
    known = registry.select(derived.KNOWN)
    result = derived.derived_alarms(right, state["meter"], state["level"], known, context.watermarks)
    judged = pl.concat([result.readings, wrong], how="diagonal")
    return {
        "alarms": result.alarms,
        "quarantined_readings": accounting.kept_apart(rows, judged, Bucket.QUARANTINED, NAME, "quarantined_readings"),
        "late_readings": accounting.kept_apart(rows, judged, Bucket.LATE, NAME, "late_readings"),
        "meter": result.meters,
        "level": result.levels,
        "recent": originals(state["recent"], right).filter(is_recent(settings.recent_records)),
        "clock": clock(valid, state["clock"], context.watermarks),
        "books": pl.concat([accounting.count(judged), accounting.invalid(rows)]),
    }


def cross_partition(handed: Frames, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Frames:
    """Counts per transformer and feeder."""
    changes = counts.placed(handed["alarms"], registry)
    counted = counts.count_alarms(changes, state["count"], context.watermarks, context.close_all)
    return {"alarm_counts": counted.rows, "count": counted.counts}


JOB = StreamingJob(
    name=NAME,
    version=3,
    topics=(READINGS,),
    writes={
        "alarms": "raised_at",
        "alarm_counts": "window_start",
        "quarantined_readings": "arrival_at",
        "late_readings": "observed_at",
    },
    sends={"alarms": ALARMS},
    state={"meter": derived.METER, "level": derived.LEVEL, "recent": RECENT, "clock": CLOCK},
    transform=transform,
    hands=("alarms",),
    cross_partition=cross_partition,
    cross_partition_state={"count": counts.COUNT},
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
