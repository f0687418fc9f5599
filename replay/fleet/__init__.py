"""N meters from the M logs of a tape, and their records by meter and time.

Everything is a pure function of the tape, the seed and the meter's number: which record a meter sends as its n-th does
not depend on how the run is cut into slices, or into processes. Times inside are microseconds since the run's begin.

With the run's clock, meter i plays log i mod M from a week of the log that the seed chooses (whole weeks, so that hours
and week days stay in place; at the end of the last whole week it goes on at the log's begin). Registers start anew and
are summed again from the log's own steps, times a scale and with a wave along the register that bends every home's use
a little and cannot make a register step back; powers bend with them. A log whose register begins anew (it steps back,
or its equipment changes) is copied with the registers it has, for nothing says how far another one would step. Voltages
are shifted a little. Reports of a meter come at its own phase of the interval. The first M meters are the logs
themselves: no week, no scale, no wave, the log's own registers. With the log's own clock nothing at all is changed.
"""

import re
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from typing import NamedTuple

import numpy as np
import polars as pl

from replay.arrays import SECOND, Flags, Floats, Integers, from_microseconds
from replay.fleet.plan import DAY, WEEK, Plan, planned
from replay.fleet.rows import Rows, by_time, with_due
from replay.tape import Tape
from schemas.codec import arrow_schema
from schemas.errors import ConfigError
from schemas.tables import REGISTRY, polars_schema

IMPORT_COLUMNS = [name for name in arrow_schema("reading").names if name.startswith("import_") and name.endswith("_w")]
EXPORT_COLUMNS = [name for name in arrow_schema("reading").names if name.startswith("export_") and name.endswith("_w")]
CURRENT_COLUMNS = [name for name in arrow_schema("reading").names if name.startswith("current_")]
VOLTAGE_COLUMNS = [name for name in arrow_schema("reading").names if name.startswith("voltage_")]
PREFIX = "m"  # of the meters' ids


class Shown(NamedTuple):
    """What a register shows in some rows.

    Attributes:
        wh: its values; not a number where the tape has none.
        energy_wh: what went through since the meter's begin.
        slope: factor by which power is bent there.
    """

    wh: Floats
    energy_wh: Floats
    slope: Floats


@dataclass(frozen=True)
class Fleet:
    """A fleet that plays a tape.

    Attributes:
        logs: registry rows of the tape, one a log.
        plan: see there.
        kinds: `readings` and `events` → the tape's rows.
        first_at: the run clock's begin.
        length: microseconds of the log that every meter plays.
        last_at: the last record is due before.
        cycle: microseconds after which a log begins again, for a copy or in a loop.
        is_loop: whether it does so for the logs themselves, too.
        span: what `Rows.keys` counts logs by.
        rebase: what the run's clock adds to the log's stamps.
        interval: microseconds between two readings of a meter, usually.
        own_clock: the log as it is.
        prefix: of the meters' ids.
    """

    logs: pl.DataFrame
    plan: Plan
    kinds: dict[str, Rows]
    first_at: datetime
    length: int
    last_at: datetime
    cycle: int
    is_loop: bool
    span: int
    rebase: timedelta
    interval: int
    own_clock: bool
    prefix: str

    def __len__(self) -> int:
        return len(self.plan.log)

    @property
    def records(self) -> int:
        """Number of records that the fleet sends."""
        return sum(int(self.counts(kind, np.arange(len(self))).sum()) for kind in self.kinds)

    def counts(self, kind: str, meters: Integers) -> Integers:
        """Records that each of the meters sends."""
        return self._before(kind, meters, self.plan.week[meters] + self.length) - self.begin(kind, meters)

    def begin(self, kind: str, meters: Integers) -> Integers:
        """The unrolled row that a meter begins at: its seq 0."""
        if not self.has_weeks:
            return np.zeros_like(meters)
        return self._before(kind, meters, self.plan.week[meters])

    @cached_property
    def first_us(self) -> int:
        """The run clock's begin, microseconds since 1970."""
        return round(self.first_at.timestamp() * SECOND)

    @cached_property
    def has_weeks(self) -> bool:
        """Whether any meter begins elsewhere than at its log's begin."""
        return bool(self.plan.week.any())

    def sent_before(self, kind: str, meters: Integers, until: int | Integers) -> Integers:
        """The unrolled row of each meter that is the first one due at `until` or later."""
        plan = self.plan
        own = np.clip(until - plan.phase[meters], 0, self.length)
        return self._before(kind, meters, plan.week[meters] + own)

    @cached_property
    def has_laps(self) -> bool:
        """Whether any meter comes to its log's end and goes on at its begin."""
        return self.is_loop or self.has_weeks

    def _goes_round(self, meters: Integers) -> Flags:
        return np.full(len(meters), True) if self.is_loop else meters >= len(self.logs)

    def _before(self, kind: str, meters: Integers, log_time: Integers) -> Integers:
        rows = self.kinds[kind]
        log = self.plan.log[meters]
        if not self.has_laps:
            before: Integers = np.searchsorted(rows.keys, log * self.span + log_time) - rows.first[log]
            return before
        lap, within = np.divmod(log_time, np.where(self._goes_round(meters), self.cycle, self.span))
        before = np.searchsorted(rows.keys, log * self.span + within) - rows.first[log]
        return np.where(self._goes_round(meters), lap * rows.cycle[log] + np.minimum(before, rows.cycle[log]), before)

    def _place(self, kind: str, meters: Integers, numbers: Integers) -> tuple[Integers, Integers]:
        """Row of the tape and lap of each unrolled row."""
        rows = self.kinds[kind]
        log = self.plan.log[meters]
        if not self.has_laps:
            return rows.first[log] + numbers, np.zeros_like(numbers)
        endless = np.iinfo(np.int64).max
        lap, within = np.divmod(numbers, np.where(self._goes_round(meters), np.maximum(rows.cycle[log], 1), endless))
        return rows.first[log] + within, lap

    def due(self, kind: str, meters: Integers, numbers: Integers) -> Integers:
        """Microseconds after the run's begin when unrolled rows are sent."""
        row, lap = self._place(kind, meters, numbers)
        plan = self.plan
        due: Integers = self.kinds[kind].due[row] + lap * self.cycle - plan.week[meters] + plan.phase[meters]
        return due

    def observed(self, kind: str, meters: Integers, numbers: Integers) -> Integers:
        """The meter's own stamp of unrolled rows, microseconds since 1970."""
        row, lap = self._place(kind, meters, numbers)
        stamps = self.kinds[kind].frame.get_column("observed_at").to_physical().to_numpy()
        rebase_us = 0 if self.own_clock else self.rebase // timedelta(microseconds=1)
        observed: Integers = stamps[row] + lap * self.cycle - self.plan.week[meters] + rebase_us
        return observed

    def registers(self, meters: Integers, numbers: Integers, filled: bool = False) -> dict[str, Floats]:
        """Register values of unrolled rows in Wh, whole numbers; not a number where there is none.

        Args:
            meters: of the rows.
            numbers: the unrolled rows.
            filled: take the last known value where the tape has none.
        """
        return {name: shown.wh for name, shown in self._registers(meters, numbers, filled).items()}

    def _registers(self, meters: Integers, numbers: Integers, filled: bool) -> dict[str, "Shown"]:
        """What each register shows."""
        rows, plan = self.kinds["readings"], self.plan
        row, lap = self._place("readings", meters, numbers)
        log = plan.log[meters]
        begun = self._place("readings", meters, self.begin("readings", meters))
        scale, wave, per_wh, angle = plan.scale[meters], plan.wave[meters], plan.wave_per_wh[meters], plan.angle[meters]
        is_copy = (meters >= len(self.logs)) & (not self.own_clock) & ~rows.begins_anew[log]

        def through(name: str, row: Integers, lap: Integers) -> tuple[Floats, Floats]:
            """What went through the meter since its begin, and where on its wave that is."""
            used = rows.used[name][row] + lap * rows.cycle_wh[name][log]
            if self.has_weeks:
                used -= rows.used[name][begun[0]] + begun[1] * rows.cycle_wh[name][log]
            at = angle + used * per_wh
            return np.floor(scale * (used + wave / per_wh * (np.sin(at) - np.sin(angle))) + 0.5), at

        result = {}
        for name in rows.used:
            energy, at = through(name, row, lap)
            since = energy
            # a home without panels has no export: its register stays at 0
            own_start = np.where(rows.cycle_wh[name][log] != 0, plan.start_wh[meters], 0)
            begin = rows.anew[name][begun[0]]
            begin = np.where(begin < 0, rows.first[log], begin)
            logged = rows.base_wh[name][begin] + rows.used[name][begun[0]] - rows.used[name][begin]
            start = np.where(is_copy, own_start, logged)
            if rows.begins_anew.any():
                anew, anew_lap = rows.anew[name][row], lap
                is_before = (anew < 0) & (lap > begun[1])  # the lap has not begun anew yet: the one before has
                anew = np.where(is_before, rows.last_anew[name][log], anew)
                anew_lap = lap - is_before
                has_begun = (anew >= 0) & ((anew_lap > begun[1]) | ((anew_lap == begun[1]) & (anew > begun[0])))
                anew = np.where(has_begun, anew, begun[0])
                start = np.where(has_begun, rows.base_wh[name][anew], start)
                since = energy - through(name, anew, np.where(has_begun, anew_lap, begun[1]))[0]
            values = start + since
            if not filled and name in rows.blank:
                values = np.where(rows.blank[name][row], np.nan, values)
            result[name] = Shown(values, energy, scale * (1 + wave * np.cos(at)))
        return result

    def pairs(self, kind: str, low: int, high: int, begin: Integers, end: Integers) -> tuple[Integers, Integers]:
        """Meter and unrolled row of every record of the meters low … high − 1 from row `begin` to before row `end`."""
        counts = end - begin
        meters = np.repeat(np.arange(low, high), counts)
        numbers = np.arange(len(meters)) - np.repeat(np.cumsum(counts) - counts - begin, counts)
        return meters, numbers

    def readings(self, meters: Integers, numbers: Integers, shown: Integers | None = None) -> pl.DataFrame:
        """Readings of unrolled rows.

        Args:
            meters: of the rows.
            numbers: the unrolled rows.
            shown: rows to take the values from instead, where a meter is stuck.

        Returns:
            `meter` (its number), meter_id, seq, observed_at, equipment_id, dialect and the columns that the tape has.
        """
        rows, plan = self.kinds["readings"], self.plan
        frame = self._taken("readings", meters, numbers, shown)
        if self.own_clock:
            return frame
        registers = self._registers(meters, numbers if shown is None else shown, False)
        new: dict[str, pl.Series] = {
            name: pl.Series(name, shown.wh).fill_nan(None).cast(pl.Int64) for name, shown in registers.items()
        }
        imports, exports = self._factors(frame, registers, plan.scale[meters])
        shift = pl.Series(plan.shift_mv[meters])
        has_import = frame.get_column("import_w") > 0 if "import_w" in frame.columns else None
        for name in rows.frame.columns:
            if name in IMPORT_COLUMNS:
                new[name] = _whole(frame.get_column(name) * imports)
            elif name in EXPORT_COLUMNS:
                new[name] = _whole(frame.get_column(name) * exports)
            elif name in CURRENT_COLUMNS:
                factor = imports if has_import is None else imports.zip_with(has_import.fill_null(True), exports)
                new[name] = _whole(frame.get_column(name) * factor)
            elif name in VOLTAGE_COLUMNS:  # a dead phase stays dead
                volts = frame.get_column(name)
                new[name] = volts.zip_with((volts <= 0).fill_null(False), (volts + shift).clip(1))
        return frame.with_columns(**new)

    def _factors(
        self, frame: pl.DataFrame, registers: dict[str, "Shown"], scale: Floats
    ) -> tuple[pl.Series, pl.Series]:
        """Factor on imported and exported power: the slope of the register that counts at that time."""
        second = (frame.get_column("tariff") == 2).fill_null(False).to_numpy() if "tariff" in frame.columns else None
        found = []
        for way in ("import", "export"):
            slopes = [
                registers[f"{way}_{tariff}_wh"].slope for tariff in ("t1", "t2") if f"{way}_{tariff}_wh" in registers
            ]
            slope = slopes[0] if slopes else scale
            if len(slopes) == 2 and second is not None:
                slope = np.where(second, slopes[1], slope)
            found.append(pl.Series(np.where(np.isnan(slope), scale, slope)))
        return found[0], found[1]

    def events(self, meters: Integers, numbers: Integers) -> pl.DataFrame:
        """Events of unrolled rows: `meter`, meter_id, seq and the event's own columns."""
        return self._taken("events", meters, numbers, None)

    def _taken(self, kind: str, meters: Integers, numbers: Integers, shown: Integers | None) -> pl.DataFrame:
        row, _ = self._place(kind, meters, numbers if shown is None else shown)
        taken = self.kinds[kind].frame[row]
        ids = self.meter_ids(meters)
        new = {
            "meter": pl.Series(meters),
            "meter_id": ids,
            "seq": pl.Series(numbers - self.begin(kind, meters)),
            "observed_at": from_microseconds(self.observed(kind, meters, numbers)),
        }
        if kind == "readings" and not self.own_clock:
            new["equipment_id"] = self._equipment(taken, meters)
        return taken.with_columns(**new)

    def _equipment(self, taken: pl.DataFrame, meters: Integers) -> pl.Series:
        first = self.first_equipment(meters)
        if not self.has_exchanges:
            return first
        later = pl.concat_str(pl.lit(first), pl.lit("-"), "equipment_number")
        is_first = pl.col("equipment_number") == 0
        return taken.select(equipment_id=pl.when(is_first).then(pl.lit(first)).otherwise(later)).to_series()

    @cached_property
    def has_exchanges(self) -> bool:
        """Whether any log has a second equipment."""
        return int(str(self.kinds["readings"].frame.get_column("equipment_number").max())) > 0

    def meter_ids(self, meters: Integers) -> pl.Series:
        """Names of meters by their numbers."""
        return self._ids[meters]

    @cached_property
    def _ids(self) -> pl.Series:
        """All names: short ones, 16 bytes each."""
        if self.own_clock:
            return self.logs.get_column("meter_id")
        numbers = pl.Series("meter_id", np.arange(1, len(self) + 1)).cast(pl.String).str.zfill(7)
        return pl.select(pl.lit(self.prefix) + numbers).to_series().rename("meter_id")

    @cached_property
    def _first_equipment(self) -> pl.Series:
        """Each meter's first equipment."""
        return pl.select(pl.lit("E-") + self._ids).to_series().rename("equipment_id")

    def first_equipment(self, meters: Integers) -> pl.Series:
        """Ids of the first equipment of meters by their numbers."""
        return self._first_equipment[meters]

    @property
    def mark(self) -> str:
        """What distinguishes this fleet's copies of the grid from those of a fleet with other ids."""
        return "" if self.prefix == PREFIX else f"{self.prefix}-"

    def registry(self, low: int, high: int) -> pl.DataFrame:
        """Registry rows of the meters low … high − 1."""
        log = self.plan.log[low:high]
        named = self.logs[log]
        if self.own_clock:
            return named.select(REGISTRY.names).cast(polars_schema(REGISTRY))
        meters = np.arange(low, high)
        ids = self.meter_ids(meters)
        copy = pl.Series("copy", meters // len(self.logs) + 1)
        mark = pl.lit(self.mark)
        is_copy, rebased = pl.col("copy") > 1, pl.col("valid_from") + self.rebase
        grid = ["transformer_id", "feeder_id", "community_id"]
        return (
            named.with_columns(copy, meter_id=ids)
            .with_columns(
                *[pl.format("{}-{}{}", name, mark, "copy").alias(name) for name in grid],
                usage_point_id=pl.format("up-{}", "meter_id"),
                equipment_id=self.first_equipment(meters),
                valid_from=pl.when(is_copy).then(pl.min_horizontal(rebased, pl.lit(self.first_at))).otherwise(rebased),
            )
            .select(REGISTRY.names)
            .cast(polars_schema(REGISTRY))
        )

    def truth(self, low: int, high: int) -> pl.DataFrame:
        """What the registers of the meters low … high − 1 show.

        Columns meter_id, register, first_wh, last_wh, energy_wh, begins_anew, readings. The energy is what went through
        the meter, the sum of its steps ahead: no fault that is injected changes it. Where the log's own register begins
        anew (a step back, other equipment), what went through in between is in no log.
        """
        meters = np.arange(low, high)
        begin = self.begin("readings", meters)
        count = self.counts("readings", meters)
        meters, begin, count = meters[count > 0], begin[count > 0], count[count > 0]
        first, last = self._registers(meters, begin, True), self._registers(meters, begin + count - 1, True)
        ids, number = self.meter_ids(meters), pl.Series(meters)
        log = self.plan.log[meters]
        rows = self.kinds["readings"]
        pieces = [
            pl.DataFrame(
                {
                    "meter_id": ids,
                    "register": pl.repeat(name.removesuffix("_wh"), len(meters), eager=True),
                    "first_wh": first[name].wh,
                    "last_wh": last[name].wh,
                    "energy_wh": last[name].energy_wh,
                    "begins_anew": rows.begins_anew[log],
                    "readings": count,
                    "meter": number,
                }
            ).filter(pl.Series(rows.has[name][log]))
            for name in sorted(first)
        ]
        schema = {
            "meter_id": pl.String, "register": pl.String, "first_wh": pl.Int64, "last_wh": pl.Int64,
            "energy_wh": pl.Int64, "begins_anew": pl.Boolean, "readings": pl.Int64,
        }  # fmt: skip
        if not pieces:
            return pl.DataFrame(schema=schema)
        both = pl.concat(pieces).sort("meter", maintain_order=True)
        return both.select(list(schema)).cast(schema)  # type: ignore[arg-type]


def _whole(values: pl.Series) -> pl.Series:
    return values.round(0).cast(pl.Int64)


def fleet(
    tape: Tape,
    meters: int | None = None,
    seed: int = 1,
    *,
    start: datetime | None = None,
    own_clock: bool = False,
    duration: timedelta | None = None,
    loop: bool = False,
    burst: bool = False,
    prefix: str = PREFIX,
) -> Fleet:
    """A fleet that plays the tape.

    Args:
        tape: the tape.
        meters: how many; the tape's own number if None.
        seed: the same gives the same fleet.
        start: run clock's begin; the tape's own if None.
        own_clock: keep the log's own stamps, values and ids.
        duration: how much of the log each meter plays; all of it if None.
        loop: begin the log again at its end, until the duration is over.
        burst: no phases: all meters report at the same moment.
        prefix: of the meters' ids; the log's own clock comes with the log's own.

    Raises:
        ConfigError: the tape is empty, its own clock is asked for more meters than it has or with another start, or a
            loop has no end.
    """
    logs, readings, events = (pl.DataFrame(table) for table in (tape.registry, tape.readings, tape.events))
    if not len(readings):
        msg = "the tape has no readings"
        raise ConfigError(msg)
    count = meters or len(logs)
    if own_clock and (count > len(logs) or start or loop):
        wrong = f"its {len(logs)} meters, not {count}" if count > len(logs) else "as it is: no --start, no --loop"
        msg = f"with its own clock the tape plays {wrong}"
        raise ConfigError(msg)
    if not re.fullmatch("[A-Za-z0-9_-]{1,32}", prefix):
        msg = f"--meter-prefix has 1 to 32 letters, digits, '_' or '-', not {prefix!r}"
        raise ConfigError(msg)
    if own_clock and prefix != PREFIX:
        msg = "with its own clock the meters keep the log's names: no --meter-prefix"
        raise ConfigError(msg)
    if loop and duration is None:
        msg = "--loop goes on until --duration is over: give both"
        raise ConfigError(msg)
    unnamed = pl.concat([rows.get_column("meter_id") for rows in (readings, events)]).unique()
    unnamed = unnamed.filter(~unnamed.is_in(logs.get_column("meter_id").implode())).sort()
    if len(unnamed):
        msg = f"the tape's registry lacks {len(unnamed)} of its meters: {', '.join(unnamed.head(5))}"
        raise ConfigError(msg)
    readings, events = with_due(readings, events)
    times = pl.concat([rows.get_column("due_at") for rows in (readings, events)])
    first, last = times.min(), times.max()
    assert isinstance(first, datetime)
    assert isinstance(last, datetime)
    interval = max(int(tape.info.interval_s or 1), 1) * SECOND
    length = (last - first) // timedelta(microseconds=1) + 1
    whole = next(
        (length + interval - 1) // unit * unit for unit in (WEEK, DAY, interval) if length + interval - 1 >= unit
    )
    has_weeks = not own_clock and count > len(logs) and whole >= 2 * WEEK
    cycle = whole if loop or has_weeks else length + interval
    span = length + interval + 1
    wanted = length if duration is None else duration // timedelta(microseconds=1)
    if wanted <= 0:
        msg = f"--duration is more than 0, not {duration}"
        raise ConfigError(msg)
    if wanted > length + interval and not loop:
        msg = f"--duration {duration} is more than the tape's {last - first}: give --loop to begin it again at its end"
        raise ConfigError(msg)
    play = wanted if loop else min(wanted, length)
    kinds = {}
    for kind, rows in (("readings", readings), ("events", events)):
        kinds[kind] = by_time(rows, logs, first, span, cycle, kind == "readings")
    plan = planned(
        count, len(logs), seed, cycle // WEEK if has_weeks else 1, 0 if own_clock or burst else interval, own_clock
    )
    begins_anew = kinds["readings"].begins_anew[plan.log]
    plan = replace(plan, scale=np.where(begins_anew, 1.0, plan.scale), wave=np.where(begins_anew, 0.0, plan.wave))
    first_at = start or first
    last_at = first_at + timedelta(microseconds=int(play + interval))
    return Fleet(
        logs, plan, kinds, first_at, play, last_at, cycle, loop, span, first_at - first, interval, own_clock, prefix
    )
