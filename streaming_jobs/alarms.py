"""Alarms from what meters say: one alarm per meter and type, raised, repeated, cleared; and outages, and counts.

Reads: meter-events-v1; alarm-commands-v1 (acknowledgements); registry (transformer, feeder).
Writes: alarms (one row per change; see the table for which is an alarm's state), topic alarms-v1 (the same rows),
outages (power failures of several meters under one transformer), alarm_counts (per quarter hour, type, transformer and
feeder), event_counts (the same of events whose code is counted and raises nothing), alarm_acknowledgements (the first
of an alarm counts), dead_letters (commands that cannot be decoded), quarantined_events (no table has the code, or a
status bit is neither set nor clear), late_events.
Key: alarm_id = f(meter, type, begin); outage_id = f(transformer, begin).
Lateness: an event older than the newest change of its alarm is late and changes nothing.
Duplicates: told by meter, time, sender's stamp and number, table, code and argument within the last offsets of a
partition. What a meter tells twice (once_within_s in the table of codes) counts once in event_counts.
Restart: state (the newest alarm of each meter and type, outages that are not over, counts that were not told) and files
are keyed by batch; alarms-v1 may get a batch twice.
A meter without a clock stamps 1970: the arrival is taken for its time.
"""

from pathlib import Path

import polars as pl

from engine.batch import BatchContext, Frames
from engine.stream import StreamingJob, command
from engine.watermark import CLOCK, clock
from metering import accounting
from metering.accounting import only_valid
from metering.alarms import counts, life_cycle, outages
from metering.clocks import is_impossible
from metering.deduplication import PLACE, is_recent, originals, with_seen
from schemas import tables
from schemas.closed_lists import Bucket
from schemas.topics import ALARMS, COMMANDS, EVENTS

IDENTITY = ["meter_id", "observed_at", "sent_at", "seq", "dialect", "source_table", "code", "argument"]
EVENT = tables.polars_schema(tables.EVENTS)
RECENT = pl.Schema({name: EVENT[name] for name in [*IDENTITY, *PLACE]})
NEEDED = [*IDENTITY, "dialect_version", "run_id", "arrival_at", *PLACE]
NAME = Path(__file__).stem


def transform(rows: pl.DataFrame, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Frames:
    """Changes of alarms, or acknowledgements, by the topic; see the module."""
    settings = context.settings
    if "acknowledged_by" in rows.columns:
        return _acknowledged(rows, state)
    clock_is_wrong = is_impossible(settings.max_ahead_s, settings.max_behind_s)
    event_at = pl.when(clock_is_wrong).then("arrival_at").otherwise("observed_at")
    valid = only_valid(rows)
    events = valid.select(*NEEDED, event_at=event_at)
    marked = with_seen(events, state["recent"], IDENTITY, [])
    result = life_cycle.lives(marked, state["open"], state["once"])
    counted = counts.count_events(
        counts.placed(result.events, registry), state["event_count"], context.watermarks, context.close_all
    )
    return {
        "alarms": result.alarms,
        "quarantined_events": accounting.kept_apart(
            rows, result.events, Bucket.QUARANTINED, NAME, "quarantined_events"
        ),
        "late_events": accounting.kept_apart(rows, result.events, Bucket.LATE, NAME, "late_events"),
        "event_counts": counted.rows,
        "open": result.open,
        "once": result.once,
        "event_count": counted.counts,
        "recent": originals(state["recent"], marked).filter(is_recent(settings.recent_records)),
        "clock": clock(valid, state["clock"], context.watermarks),
        "books": pl.concat([accounting.count(result.events), accounting.invalid(rows)]),
    }


def _acknowledged(rows: pl.DataFrame, state: Frames) -> Frames:
    """A partition of the command topic: its rows, and the state as it was."""
    valid = only_valid(rows)
    stored = valid.with_columns(run_id=pl.lit(None, pl.String), bucket=pl.lit(Bucket.STORED.value))
    return {
        **state,
        "alarms": pl.DataFrame(schema=life_cycle.ALARMS),
        "alarm_acknowledgements": valid.select(tables.ALARM_ACKNOWLEDGEMENTS.names),
        "dead_letters": accounting.refused(rows),
        "books": pl.concat([accounting.count(stored), accounting.invalid(rows)]),
    }


def cross_partition(handed: Frames, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Frames:
    """Outages per transformer, and counts."""
    changes = counts.placed(handed["alarms"], registry)
    failures = changes.filter(pl.col("alarm_type") == outages.POWER_FAILURE)
    grouped = outages.group_outages(failures, state["member"], context.watermarks)
    counted = counts.count_alarms(changes, state["count"], context.watermarks, context.close_all)
    return {
        "outages": grouped.rows,
        "member": grouped.members,
        "alarm_counts": counted.rows,
        "count": counted.counts,
    }


JOB = StreamingJob(
    name=NAME,
    version=6,
    topics=(EVENTS, COMMANDS),
    writes={
        "alarms": "raised_at",
        "outages": "began_at",
        "alarm_counts": "window_start",
        "event_counts": "window_start",
        "alarm_acknowledgements": "acknowledged_at",
        "dead_letters": "received_at",
        "quarantined_events": "arrival_at",
        "late_events": "arrival_at",
    },
    sends={"alarms": ALARMS},
    state={
        "open": life_cycle.OPEN,
        "once": life_cycle.ONCE,
        "event_count": counts.EVENT_COUNT,
        "recent": RECENT,
        "clock": CLOCK,
    },
    transform=transform,
    hands=("alarms",),
    cross_partition=cross_partition,
    cross_partition_state={"member": outages.MEMBER, "count": counts.COUNT},
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
