"""Changes of alarms, and events that raise none → counts per quarter hour, type, transformer and feeder.

Pure functions on Polars frames. The quarter hour is that of the arrival: when it was known, not when it was. Counts add
up: what comes when its quarter hour has been written gives a further row.
"""

from datetime import timedelta
from typing import NamedTuple

import polars as pl

from metering.registry import is_among
from schemas.closed_lists import AlarmSource, AlarmState, EventAction
from schemas.tables import ALARM_COUNTS, EVENT_COUNTS, polars_schema

WINDOW = timedelta(minutes=15)
ROWS = polars_schema(ALARM_COUNTS)
COUNTED = ["raised_count", "repeated_count", "cleared_count"]
OF = ["run_id", "window_start", "alarm_type", "transformer_id", "feeder_id"]
COUNT = pl.Schema({name: ROWS[name] for name in [*OF, *COUNTED]})
"""State: counts of changes in quarter hours that are not over."""
EVENT_ROWS = polars_schema(EVENT_COUNTS)
EVENT_COUNT = pl.Schema({name: kind for name, kind in EVENT_ROWS.items() if name != "window_end"})
"""State: counts of events in quarter hours that are not over."""


class Counts(NamedTuple):
    """What `count_alarms` and `count_events` return.

    Attributes:
        rows: counts of the quarter hours that are over, columns `ROWS` or `EVENT_ROWS`.
        counts: the new state, columns `COUNT` or `EVENT_COUNT`.
    """

    rows: pl.DataFrame
    counts: pl.DataFrame


def placed(changes: pl.DataFrame, registry: pl.DataFrame) -> pl.DataFrame:
    """Changes of alarms, or events, with transformer_id and feeder_id of their meters."""
    concerned = registry.filter(is_among(changes.get_column("meter_id")))
    places = concerned.select("meter_id", "transformer_id", "feeder_id")
    return changes.join(places, on="meter_id", how="left", maintain_order="left")


def count_alarms(
    changes: pl.DataFrame, counts: pl.DataFrame, watermarks: pl.DataFrame, source: AlarmSource, close_all: bool = False
) -> Counts:
    """Counts a batch's changes and gives the quarter hours that are over.

    Args:
        changes: columns of the table alarms, transformer_id, feeder_id.
        counts: the state so far, columns `COUNT`.
        watermarks: per run_id `watermark`, up to which quarter hours are over.
        source: of all of these alarms.
        close_all: at the end of a run: all are over.
    """
    is_active, is_first = pl.col("state") == AlarmState.ACTIVE.value, pl.col("repeat_count") == 0
    each = changes.select(
        *[name for name in OF if name != "window_start"],
        window_start=pl.col("updated_at").dt.truncate("15m"),
        raised_count=(is_active & is_first).cast(pl.Int64),
        repeated_count=(is_active & ~is_first).cast(pl.Int64),
        cleared_count=(~is_active).cast(pl.Int64),
    ).select(COUNT.names())
    found = _over(pl.concat([counts, each]), watermarks, close_all)
    return Counts(found.rows.with_columns(source=pl.lit(source.value)).select(ROWS.names()).cast(ROWS), found.counts)


def count_events(
    events: pl.DataFrame, counts: pl.DataFrame, watermarks: pl.DataFrame, close_all: bool = False
) -> Counts:
    """Counts those of a batch's events whose code is counted only, and gives the quarter hours that are over.

    Args:
        events: of `metering.alarms.life_cycle.lives`: run_id, arrival_at, event_type, action, is_sent_again, why;
            transformer_id, feeder_id.
        counts: the state so far, columns `EVENT_COUNT`.
        watermarks: as for `count_alarms`.
        close_all: as for `count_alarms`.
    """
    is_counted = (pl.col("action") == EventAction.COUNT.value) & pl.col("why").is_null() & ~pl.col("is_sent_again")
    each = events.filter(is_counted).select(
        "event_type",
        "transformer_id",
        "feeder_id",
        "run_id",
        window_start=pl.col("arrival_at").dt.truncate("15m"),
        event_count=pl.lit(1, pl.Int64),
    )
    found = _over(pl.concat([counts, each.select(EVENT_COUNT.names())]), watermarks, close_all)
    return Counts(found.rows.select(EVENT_ROWS.names()).cast(EVENT_ROWS), found.counts)


def _over(each: pl.DataFrame, watermarks: pl.DataFrame, close_all: bool) -> Counts:
    """Adds up, and parts the quarter hours that are over from the others."""
    counted = [name for name in each.columns if name.endswith("_count")]
    keys = [name for name in each.columns if name not in counted]
    known = (
        each.group_by(keys)
        .agg(pl.col(counted).sum())
        .sort(keys)
        .join(
            watermarks.select("run_id", "watermark"), on="run_id", how="left", nulls_equal=True, maintain_order="left"
        )
    )
    end = pl.col("window_start") + WINDOW
    is_over = pl.lit(True) if close_all else (end <= pl.col("watermark")).fill_null(False)
    rows = known.filter(is_over).with_columns(window_end=end)
    return Counts(rows, known.filter(~is_over).select(each.columns))
