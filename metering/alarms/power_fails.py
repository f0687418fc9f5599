"""Events of meters → when each was without power. Pure functions over Polars frames.

What the alarms of power failures are made of, without their life cycle: a failure ends at the next clear in the order
of the meter's own time, however they are read.
"""

import polars as pl

from metering.alarms.life_cycle import LEVELS, with_meaning
from metering.alarms.outages import POWER_FAILURE
from metering.energy.delta_engine import STAMP
from schemas.closed_lists import Edge, EventAction

EDGE = pl.Schema({"meter_id": pl.String(), "at": STAMP, "is_up": pl.Boolean()})
"""State: when a meter lost its power, and had it again."""
POWER_FAILS = pl.Schema({"meter_id": pl.String(), "down_at": STAMP, "up_at": STAMP})
MOST_EDGES = 1_000
"""Of a meter: the newest are kept; one that fails more often has another trouble."""


def edges(events: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    """The new state, columns `EDGE`: the same frame where no event speaks of power.

    Args:
        events: columns of the event, and `event_at` (the meter's clock, or the arrival where that is impossible).
        known: the state so far, columns `EDGE`: at least of the meters of the events.
    """
    level = pl.col("argument").replace_strict(LEVELS, default=None, return_dtype=pl.String)
    moves = pl.when(pl.col("edge") == Edge.LEVEL.value).then(level).otherwise("edge")
    new = (
        with_meaning(events)
        .filter((pl.col("alarm_type") == POWER_FAILURE) & (pl.col("action") == EventAction.RAISE.value))
        .select("meter_id", at="event_at", is_up=moves == Edge.CLEAR.value)
        .drop_nulls()
    )
    if new.is_empty():
        return known
    return (
        pl.concat([known, new])
        .unique()
        .sort("meter_id", "at", "is_up")
        .group_by("meter_id", maintain_order=True)
        .tail(MOST_EDGES)
        .select(EDGE.keys())
    )


def power_fails(edges: pl.DataFrame) -> pl.DataFrame:
    """Begins of power failures, columns `POWER_FAILS`: each with the next end that was told, null where none was.

    What begins and ends in one second is none, unless the next that is told is an end. A begin after a begin has the
    same end: a meter says it twice, or the end between them was lost; who has a reading between them knows which.

    Args:
        edges: columns `EDGE`.
    """
    ordered = edges.sort("meter_id", "at", "is_up", descending=[False, False, True])
    is_up, at = pl.col("is_up"), pl.col("at")
    before, after = (is_up.shift(places).over("meter_id").fill_null(False) for places in (1, -1))
    is_momentary = before & (at == at.shift(1).over("meter_id")) & ~after
    return (
        ordered.with_columns(
            up_at=pl.when("is_up").then("at").backward_fill().over("meter_id"), is_momentary=is_momentary
        )
        .filter(~is_up & ~pl.col("is_momentary"))
        .select("meter_id", "up_at", down_at="at")
        .select(POWER_FAILS.keys())
    )
