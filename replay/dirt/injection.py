"""What is done to a fleet's records, fault by fault, with the truth about it."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl

from replay.arrays import SECOND
from replay.dirt.entries import Entry
from replay.dirt.places import MARGIN, Places
from replay.dirt.poison import Raw, encoding_of, poisoned
from replay.fleet import Fleet
from replay.fleet.rows import REGISTER_COLUMNS
from schemas.closed_lists import FaultKind
from schemas.codec import arrow_schema
from schemas.errors import ConfigError

EPOCH_US = {
    FaultKind.CLOCK_1970: 0,
    FaultKind.CLOCK_2099: round(datetime(2099, 1, 1, tzinfo=UTC).timestamp()) * SECOND,
}
NEW_EQUIPMENT_WH = 50_000  # a new meter has run a little on the test bench
FULL_WH = 10**8  # where a register of eight digits begins again
TRIES = 1_000  # transformers beyond those asked for that are looked at, where one cannot have a fault
BENDS = pl.Schema(
    {
        "meter": pl.Int64(),
        "from_number": pl.Int64(),
        "to_number": pl.Int64(),
        "shift_us": pl.Int64(),
        "clock_us": pl.Int64(),
        "factor": pl.Float64(),
        "full_wh": pl.Int64(),
        "equipment_id": pl.String(),
        **dict.fromkeys(REGISTER_COLUMNS, pl.Int64()),
    }
)
"""What is done to the readings `from_number` … `to_number` − 1 of a meter: the clock is shifted, or set and goes on
from there; registers are multiplied, shifted by so many Wh, and begin again at `full_wh`; the equipment is another."""


class Injection:
    """All that is planned, in the order of planning.

    Attributes:
        truth: of readings, a row per reading that is touched: `due` where it is not the reading's own.
        events: that meters say on top of the tape's.
        withheld: meter and unrolled row of readings that are not sent at their time.
        extra: meter, unrolled row and due time of readings that are sent again, or later than their time.
        stuck: meter and unrolled row of a reading, and the unrolled row whose values it shows.
        bends: rows of `BENDS`.
        raw: bytes that are sent as they are.
    """

    def __init__(self, fleet: Fleet, entries: list[Entry], seed: int) -> None:
        """Plans all faults.

        Raises:
            ConfigError: an entry, named by its place, asks for more meters than are left, or for what the tape has not.
        """
        self._fleet = fleet
        self._places = Places(fleet, seed)
        self._fault_id = 0
        self.truth: list[dict[str, Any]] = []
        self.withheld: list[tuple[int, int]] = []
        self.extra: list[tuple[int, int, int]] = []
        self.stuck: list[tuple[int, int, int]] = []
        self.bends: list[dict[str, Any]] = []
        self.raw: list[Raw] = []
        self.events: list[dict[str, Any]] = []
        # meters by name first, then whole transformers
        for place in sorted(range(len(entries)), key=lambda place: _rank(entries[place])):
            try:
                (self._storms if entries[place].kind == FaultKind.POWER_STORM else self._inject)(entries[place])
            except ConfigError as error:
                msg = f"faults.{place}: {error}"
                raise ConfigError(msg) from error

    def _inject(self, entry: Entry) -> None:
        """Plans an entry's faults; where meters are not named, those that cannot have them are passed over."""
        meters, count = self._places.candidates(entry)
        taken: list[int] = []
        why: ConfigError | None = None
        for meter in meters:
            try:
                places = [self._places.place(entry, meter, *numbers) for numbers in self._places.numbers(entry, meter)]
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
        self._places.take(taken)

    def _plan(self, entry: Entry, meter: int, number: int, turn: int, register: str) -> None:
        match entry.kind:
            case FaultKind.DUPLICATE:
                self.extra.append((meter, number, self._places.due(meter, number)))
                self._label(entry, meter, range(number, number + 1))
            case FaultKind.LATE:
                due = self._places.due(meter, number) + entry.by_s * SECOND
                self._delay(meter, number, due)
                self._label(entry, meter, range(number, number + 1), due=due, amount=entry.by_s)
            case FaultKind.REORDER:
                due = self._places.due(meter, number + 1) + 1
                self._delay(meter, number, due)
                self._label(entry, meter, range(number, number + 1), due=due)
            case FaultKind.GAP:
                touched = range(number, number + entry.length)
                self._withhold(meter, touched)
                self._label(entry, meter, touched, is_sent=False)
            case FaultKind.CLOCK_JUMP:
                self._bend(meter, number, number + entry.length, shift_us=entry.by_s * SECOND)
                self._label(entry, meter, range(number, number + entry.length), amount=entry.by_s)
            case FaultKind.CLOCK_1970 | FaultKind.CLOCK_2099:
                self._bend(meter, number, number + entry.length, clock_us=EPOCH_US[entry.kind])
                self._label(entry, meter, range(number, number + entry.length))
            case FaultKind.FROZEN:
                touched = range(number, number + entry.length)
                self.stuck += [(meter, each, number - 1) for each in touched]
                self._label(entry, meter, touched)
            case FaultKind.POISON:
                self._poison(entry, meter, number, turn)
            case FaultKind.VOLTAGE_ALARM | FaultKind.TAMPER:
                self._plan_events(entry, meter, number)
            case _:
                self._plan_register(entry, meter, number, register)

    def _plan_register(self, entry: Entry, meter: int, number: int, register: str) -> None:
        before = self._places.values(meter, number - 1)
        end = number + self._places.count(meter) + entry.length  # to the end of the run
        match entry.kind:
            case FaultKind.RESET:
                self._bend(meter, number, end, **{name: -value for name, value in before.items()})
                self._label(entry, meter, range(number, number + 1), amount=before[register], detail=register)
            case FaultKind.METER_EXCHANGE:
                new = int(self._places.random.integers(0, NEW_EQUIPMENT_WH))
                first = {name: (new if value else 0) - value for name, value in before.items()}
                equipment_id = f"{self._fleet.first_equipment(np.array([meter]))[0]}-new"
                self._bend(meter, number, end, equipment_id=equipment_id, **first)
                self._label(entry, meter, range(number, number + 1), amount=new, detail=register)
            case FaultKind.ROLLOVER:
                after = self._places.values(meter, number)[register]
                begin = int(self._fleet.begin("readings", np.array([meter]))[0])
                self._bend(meter, begin, end, full_wh=FULL_WH, **{register: FULL_WH - after})
                self._label(entry, meter, range(number, number + 1), amount=FULL_WH, detail=register)
            case FaultKind.SPIKE:
                wild = 500_000 if entry.amount is None else round(entry.amount)
                self._bend(meter, number, number + entry.length, **{register: wild})
                self._label(entry, meter, range(number, number + entry.length), amount=wild, detail=register)
            case _:
                factor = 1_000.0 if entry.amount is None else entry.amount
                self._bend(meter, number, number + entry.length, factor=factor)
                self._label(entry, meter, range(number, number + entry.length), amount=round(factor), detail=register)

    def _storms(self, entry: Entry) -> None:
        """All meters of a transformer lose their supply and get it back."""
        fleet, margin = self._fleet, MARGIN * self._places.interval_s * SECOND
        names, own = np.unique([name or "" for name in fleet.logs.get_column("transformer_id")], return_inverse=True)
        if not any(names):
            msg = "power_storm: the tape's registry names no transformer: leave it out"
            raise ConfigError(msg)
        group = np.arange(len(fleet)) // len(fleet.logs) * len(names) + own[fleet.plan.log]
        free = np.sort(self._places.left)
        free = free[names[group[free] % len(names)] != ""]
        lasts = entry.by_s * SECOND
        latest = fleet.length - lasts - 2 * margin
        earliest = max(latest // 4, margin + fleet.interval)
        if latest <= earliest or (entry.at is not None and entry.at * SECOND > latest):
            msg = f"power_storm: {fleet.length / SECOND:.0f} s do not hold it and {2 * MARGIN} readings after it"
            raise ConfigError(msg)
        struck = 0
        for each in self._places.random.permutation(np.unique(group[free]))[: entry.transformers + TRIES]:
            members = free[group[free] == each]
            down = int(self._places.random.integers(earliest, latest)) if entry.at is None else round(entry.at * SECOND)
            first = fleet.sent_before("readings", members, down)
            after = fleet.sent_before("readings", members, down + lasts)
            begin = fleet.begin("readings", members)
            is_there = (first >= begin + MARGIN) & (after + MARGIN <= begin + fleet.counts("readings", members))
            if not (is_there & (after > first)).any():
                continue
            self._places.take(members)
            self._fault_id += 1
            number, place = divmod(int(each), len(names))
            name = str(names[place]) if fleet.own_clock else f"{names[place]}-{fleet.mark}{number + 1}"
            for meter, low, high in zip(*(rows[is_there].tolist() for rows in (members, first, after)), strict=True):
                jitter = np.sort(self._places.random.integers(0, 3 * SECOND, 2)).tolist()  # up again never before down
                for moment, code in ((down + jitter[0], "AE1"), (down + lasts + jitter[1], "AE2")):
                    self._say(FaultKind.POWER_STORM, meter, moment, "c12.19", "ST76", code)
                self._withhold(meter, range(low, high))
                self._label(entry, meter, range(low, high), is_sent=False, detail=name)
            struck += 1
            if struck == entry.transformers:
                return
        msg = (
            f"power_storm asks for {entry.transformers} transformers, {struck} have meters without a fault yet that "
            f"would miss a reading and have {MARGIN} before and after: ask for fewer, or for another time"
        )
        raise ConfigError(msg)

    def _plan_events(self, entry: Entry, meter: int, number: int) -> None:
        begin = self._places.due(meter, number)
        if entry.kind == FaultKind.TAMPER:
            self._say(entry.kind, meter, begin, "c12.19", "ST76", "AE47")
            return
        self._say(entry.kind, meter, begin, "itron", "MT76", "ME16")
        self._say(entry.kind, meter, begin + entry.by_s * SECOND, "itron", "MT76", "ME17")

    def _say(self, kind: FaultKind, meter: int, due: int, dialect: str, table: str, code: str) -> None:
        self.events.append(
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
        self.raw.append(Raw(self._places.due(meter, number), meter, encoding_of(poison), payload))
        self._label(entry, meter, range(number, number + 1), detail=poison.value, payload=payload)

    def _withhold(self, meter: int, numbers: range) -> None:
        self.withheld += [(meter, number) for number in numbers]

    def _delay(self, meter: int, number: int, due: int) -> None:
        self._withhold(meter, range(number, number + 1))
        self.extra.append((meter, number, due))

    def _bend(self, meter: int, begin: int, end: int, **what: Any) -> None:
        self.bends.append(dict.fromkeys(BENDS) | {"meter": meter, "from_number": begin, "to_number": end} | what)

    def _label(
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
        self.truth += [
            {
                "fault_id": self._fault_id, "kind": entry.kind.value, "meter": meter, "number": number, "due": due,
                "is_sent": is_sent, "amount": amount, "detail": detail, "payload": payload,
            }
            for number in numbers
        ]  # fmt: skip


def _rank(entry: Entry) -> tuple[bool, bool]:
    return not isinstance(entry.meters, list), entry.kind != FaultKind.POWER_STORM
