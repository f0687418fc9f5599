"""The tape's readings or events by log and time: when each is sent, and what each register has counted by then."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import numpy as np
import polars as pl

from replay.arrays import Flags, Floats, Integers
from schemas.tables import REGISTERS

REGISTER_COLUMNS = [f"{register}_wh" for register in REGISTERS]
MAX_HOLE = timedelta(days=400)  # beyond a hole as long as this stand broken clocks: no times to wait for


@dataclass(frozen=True)
class Rows:
    """The tape's readings or events, by log and time.

    Attributes:
        frame: the tape's columns that hold anything, with `equipment_number` (0 for a log's first, then 1 …).
        keys: log × span + due, to find a log's row by time.
        due: microseconds since the tape's begin when a row is sent: never before the one above it in the log.
        first: per log its first row.
        cycle: per log its rows within one cycle.
        used: per register and row the Wh since the log's first value: the sum of its steps ahead.
        blank: per register where the tape has no value; not named where it has all.
        has: per register and log whether there is any value.
        base_wh: per register and row what the log shows where it began anew the last time, or at first.
        anew: per register and row the row where it began anew the last time, −1 if it has not since the log's begin.
        last_anew: per register and log the same at a cycle's end.
        begins_anew: per log whether any of its registers does.
        cycle_wh: per register and log the Wh of a whole cycle.
    """

    frame: pl.DataFrame
    keys: Integers
    due: Integers
    first: Integers
    cycle: Integers
    used: dict[str, Floats]
    blank: dict[str, Flags]
    has: dict[str, Flags]
    base_wh: dict[str, Floats]
    anew: dict[str, Integers]
    last_anew: dict[str, Integers]
    begins_anew: Flags
    cycle_wh: dict[str, Floats]


def with_due(readings: pl.DataFrame, events: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Adds due_at: when a record is sent, never before the one above it in the log.

    A log's time is where most of its readings stand, between two holes of `MAX_HOLE`; a stamp outside is of a broken
    clock and is sent when its neighbours are.
    """
    hole = (pl.col("observed_at").diff() > MAX_HOLE).fill_null(False).cum_sum()
    times = (
        readings.sort("observed_at")
        .select("meter_id", "observed_at", part=hole.over("meter_id"))
        .group_by("meter_id", "part")
        .agg(begin=pl.col("observed_at").min(), end=pl.col("observed_at").max(), rows=pl.len())
        .sort("rows", "end")
        .group_by("meter_id")
        .agg(pl.col("begin", "end").last())
    )
    every = times.select(pl.col("begin").min(), pl.col("end").max())
    both = []
    for rows in (readings, events):
        known = rows.sort("log_row").join(times, on="meter_id", how="left", maintain_order="left")
        begin, end = pl.col("begin").fill_null(every["begin"][0]), pl.col("end").fill_null(every["end"][0])
        is_sane = pl.col("observed_at").is_between(begin - MAX_HOLE, end + MAX_HOLE)
        due = pl.when(is_sane).then("observed_at").cum_max().forward_fill().backward_fill()
        both.append(known.with_columns(due_at=due.over("meter_id")).drop("begin", "end"))
    return both[0], both[1]


def by_time(
    rows: pl.DataFrame, logs: pl.DataFrame, first: datetime, span: int, cycle: int, has_registers: bool
) -> Rows:
    """Rows of the tape by log and time.

    Args:
        rows: of `with_due`.
        logs: registry rows of the tape, one a log.
        first: the tape's begin.
        span: what `Rows.keys` counts logs by, microseconds.
        cycle: microseconds after which a log begins again.
        has_registers: whether the rows are readings.
    """
    number = pl.DataFrame({"meter_id": logs.get_column("meter_id"), "log": np.arange(len(logs))})
    known = (
        rows.join(number, on="meter_id", how="left", maintain_order="left")
        .with_columns(due=(pl.col("due_at") - first).dt.total_microseconds().fill_null(0))
        .sort("log", "due", "log_row")
    )
    log, due = known.get_column("log").to_numpy(), known.get_column("due").to_numpy()
    edges = np.searchsorted(log, np.arange(len(logs) + 1))
    keys = log * span + due
    ends = np.searchsorted(keys, np.arange(len(logs)) * span + min(cycle, span - 1))
    found = Rows(known, keys, due, edges[:-1], ends - edges[:-1], {}, {}, {}, {}, {}, {}, np.zeros(len(logs), bool), {})
    if has_registers:
        equipment = pl.col("equipment_id").forward_fill().backward_fill()
        known = known.with_columns(
            equipment_number=equipment.rle_id().over("log").cast(pl.Int64), row=pl.int_range(pl.len())
        )
    has_rows = edges[1:] > edges[:-1]
    # to the first row after the cycle, where there is one: the step from a lap to the next is in it
    after = np.minimum(np.maximum(np.minimum(ends, edges[1:] - 1), edges[:-1]), len(known) - 1)
    last = np.minimum(np.maximum(np.minimum(ends, edges[1:]) - 1, edges[:-1]), len(known) - 1)
    for name in REGISTER_COLUMNS if has_registers else ():
        if known.get_column(name).null_count() == len(known):
            continue
        wh = pl.col(name).forward_fill().over("log", "equipment_number")
        step = wh.diff().over("log", "equipment_number")
        is_anew = (step < 0) | (pl.col("equipment_number") > 0) & wh.is_not_null() & wh.shift(1).over(
            "log", "equipment_number"
        ).is_null()
        own = known.select(
            used=step.clip(0).fill_null(0).cum_sum().over("log").cast(pl.Float64),
            anew=pl.when(is_anew).then("row").forward_fill().over("log").fill_null(-1),
            is_blank=pl.col(name).is_null(),
            base_wh=pl.col(name).drop_nulls().first().over("log").fill_null(0).cast(pl.Float64),
            wh=pl.col(name).cast(pl.Float64),
        )  # fmt: skip
        base, wh_there, anew = (own.get_column(each).to_numpy() for each in ("base_wh", "wh", "anew"))
        found.used[name], found.anew[name] = own.get_column("used").to_numpy(), anew
        # where a register begins anew the log shows a value
        found.base_wh[name] = np.where(anew == np.arange(len(known)), wh_there, base)
        if known.get_column(name).null_count():
            found.blank[name] = own.get_column("is_blank").to_numpy()
        found.has[name] = np.array(
            [not blank.all() for blank in np.split(own.get_column("is_blank").to_numpy(), edges[1:-1])]
        )
        found.last_anew[name] = np.where(has_rows, anew[last], -1)
        found.begins_anew[log[anew >= 0]] = True
        found.cycle_wh[name] = np.where(has_rows, found.used[name][after], 0.0)
    frame = known.drop("log_row", "due_at", "log", "due", "row", strict=False)
    empty = [column.name for column in frame.get_columns() if column.null_count() == len(frame) and len(frame)]
    return replace(found, frame=frame.drop(empty))
