"""N meters from the M logs of a tape, and their records by meter and time.

Everything is a pure function of the tape, the seed and the meter's number: which record a meter sends as its n-th does
not depend on how the run is cut into slices, or into processes. Times inside are microseconds since the run's begin.

With the run's clock, meter i plays log i mod M from a week of the log that the seed chooses (whole weeks, so that hours
and week days stay in place; at the log's end it goes on at its begin). Registers start anew and are summed again from
the log's own steps, times a scale and with a wave along the register that bends every home's use a little and cannot
make a register step back; powers bend with them. Voltages are moved a little. Reports of a meter come at its own phase
of the interval. The first M meters are the logs themselves: no week, no scale, no wave. With the log's own clock
nothing at all is changed.
"""

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property

import numpy as np
import numpy.typing as npt
import polars as pl

from replay.tape import Tape
from schemas.codec import arrow_schema
from schemas.errors import ConfigError
from schemas.tables import REGISTERS, REGISTRY, polars_schema

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

REGISTER_COLUMNS = [f"{register}_wh" for register in REGISTERS]
IMPORT_COLUMNS = [name for name in arrow_schema("reading").names if name.startswith("import_") and name.endswith("_w")]
EXPORT_COLUMNS = [name for name in arrow_schema("reading").names if name.startswith("export_") and name.endswith("_w")]
CURRENT_COLUMNS = [name for name in arrow_schema("reading").names if name.startswith("current_")]
VOLTAGE_COLUMNS = [name for name in arrow_schema("reading").names if name.startswith("voltage_")]
SCALES = (0.7, 1.3)  # homes of one grid differ by more; enough that no two copies are alike
START_WH = 20_000_000  # a meter some years old
SHIFT_MV = 800  # two neighbouring grids of one kind
WAVE = 0.3  # how much a home's use is bent at most; below 1, or a register could step back
WAVE_WH = (400.0, 4_000.0)  # length of the wave: some hours of a home's use
MAX_OUTLIER = timedelta(days=400)  # a stamp this far from the log's middle is a broken clock, not a time to wait for
SECOND = 1_000_000
DAY, WEEK = 86_400 * SECOND, 7 * 86_400 * SECOND
STAMP = pl.Datetime("us", "UTC")


@dataclass(frozen=True)
class Rows:
    """The tape's readings or events, by log and time.

    Attributes:
        frame: the tape's columns that hold anything, with `box` (0 for a log's first equipment, then 1 …).
        keys: log × span + due, to find a log's row by time.
        due: microseconds since the tape's begin when a row is sent: never before the one above it in the log.
        first: per log its first row.
        cycle: per log its rows within one cycle.
        energy: per register and row the Wh since the log's first value; not a number where the tape has none.
        filled: the same with the last known value instead.
        has: per register and log whether there is any value.
        base_wh: per register and log its first value.
        cycle_wh: per register and log the Wh of a whole cycle.
    """

    frame: pl.DataFrame
    keys: Integers
    due: Integers
    first: Integers
    cycle: Integers
    energy: dict[str, Floats]
    filled: dict[str, Floats]
    has: dict[str, npt.NDArray[np.bool_]]
    base_wh: dict[str, Floats]
    cycle_wh: dict[str, Floats]


@dataclass(frozen=True)
class Plan:
    """What each meter plays: arrays of one entry a meter.

    Attributes:
        log: number of its log.
        week: microseconds of the log that it begins at.
        scale: factor on energy and power.
        wave: how much its use is bent, 0 to `WAVE`.
        wave_per_wh: angle per Wh of the wave along the register.
        angle: where on the wave it begins.
        start_wh: its registers' first value.
        shift_mv: on its voltages.
        phase: microseconds after the log's time that it reports.
    """

    log: Integers
    week: Integers
    scale: Floats
    wave: Floats
    wave_per_wh: Floats
    angle: Floats
    start_wh: Integers
    shift_mv: Integers
    phase: Integers


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
        cycle: microseconds after which a log begins again.
        span: what `Rows.keys` counts logs by.
        rebase: what the run's clock adds to the log's stamps.
        interval: microseconds between two readings of a meter, usually.
        own_clock: the log as it is.
    """

    logs: pl.DataFrame
    plan: Plan
    kinds: dict[str, Rows]
    first_at: datetime
    length: int
    last_at: datetime
    cycle: int
    span: int
    rebase: timedelta
    interval: int
    own_clock: bool

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

    def _before(self, kind: str, meters: Integers, log_time: Integers) -> Integers:
        rows = self.kinds[kind]
        log = self.plan.log[meters]
        lap, within = np.divmod(log_time, self.cycle)
        found = np.searchsorted(rows.keys, log * self.span + within) - rows.first[log]
        before: Integers = lap * rows.cycle[log] + (
            np.minimum(found, rows.cycle[log]) if self.cycle < self.span else found
        )
        return before

    def _place(self, kind: str, meters: Integers, numbers: Integers) -> tuple[Integers, Integers]:
        """Row of the tape and lap of each unrolled row."""
        rows = self.kinds[kind]
        log = self.plan.log[meters]
        if self.cycle >= self.span:
            return rows.first[log] + numbers, np.zeros_like(numbers)
        lap, within = np.divmod(numbers, np.maximum(rows.cycle[log], 1))
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
        moved = 0 if self.own_clock else self.rebase // timedelta(microseconds=1)
        observed: Integers = stamps[row] + lap * self.cycle - self.plan.week[meters] + moved
        return observed

    def registers(self, meters: Integers, numbers: Integers, filled: bool = False) -> dict[str, Floats]:
        """Register values of unrolled rows in Wh, whole numbers; not a number where there is none.

        Args:
            meters: of the rows.
            numbers: the unrolled rows.
            filled: take the last known value where the tape has none.
        """
        return {name: values for name, (values, _) in self._registers(meters, numbers, filled).items()}

    def _registers(self, meters: Integers, numbers: Integers, filled: bool) -> dict[str, tuple[Floats, Floats]]:
        """Per register the values and the factor by which power is bent there."""
        rows, plan = self.kinds["readings"], self.plan
        row, lap = self._place("readings", meters, numbers)
        log = plan.log[meters]
        begun = self._place("readings", meters, self.begin("readings", meters)) if self.has_weeks else None
        scale, wave, per_wh, angle = plan.scale[meters], plan.wave[meters], plan.wave_per_wh[meters], plan.angle[meters]
        result = {}
        for name, energy in (rows.filled if filled else rows.energy).items():
            used = energy[row] + lap * rows.cycle_wh[name][log]
            if begun is not None:
                used -= rows.filled[name][begun[0]] + begun[1] * rows.cycle_wh[name][log]
            at = angle + used * per_wh
            shown = scale * (used + wave / per_wh * (np.sin(at) - np.sin(angle)))
            # a home without panels has no export: its register stays at 0
            start = np.where(rows.cycle_wh[name][log] != 0, plan.start_wh[meters], 0)
            if self.own_clock:
                start = rows.base_wh[name][log]
            result[name] = (start + np.floor(shown + 0.5), scale * (1 + wave * np.cos(at)))
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
            name: pl.Series(name, values).fill_nan(None).cast(pl.Int64) for name, (values, _) in registers.items()
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
            elif name in VOLTAGE_COLUMNS:
                new[name] = frame.get_column(name) + shift
        return frame.with_columns(**new)

    def _factors(
        self, frame: pl.DataFrame, registers: dict[str, tuple[Floats, Floats]], scale: Floats
    ) -> tuple[pl.Series, pl.Series]:
        """Factor on imported and exported power: the slope of the register that counts at that time."""
        second = (frame.get_column("tariff") == 2).fill_null(False).to_numpy() if "tariff" in frame.columns else None
        found = []
        for way in ("import", "export"):
            slopes = [
                registers[f"{way}_{tariff}_wh"][1] for tariff in ("t1", "t2") if f"{way}_{tariff}_wh" in registers
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
        first = self.boxes(meters)
        if not self.has_exchanges:
            return first
        later = pl.concat_str(pl.lit(first), pl.lit("-"), "box")
        return taken.select(equipment_id=pl.when(pl.col("box") == 0).then(pl.lit(first)).otherwise(later)).to_series()

    @cached_property
    def has_exchanges(self) -> bool:
        """Whether any log has a second box."""
        return int(str(self.kinds["readings"].frame.get_column("box").max())) > 0

    def meter_ids(self, meters: Integers) -> pl.Series:
        """Names of meters by their numbers."""
        return self._ids[meters]

    @cached_property
    def _ids(self) -> pl.Series:
        """All names: short ones, 16 bytes each."""
        if self.own_clock:
            return self.logs.get_column("meter_id")
        numbers = pl.Series("meter_id", np.arange(1, len(self) + 1)).cast(pl.String).str.zfill(7)
        return pl.select(pl.lit("m") + numbers).to_series().rename("meter_id")

    @cached_property
    def _boxes(self) -> pl.Series:
        """Each meter's first box."""
        return pl.select(pl.lit("E-") + self._ids).to_series().rename("equipment_id")

    def boxes(self, meters: Integers) -> pl.Series:
        """The first box of meters by their numbers."""
        return self._boxes[meters]

    def registry(self, low: int, high: int) -> pl.DataFrame:
        """Registry rows of the meters low … high − 1."""
        log = self.plan.log[low:high]
        named = self.logs[log]
        if self.own_clock:
            return named.select(REGISTRY.names).cast(polars_schema(REGISTRY))
        meters = np.arange(low, high)
        ids = self.meter_ids(meters)
        copy = pl.Series("copy", meters // len(self.logs) + 1)
        grid = ["transformer_id", "feeder_id", "community_id"]
        return (
            named.with_columns(copy, meter_id=ids)
            .with_columns(
                *[pl.format("{}-{}", name, "copy").alias(name) for name in grid],
                usage_point_id=pl.format("up-{}", "meter_id"),
                equipment_id=self.boxes(meters),
                valid_from=pl.col("valid_from") + self.rebase,
            )
            .select(REGISTRY.names)
            .cast(polars_schema(REGISTRY))
        )

    def truth(self, low: int, high: int) -> pl.DataFrame:
        """What the registers of the meters low … high − 1 show.

        Columns meter_id, register, first_wh, last_wh, energy_wh, readings. The energy is what went through the meter:
        no fault that is injected changes it.
        """
        meters = np.arange(low, high)
        begin = self.begin("readings", meters)
        count = self.counts("readings", meters)
        meters, begin, count = meters[count > 0], begin[count > 0], count[count > 0]
        first, last = self.registers(meters, begin, True), self.registers(meters, begin + count - 1, True)
        ids, number = self.meter_ids(meters), pl.Series(meters)
        log = self.plan.log[meters]
        rows = self.kinds["readings"]
        pieces = [
            pl.DataFrame(
                {
                    "meter_id": ids,
                    "register": pl.repeat(name.removesuffix("_wh"), len(meters), eager=True),
                    "first_wh": first[name],
                    "last_wh": last[name],
                    "energy_wh": last[name] - first[name],
                    "readings": count,
                    "meter": number,
                }
            ).filter(pl.Series(rows.has[name][log]))
            for name in sorted(first)
        ]
        schema = {
            "meter_id": pl.String, "register": pl.String, "first_wh": pl.Int64, "last_wh": pl.Int64,
            "energy_wh": pl.Int64, "readings": pl.Int64,
        }  # fmt: skip
        if not pieces:
            return pl.DataFrame(schema=schema)
        both = pl.concat(pieces).sort("meter", maintain_order=True)
        return both.select(list(schema)).cast(schema)  # type: ignore[arg-type]


def _whole(values: pl.Series) -> pl.Series:
    return values.round(0).cast(pl.Int64)


def from_microseconds(microseconds: Integers) -> pl.Series:
    """Times by microseconds since 1970."""
    return pl.Series(microseconds).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")


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
    if loop and duration is None:
        msg = "--loop goes on until --duration is over: give both"
        raise ConfigError(msg)
    readings, events = _due(readings), _due(events)
    first = min(rows.get_column("due_at").min() for rows in (readings, events) if len(rows))  # type: ignore[type-var]
    last = max(rows.get_column("due_at").max() for rows in (readings, events) if len(rows))  # type: ignore[type-var]
    assert isinstance(first, datetime)
    assert isinstance(last, datetime)
    interval = max(int(tape.info.interval_s or 1), 1) * SECOND
    length = (last - first) // timedelta(microseconds=1) + 1
    whole = next(
        (length + interval - 1) // unit * unit for unit in (WEEK, DAY, interval) if length + interval - 1 >= unit
    )
    has_weeks = not own_clock and count > len(logs) and whole >= 2 * WEEK
    cycle = whole if loop or has_weeks else length + interval
    span = length + interval + 1 if loop or has_weeks else cycle
    longest = length if not loop and not has_weeks else whole
    wanted = longest if duration is None else duration // timedelta(microseconds=1)
    play = wanted if loop else min(wanted, longest)
    if play <= 0:
        msg = f"--duration is more than 0, not {duration}"
        raise ConfigError(msg)
    kinds = {}
    for kind, rows in (("readings", readings), ("events", events)):
        kinds[kind] = _rows(rows, logs, first, span, cycle, kind == "readings")
    plan = _plan(
        count, len(logs), seed, cycle // WEEK if has_weeks else 1, 0 if own_clock or burst else interval, own_clock
    )
    first_at = start or first
    last_at = first_at + timedelta(microseconds=int(play + interval))
    return Fleet(logs, plan, kinds, first_at, play, last_at, cycle, span, first_at - first, interval, own_clock)


def _plan(count: int, logs: int, seed: int, weeks: int, interval: int, own_clock: bool) -> Plan:
    random = np.random.default_rng(seed)
    number = np.arange(count)
    is_copy = (number >= logs) & (not own_clock)
    week = random.integers(0, weeks, count) * WEEK
    scale = np.round(random.uniform(*SCALES, count), 4)
    wave = np.round(random.uniform(0, WAVE, count), 4)
    wave_wh = random.uniform(math.log(WAVE_WH[0]), math.log(WAVE_WH[1]), count)
    angle = random.uniform(0, 2 * math.pi, count)
    return Plan(
        log=number % logs,
        week=np.where(is_copy, week, 0),
        scale=np.where(is_copy, scale, 1.0),
        wave=np.where(is_copy, wave, 0.0),
        wave_per_wh=np.asarray(2 * math.pi / np.round(np.exp(wave_wh), 1), np.float64),
        angle=np.round(angle, 6),
        start_wh=random.integers(0, START_WH, count),
        shift_mv=np.where(is_copy, random.integers(-SHIFT_MV, SHIFT_MV + 1, count), 0),
        phase=random.integers(0, interval, count) if interval else np.zeros(count, np.int64),
    )


def _due(rows: pl.DataFrame) -> pl.DataFrame:
    """Adds due_at: when a record is sent, never before the one above it in the log."""
    middle = pl.col("observed_at").median()
    is_sane = (pl.col("observed_at") - middle).abs() <= MAX_OUTLIER
    known = pl.when(is_sane).then("observed_at").cum_max().forward_fill().backward_fill()
    return rows.sort("log_row").with_columns(due_at=known.over("meter_id"))


def _rows(rows: pl.DataFrame, logs: pl.DataFrame, first: datetime, span: int, cycle: int, has_registers: bool) -> Rows:
    number = pl.DataFrame({"meter_id": logs.get_column("meter_id"), "log": np.arange(len(logs))})
    known = (
        rows.join(number, on="meter_id", how="inner", maintain_order="left")
        .with_columns(due=(pl.col("due_at") - first).dt.total_microseconds().fill_null(0))
        .sort("log", "due", "log_row")
    )
    log, due = known.get_column("log").to_numpy(), known.get_column("due").to_numpy()
    edges = np.searchsorted(log, np.arange(len(logs) + 1))
    keys = log * span + due
    ends = np.searchsorted(keys, np.arange(len(logs)) * span + min(cycle, span - 1))
    frame = known.drop("log_row", "due_at", "log", "due")
    if has_registers:
        boxes = pl.col("equipment_id").forward_fill().backward_fill()
        frame = frame.with_columns(box=boxes.rle_id().over("meter_id").cast(pl.Int64))
    energy: dict[str, Floats] = {}
    filled: dict[str, Floats] = {}
    has: dict[str, npt.NDArray[np.bool_]] = {}
    base_wh: dict[str, Floats] = {}
    cycle_wh: dict[str, Floats] = {}
    for name in REGISTER_COLUMNS if has_registers else ():
        column = known.get_column(name)
        if column.null_count() == len(column):
            continue
        own = known.select("log", wh=name, base=pl.col(name).drop_nulls().first().over("log"))
        used = (pl.col("wh") - pl.col("base")).cast(pl.Float64)
        energy[name] = own.select(used.fill_null(float("nan"))).to_series().to_numpy()
        filled[name] = own.select(used.forward_fill().over("log").fill_null(0.0)).to_series().to_numpy()
        bases = own.group_by("log").agg(pl.col("base").first()).drop_nulls()
        logged = bases.get_column("log").to_numpy()
        has[name], base_wh[name] = np.zeros(len(logs), bool), np.zeros(len(logs))
        has[name][logged], base_wh[name][logged] = True, bases.get_column("base").to_numpy()
        last = np.maximum(np.minimum(ends, edges[1:] - 1), edges[:-1])
        cycle_wh[name] = np.where(edges[1:] > edges[:-1], filled[name][np.minimum(last, len(keys) - 1)], 0.0)
    frame = frame.drop(
        [column.name for column in frame.get_columns() if column.null_count() == len(frame) and len(frame)]
    )
    return Rows(frame, keys, due, edges[:-1], ends - edges[:-1], energy, filled, has, base_wh, cycle_wh)
