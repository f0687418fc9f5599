"""Alarms from what meters say: one alarm per meter and type, raised, repeated, cleared; and outages, and counts.

Reads: meter-events-v1; alarm-commands-v1 (acknowledgements); registry (transformer, feeder).
Writes: alarms (one row per change; see the table for which is an alarm's state), topic alarms-v1 (the same rows),
outages (power failures of several meters under one transformer), alarm_counts (per quarter hour, type, transformer and
feeder), event_counts (the same of events whose code is counted and raises nothing), alarm_acknowledgements (the first
of an alarm counts), dead_letters (commands that cannot be decoded), quarantined_events (no table has the code, or a
status bit is neither set nor clear), late_events.
Key: alarm_id = f(meter, type, begin); outage_id = f(transformer, begin).
Lateness: an event older than the newest change of its alarm is late and changes nothing, but a raise whose clear was
read before it: that is an alarm, raised and cleared at once, with its outage.
Duplicates: by meter, time, sender's stamp and number, table, code and argument within the last offsets of a
partition. What a meter sends twice (once_within_s in the table of codes) counts once in event_counts.
Restart: state (the newest alarm of each meter and type, outages that are not over, counts that were not written) and
files are keyed by batch; alarms-v1 may get a batch twice.
A meter without a clock stamps 1970: the arrival is taken for its time.
"""

from pathlib import Path

import polars as pl

from engine.driver import command
from engine.job import BatchContext, Frames, Output, Source, StreamingJob
from metering import accounting
from metering.alarms import counts, life_cycle, outages
from metering.clocks import event_at
from metering.deduplication import EVENT
from schemas.closed_lists import AlarmSource
from schemas.topics import ALARMS, COMMANDS, EVENTS

NEEDED = (*EVENT, "dialect_version", "run_id", "arrival_at")
NAME = Path(__file__).stem


def transform(rows: pl.DataFrame, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Output:
    """Changes of alarms; see the module."""
    dated = rows.with_columns(event_at(context.settings.max_ahead_s, context.settings.max_behind_s))
    result = life_cycle.lives(dated, state["open"], state["once"])
    placed = counts.placed(result.events, registry)
    counted = counts.count_events(placed, state["event_count"], context.watermarks, context.close_all)
    return Output(
        tables={"alarms": result.alarms, "event_counts": counted.rows},
        state={"open": result.open, "once": result.once, "event_count": counted.counts},
        verdicts=accounting.verdicts(result.events, pl.col("why")),
    )


def acknowledged(rows: pl.DataFrame, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Output:
    """Acknowledgements, as they were given."""
    return Output(tables={"alarm_acknowledgements": rows})


def cross_partition(handed: Frames, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Output:
    """Outages per transformer, and counts."""
    changes = counts.placed(handed["alarms"], registry)
    failures = changes.filter(pl.col("alarm_type") == outages.POWER_FAILURE)
    under = registry.filter(pl.col("transformer_id").is_in(failures.get_column("transformer_id").unique().implode()))
    served = dict(under.group_by("transformer_id").len().iter_rows())
    grouped = outages.group_outages(failures, state["member"], context.watermarks, served)
    counted = counts.count_alarms(
        changes, state["count"], context.watermarks, AlarmSource.METER_EVENT, context.close_all
    )
    return Output(
        tables={"outages": grouped.rows, "alarm_counts": counted.rows},
        state={"member": grouped.members, "count": counted.counts},
    )


JOB = StreamingJob(
    name=NAME,
    version=8,
    sources=(
        Source(
            EVENTS,
            transform,
            columns=NEEDED,
            state={"open": life_cycle.OPEN, "once": life_cycle.ONCE, "event_count": counts.EVENT_COUNT},
            by={"open": ("meter_id",), "once": ("meter_id",)},
            deduplicate_on=EVENT,
            closes_windows=True,
        ),
        Source(COMMANDS, acknowledged, keeps_undecoded=True),
    ),
    writes=("alarms", "outages", "alarm_counts", "event_counts", "alarm_acknowledgements"),
    sends={"alarms": ALARMS},
    hands=("alarms",),
    cross_partition=cross_partition,
    cross_partition_state={"member": outages.MEMBER, "count": counts.COUNT},
    shares={
        **dict.fromkeys(("alarms", "alarm_counts"), f"source = '{AlarmSource.METER_EVENT}'"),
        "dead_letters": f"kafka_topic = '{COMMANDS.name}'",
    },
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
