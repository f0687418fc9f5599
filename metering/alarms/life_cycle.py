"""Events of meters → life cycle of alarms. Pure functions over Polars frames.

One alarm per meter and alarm type at a time; start and clear close each other; repeats are counted on the open alarm.
alarm_id = f(meter, type, begin), so that reprocessing writes the same row (docs/domain.md, Alarms).
"""

import hashlib
from datetime import datetime
from typing import Any, NamedTuple

import polars as pl

from metering.energy.delta_engine import STAMP
from schemas import tables
from schemas.closed_lists import AlarmSource, AlarmState, DeltaReason, Edge, EventAction, QuarantineReason
from schemas.event_codes import code_table

OPEN = pl.Schema(
    {
        "meter_id": pl.String(),
        "alarm_type": pl.String(),
        "alarm_id": pl.String(),
        "severity": pl.String(),
        "raised_at": STAMP,
        "repeat_count": pl.Int64(),
        "changed_at": STAMP,
        "is_open": pl.Boolean(),
    }
)
"""State: the newest alarm of each meter and type, also when it is cleared, so that a late event finds it."""
ONCE = pl.Schema({"meter_id": pl.String(), "event_type": pl.String(), "counted_at": STAMP})
"""State: when an event that meters send twice was counted last, of each meter and type."""
ALARMS = tables.polars_schema(tables.ALARMS)
KEY = ["meter_id", "alarm_type"]
LEVELS = {"1": Edge.RAISE.value, "0": Edge.CLEAR.value}
VISIBLE = ("alarm_id", "is_open", "repeat_count")
"""What makes a row of the table when it changes."""


class Result(NamedTuple):
    """What `lives` returns.

    Attributes:
        alarms: one row per change, columns `ALARMS`; the last row of an alarm_id is its state.
        open: the new state, columns `OPEN`.
        once: the new state, columns `ONCE`.
        events: the events with their meaning, `is_sent_again`, and `why` they were not stored.
    """

    alarms: pl.DataFrame
    open: pl.DataFrame
    once: pl.DataFrame
    events: pl.DataFrame


def with_meaning(events: pl.DataFrame) -> pl.DataFrame:
    """Decodes by (dialect, version, code), never by code alone; a table row of version `*` serves every version.

    Returns:
        The events with event_type, alarm_type, edge, severity, tier, action, once_within_s; all null where no table has
        the code.
    """
    codes = code_table()
    keys = ["dialect", "source_table", "code"]
    meaning = [name for name in codes.columns if name not in [*keys, "dialect_version"]]
    exact = events.join(
        codes.filter(pl.col("dialect_version") != "*"), on=[*keys, "dialect_version"], how="left", maintain_order="left"
    )
    any_version = events.join(
        codes.filter(pl.col("dialect_version") == "*").drop("dialect_version"),
        on=keys,
        how="left",
        maintain_order="left",
    )
    return exact.with_columns(*[pl.coalesce(name, any_version[name]).alias(name) for name in meaning])


def alarm_id(meter_id: str, alarm_type: str, raised_at: datetime) -> str:
    """Name of an alarm by meter, type and begin."""
    text = f"{meter_id}|{alarm_type}|{raised_at.isoformat()}"
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def lives(events: pl.DataFrame, open_alarms: pl.DataFrame, once: pl.DataFrame) -> Result:
    """Moves the alarms by a batch of events.

    Args:
        events: columns of the event, arrival_at, partition, offset, `event_at` (the meter's clock, or the arrival
            where that is impossible).
        open_alarms: the state so far, columns `OPEN`.
        once: the state so far, columns `ONCE`.
    """
    named = with_meaning(events)
    is_known = pl.col("action").is_not_null()
    named = named.with_columns(
        why=pl.when(~is_known)
        .then(pl.lit(QuarantineReason.UNKNOWN_CODE.value))
        .when((pl.col("edge") == Edge.LEVEL.value) & ~pl.col("argument").is_in(list(LEVELS)).fill_null(False))
        .then(pl.lit(QuarantineReason.UNKNOWN_ARGUMENT.value))
    )
    named, once = _counted_once(named, once)
    moving = named.filter(pl.col("why").is_null() & (pl.col("action") == EventAction.RAISE.value))
    moving = moving.sort(*KEY, "event_at", "partition", "offset")
    state = {(row["meter_id"], row["alarm_type"]): row for row in open_alarms.to_dicts()}
    changes: list[dict[str, Any]] = []
    late: list[tuple[int, int]] = []
    for event in moving.iter_rows(named=True):
        key = (event["meter_id"], event["alarm_type"])
        last = state.get(key)
        if last and event["event_at"] < last["changed_at"]:
            late.append((event["partition"], event["offset"]))
            continue
        new = _after(last, event)
        state[key] = new
        if new["alarm_id"] and (not last or any(new[name] != last[name] for name in VISIBLE)):
            changes.append(
                {
                    **new,
                    "state": (AlarmState.ACTIVE if new["is_open"] else AlarmState.CLEARED).value,
                    "cleared_at": None if new["is_open"] else event["event_at"],
                    "source": AlarmSource.METER_EVENT.value,
                    "run_id": event["run_id"],
                    "updated_at": event["arrival_at"],
                }
            )
    was_late = pl.DataFrame(late, schema={"partition": pl.Int64, "offset": pl.Int64}, orient="row").with_columns(
        is_late=pl.lit(True)
    )
    judged = named.join(was_late, on=["partition", "offset"], how="left").with_columns(
        why=pl.when(pl.col("is_late").fill_null(False))
        .then(pl.lit(DeltaReason.OUT_OF_ORDER.value))
        .otherwise(pl.col("why"))
    )
    return Result(
        pl.DataFrame(changes, schema=ALARMS) if changes else pl.DataFrame(schema=ALARMS),
        pl.DataFrame(list(state.values()), schema=OPEN) if state else pl.DataFrame(schema=OPEN),
        once,
        judged,
    )


def _counted_once(named: pl.DataFrame, once: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Adds `is_sent_again`, true of the second record of what a meter sends twice; and the new state.

    Two records of one happening are each stored, and count once. The time that was counted last is kept,
    not the greatest: a wrong clock, or what a meter that was offline sends later, does not disturb what comes then.
    """
    asked = named.filter(pl.col("why").is_null() & pl.col("once_within_s").is_not_null())
    if asked.is_empty():
        return named.with_columns(is_sent_again=pl.lit(False)), once
    counted = {(meter_id, event_type): at for meter_id, event_type, at in once.iter_rows()}
    again: list[tuple[int, int]] = []
    for event in asked.sort("meter_id", "event_type", "event_at", "partition", "offset").iter_rows(named=True):
        key = (event["meter_id"], event["event_type"])
        last = counted.get(key)
        if last and abs((event["event_at"] - last).total_seconds()) <= int(event["once_within_s"]):
            again.append((event["partition"], event["offset"]))
        else:
            counted[key] = event["event_at"]
    repeated = pl.DataFrame(again, schema={"partition": pl.Int64, "offset": pl.Int64}, orient="row")
    marked = named.join(
        repeated.with_columns(is_sent_again=pl.lit(True)), on=["partition", "offset"], how="left", maintain_order="left"
    )
    rows = [(*key, at) for key, at in counted.items()]
    return marked.with_columns(pl.col("is_sent_again").fill_null(False)), pl.DataFrame(rows, ONCE, orient="row")


def _after(last: dict[str, Any] | None, event: dict[str, Any]) -> dict[str, Any]:
    """The state of an alarm after an event."""
    edge = event["edge"]
    if edge == Edge.LEVEL.value:
        edge = LEVELS[event["argument"]]
    is_open = bool(last and last["is_open"])
    if edge == Edge.RAISE.value and is_open and last:
        return {**last, "repeat_count": last["repeat_count"] + 1, "changed_at": event["event_at"]}
    if edge == Edge.RAISE.value:
        return {
            "meter_id": event["meter_id"],
            "alarm_type": event["alarm_type"],
            "alarm_id": alarm_id(event["meter_id"], event["alarm_type"], event["event_at"]),
            "severity": event["severity"],
            "raised_at": event["event_at"],
            "repeat_count": 0,
            "changed_at": event["event_at"],
            "is_open": True,
        }
    if is_open and last:
        return {**last, "is_open": False, "changed_at": event["event_at"]}
    if last:  # cleared already: only an older raise has to know that it was cleared again
        return {**last, "changed_at": event["event_at"]}
    return {  # a clear before any raise: remembered, so that an older raise is seen to be late
        "meter_id": event["meter_id"],
        "alarm_type": event["alarm_type"],
        "alarm_id": None,
        "severity": None,
        "raised_at": None,
        "repeat_count": 0,
        "changed_at": event["event_at"],
        "is_open": False,
    }
