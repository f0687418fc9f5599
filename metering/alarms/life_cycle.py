"""Events of meters → life cycle of alarms. Pure functions over Polars frames.

One alarm per meter and alarm type at a time; start and clear close each other; repeats are counted on the open alarm.
alarm_id = f(meter, type, begin), so that reprocessing writes the same row (docs/domain.md, Alarms). A raise that is
read after its clear is an alarm that is closed already: it is raised and cleared at once.
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
        "cleared_at": STAMP,
        "changed_at": STAMP,
        "updated_at": STAMP,
        "is_open": pl.Boolean(),
        "before_at": STAMP,
        "unmatched": pl.List(pl.Struct({"after": STAMP, "at": STAMP})),
    }
)
"""State: the newest alarm of each meter and type, also when it is cleared, so that a late event finds it; when the one
before it ended; and clears that closed nothing, each with the end of the alarm before it: its raise, which must be
between the two, may still come."""
MOST_UNMATCHED = 8
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
        if last and _edge(event) == Edge.RAISE.value and (cleared_at := _clear_of(last, event["event_at"])):
            opened = _raised(event)
            closed = _cleared(opened, cleared_at)
            state[key] = _with_closed(last, closed)
            changes += [_change(opened, event), _change(closed, event)]
            continue
        if last and _edge(event) == Edge.CLEAR.value and _is_of_an_older_one(last, event["event_at"]):
            state[key] = {**last, "unmatched": _with_clear(last["unmatched"], last["before_at"], event["event_at"])}
            continue
        if last and event["event_at"] < last["changed_at"]:
            late.append((event["partition"], event["offset"]))
            continue
        new = state[key] = _after(last, event)
        if new["alarm_id"] and (not last or any(new[name] != last[name] for name in VISIBLE)):
            changes.append(_change(new, event))
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


def _edge(event: dict[str, Any]) -> str:
    """How an event moves its alarm: raise or clear."""
    return LEVELS[event["argument"]] if event["edge"] == Edge.LEVEL.value else str(event["edge"])


def _clear_of(last: dict[str, Any], raised_at: datetime) -> datetime | None:
    """When an alarm that is raised now was cleared already; None where it was not, or nobody can say."""
    if last["is_open"] and raised_at >= last["raised_at"]:
        return None
    after = [
        each["at"]
        for each in last["unmatched"]
        if raised_at <= each["at"] and (each["after"] is None or each["after"] < raised_at)
    ]
    is_forgotten = len(last["unmatched"]) == MOST_UNMATCHED == len(after)  # an earlier clear may have been its own
    return min(after) if after and not is_forgotten else None


def _is_of_an_older_one(last: dict[str, Any], cleared_at: datetime) -> bool:
    """Whether a clear is older than the newest alarm, and not than what came before that."""
    is_older = last["raised_at"] is not None and cleared_at < last["raised_at"]
    return bool(is_older and (last["before_at"] is None or cleared_at > last["before_at"]))


def _with_clear(unmatched: list[dict[str, Any]], after: datetime | None, at: datetime) -> list[dict[str, Any]]:
    """The clears that closed nothing, in the order of time, with one more."""
    return sorted([*unmatched, {"after": after, "at": at}], key=lambda each: each["at"])[-MOST_UNMATCHED:]


def _with_closed(last: dict[str, Any], closed: dict[str, Any]) -> dict[str, Any]:
    """The state with an alarm that is closed already; it is the newest one, or lies before that."""
    raised_at, cleared_at = closed["raised_at"], closed["cleared_at"]
    unmatched = [
        {**each, "after": cleared_at if each["after"] is None else max(each["after"], cleared_at)}
        if each["at"] > cleared_at
        else each
        for each in last["unmatched"]
        if each["at"] != cleared_at
    ]
    if last["raised_at"] is None or raised_at > last["raised_at"]:
        return {**closed, "changed_at": last["changed_at"], "before_at": last["cleared_at"], "unmatched": unmatched}
    before_at = max(filter(None, (last["before_at"], cleared_at)))
    return {**last, "before_at": before_at, "unmatched": unmatched}


def _change(alarm: dict[str, Any], event: dict[str, Any]) -> dict[str, Any]:
    """The row of the table."""
    return {
        **alarm,
        "state": (AlarmState.ACTIVE if alarm["is_open"] else AlarmState.CLEARED).value,
        "source": AlarmSource.METER_EVENT.value,
        "run_id": event["run_id"],
    }


def _after(last: dict[str, Any] | None, event: dict[str, Any]) -> dict[str, Any]:
    """The state of an alarm after an event that is not older than its newest change."""
    at = event["event_at"]
    if last and last["is_open"]:
        updated = {**last, "updated_at": max(last["updated_at"], event["arrival_at"])}
        if _edge(event) == Edge.RAISE.value:
            return {**updated, "repeat_count": last["repeat_count"] + 1, "changed_at": at}
        return _cleared(updated, at)
    if _edge(event) == Edge.RAISE.value:
        kept = {"before_at": last["cleared_at"], "unmatched": last["unmatched"]} if last else {}
        return {**_raised(event), **kept}
    known = last or {**dict.fromkeys(OPEN), **{name: event[name] for name in KEY}, "repeat_count": 0, "unmatched": []}
    unmatched = _with_clear(known["unmatched"], known["cleared_at"], at)
    return {**known, "is_open": False, "changed_at": at, "unmatched": unmatched}


def _raised(event: dict[str, Any]) -> dict[str, Any]:
    return {
        "meter_id": event["meter_id"],
        "alarm_type": event["alarm_type"],
        "alarm_id": alarm_id(event["meter_id"], event["alarm_type"], event["event_at"]),
        "severity": event["severity"],
        "raised_at": event["event_at"],
        "repeat_count": 0,
        "cleared_at": None,
        "changed_at": event["event_at"],
        "updated_at": event["arrival_at"],
        "is_open": True,
        "before_at": None,
        "unmatched": [],
    }


def _cleared(alarm: dict[str, Any], cleared_at: datetime) -> dict[str, Any]:
    return {**alarm, "is_open": False, "cleared_at": cleared_at, "changed_at": cleared_at}
