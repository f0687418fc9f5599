"""Labelled faults: planned from a file and the seed before the run begins, so that every one of them is a row of truth.

A meter carries the faults of one entry only, so that what became of each can be told. Like the fleet, the plan is a
function of file, seed and meter number: it does not depend on slices or processes.
"""

import re
from bisect import bisect_left
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from replay.fleet import REGISTER_COLUMNS, STAMP, Fleet, Integers, from_microseconds
from schemas.closed_lists import FaultKind, Poison
from schemas.codec import FRAME, arrow_schema, encode
from schemas.errors import ConfigError

MARGIN = 6  # readings before the first fault of a meter, after its last and between two: the series is known by then
EPOCH_US = {
    FaultKind.CLOCK_1970: 0,
    FaultKind.CLOCK_2099: round(datetime(2099, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000,
}
NEW_BOX_WH = 50_000  # a new meter has run a little on the test bench
ON_EVERY_WAY = (
    Poison.NOT_FRAMED,
    Poison.UNKNOWN_SCHEMA_ID,
    Poison.UNDECODABLE,
    Poison.TRAILING_BYTES,
    Poison.METER_ID_MISMATCH,
)
"""What is poison over MQTT and in Kafka alike; JSON and telegrams are for MQTT only."""
FULL_WH = 10**8  # where a register of eight digits begins again
SECOND = 1_000_000
CENTURY = 36_525 * 86_400
MOST = 10**9
TRIES = 1_000  # transformers beyond those asked for that are looked at, where one cannot have a fault
LOOK = 10_000  # readings before and after that are looked at first
ONCE = (FaultKind.RESET, FaultKind.ROLLOVER, FaultKind.METER_EXCHANGE)
NEEDS = {
    FaultKind.RESET: "more than 0 there, and less afterwards",
    FaultKind.METER_EXCHANGE: "more than 0 there, of a box that its log names",
    FaultKind.ROLLOVER: "a step ahead there",
    FaultKind.SPIKE: "a value there that is not 0 for ever",
    FaultKind.UNIT_SLIP: "more than 0 there",
}
"""Faults of registers: what one of them has to show after its first value, or the fault cannot be told."""
AMOUNTS = {FaultKind.SPIKE: (1, 10**12), FaultKind.UNIT_SLIP: (2, 10**6)}
BY_S = {
    FaultKind.LATE: 2_700, FaultKind.CLOCK_JUMP: 3_600, FaultKind.VOLTAGE_ALARM: 1_800, FaultKind.POWER_STORM: 1_200,
}  # fmt: skip
"""`by` where an entry does not say."""
PARTS = {
    "meters": set(FaultKind) - {FaultKind.POWER_STORM},
    "times": set(FaultKind) - {FaultKind.POWER_STORM},
    "length": {
        FaultKind.GAP, FaultKind.CLOCK_JUMP, FaultKind.CLOCK_1970, FaultKind.CLOCK_2099, FaultKind.SPIKE,
        FaultKind.FROZEN, FaultKind.UNIT_SLIP,
    },
    "by": set(BY_S),
    "amount": set(AMOUNTS),
    "bytes": {FaultKind.POISON},
    "transformers": {FaultKind.POWER_STORM},
}  # fmt: skip
"""Part of an entry → the kinds that heed it."""
FAULTS = pa.schema(
    [
        ("fault_id", pa.int64()),
        ("kind", pa.string()),
        ("meter_id", pa.string()),
        ("topic", pa.string()),
        ("seq", pa.int64()),
        ("due_at", pa.timestamp("us", "UTC")),
        ("observed_at", pa.timestamp("us", "UTC")),
        ("is_sent", pa.bool_()),
        ("amount", pa.int64()),
        ("detail", pa.string()),
        ("payload", pa.binary()),
    ]
)
"""The truth about faults, one row per record that is touched: `observed_at` as it is sent (or would have been);
`amount` in Wh (reset, rollover, meter_exchange, spike), seconds (late, clock_jump) or a factor (unit_slip); `detail`
the register, the event's code, the kind of poison or the transformer; `payload` the bytes of poison."""


def seconds(value: Any) -> float:
    """`90`, `40m`, `-1h` → seconds.

    Raises:
        ValueError: no such time.
    """
    match = re.fullmatch(r"([+-]?\d+(?:\.\d+)?)\s*(s|m|h|d)", str(value).strip())
    if not match:
        msg = f"{value!r} is no time: say 90s, 40m, -1h or 2d"
        raise ValueError(msg)
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]


Seconds = Annotated[float, BeforeValidator(seconds), Field(ge=-CENTURY, le=CENTURY)]
Count = Annotated[int, Field(ge=1, le=MOST)]


class Entry(BaseModel):
    """One entry of a dirt file.

    Attributes:
        kind: which fault.
        meters: how many meters: a number, a share below 1, or their ids.
        transformers: for a power_storm: how many transformers lose their supply.
        times: how often per meter, spread over the run.
        length: readings that are touched each time (gap, clock_*, spike, frozen, unit_slip).
        by: whole seconds that a late record is late, that a clock jumps (may be negative) or an outage or alarm lasts.
        amount: Wh of a spike, or factor of a unit_slip: whole numbers.
        bytes: kinds of poison, in turn.
        at: seconds after the run's begin, once; drawn by seed if absent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: FaultKind
    meters: int | float | list[str] = 1
    transformers: Count = 1
    times: Count = 1
    length: Count = 1
    by: Seconds | None = None
    amount: float | None = None
    bytes: Annotated[list[Poison], Field(min_length=1)] = list(ON_EVERY_WAY)
    at: Annotated[Seconds, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> "Entry":
        named = self.meters if isinstance(self.meters, list) else []
        number = 1.0 if isinstance(self.meters, list) else self.meters
        least, most = AMOUNTS.get(self.kind, (0, 0))
        unheeded = sorted(part for part in self.model_fields_set & set(PARTS) if self.kind not in PARTS[part])
        wrong = [
            told
            for is_wrong, told in (
                (not (0 < number < 1 or (1 <= number <= MOST and number % 1 == 0)) or self.meters == [],
                 f"meters is a number from 1 to {MOST}, a share below 1, or a list of ids"),
                (len(set(named)) < len(named), "meters names one twice"),
                (self.at is not None and self.times > 1, "at says when: leave times out"),
                (bool(unheeded), f"a {self.kind} has no {', no '.join(unheeded)}: leave it out"),
                (self.by is not None and (self.by == 0 or self.by % 1 != 0), "by is whole seconds, and not 0"),
                (self.by is not None and self.by < 0 and self.kind != FaultKind.CLOCK_JUMP,
                 "by is more than 0: only a clock jumps back"),
                (self.kind in ONCE and self.times > 1, f"a {self.kind} comes once per meter, not {self.times} times"),
                (self.kind in AMOUNTS and self.amount is not None
                 and (not least <= self.amount <= most or self.amount % 1 != 0),
                 f"amount is a whole number from {least} to {most}"),
            )
            if is_wrong
        ]  # fmt: skip
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def by_s(self) -> int:
        """`by`, or what it is where the entry does not say."""
        return round(BY_S.get(self.kind, 0) if self.by is None else self.by)


class DirtFile(BaseModel):
    """A dirt file: a list of entries under `faults`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    faults: list[Entry]


def read_dirt(path: Path) -> list[Entry]:
    """The entries of a dirt file.

    Raises:
        ConfigError: it is not there, no YAML, or an entry is none that we know; all that is wrong, together.
    """
    try:
        return DirtFile.model_validate(yaml.safe_load(path.read_text())).faults
    except (OSError, yaml.YAMLError) as error:
        msg = f"cannot read {path}: {error}"
        raise ConfigError(msg) from error
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc']))}: {_said(each['type'], each['msg'])}" for each in error.errors()]
        msg = f"{path}: " + "; ".join(wrong)
        raise ConfigError(msg) from error


def _said(error: str, text: str) -> str:
    if error == "extra_forbidden":
        return f"no such part; an entry has {', '.join(Entry.model_fields)}"
    return text.removeprefix("Value error, ")


BENDS = pl.Schema(
    {
        "meter": pl.Int64(),
        "from_number": pl.Int64(),
        "to_number": pl.Int64(),
        "moved_us": pl.Int64(),
        "clock_us": pl.Int64(),
        "factor": pl.Float64(),
        "full_wh": pl.Int64(),
        "box": pl.String(),
        **dict.fromkeys(REGISTER_COLUMNS, pl.Int64()),
    }
)
"""What is done to the readings `from_number` … `to_number` − 1 of a meter: the clock is moved, or set and goes on from
there; registers are multiplied, moved by so many Wh, and begin again at `full_wh`; the box is another."""


@dataclass(frozen=True)
class Raw:
    """Bytes that are sent as they are.

    Attributes:
        due: microseconds after the run's begin.
        meter: number of the meter in whose name they are sent.
    """

    due: int
    meter: int
    encoding: str
    payload: bytes


class _Around:
    """What a register shows around some of a meter's rows.

    Attributes:
        now: its values in these rows; not a number where it is blank.
        before: per row the last value before it; not a number where there is none.
        after: per row the next value, its own if it has one; not a number where there is none.
    """

    def __init__(self, wh: npt.NDArray[np.float64], here: slice) -> None:
        """Looks at the rows `here` of all that are known; there is one before them."""
        self._wh, self._here = wh, here
        self.now = wh[here]
        self.before = _filled(wh)[here.start - 1 : here.stop - 1]
        self.after = _filled(wh[::-1])[::-1][here]

    def stay(self, above: int, length: int) -> npt.NDArray[np.bool_]:
        """Per row whether so many values from it on are above a number, and none is blank."""
        fails = np.concatenate([[0], np.cumsum(~(self._wh > above))])
        begin, end = self._here.start, self._here.stop
        is_so: npt.NDArray[np.bool_] = fails[begin + length : end + length] == fails[begin:end]
        return is_so


def _filled(wh: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Each value, or the last one before."""
    return wh[np.maximum.accumulate(np.where(np.isnan(wh), 0, np.arange(len(wh))))]


class Dirt:
    """The faults of a run.

    Attributes:
        faults: the truth, columns `FAULTS`.
        has_readings: per meter whether any of its readings is touched.
        has_events: the same of its events.
    """

    def __init__(self, fleet: Fleet, entries: list[Entry], seed: int) -> None:
        """Plans all faults.

        Raises:
            ConfigError: an entry, named by its place, asks for more meters than are left, or for what the tape has not.
        """
        self._fleet = fleet
        self._random = np.random.default_rng([seed, 0xD127])
        self._interval = fleet.interval // SECOND
        self._left = self._random.permutation(
            np.flatnonzero(fleet.counts("readings", np.arange(len(fleet))) >= 4 * MARGIN)
        )
        self._fault_id = 0
        self._truth: list[dict[str, Any]] = []
        self._withheld: list[int] = []
        self._extra: list[tuple[int, int, int]] = []
        self._stuck: list[tuple[int, int]] = []
        self._bends: list[dict[str, Any]] = []
        self._raw: list[Raw] = []
        self._events: list[dict[str, Any]] = []
        # meters by name first, then whole transformers
        for place in sorted(range(len(entries)), key=lambda place: _rank(entries[place])):
            try:
                (self._storms if entries[place].kind == FaultKind.POWER_STORM else self._inject)(entries[place])
            except ConfigError as error:
                msg = f"faults.{place}: {error}"
                raise ConfigError(msg) from error
        self._freeze()

    def _inject(self, entry: Entry) -> None:
        """Plans an entry's faults; where meters are not named, those that cannot have them are passed over."""
        meters, count = self._candidates(entry)
        taken: list[int] = []
        why: ConfigError | None = None
        for meter in meters:
            try:
                places = [self._place(entry, meter, *numbers) for numbers in self._numbers(entry, meter)]
            except ConfigError as error:
                why = why or error
                continue
            for number, register in places:
                self._fault_id += 1
                self._plan(entry, meter, number, len(taken), register)
            taken.append(meter)
            if len(taken) == count:
                break
        if len(taken) < count:
            msg = (
                f"{entry.kind} asks for {count} meters, {len(taken)} of {len(meters)} that are free can have it: {why}"
            )
            raise ConfigError(msg) from why
        self._left = self._left[~np.isin(self._left, taken)]

    def _candidates(self, entry: Entry) -> tuple[list[int], int]:
        """Meters that may have an entry's faults, in turn, and how many of them shall."""
        if isinstance(entry.meters, list):
            free = dict(zip(self._fleet.meter_ids(self._left), self._left.tolist(), strict=True))
            for name in entry.meters:
                if name not in free:
                    msg = f"{entry.kind}: {name} {self._why_not_free(name)}"
                    raise ConfigError(msg)
            return [free[name] for name in entry.meters], len(entry.meters)
        count = max(1, round(entry.meters * len(self._fleet))) if 0 < entry.meters < 1 else int(entry.meters)
        if count > len(self._left):
            msg = (
                f"{entry.kind} asks for {count} meters, {len(self._left)} are left that have no fault yet and "
                f"{4 * MARGIN} readings: ask for fewer, or play more"
            )
            raise ConfigError(msg)
        return self._left.tolist(), count

    def _why_not_free(self, name: str) -> str:
        found = np.flatnonzero((self._fleet.meter_ids(np.arange(len(self._fleet))) == name).to_numpy())
        if not len(found):
            return "is no meter of the fleet"
        count = int(self._fleet.counts("readings", found)[0])
        few = f"has {count} readings: a fault asks for {4 * MARGIN}"
        return few if count < 4 * MARGIN else "is named by another entry"

    def _numbers(self, entry: Entry, meter: int) -> list[tuple[int, int, int]]:
        """Unrolled rows at which the faults of one meter begin, each with those between which it could."""
        each = np.array([meter])
        begin = int(self._fleet.begin("readings", each)[0])
        count = self._count(meter)
        if entry.at is not None:
            at = int(self._fleet.sent_before("readings", each, round(entry.at * SECOND))[0])
            latest = begin + count - MARGIN - entry.length
            if not begin + MARGIN <= at <= latest:
                name = self._fleet.meter_ids(each)[0]
                msg = f"at {entry.at:.0f} s {name} has not {MARGIN} readings before and after: choose another time"
                raise ConfigError(msg)
            return [(at, at, latest)]
        reach = entry.length + round(abs(entry.by_s) / self._interval)
        room = (count - MARGIN) // entry.times - reach - MARGIN
        if room < 1:
            msg = f"{count} readings of a meter do not hold {entry.times} faults that reach over {reach}"
            raise ConfigError(msg)
        stretch = (count - MARGIN) // entry.times
        firsts = [begin + MARGIN + turn * stretch for turn in range(entry.times)]
        return [(first + int(self._random.integers(0, room)), first, first + room - 1) for first in firsts]

    def _place(self, entry: Entry, meter: int, number: int, first: int, last: int) -> tuple[int, str]:
        """Row and register of a fault that is to begin at `number`; no register where it needs none.

        Where no register lets the fault be told there it begins at the next row, up to `last` and then from `first` on,
        where one does.

        Raises:
            ConfigError: the meter cannot have it.
        """
        if entry.kind not in NEEDS:
            return number, ""
        name = self._fleet.meter_ids(np.array([meter]))[0]
        if entry.kind in ONCE and self._fleet.kinds["readings"].begins_anew[self._fleet.plan.log[meter]]:
            msg = f"the registers of {name} begin anew in its own log"
            raise ConfigError(msg)
        for low, high in dict.fromkeys([(number, min(number + LOOK, last + 1)), (number, last + 1), (first, number)]):
            if found := self._found(entry, meter, low, high):
                return found
        msg = f"no register of {name} shows {NEEDS[entry.kind]}"
        raise ConfigError(msg)

    def _found(self, entry: Entry, meter: int, low: int, high: int) -> tuple[int, str] | None:
        """The first row of low … high − 1 at which a fault of registers can be told, and by which of them."""
        begin = int(self._fleet.begin("readings", np.array([meter]))[0])
        end = begin + self._count(meter)
        rows = np.arange(max(low - LOOK, begin), min(high + LOOK + entry.length, end))
        here = slice(low - rows[0], high - rows[0])
        registers = {name: _Around(wh, here) for name, wh in self._registers(meter, rows).items()}
        is_able = np.full(high - low, True)
        if entry.kind == FaultKind.RESET:  # of no register may the value after it pass for a step ahead
            for each in registers.values():
                is_able &= ~((each.before > 0) & (each.after >= 2 * each.before))
        if entry.kind == FaultKind.METER_EXCHANGE and self._fleet.own_clock:
            is_able &= np.maximum.accumulate(self._has_box(meter, rows))[here.start - 1 : here.stop - 1]
        last = self._values(meter, end - 1) if entry.kind == FaultKind.SPIKE else {}
        places: list[tuple[int, bool, int, str]] = []
        for name, each in registers.items():
            match entry.kind:
                case FaultKind.ROLLOVER:
                    fits = each.now > each.before
                case FaultKind.SPIKE:
                    fits = each.stay(-1, entry.length) & ((each.before > 0) | (each.before < last[name]))
                case FaultKind.UNIT_SLIP:
                    fits = each.stay(0, entry.length) & (each.before > 0)
                case _:
                    fits = (each.now >= 0) & (each.before > 0)
            if (fits & is_able).any():
                place = int(np.flatnonzero(fits & is_able)[0])
                stands = entry.kind == FaultKind.SPIKE and last[name] <= each.before[place]
                places.append((place, stands, len(places), name))
        if not places:
            return None
        place, *_, name = min(places)  # the first one, and of those one that rises, where there is one
        return low + place, name

    def _registers(self, meter: int, rows: Integers) -> dict[str, npt.NDArray[np.float64]]:
        """What the registers that a meter has show in its rows; not a number where one is blank."""
        has, log = self._fleet.kinds["readings"].has, self._fleet.plan.log[meter]
        shown = self._fleet.registers(np.full(len(rows), meter), rows)
        return {name: wh for name, wh in shown.items() if has[name][log]}

    def _has_box(self, meter: int, rows: Integers) -> npt.NDArray[np.bool_]:
        known = self._fleet.readings(np.full(len(rows), meter), rows)
        if "equipment_id" not in known.columns:
            return np.full(len(rows), False)
        return known.get_column("equipment_id").is_not_null().to_numpy()

    def _plan(self, entry: Entry, meter: int, number: int, turn: int, register: str) -> None:
        match entry.kind:
            case FaultKind.DUPLICATE:
                self._extra.append((meter, number, self._due(meter, number)))
                self._tell(entry, meter, range(number, number + 1))
            case FaultKind.LATE:
                due = self._due(meter, number) + entry.by_s * SECOND
                self._move(meter, number, due)
                self._tell(entry, meter, range(number, number + 1), due=due, amount=entry.by_s)
            case FaultKind.REORDER:
                due = self._due(meter, number + 1) + 1
                self._move(meter, number, due)
                self._tell(entry, meter, range(number, number + 1), due=due)
            case FaultKind.GAP:
                touched = range(number, number + entry.length)
                self._withhold(meter, touched)
                self._tell(entry, meter, touched, is_sent=False)
            case FaultKind.CLOCK_JUMP:
                self._bend(meter, number, number + entry.length, moved_us=entry.by_s * SECOND)
                self._tell(entry, meter, range(number, number + entry.length), amount=entry.by_s)
            case FaultKind.CLOCK_1970 | FaultKind.CLOCK_2099:
                self._bend(meter, number, number + entry.length, clock_us=EPOCH_US[entry.kind])
                self._tell(entry, meter, range(number, number + entry.length))
            case FaultKind.FROZEN:
                touched = range(number, number + entry.length)
                self._stuck += [(_code(meter, each), number - 1) for each in touched]
                self._tell(entry, meter, touched)
            case FaultKind.POISON:
                self._poison(entry, meter, number, turn)
            case FaultKind.VOLTAGE_ALARM | FaultKind.TAMPER:
                self._said(entry, meter, number)
            case _:
                self._plan_register(entry, meter, number, register)

    def _plan_register(self, entry: Entry, meter: int, number: int, register: str) -> None:
        before = self._values(meter, number - 1)
        end = number + self._count(meter) + entry.length  # to the end of the run
        match entry.kind:
            case FaultKind.RESET:
                self._bend(meter, number, end, **{name: -value for name, value in before.items()})
                self._tell(entry, meter, range(number, number + 1), amount=before[register], detail=register)
            case FaultKind.METER_EXCHANGE:
                new = int(self._random.integers(0, NEW_BOX_WH))
                first = {name: (new if value else 0) - value for name, value in before.items()}
                box = f"{self._fleet.boxes(np.array([meter]))[0]}-new"
                self._bend(meter, number, end, box=box, **first)
                self._tell(entry, meter, range(number, number + 1), amount=new, detail=register)
            case FaultKind.ROLLOVER:
                after = self._values(meter, number)[register]
                begin = int(self._fleet.begin("readings", np.array([meter]))[0])
                self._bend(meter, begin, end, full_wh=FULL_WH, **{register: FULL_WH - after})
                self._tell(entry, meter, range(number, number + 1), amount=FULL_WH, detail=register)
            case FaultKind.SPIKE:
                wild = 500_000 if entry.amount is None else round(entry.amount)
                self._bend(meter, number, number + entry.length, **{register: wild})
                self._tell(entry, meter, range(number, number + entry.length), amount=wild, detail=register)
            case _:
                factor = 1_000.0 if entry.amount is None else entry.amount
                self._bend(meter, number, number + entry.length, factor=factor)
                self._tell(entry, meter, range(number, number + entry.length), amount=round(factor), detail=register)

    def _storms(self, entry: Entry) -> None:
        """All meters of a transformer lose their supply and get it back."""
        fleet, margin = self._fleet, MARGIN * self._interval * SECOND
        names, own = np.unique([name or "" for name in fleet.logs.get_column("transformer_id")], return_inverse=True)
        if not any(names):
            msg = "power_storm: the tape's registry names no transformer: leave it out"
            raise ConfigError(msg)
        group = np.arange(len(fleet)) // len(fleet.logs) * len(names) + own[fleet.plan.log]
        free = np.sort(self._left)
        free = free[names[group[free] % len(names)] != ""]
        lasts = entry.by_s * SECOND
        latest = fleet.length - lasts - 2 * margin
        earliest = max(latest // 4, margin + fleet.interval)
        if latest <= earliest or (entry.at is not None and entry.at * SECOND > latest):
            msg = f"power_storm: {fleet.length / SECOND:.0f} s do not hold it and {2 * MARGIN} readings after it"
            raise ConfigError(msg)
        struck = 0
        for each in self._random.permutation(np.unique(group[free]))[: entry.transformers + TRIES]:
            members = free[group[free] == each]
            down = int(self._random.integers(earliest, latest)) if entry.at is None else round(entry.at * SECOND)
            first = fleet.sent_before("readings", members, down)
            after = fleet.sent_before("readings", members, down + lasts)
            begin = fleet.begin("readings", members)
            is_there = (first >= begin + MARGIN) & (after + MARGIN <= begin + fleet.counts("readings", members))
            if not (is_there & (after > first)).any():
                continue
            self._left = self._left[~np.isin(self._left, members)]
            self._fault_id += 1
            number, place = divmod(int(each), len(names))
            name = str(names[place]) if fleet.own_clock else f"{names[place]}-{fleet.mark}{number + 1}"
            for meter, low, high in zip(*(rows[is_there].tolist() for rows in (members, first, after)), strict=True):
                jitter = np.sort(self._random.integers(0, 3 * SECOND, 2)).tolist()  # up again never before down
                for moment, code in ((down + jitter[0], "AE1"), (down + lasts + jitter[1], "AE2")):
                    self._say(FaultKind.POWER_STORM, meter, moment, "c12.19", "ST76", code)
                self._withhold(meter, range(low, high))
                self._tell(entry, meter, range(low, high), is_sent=False, detail=name)
            struck += 1
            if struck == entry.transformers:
                return
        msg = (
            f"power_storm asks for {entry.transformers} transformers, {struck} have meters without a fault yet that "
            f"would miss a reading and have {MARGIN} before and after: ask for fewer, or for another time"
        )
        raise ConfigError(msg)

    def _said(self, entry: Entry, meter: int, number: int) -> None:
        begin = self._due(meter, number)
        if entry.kind == FaultKind.TAMPER:
            self._say(entry.kind, meter, begin, "c12.19", "ST76", "AE47")
            return
        self._say(entry.kind, meter, begin, "itron", "MT76", "ME16")
        self._say(entry.kind, meter, begin + entry.by_s * SECOND, "itron", "MT76", "ME17")

    def _say(self, kind: FaultKind, meter: int, due: int, dialect: str, table: str, code: str) -> None:
        self._events.append(
            {"fault_id": self._fault_id, "kind": kind.value, "meter": meter, "due": due, "dialect": dialect,
             "dialect_version": "*", "source_table": table, "code": code}
        )  # fmt: skip

    def _poison(self, entry: Entry, meter: int, number: int, turn: int) -> None:
        poison = entry.bytes[turn % len(entry.bytes)]
        each = np.array([meter]), np.array([number])
        known = self._fleet.readings(*each).to_dicts()[0]
        reading = {name: known.get(name) for name in arrow_schema("reading").names}
        payload = poisoned(poison, reading)
        self._withhold(meter, range(number, number + 1))
        self._raw.append(Raw(self._due(meter, number), meter, encoding_of(poison), payload))
        self._tell(entry, meter, range(number, number + 1), detail=poison.value, payload=payload)

    def _due(self, meter: int, number: int) -> int:
        return int(self._fleet.due("readings", np.array([meter]), np.array([number]))[0])

    def _count(self, meter: int) -> int:
        return int(self._fleet.counts("readings", np.array([meter]))[0])

    def _values(self, meter: int, number: int) -> dict[str, int]:
        each = np.array([meter]), np.array([number])
        found = self._fleet.registers(*each, filled=True)
        has = self._fleet.kinds["readings"].has
        log = self._fleet.plan.log[meter]
        return {name: int(values[0]) for name, values in found.items() if has[name][log]}

    def _withhold(self, meter: int, numbers: range) -> None:
        self._withheld += [_code(meter, number) for number in numbers]

    def _move(self, meter: int, number: int, due: int) -> None:
        self._withhold(meter, range(number, number + 1))
        self._extra.append((meter, number, due))

    def _bend(self, meter: int, begin: int, end: int, **what: Any) -> None:
        self._bends.append(dict.fromkeys(BENDS) | {"meter": meter, "from_number": begin, "to_number": end} | what)

    def _tell(
        self,
        entry: Entry,
        meter: int,
        numbers: range,
        *,
        due: int | None = None,
        is_sent: bool = True,
        amount: int | None = None,
        detail: str | None = None,
        payload: bytes | None = None,
    ) -> None:
        self._truth += [
            {
                "fault_id": self._fault_id, "kind": entry.kind.value, "meter": meter, "number": number, "due": due,
                "is_sent": is_sent, "amount": amount, "detail": detail, "payload": payload,
            }
            for number in numbers
        ]  # fmt: skip

    def _freeze(self) -> None:
        """Lists → sorted arrays, and the truth."""
        fleet = self._fleet
        self.has_readings = np.zeros(len(fleet), bool)
        self.has_events = np.zeros(len(fleet), bool)
        self.has_readings[[row["meter"] for row in self._truth]] = True
        self.has_events[[row["meter"] for row in self._events]] = True
        self.withheld = np.sort(np.array(self._withheld, np.int64))
        extra = np.array(sorted(self._extra, key=lambda row: row[2]), np.int64).reshape(-1, 3)
        self.extra_meter, self.extra_number, self.extra_due = extra[:, 0], extra[:, 1], extra[:, 2]
        stuck = np.array(sorted(self._stuck), np.int64).reshape(-1, 2)
        self._stuck_code, self._stuck_number = stuck[:, 0], stuck[:, 1]
        self.bends = pl.DataFrame(self._bends, schema=BENDS)
        self.raw = sorted(self._raw, key=lambda raw: (raw.due, raw.meter))
        self._raw_due = [raw.due for raw in self.raw]
        self._event_meters = np.flatnonzero(self.has_events)
        self._said_at = np.unique(np.array([row["due"] for row in self._events], np.int64))
        self.events = self._numbered_events()
        self.faults = pl.concat([self._truth_of_readings(), self._truth_of_events()])

    def _event_keys(self, meters: Integers, due: Integers) -> Integers:
        keys: Integers = np.searchsorted(self._event_meters, meters) * (len(self._said_at) + 1)
        keys += np.searchsorted(self._said_at, due)
        return keys

    def _numbered_events(self) -> pl.DataFrame:
        """Events that are said on top of the tape's, with their place among these."""
        rows = sorted(self._events, key=lambda row: (row["meter"], row["due"], row["code"]))
        meters = np.array([row["meter"] for row in rows], np.int64)
        due = np.array([row["due"] for row in rows], np.int64)
        self._said_keys = self._event_keys(meters, due)
        of_tape = self._fleet.sent_before("events", meters, due + 1) - self._fleet.begin("events", meters)
        own = np.arange(len(rows)) - np.searchsorted(self._said_keys, self._event_keys(meters, np.zeros_like(due)))
        frame = pl.DataFrame(
            rows,
            schema={
                "fault_id": pl.Int64, "kind": pl.String, "meter": pl.Int64, "due": pl.Int64, "dialect": pl.String,
                "dialect_version": pl.String, "source_table": pl.String, "code": pl.String,
            },
        )  # fmt: skip
        return frame.with_columns(
            meter_id=self._fleet.meter_ids(meters),
            seq=pl.Series(of_tape + own, dtype=pl.Int64),
            observed_at=from_microseconds((self._fleet.first_us + due) // SECOND * SECOND),  # meters log whole seconds
        )

    def events_before(self, meters: Integers, due: Integers) -> Integers:
        """How many events were said on top of the tape's before, per event of the tape."""
        mine = self.has_events[meters]
        before: Integers = np.zeros(len(meters), np.int64)
        of = meters[mine], due[mine]
        before[mine] = np.searchsorted(self._said_keys, self._event_keys(*of)) - np.searchsorted(
            self._said_keys, self._event_keys(of[0], np.zeros_like(of[1]))
        )
        return before

    def is_withheld(self, meters: Integers, numbers: Integers) -> npt.NDArray[np.bool_]:
        """Which readings are not sent at their time."""
        return np.isin(_codes(meters, numbers), self.withheld)

    def last_due(self) -> int:
        """When the last record is due that is moved or added, microseconds of the run."""
        said: list[int] = self.events.get_column("due").to_list()
        moved: list[int] = self.extra_due.tolist()
        return max([0, *moved, *self._raw_due, *said])

    def extras(self, low: int, high: int, begin: int, end: int) -> tuple[Integers, Integers, Integers]:
        """Meter, unrolled row and due time of readings that are sent again, or later than their time."""
        first, last = np.searchsorted(self.extra_due, [begin, end])
        meters, numbers, due = (rows[first:last] for rows in (self.extra_meter, self.extra_number, self.extra_due))
        mine = (meters >= low) & (meters < high)
        return meters[mine], numbers[mine], due[mine]

    def raw_due(self, low: int, high: int, begin: int, end: int) -> list[Raw]:
        """Bytes of the meters low … high − 1 that are due in a stretch of the run."""
        first, last = bisect_left(self._raw_due, begin), bisect_left(self._raw_due, end)
        return [raw for raw in self.raw[first:last] if low <= raw.meter < high]

    def events_due(self, low: int, high: int, begin: int, end: int) -> pl.DataFrame:
        """Events that are said on top of the tape's in a stretch of the run."""
        is_due = pl.col("due").is_between(begin, end, closed="left") & pl.col("meter").is_between(low, high - 1)
        return self.events.filter(is_due).drop("fault_id", "kind")

    def shown(self, meters: Integers, numbers: Integers) -> Integers:
        """The rows whose values are shown: earlier ones where a meter is stuck."""
        if not len(self._stuck_code):
            return numbers
        codes = _codes(meters, numbers)
        place = np.minimum(np.searchsorted(self._stuck_code, codes), len(self._stuck_code) - 1)
        result: Integers = np.where(self._stuck_code[place] == codes, self._stuck_number[place], numbers)
        return result

    def bent(self, readings: pl.DataFrame) -> pl.DataFrame:
        """Readings with the faults of clock, registers and box; the other columns and the order stay.

        Args:
            readings: of `Fleet.readings`, with `number`, the unrolled row.
        """
        if "equipment_id" not in readings.columns:
            readings = readings.with_columns(equipment_id=pl.lit(None, pl.String))
        keys = readings.select("meter", "number")
        hits = (
            keys.unique()
            .join(self.bends.rename({name: f"bend_{name}" for name in BENDS if name != "meter"}), on="meter")
            .filter((pl.col("number") >= pl.col("bend_from_number")) & (pl.col("number") < pl.col("bend_to_number")))
        )
        if not len(hits):
            return readings
        both = readings.join(hits, on=["meter", "number"], how="left", maintain_order="left")
        begun = self._begun(hits)
        both = both.join(begun, on=["meter", "number"], how="left", maintain_order="left")
        since = pl.col("observed_at") - pl.col("begun_at")
        clock = pl.from_epoch("bend_clock_us", time_unit="us").dt.replace_time_zone("UTC") + since
        moved = pl.col("observed_at") + pl.duration(microseconds=pl.col("bend_moved_us"))
        registers = []
        for name in (name for name in REGISTER_COLUMNS if name in readings.columns):
            value = (pl.col(name) * pl.col("bend_factor").fill_null(1.0)).round(0).cast(pl.Int64)
            value = value + pl.col(f"bend_{name}").fill_null(0)
            touched = pl.col("bend_full_wh").is_not_null() & pl.col(f"bend_{name}").is_not_null()
            registers.append(pl.when(touched).then(value % pl.col("bend_full_wh")).otherwise(value).alias(name))
        return both.with_columns(
            *registers,
            observed_at=pl.coalesce(clock, moved, "observed_at").cast(STAMP),
            equipment_id=pl.coalesce("bend_box", "equipment_id"),
        ).select(readings.columns)

    def _begun(self, hits: pl.DataFrame) -> pl.DataFrame:
        """When the meter's clock was set, for readings whose clock is: null for others."""
        clocks = hits.filter(pl.col("bend_clock_us").is_not_null()).select("meter", "number", "bend_from_number")
        stamps = self._fleet.observed(
            "readings", clocks.get_column("meter").to_numpy(), clocks.get_column("bend_from_number").to_numpy()
        )
        return clocks.select("meter", "number").with_columns(begun_at=from_microseconds(stamps))

    def _truth_of_readings(self) -> pl.DataFrame:
        schema = {"fault_id": pl.Int64, "kind": pl.String, "meter": pl.Int64, "number": pl.Int64, "due": pl.Int64,
                  "is_sent": pl.Boolean, "amount": pl.Int64, "detail": pl.String, "payload": pl.Binary}  # fmt: skip
        rows = pl.DataFrame(self._truth, schema=schema)
        meters, numbers = rows.get_column("meter").to_numpy(), rows.get_column("number").to_numpy()
        due = self._fleet.due("readings", meters, numbers) + self._fleet.first_us
        moved = pl.from_epoch(pl.col("due") + self._fleet.first_us, time_unit="us").dt.replace_time_zone("UTC")
        sent = self.bent(self._fleet.readings(meters, numbers).with_columns(number=pl.Series(numbers)))
        return (
            rows.with_columns(
                topic=pl.lit("readings"),
                meter_id=sent.get_column("meter_id"),
                seq=sent.get_column("seq"),
                observed_at=sent.get_column("observed_at"),
                due_at=pl.coalesce(moved, from_microseconds(due)),
            )
            .select(FAULTS.names)
        )  # fmt: skip

    def _truth_of_events(self) -> pl.DataFrame:
        return self.events.with_columns(
            topic=pl.lit("events"),
            due_at=from_microseconds(self.events.get_column("due").to_numpy() + self._fleet.first_us),
            is_sent=pl.lit(True),
            amount=pl.lit(None, pl.Int64),
            detail=pl.col("code"),
            payload=pl.lit(None, pl.Binary),
        ).select(FAULTS.names)


def poisoned(poison: Poison, reading: dict[str, Any]) -> bytes:
    """A record that cannot be taken, made of a good reading."""
    good = encode("reading", reading)
    match poison:
        case Poison.NOT_FRAMED:
            return b"\xff" + good[1:]
        case Poison.UNKNOWN_SCHEMA_ID:
            return FRAME.pack(0, 9_999) + good[FRAME.size :]
        case Poison.UNDECODABLE:
            return good[:-1]
        case Poison.TRAILING_BYTES:
            return good + b"\x00"
        case Poison.METER_ID_MISMATCH:
            return encode("reading", {**reading, "meter_id": f"{reading['meter_id']}-other"})
        case Poison.INVALID_JSON:
            return f'{{"meter_id": "{reading["meter_id"]}", "seq": {reading["seq"]}, "observed_at": '.encode()
        case Poison.INVALID_TELEGRAM:
            name = f"{reading['meter_id']}/{reading['seq']}".encode().hex()  # an octet string
            return f"/ISK5\\2M550T-1012\r\n\r\n0-0:96.1.1({name})\r\n1-0:1.8.1(0034#2.827*kWh)\r\n!0000\r\n".encode()


def encoding_of(poison: Poison) -> str:
    """As what it is sent: the last level of its MQTT topic."""
    return {Poison.INVALID_JSON: "json", Poison.INVALID_TELEGRAM: "dsmr"}.get(poison, "avro")


def _rank(entry: Entry) -> tuple[bool, bool]:
    return not isinstance(entry.meters, list), entry.kind != FaultKind.POWER_STORM


def _code(meter: int, number: int) -> int:
    return meter << 32 | number


def _codes(meters: Integers, numbers: Integers) -> Integers:
    codes: Integers = meters.astype(np.int64) << 32 | numbers
    return codes
