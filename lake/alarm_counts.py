"""Changes of alarms → counts per quarter hour, alarm type, transformer and feeder. Pure functions on Polars frames.

The quarter hour is that of the change's arrival: when it was known, not when it was. Counts add up: a change that comes
when its quarter hour has been told gives a further row.
"""

from datetime import timedelta
from typing import NamedTuple

import polars as pl

from schemas.closed_lists import AlarmState
from schemas.tables import ALARM_COUNTS, polars_schema

WINDOW = timedelta(minutes=15)
ROWS = polars_schema(ALARM_COUNTS)
COUNTED = ["raised_count", "repeated_count", "cleared_count"]
OF = ["run_id", "window_start", "alarm_type", "transformer_id", "feeder_id"]
COUNT = pl.Schema({name: ROWS[name] for name in [*OF, *COUNTED]})
"""State: counts of quarter hours that are not over."""


class Advance(NamedTuple):
    """What `advance` returns.

    Attributes:
        rows: counts of the quarter hours that are over, columns `ROWS`.
        counts: the new state, columns `COUNT`.
    """

    rows: pl.DataFrame
    counts: pl.DataFrame


def placed(changes: pl.DataFrame, registry: pl.DataFrame) -> pl.DataFrame:
    """Changes of alarms with transformer_id and feeder_id of their meters."""
    places = registry.select("meter_id", "transformer_id", "feeder_id")
    return changes.join(places, on="meter_id", how="left", maintain_order="left")


def advance(changes: pl.DataFrame, counts: pl.DataFrame, bounds: pl.DataFrame, close_all: bool = False) -> Advance:
    """Counts a batch's changes and gives the quarter hours that are over.

    Args:
        changes: columns of the table alarms, transformer_id, feeder_id.
        counts: the state so far, columns `COUNT`.
        bounds: per run_id `bound_after`, up to which quarter hours are over.
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
    known = (
        pl.concat([counts, each])
        .group_by(OF)
        .agg(pl.col(COUNTED).sum())
        .sort(OF)
        .join(bounds.select("run_id", "bound_after"), on="run_id", how="left", nulls_equal=True, maintain_order="left")
    )
    end = pl.col("window_start") + WINDOW
    is_over = pl.lit(True) if close_all else (end <= pl.col("bound_after")).fill_null(False)
    rows = known.filter(is_over).with_columns(window_end=end)
    return Advance(rows.select(ROWS.names()).cast(ROWS), known.filter(~is_over).select(COUNT.names()))
