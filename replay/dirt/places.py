"""Where faults can be: meters that have none yet, and rows at which the registers show a fault."""

import numpy as np

from replay.arrays import SECOND, Flags, Floats, Integers
from replay.dirt.entries import ONCE, Entry
from replay.fleet import Fleet
from schemas.closed_lists import FaultKind
from schemas.errors import ConfigError

MARGIN = 6  # readings before the first fault of a meter, after its last and between two: the series is known by then
LOOK = 10_000  # readings before and after that are looked at first
NEEDS = {
    FaultKind.RESET: "more than 0 there, and less afterwards",
    FaultKind.METER_EXCHANGE: "more than 0 there, of equipment that its log names",
    FaultKind.ROLLOVER: "a step ahead there",
    FaultKind.SPIKE: "a value there that is not 0 for ever",
    FaultKind.UNIT_SLIP: "more than 0 there",
}
"""Faults of registers: what one of them has to show after its first value, or nothing shows the fault."""


class _Around:
    """What a register shows around some of a meter's rows.

    Attributes:
        now: its values in these rows; not a number where it is blank.
        before: per row the last value before it; not a number where there is none.
        after: per row the next value, its own if it has one; not a number where there is none.
    """

    def __init__(self, wh: Floats, here: slice) -> None:
        """Looks at the rows `here` of all that are known; there is one before them."""
        self._wh, self._here = wh, here
        self.now = wh[here]
        self.before = _filled(wh)[here.start - 1 : here.stop - 1]
        self.after = _filled(wh[::-1])[::-1][here]

    def stay(self, above: int, length: int) -> Flags:
        """Per row whether so many values from it on are above a number, and none is blank."""
        fails = np.concatenate([[0], np.cumsum(~(self._wh > above))])
        begin, end = self._here.start, self._here.stop
        is_so: Flags = fails[begin + length : end + length] == fails[begin:end]
        return is_so


def _filled(wh: Floats) -> Floats:
    """Each value, or the last one before."""
    return wh[np.maximum.accumulate(np.where(np.isnan(wh), 0, np.arange(len(wh))))]


class Places:
    """Where a fleet's faults can be.

    Attributes:
        fleet: whose.
        random: what is drawn by seed.
        interval_s: seconds between two readings of a meter, usually.
        left: numbers of the meters that have no fault yet and readings enough, in an order that is drawn.
    """

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet = fleet
        self.random = np.random.default_rng([seed, 0xD127])
        self.interval_s = fleet.interval // SECOND
        self.left = self.random.permutation(
            np.flatnonzero(fleet.counts("readings", np.arange(len(fleet))) >= 4 * MARGIN)
        )

    def take(self, meters: list[int] | Integers) -> None:
        """These meters have a fault from now on."""
        self.left = self.left[~np.isin(self.left, meters)]

    def candidates(self, entry: Entry) -> tuple[list[int], int]:
        """Meters that may have an entry's faults, in turn, and how many of them shall.

        Raises:
            ConfigError: a meter that is named is not free, or fewer are free than the entry asks for.
        """
        if isinstance(entry.meters, list):
            free = dict(zip(self.fleet.meter_ids(self.left), self.left.tolist(), strict=True))
            for name in entry.meters:
                if name not in free:
                    msg = f"{entry.kind}: {name} {self._why_not_free(name)}"
                    raise ConfigError(msg)
            return [free[name] for name in entry.meters], len(entry.meters)
        count = max(1, round(entry.meters * len(self.fleet))) if 0 < entry.meters < 1 else int(entry.meters)
        if count > len(self.left):
            msg = (
                f"{entry.kind} asks for {count} meters, {len(self.left)} are left that have no fault yet and "
                f"{4 * MARGIN} readings: ask for fewer, or play more"
            )
            raise ConfigError(msg)
        return self.left.tolist(), count

    def _why_not_free(self, name: str) -> str:
        found = np.flatnonzero((self.fleet.meter_ids(np.arange(len(self.fleet))) == name).to_numpy())
        if not len(found):
            return "is no meter of the fleet"
        count = int(self.fleet.counts("readings", found)[0])
        few = f"has {count} readings: a fault asks for {4 * MARGIN}"
        return few if count < 4 * MARGIN else "is named by another entry"

    def numbers(self, entry: Entry, meter: int) -> list[tuple[int, int, int]]:
        """Unrolled rows at which the faults of one meter begin, each with those between which it could.

        Raises:
            ConfigError: the meter has too few readings before, after or between them.
        """
        each = np.array([meter])
        begin = int(self.fleet.begin("readings", each)[0])
        count = self.count(meter)
        if entry.at is not None:
            at = int(self.fleet.sent_before("readings", each, round(entry.at * SECOND))[0])
            latest = begin + count - MARGIN - entry.length
            if not begin + MARGIN <= at <= latest:
                name = self.fleet.meter_ids(each)[0]
                msg = f"at {entry.at:.0f} s {name} has not {MARGIN} readings before and after: choose another time"
                raise ConfigError(msg)
            return [(at, at, latest)]
        reach = entry.length + round(abs(entry.by_s) / self.interval_s)
        room = (count - MARGIN) // entry.times - reach - MARGIN
        if room < 1:
            msg = f"{count} readings of a meter do not hold {entry.times} faults that reach over {reach}"
            raise ConfigError(msg)
        stretch = (count - MARGIN) // entry.times
        firsts = [begin + MARGIN + turn * stretch for turn in range(entry.times)]
        return [(first + int(self.random.integers(0, room)), first, first + room - 1) for first in firsts]

    def place(self, entry: Entry, meter: int, number: int, first: int, last: int) -> tuple[int, str]:
        """Row and register of a fault that is to begin at `number`; no register where it needs none.

        Where no register shows the fault there it begins at the next row, up to `last` and then from `first` on, where
        one does.

        Raises:
            ConfigError: the meter cannot have it.
        """
        if entry.kind not in NEEDS:
            return number, ""
        name = self.fleet.meter_ids(np.array([meter]))[0]
        if entry.kind in ONCE and self.fleet.kinds["readings"].begins_anew[self.fleet.plan.log[meter]]:
            msg = f"the registers of {name} begin anew in its own log"
            raise ConfigError(msg)
        for low, high in dict.fromkeys([(number, min(number + LOOK, last + 1)), (number, last + 1), (first, number)]):
            if found := self._found(entry, meter, low, high):
                return found
        msg = f"no register of {name} shows {NEEDS[entry.kind]}"
        raise ConfigError(msg)

    def _found(self, entry: Entry, meter: int, low: int, high: int) -> tuple[int, str] | None:
        """The first row of low … high − 1 at which registers show a fault, and which of them."""
        begin = int(self.fleet.begin("readings", np.array([meter]))[0])
        end = begin + self.count(meter)
        rows = np.arange(max(low - LOOK, begin), min(high + LOOK + entry.length, end))
        here = slice(low - rows[0], high - rows[0])
        registers = {name: _Around(wh, here) for name, wh in self._registers(meter, rows).items()}
        is_able = np.full(high - low, True)
        if entry.kind == FaultKind.RESET:  # of no register may the value after it pass for a step ahead
            for each in registers.values():
                is_able &= ~((each.before > 0) & (each.after >= 2 * each.before))
        if entry.kind == FaultKind.METER_EXCHANGE and self.fleet.own_clock:
            is_able &= np.maximum.accumulate(self._names_equipment(meter, rows))[here.start - 1 : here.stop - 1]
        last = self.values(meter, end - 1) if entry.kind == FaultKind.SPIKE else {}
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

    def _registers(self, meter: int, rows: Integers) -> dict[str, Floats]:
        """What the registers that a meter has show in its rows; not a number where one is blank."""
        has, log = self.fleet.kinds["readings"].has, self.fleet.plan.log[meter]
        shown = self.fleet.registers(np.full(len(rows), meter), rows)
        return {name: wh for name, wh in shown.items() if has[name][log]}

    def _names_equipment(self, meter: int, rows: Integers) -> Flags:
        known = self.fleet.readings(np.full(len(rows), meter), rows)
        if "equipment_id" not in known.columns:
            return np.full(len(rows), False)
        return known.get_column("equipment_id").is_not_null().to_numpy()

    def due(self, meter: int, number: int) -> int:
        """Microseconds after the run's begin when a reading is sent."""
        return int(self.fleet.due("readings", np.array([meter]), np.array([number]))[0])

    def count(self, meter: int) -> int:
        """Readings that a meter sends."""
        return int(self.fleet.counts("readings", np.array([meter]))[0])

    def values(self, meter: int, number: int) -> dict[str, int]:
        """Wh that a meter's registers show in a row; the last value before where one is blank."""
        each = np.array([meter]), np.array([number])
        found = self.fleet.registers(*each, filled=True)
        has = self.fleet.kinds["readings"].has
        log = self.fleet.plan.log[meter]
        return {name: int(values[0]) for name, values in found.items() if has[name][log]}
