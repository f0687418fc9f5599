"""Australian NEM12 interval files and NEM13 register reads, market time (UTC+10; Western Power's: UTC+8)."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import MAXYEAR, MINYEAR, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl

from replay.fields import MAX_EXACT, exact, summed
from replay.log import Asked, Defect, Imported, Log, fields_of
from schemas.tables import EXPORTS, IMPORTS, TARIFFS
from schemas.topics import METER_ID

FILES = ("*.csv", "*.csv.gz")
ZONE = "Australia/Brisbane"
MICRO_WH = {"KWH": 10**9, "WH": 10**6, "MWH": 10**12}
"""Unit of energy, in capitals → millionths of a Wh."""
MICRO_WH_PER_WH = 10**6
NEM13_WAYS = {"E": tuple(f"{name}_wh" for name in IMPORTS), "I": tuple(f"{name}_wh" for name in EXPORTS)}
CHANNELS = {f"{way[:1]}{tariff}": f"{name}_wh" for way, names in (("E", IMPORTS), ("B", EXPORTS))
            for tariff, name in zip(TARIFFS, names, strict=True)}  # fmt: skip
"""NMI suffix → register: E is drawn from the grid, B fed into it."""
WAYS = {suffix[0] for suffix in CHANNELS}
QUALITIES = {"S": Defect.SUBSTITUTED, "F": Defect.SUBSTITUTED, "E": Defect.ESTIMATED}
"""First letter of a quality method that is not actual (A). N, no data, is left out."""
SENDER_ZONES = {"WPNTKS": "Australia/Perth"}
"""Sender in the header → its market's clock, where that is not the eastern one."""
NO_YEARS = (MINYEAR, MAXYEAR)  # in UTC they may be none
DAY = timedelta(days=1)
PADDING = "\0\x1a"  # what some systems end a file with
REGISTERS = list(CHANNELS.values())
READ: dict[str, Any] = {
    "meter_id": pl.String,
    "observed_at": pl.Datetime("us"),
    "equipment_id": pl.String,
    "register": pl.String,
}


@dataclass(frozen=True)
class _Channel:
    """What a 200 record says; `register` is null for a quantity that has no place in a reading."""

    suffix: str
    meter_id: str
    serial: str | None
    register: str | None
    micro_wh: int
    length: timedelta


@dataclass
class _Day:
    """What a 300 record says, with the qualities that the 400 records after it set; `updated` is its UpdateDateTime."""

    channel: _Channel
    begin: datetime
    energies: list[int | None]
    qualities: list[str]
    updated: str = ""
    is_replaced: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        """No interval is replaced yet."""
        self.is_replaced = [False] * len(self.energies)

    def has_value(self, place: int) -> bool:
        """Whether an interval has one: not of quality N, no data."""
        return self.energies[place] is not None and self.qualities[place] != "N"

    @property
    def place(self) -> tuple[str, str, datetime]:
        """Which day of which NMI and suffix: a version may have another length, unit or serial."""
        return self.channel.meter_id, self.channel.suffix, self.begin


@dataclass
class _File:
    """What a file says: days of channels, register reads, and where registers end (NMI → Wh)."""

    log: Log
    days: list[_Day]
    reads: list[tuple[Any, ...]]
    wraps: dict[str, set[int]]


def read(path: Path, asked: Asked) -> Imported:
    """The registers of the meters (NMI) of a file: see `read_together`."""
    return read_together([path], [asked])[0]


def read_together(paths: Sequence[Path], asked: Sequence[Asked]) -> list[Imported]:
    """The registers of the meters (NMI) of some files: summed from a NEM12's intervals, as read of a NEM13.

    Of a day that comes again, in one file or in another, the version with the newest UpdateDateTime counts. An interval
    is read at its end; each channel's register begins at 0 with its first interval and goes on from file to file.
    Intervals without a value, or of quality N, add nothing. Other quantities than energy are left out and counted. A
    record in is one interval, one NEM13 row, or another line that is refused. The readings of a meter are in the order
    of time, for a file has channel after channel.

    Args:
        paths: the files.
        asked: what the operator says of each.

    Returns:
        One result for each market time (sender) that the files have.

    Raises:
        BadLog: a record that does not fit, or a file is no NEM12 or NEM13.
    """
    suffixes: dict[tuple[str, str], list[str]] = {}
    files = [_parsed(path, one, suffixes) for path, one in zip(paths, asked, strict=True)]
    by_zone = {file.log.zone.key: [other for other in files if other.log.zone == file.log.zone] for file in files}
    return [_of_files(of_zone) for of_zone in by_zone.values()]


def _parsed(path: Path, asked: Asked, suffixes: dict[tuple[str, str], list[str]]) -> _File:
    log = Log(path, asked, ZONE)
    lines = fields_of(io.StringIO(log.text().rstrip(PADDING), newline=""))
    _, header = next(lines, (1, []))
    begin = [] if isinstance(header, csv.Error) else [field.strip() for field in header]
    if begin[:1] == ["200"]:  # a portal left the header out; what follows is a channel of a NEM12 all the same
        lines = chain([(1, header)], lines)
    elif begin[:2] not in (["100", "NEM12"], ["100", "NEM13"]):
        raise log.bad(1, f"the first record is {','.join(begin[:2])!r}, expected 100,NEM12 or 100,NEM13, or a 200")
    elif asked.timezone is None and len(begin) > 3:
        log.zone = ZoneInfo(SENDER_ZONES.get(begin[3], log.zone.key))
    channel: _Channel | None = None
    days: list[_Day] = []
    is_open = False  # the last day was taken, so that 400 records have something to set
    reads: list[tuple[Any, ...]] = []
    wraps: dict[str, set[int]] = {}
    for number, record in lines:
        if isinstance(record, csv.Error):
            channel, is_open = None, False  # it may have been a 200: what follows is of nobody
            log.rows_in += 1
            log.refuse(number, str(record))
            continue
        kind = record[0].strip() if record else ""
        try:
            match kind:
                case "200":
                    channel, is_open = None, False
                    channel = _channel(record)
                case "300":
                    is_open = False
                    days.append(_day(record, channel))
                    is_open = True
                    log.rows_in += len(days[-1].energies)
                case "400":
                    if is_open:
                        _set_quality(record, days[-1])
                case "250":
                    log.rows_in += 1
                    reads += _register_reads(log, record, suffixes, wraps)
                case "100" | "500" | "550" | "900" | "":
                    continue
                case _:
                    channel, is_open = None, False  # as above
                    log.rows_in += 1
                    log.refuse(number, f"record {kind!r} is none that we know")
        except (ValueError, IndexError, KeyError, ArithmeticError) as error:
            records = _intervals_in(record, channel) if kind == "300" else 1
            log.rows_in += records if kind in ("200", "300", "400") else 0  # others have been counted
            reason = (
                str(error) if isinstance(error, ValueError) else f"record {kind} of {len(record)} fields is cut off"
            )
            log.refuse(number, reason, records=records)
    return _File(log, days, reads, wraps)


def _of_files(files: list[_File]) -> Imported:
    """The registers of files of one market time."""
    log = files[0].log
    for other in files[1:]:
        log.rows_in += other.log.rows_in
        log.defects += other.log.defects
        log.refused += other.log.refused
    days = _newest(log, [day for file in files for day in file.days])
    log.defects[Defect.OTHER_QUANTITY] += sum(len(day.energies) for day in days if day.channel.register is None)
    values = [
        *(_intervals(log, days, register) for register in REGISTERS),
        _as_read([read for file in files for read in file.reads]),
    ]
    readings = _boxes(pl.concat(values, how="diagonal"))
    # a value that comes again has a reading of its own
    readings = readings.with_columns(copy=pl.int_range(pl.len()).over("meter_id", "observed_at", "register"))
    readings = (
        readings.group_by("meter_id", "observed_at", "copy", "dialect")
        .agg(
            pl.when(pl.col("equipment_id").drop_nulls().n_unique() == 1).then(
                pl.col("equipment_id").drop_nulls().first()
            ),
            **{name: pl.col("wh").filter(pl.col("register") == name).first() for name in REGISTERS},
        )
        .sort("meter_id", "observed_at", "copy")
        .with_columns(pl.col("equipment_id").fill_null(strategy="backward").over("meter_id"))
    )
    wraps: dict[str, set[int]] = {}
    for meter_id, ends in (item for file in files for item in file.wraps.items()):
        wraps.setdefault(meter_id, set()).update(ends)
    agreed = {meter_id: min(found) for meter_id, found in wraps.items() if len(found) == 1}
    registry = readings.select("meter_id", jurisdiction=pl.lit("AS60038")).unique()
    registry = registry.with_columns(
        wraps_wh=pl.col("meter_id").replace_strict(agreed, default=None, return_dtype=pl.Int64)
    )
    return log.close(log.utc(readings), registry)


def _boxes(readings: pl.DataFrame) -> pl.DataFrame:
    """Readings without the serials of meters whose registers are summed here from several boxes' intervals.

    A register that begins at 0 with the file is of no box; a serial that comes and goes would be an exchange.
    """
    several = pl.col("equipment_id").drop_nulls().n_unique().over("meter_id") > 1
    is_summed = pl.col("dialect") == "nem12"
    return readings.with_columns(equipment_id=pl.when(~(several & is_summed)).then("equipment_id"))


def _meter_id(text: str) -> str:
    if not METER_ID.fullmatch(text.strip()):
        msg = f"no NMI: {text!r}"
        raise ValueError(msg)
    return text.strip()


def _channel(record: list[str]) -> _Channel:
    suffix, serial, unit, minutes = (record[place].strip() for place in (4, 6, 7, 8))
    suffix = suffix.upper()
    is_number = minutes.isascii() and minutes.isdecimal() and len(minutes) <= 4
    length = timedelta(minutes=int(minutes)) if is_number else timedelta(0)
    if not timedelta(0) < length <= DAY or DAY % length:
        msg = f"field 9: no interval length: {minutes!r}, expected minutes that divide a day"
        raise ValueError(msg)
    factor = MICRO_WH.get(unit.upper())
    if factor and not suffix:
        msg = f"field 5: no NMI suffix of a channel in {unit}, expected one of {', '.join(CHANNELS)}"
        raise ValueError(msg)
    if not factor and suffix in CHANNELS:
        msg = f"field 8: unit {unit!r} of {suffix}, expected {', '.join(MICRO_WH)}"
        raise ValueError(msg)
    return _Channel(
        suffix, _meter_id(record[1]), serial or None, CHANNELS.get(suffix) if factor else None, factor or 0, length
    )


def _day(record: list[str], channel: _Channel | None) -> _Day:
    if channel is None:
        msg = "a day without a channel (200)"
        raise ValueError(msg)
    count, values = DAY // channel.length, _values(record)
    if values != count and len(record) > 2 + count and record[2 + count].strip()[:1].isalpha():
        values = count  # so many are there: one of them is no number
    if values != count:
        minutes = channel.length // timedelta(minutes=1)
        found = (
            f"{max(len(record) - 2, 0)} fields after the date and no quality" if values is None else f"{values} values"
        )
        msg = f"{found}, expected {count} values and a quality: record 200 says {minutes} minutes an interval"
        raise ValueError(msg)
    energies = [_energy(place, record[place], channel) for place in range(2, 2 + count)]
    if channel.register is None and channel.suffix[:1] in WAYS and channel.micro_wh and any(energies):
        msg = f"record 200, field 5: {channel.suffix!r} has energy, and a reading has {', '.join(CHANNELS)}"
        raise ValueError(msg)
    updated = record[5 + count].strip() if len(record) > 5 + count else ""
    return _Day(channel, _date(record[1]), energies, [record[2 + count].strip()[0]] * count, updated)


def _date(text: str) -> datetime:
    return _at(1, text, "day", "%Y%m%d", "YYYYMMDD")


def _stamp(place: int, text: str) -> datetime:
    return _at(place, text, "time", "%Y%m%d%H%M%S", "YYYYMMDDhhmmss")


def _at(place: int, text: str, what: str, form: str, expected: str) -> datetime:
    try:
        at = datetime.strptime(text.strip(), form)  # noqa: DTZ007
    except ValueError:
        at = None
    if at is None or at.year in NO_YEARS:
        msg = f"field {place + 1}: no {what}: {text!r}, expected {expected}"
        raise ValueError(msg)
    return at


def _values(record: list[str]) -> int | None:
    """How many fields are between a day and its quality; None where there is none."""
    return next((place for place, field in enumerate(record[2:]) if field.strip()[:1].isalpha()), None)


def _number(place: int, text: str, factor: int) -> int | None:
    try:
        return exact(text, factor)
    except ValueError as error:
        msg = f"field {place + 1}: {error}"
        raise ValueError(msg) from error


def _energy(place: int, text: str, channel: _Channel) -> int | None:
    energy = _number(place, text, channel.micro_wh)
    least = 0 if channel.register else -MAX_EXACT
    if energy is not None and not least <= energy < MAX_EXACT:
        msg = f"field {place + 1}: {text.strip()!r} is {'below 0' if energy < 0 else 'too much'}, expected an energy"
        raise ValueError(msg)
    return energy


def _newest(log: Log, days: list[_Day]) -> list[_Day]:
    """The days without what a version with a newer UpdateDateTime has another value of; those are counted.

    Of an interval without a value in the newer one, as where a box was exchanged within the day, the older one's value
    counts. Of versions without an UpdateDateTime, or with the same, all stay: which of them is right nobody says.
    """
    versions: dict[tuple[str, str, datetime], list[_Day]] = {}
    for day in days:
        versions.setdefault(day.place, []).append(day)
    for several in versions.values():
        for day in several:
            newer = [other for other in several if other.updated > day.updated]
            for place, energy in enumerate(day.energies):
                is_there = any(len(other.energies) != len(day.energies) or other.has_value(place) for other in newer)
                if is_there and day.has_value(place):
                    log.defects[Defect.SUPERSEDED] += 1
                if newer:
                    day.energies[place] = None if is_there else energy
                    day.is_replaced[place] = is_there
    return days


def _intervals_in(record: list[str], channel: _Channel | None) -> int:
    """Intervals of a day that is refused; if its channel is unknown, the values before the quality."""
    if channel:
        return DAY // channel.length
    values = _values(record)
    return max(sum(bool(field.strip()) for field in record[2:]) if values is None else values, 1)


def _set_quality(record: list[str], day: _Day) -> None:
    """Quality of a stretch of intervals, where the day's own is V: mixed."""
    places, quality = [field.strip() for field in record[1:3]], record[3].strip()
    first, last = (int(place) if place.isascii() and place.isdecimal() else 0 for place in places)
    if not 1 <= first <= last <= len(day.qualities) or not quality[:1].isalpha():
        msg = f"no stretch of {len(day.qualities)} intervals with a quality: {' to '.join(places)}, {quality!r}"
        raise ValueError(msg)
    day.qualities[first - 1 : last] = [quality[0]] * (last - first + 1)


def _intervals(log: Log, days: list[_Day], register: str) -> pl.DataFrame:
    """One summed register of each meter that has it."""
    rows = []
    for day in days:
        channel = day.channel
        if channel.register != register:
            continue
        for place, (energy, quality) in enumerate(zip(day.energies, day.qualities, strict=True)):
            if not day.has_value(place):
                log.defects[Defect.EMPTY_FIELDS] += not day.is_replaced[place]
                continue
            assert energy is not None
            if quality in QUALITIES:
                log.defects[QUALITIES[quality]] += 1
            begun_at = day.begin + place * channel.length
            rows.append((channel.meter_id, begun_at + channel.length, channel.serial, register, begun_at, energy))
    intervals = pl.DataFrame(rows, READ | {"begun_at": pl.Datetime("us"), "energy": pl.Int64}, orient="row")
    return summed(intervals, "wh", MICRO_WH_PER_WH).with_columns(register=pl.lit(register), dialect=pl.lit("nem12"))


def _register_reads(
    log: Log, record: list[str], suffixes: dict[tuple[str, str], list[str]], wraps: dict[str, set[int]]
) -> list[tuple[Any, ...]]:
    """Previous and current read of one register: a NMI's suffixes have the registers, in their order in the file.

    Args:
        log: counts what is odd.
        record: 250.
        suffixes: NMI and direction → those that came; another serial of one suffix is an exchange.
        wraps: NMI → Wh at which its registers begin again at 0, where reads or a Quantity say so.
    """
    meter_id, serial, unit = _meter_id(record[1]), record[6].strip() or None, record[19].strip().upper()
    way = record[7].strip()
    if way not in NEM13_WAYS or unit not in MICRO_WH:
        wrong = (
            f"field 8: {way!r}, expected E or I"
            if way not in NEM13_WAYS
            else f"field 20: {unit!r}, expected {', '.join(MICRO_WH)}"
        )
        raise ValueError(wrong)
    suffix = record[4].strip() or record[3].strip()
    known = suffixes.setdefault((meter_id, way), [])
    if suffix not in known and len(known) == len(NEM13_WAYS[way]):
        msg = f"field 5: {suffix!r} is one register more than {', '.join(known)}, and a reading has {len(known)} a way"
        raise ValueError(msg)
    known += [] if suffix in known else [suffix]
    register = NEM13_WAYS[way][known.index(suffix)]
    reads = []
    for place in (8, 13):
        at = _stamp(place + 1, record[place + 1])
        wh = _number(place, record[place], MICRO_WH[unit] // MICRO_WH_PER_WH)
        if wh is None or not 0 <= wh < MAX_EXACT:
            msg = f"field {place + 1}: no register: {record[place]!r}"
            raise ValueError(msg)
        reads.append((meter_id, at, serial, register, wh))
    (before, after), unit_wh = (wh for *_, wh in reads), MICRO_WH[unit] // MICRO_WH_PER_WH
    quantity = _number(18, record[18], unit_wh)
    if quantity is not None and after >= before and abs(quantity - (after - before)) > unit_wh:
        log.defects[Defect.OTHER_SUM] += 1
    end = _end_of(record[8], before, after, quantity, unit_wh)
    if end:
        wraps.setdefault(meter_id, set()).add(end)
    for place in (8, 13):
        if defect := QUALITIES.get(record[place + 2].strip()[:1]):
            log.defects[defect] += 1
    return reads


def _end_of(text: str, before: int, after: int, quantity: int | None, unit_wh: int) -> int | None:
    """Where a register ends, Wh: by the Quantity of a step over the end, or by the zeros before a read's digits."""
    digits = text.strip().partition(".")[0]
    if after < before and quantity is not None:
        end, rest = divmod(before - after + quantity, unit_wh)
        if not rest and str(end).rstrip("0") == "1" and end * unit_wh > before:
            return end * unit_wh
        if quantity < before:  # of an exchange; a larger one is by a multiplier
            return None
    is_padded = digits.startswith("0") and len(digits) > 1
    end = 10 ** len(digits) * unit_wh
    return end if (is_padded or after < before) and max(before, after) < end else None


def _as_read(reads: list[tuple[Any, ...]]) -> pl.DataFrame:
    """The reads; where a box ends and the next begins at one time, the next begins a second later."""
    boxes: dict[tuple[Any, ...], Any] = {}
    for number, (meter_id, at, serial, register, wh) in enumerate(reads):
        if boxes.setdefault((meter_id, at, register), serial) != serial:
            reads[number] = (meter_id, at + timedelta(seconds=1), serial, register, wh)
    return pl.DataFrame(reads, READ | {"wh": pl.Int64}, orient="row").with_columns(dialect=pl.lit("nem13"))
