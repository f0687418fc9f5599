"""N meters from the M logs of a tape, and their records in the order in which they are sent.

The same seed gives the same fleet. With the run's clock, meter i plays log i mod M: registers start anew and are summed
again from the log's own steps times a scale, so that they stay monotone; powers are scaled with them, voltages moved a
little; each copy of a grid has its own transformers. Reports of a meter come at its own phase of the interval. With the
log's own clock nothing is changed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from replay.tape import Tape
from schemas.codec import arrow_schema
from schemas.errors import ConfigError
from schemas.tables import REGISTERS, REGISTRY, polars_schema

REGISTER_COLUMNS = [f"{register}_wh" for register in REGISTERS]
POWER_COLUMNS = [name for name in arrow_schema("reading").names if name.endswith("_w") or (name.startswith("current_"))]
VOLTAGE_COLUMNS = [name for name in arrow_schema("reading").names if name.startswith("voltage_")]
PLAN_COLUMNS = ["log", "scale", "start_wh", "shift_mv", "phase", *[f"base_{name}" for name in REGISTER_COLUMNS]]
SCALES = (0.7, 1.3)  # homes of one grid differ by more; enough that no two copies are alike
START_WH = 20_000_000  # a meter some years old
SHIFT_MV = 800  # two neighbouring grids of one kind
MAX_OUTLIER = timedelta(days=400)  # a stamp this far from the log's middle is a broken clock, not a time to wait for


class Slice(NamedTuple):
    """Records that are due in one stretch of the run's clock; columns of the entity and `due_at`."""

    until: datetime
    readings: pl.DataFrame
    events: pl.DataFrame


@dataclass(frozen=True)
class Fleet:
    """A fleet that plays a tape.

    Attributes:
        registry: its registry, columns of `schemas.tables.REGISTRY`.
        plan: per meter: log (the tape's meter), scale, start_wh, shift_mv, phase.
        readings: the tape's readings with due_at and seq, by log.
        events: the same for its events.
        first_at: the run clock's begin.
        last_at: the last record is due by then.
    """

    registry: pl.DataFrame
    plan: pl.DataFrame
    readings: pl.DataFrame
    events: pl.DataFrame
    first_at: datetime
    last_at: datetime
    own_clock: bool

    @property
    def records(self) -> int:
        """Number of records that the fleet sends."""
        per_log = pl.concat([self.readings.select("log"), self.events.select("log")]).group_by("log").len()
        return int(self.plan.join(per_log, on="log").get_column("len").sum())

    def slices(self, step: timedelta) -> Iterator[Slice]:
        """The records in sending order, cut at multiples of `step`; empty stretches are left out."""
        readings, events = _Play(self, self.readings, True), _Play(self, self.events, False)
        until = self.first_at
        while True:
            due = [at for at in (readings.next_due(), events.next_due()) if at is not None]
            if not due:
                return
            until = max(until + step, min(due) + timedelta(microseconds=1))
            yield Slice(until, readings.until(until), events.until(until))

    def truth(self) -> pl.DataFrame:
        """What the fleet's registers show: meter_id, register, first_wh, last_wh, energy_wh, readings."""
        long = (
            self.readings.select("log", "seq", *REGISTER_COLUMNS)
            .unpivot(on=REGISTER_COLUMNS, index=["log", "seq"], variable_name="register", value_name="wh")
            .filter(pl.col("wh").is_not_null())
            .sort("log", "register", "seq")
        )
        ends = long.group_by("log", "register").agg(
            base_wh=pl.col("wh").first(), end_wh=pl.col("wh").last(), readings=pl.len()
        )
        each = self.plan.join(ends, on="log")
        first, last = (pl.col("base_wh"), pl.col("end_wh"))
        if not self.own_clock:
            first, last = pl.col("start_wh"), pl.col("start_wh") + _scaled(pl.col("end_wh") - pl.col("base_wh"))
        return each.select(
            "meter_id",
            pl.col("register").str.strip_suffix("_wh"),
            first_wh=first,
            last_wh=last,
            energy_wh=last - first,
            readings=pl.col("readings").cast(pl.Int64),
        ).sort("meter_id", "register")


def _scaled(values: pl.Expr) -> pl.Expr:
    return (values * pl.col("scale")).round(0).cast(pl.Int64)


class _Play:
    """One kind of records of the tape, expanded to the fleet as their time comes."""

    def __init__(self, fleet: Fleet, rows: pl.DataFrame, has_registers: bool) -> None:
        self._fleet = fleet
        self._rows = rows.sort("due_at", "log", "seq")
        self._has_registers = has_registers
        self._next = 0
        self._waiting: pl.DataFrame | None = None
        self._due = self._rows.get_column("due_at")

    def next_due(self) -> datetime | None:
        """When the next record is due; null at the end."""
        times: list[datetime] = []
        if self._next < len(self._rows):
            times.append(self._due[self._next])
        if self._waiting is not None and len(self._waiting):
            times.append(self._waiting.get_column("due_at")[0])
        return min(times, default=None)

    def until(self, time: datetime) -> pl.DataFrame:
        """The fleet's records that are due before `time` and were not given yet."""
        stop = int(self._due.search_sorted(time, side="left"))
        fresh = self._expand(self._rows.slice(self._next, stop - self._next))
        self._next = stop
        waiting = fresh if self._waiting is None else pl.concat([self._waiting, fresh])
        waiting = waiting.sort("due_at", "meter_id", "seq")
        cut = int(waiting.get_column("due_at").search_sorted(time, side="left"))
        self._waiting = waiting.slice(cut)
        return waiting.slice(0, cut)

    def _expand(self, rows: pl.DataFrame) -> pl.DataFrame:
        out = rows.drop("meter_id").join(self._fleet.plan, on="log", maintain_order="left")
        if not self._fleet.own_clock:
            out = out.with_columns(due_at=pl.col("due_at") + pl.col("phase"))
            if self._has_registers:
                out = out.with_columns(
                    *[
                        (pl.col("start_wh") + _scaled(pl.col(name) - pl.col(f"base_{name}"))).alias(name)
                        for name in REGISTER_COLUMNS
                    ],
                    *[_scaled(pl.col(name)).alias(name) for name in POWER_COLUMNS],
                    *[(pl.col(name) + pl.col("shift_mv")).alias(name) for name in VOLTAGE_COLUMNS],
                    equipment_id=pl.format("E-{}", "meter_id"),
                )
        return out.drop(PLAN_COLUMNS, strict=False)


def fleet(tape: Tape, meters: int | None, seed: int, start: datetime | None, own_clock: bool) -> Fleet:
    """A fleet that plays the tape.

    Args:
        tape: the tape.
        meters: how many; the tape's own number if None.
        seed: the same gives the same fleet.
        start: run clock's begin; the tape's own if None.
        own_clock: keep the log's own stamps, values and ids.

    Raises:
        ConfigError: the tape is empty, or its own clock is asked for more meters than it has.
    """
    logs = [row["meter_id"] for row in tape.registry.select(["meter_id"]).to_pylist()]
    readings, events = _frame(tape.readings), _frame(tape.events)
    if not len(readings):
        msg = "the tape has no readings"
        raise ConfigError(msg)
    count = meters or len(logs)
    if own_clock and count > len(logs):
        msg = f"with its own clock the tape plays its {len(logs)} meters, not {count}"
        raise ConfigError(msg)
    readings, events = _due(readings), _due(events)
    due: list[datetime] = [*readings.get_column("due_at"), *events.get_column("due_at")]
    first_at = min(due)
    shift = timedelta(0) if own_clock or start is None else start - first_at
    readings, events = (
        rows.with_columns(pl.col("due_at") + shift, pl.col("observed_at") + shift) for rows in (readings, events)
    )
    bases = (
        readings.sort("log", "seq")
        .group_by("log")
        .agg(*[pl.col(name).drop_nulls().first().alias(f"base_{name}") for name in REGISTER_COLUMNS])
    )
    readings = readings.join(bases, on="log", how="left")
    phase_s = max(int(tape.info.interval_s or 1), 1)
    random = np.random.default_rng(seed)
    indices = np.arange(count)
    plan = pl.DataFrame(
        {
            "log": [logs[index % len(logs)] for index in indices],
            "meter_id": logs[:count] if own_clock else [f"m{index + 1:07d}" for index in indices],
            "copy": indices // len(logs) + 1,
            "scale": np.where(indices < len(logs), 1.0, np.round(random.uniform(*SCALES, count), 4)),
            "start_wh": random.integers(0, START_WH, count),
            "shift_mv": np.where(indices < len(logs), 0, random.integers(-SHIFT_MV, SHIFT_MV + 1, count)),
            "phase": random.integers(0, phase_s * 1_000_000, count),
        }
    ).with_columns(phase=pl.duration(microseconds=pl.col("phase")))
    registry = _registry(_frame(tape.registry), plan, shift, own_clock)
    last_at = max(due) + shift + timedelta(seconds=phase_s)
    return Fleet(registry, plan.drop("copy"), readings, events, first_at + shift, last_at, own_clock)


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _due(rows: pl.DataFrame) -> pl.DataFrame:
    """Adds log, due_at (when a record is sent: never before the one above it in the log) and seq."""
    middle = pl.col("observed_at").median()
    is_sane = (pl.col("observed_at") - middle).abs() <= MAX_OUTLIER
    return (
        rows.sort("log_row")
        .with_columns(log=pl.col("meter_id"))
        .with_columns(
            due_at=pl.when(is_sane).then("observed_at").cum_max().forward_fill().backward_fill().over("log"),
            seq=pl.int_range(pl.len()).over("log"),
        )
        .drop("log_row")
    )


def _registry(logs: pl.DataFrame, plan: pl.DataFrame, shift: timedelta, own_clock: bool) -> pl.DataFrame:
    if own_clock:
        return logs
    grid = ["transformer_id", "feeder_id", "community_id"]
    named = logs.rename({"meter_id": "log"}).drop("usage_point_id", "equipment_id")
    return (
        plan.join(named, on="log", how="left", maintain_order="left")
        .with_columns(
            *[pl.format("{}-{}", name, "copy").alias(name) for name in grid],
            usage_point_id=pl.format("up-{}", "meter_id"),
            equipment_id=pl.format("E-{}", "meter_id"),
            valid_from=pl.col("valid_from") + shift,
        )
        .select(REGISTRY.names)
        .cast(polars_schema(REGISTRY))
    )
