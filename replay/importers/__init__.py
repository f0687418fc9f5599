"""Logs → tapes: one module a format, discovered; a module's name, with `-` for `_`, is the format's.

A module has `read(path, *, meter_id, timezone, keep_going, first_at) -> Imported`, and `FILES`: which files of a folder
are logs of its format.
"""

import csv
import gzip
import importlib
import io
import pkgutil
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import pyarrow as pa

from replay.tape import Tape, log_schema, registry_of, write_tape
from schemas.errors import BadLog, ConfigError
from schemas.tables import REGISTRY, polars_schema
from schemas.topics import METER_ID

READING = polars_schema(log_schema("reading"))
TOLD = 5  # refused records that are named; the others are counted


class Defect(StrEnum):
    """What can be wrong with a log. All but the first three stay on the tape as they are."""

    CUT_OFF = "cut_off"
    REFUSED = "refused"
    OTHER_QUANTITY = "other_quantity"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    BACKWARD_STEP = "backward_step"
    GAP = "gap"
    MISSING_READING = "missing_reading"
    EMPTY_FIELDS = "empty_fields"
    SUBSTITUTED = "substituted"
    ESTIMATED = "estimated"
    SAME_METER_AGAIN = "same_meter_again"
    AMBIGUOUS_LOCAL_TIME = "ambiguous_local_time"
    NONEXISTENT_LOCAL_TIME = "nonexistent_local_time"


@dataclass(frozen=True)
class Imported:
    """What an importer made of one log.

    Attributes:
        readings: columns of `replay.tape.log_schema("reading")`, oldest first as the log has them.
        time_zone: of the usage point.
        defects: what was wrong, by `Defect`.
        rows_in: records in the log.
        interval_s: usual step of each meter in whole seconds; null with fewer than two readings.
        refused: the first records that were left out: file, line and reason.
        registry: meter_id and what else the log knows of its meters, columns of `schemas.tables.REGISTRY`.
    """

    readings: pa.Table
    time_zone: str
    defects: Counter[str]
    rows_in: int
    intervals_s: dict[str, int | None]
    refused: list[str] = field(default_factory=list)
    registry: pl.DataFrame | None = None

    @property
    def interval_s(self) -> int | None:
        """The usual step of most of the meters."""
        return most_common(self.intervals_s.values())


def most_common(intervals_s: Any) -> int | None:
    """The step that most have; the shortest of equals."""
    counted = Counter(interval for interval in intervals_s if interval)
    return min(counted, key=lambda interval: (-counted[interval], interval)) if counted else None


def formats() -> dict[str, ModuleType]:
    """Format name → its module, whose docstring's first line is the description."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name.replace("_", "-"): importlib.import_module(f"{__name__}.{name}") for name in names}


def import_log(
    paths: Path | Sequence[Path],
    format: str,
    folder: Path,
    *,
    meter_id: str | None = None,
    timezone: str | None = None,
    keep_going: bool = False,
    first_at: datetime | None = None,
) -> tuple[Tape, list[str]]:
    """Make a tape of one or several logs.

    Args:
        paths: logs, `.gz` or plain, or folders of them.
        format: a name of `formats`.
        folder: where the tape goes.
        meter_id: whose log it is, where there is one that names no meter; default is the file's stem.
        timezone: IANA name; default is the format's.
        keep_going: count and leave out what the format does not allow, instead of failing.
        first_at: begin of a log whose records have no clock.

    Returns:
        The tape, and the first refused records of each log.

    Raises:
        ConfigError: no such file, format, time zone or a meter id that is not allowed.
        BadLog: a line that the format does not allow.
    """
    known = formats()
    if format not in known:
        msg = f"no format {format}: there are {', '.join(known)}"
        raise ConfigError(msg)
    logs = _logs([paths] if isinstance(paths, Path) else list(paths), format, known[format].FILES)
    if meter_id and len(logs) > 1:
        msg = f"--meter-id names one meter, there are {len(logs)} logs"
        raise ConfigError(msg)
    done: list[Imported] = []
    refused: list[str] = []
    defects: Counter[str] = Counter()
    rows_in = 0
    for path in logs:
        imported: Imported = known[format].read(
            path, meter_id=meter_id or stem(path), timezone=timezone, keep_going=keep_going, first_at=first_at
        )
        told = imported.refused or [f"{path}: no reading in it, {imported.rows_in} records cut off"]
        if len(imported.readings):
            done.append(imported)
            told = imported.refused
        elif not keep_going:
            raise BadLog(told[0])
        refused += told
        defects += imported.defects
        rows_in += imported.rows_in
    if not done:
        raise BadLog(refused[0])
    registries = []
    seen: set[str] = set()
    for imported in done:
        own = _registry(imported)
        is_new = ~own.get_column("meter_id").is_in(list(seen))
        defects[Defect.SAME_METER_AGAIN] += len(own) - int(is_new.sum())
        registries.append(own.filter(is_new))
        seen |= set(own.get_column("meter_id"))
    tape = write_tape(
        folder, readings=pa.concat_tables(imported.readings for imported in done),
        events=log_schema("event").empty_table(), registry=pl.concat(registries).to_arrow().cast(REGISTRY),
        format=format, source=logs[0].name if len(logs) == 1 else f"{len(logs)} logs",
        time_zone=done[0].time_zone, rows_in=rows_in, defects=+defects,
        interval_s=most_common(step for imported in done for step in imported.intervals_s.values()),
    )  # fmt: skip
    return tape, refused


def _logs(paths: list[Path], format: str, patterns: Sequence[str]) -> list[Path]:
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted({log for pattern in patterns for log in path.glob(pattern) if log.is_file()})
        if not inside:
            msg = f"{path}: no log of format {format} in it ({', '.join(patterns)})"
            raise ConfigError(msg)
        found += inside
    return found


def stem(path: Path) -> str:
    """A file's name without its endings, as a meter id."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", re.sub(r"(\.(csv|txt|json|gz|log))+$", "", path.name))[:64]


def _registry(imported: Imported) -> pl.DataFrame:
    """Registry rows of one log's meters."""
    own = pl.DataFrame(pl.from_arrow(registry_of(imported.readings, time_zone=imported.time_zone, interval_s=None)))
    steps = pl.DataFrame(list(imported.intervals_s.items()), schema=["meter_id", "interval_s"], orient="row")
    own = own.update(steps.cast({"meter_id": pl.String, "interval_s": pl.Int64}), on="meter_id")
    return own if imported.registry is None else own.update(imported.registry, on="meter_id")


class Log:
    """One log being read: its bytes, and the books over its records.

    Attributes:
        data: content, unpacked.
        zone: the usage point's time zone.
        rows_in: records met so far.
        defects: see `Defect`.
        refused: the first records that were left out.
    """

    def __init__(self, path: Path, *, meter_id: str, timezone: str, keep_going: bool) -> None:
        self.path = path
        self.keep_going = keep_going
        self.meter_id = meter_id
        self.rows_in = 0
        self.defects: Counter[str] = Counter()
        self.refused: list[str] = []
        if not METER_ID.fullmatch(meter_id):
            msg = f"meter id {meter_id!r}: 1 to 64 letters, digits, _ and - are allowed"
            raise ConfigError(msg)
        try:
            self.zone = ZoneInfo(timezone)
        except (OSError, ValueError, KeyError) as error:
            msg = f"no time zone {timezone!r}"
            raise ConfigError(msg) from error
        try:
            self.data = path.read_bytes()
        except OSError as error:
            msg = f"cannot read {path}: {error.strerror}"
            raise ConfigError(msg) from error
        if self.data.startswith(b"\x1f\x8b"):
            try:
                self.data = gzip.decompress(self.data)
            except (OSError, EOFError, zlib.error) as error:
                msg = f"{path}: broken gzip: {error}"
                raise BadLog(msg) from error

    def text(self) -> str:
        """The content as text."""
        try:
            return self.data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = self.data.count(b"\n", 0, error.start) + 1
            raise self.bad(line, f"not UTF-8: {error.reason}") from error

    def table(self, needed: Sequence[str], delimiter: str = ",") -> Iterator[tuple[int, dict[str, str]]]:
        """(line number, fields by column) of each row of a CSV log; a row of another length is refused.

        Raises:
            BadLog: a needed column is missing.
        """
        rows = csv.reader(io.StringIO(self.text()), delimiter=delimiter)
        header = [name.strip() for name in next(rows, [])]
        missing = [name for name in needed if name not in header]
        if missing:
            raise self.bad(1, f"no column {', '.join(missing)}")
        for fields in rows:
            if not fields:
                continue
            self.rows_in += 1
            if len(fields) == len(header):
                yield rows.line_num, dict(zip(header, fields, strict=True))
            else:
                self.refuse(rows.line_num, f"{len(fields)} fields, the header has {len(header)}")

    def bad(self, line: int, reason: str) -> BadLog:
        """The error that names file, line and reason."""
        return BadLog(f"{self.path}:{line}: {reason}")

    def refuse(self, line: int, reason: str, defect: Defect = Defect.REFUSED) -> None:
        """Leave a record out, counted; unless told to keep going that is an error."""
        if not self.keep_going:
            raise self.bad(line, reason)
        self.defects[defect] += 1
        if len(self.refused) < TOLD:
            self.refused.append(f"{self.path}:{line}: {reason}")

    def utc(self, walls: Sequence[datetime]) -> list[datetime]:
        """Local wall times in the order of the log → UTC.

        The autumn hour that comes twice is told apart by the order of the rows: where the clock steps back within it,
        the second pass begins. Where it does not, the rows are taken as the first pass and counted as ambiguous. An
        hour that is skipped in spring is named: no clock that follows the zone can say it.
        """
        offsets: dict[tuple[int, int, int, int], tuple[timedelta, timedelta]] = {}
        result: list[datetime] = []
        repeated: list[int] = []  # rows of one repeated hour so far
        for index, wall in enumerate(walls):
            hour = (wall.year, wall.month, wall.day, wall.hour)
            if hour not in offsets:
                first, second = (wall.replace(tzinfo=self.zone, fold=fold).utcoffset() for fold in (0, 1))
                offsets[hour] = (first or timedelta(0), second or timedelta(0))
            first, second = offsets[hour]
            if first < second:
                self.defects[Defect.NONEXISTENT_LOCAL_TIME] += 1
            if first > second:
                repeated.append(index)
            elif repeated:
                self._settle(repeated, walls, result)
            result.append(wall.replace(tzinfo=UTC) - first)
        self._settle(repeated, walls, result)
        return result

    def _settle(self, repeated: list[int], walls: Sequence[datetime], result: list[datetime]) -> None:
        second = False
        for index, before in zip(repeated, [None, *repeated], strict=False):
            second = second or (before is not None and walls[index] < walls[before])
            if second:
                result[index] = walls[index].replace(tzinfo=self.zone, fold=1).astimezone(UTC)
        if not second:
            self.defects[Defect.AMBIGUOUS_LOCAL_TIME] += len(repeated)
        repeated.clear()

    def close(self, rows: Sequence[Mapping[str, Any]], registry: pl.DataFrame | None = None) -> Imported:
        """The result over all accepted rows, oldest first; counts what is odd in their times.

        Args:
            rows: columns of the reading that the log has, the same in each; meter_id where the log names it.
            registry: see `Imported`.
        """
        names = list(rows[0]) if rows else []
        readings = pl.DataFrame(rows, schema={name: READING[name] for name in names})
        own = {} if "meter_id" in names else {"meter_id": pl.lit(self.meter_id)}
        absent = {name: pl.lit(None, kind) for name, kind in READING.items() if name not in names}
        readings = readings.with_columns(**absent | own).select(READING.names())
        intervals_s = look_at_times(readings, self.defects)
        return Imported(
            readings.to_arrow().cast(log_schema("reading")), self.zone.key, +self.defects, self.rows_in, intervals_s,
            self.refused, registry,
        )  # fmt: skip


def look_at_times(readings: pl.DataFrame, defects: Counter[str]) -> dict[str, int | None]:
    """Each meter's usual step in seconds; counts steps that are none, backward, or longer than one and a half of it."""
    intervals_s: dict[str, int | None] = {}
    for (meter_id,), own in readings.group_by("meter_id", maintain_order=True):
        step = own.get_column("observed_at").diff().dt.total_microseconds().drop_nulls() / 1e6
        forward = step.filter(step > 0).round(0).cast(pl.Int64).clip(1)
        counted = forward.value_counts().sort(["count", forward.name], descending=[True, False])
        interval_s = int(counted.item(0, 0)) if len(counted) else None
        intervals_s[str(meter_id)] = interval_s
        defects[Defect.BACKWARD_STEP] += int((step < 0).sum())
        if interval_s:
            long = step.filter(step > 1.5 * interval_s)
            defects[Defect.GAP] += len(long)
            defects[Defect.MISSING_READING] += int(((long / interval_s).round(0) - 1).sum())
        again = own.filter(~pl.col("observed_at").is_first_distinct())
        if len(again):
            first = own.unique("observed_at", keep="first", maintain_order=True)
            same = len(again.join(first, on=own.columns, how="semi", nulls_equal=True))
            defects[Defect.DUPLICATE] += same
            defects[Defect.CONFLICT] += len(again) - same
    return intervals_s


def exact(text: str | None, factor: int) -> int | None:
    """A decimal number times a factor, rounded to an integer; none where the field is empty.

    Raises:
        ValueError: not a number.
    """
    if text is None or not text.strip():
        return None
    try:
        return int((Decimal(text.strip()) * factor).to_integral_value())
    except (InvalidOperation, OverflowError) as error:
        msg = f"not a number: {text!r}"
        raise ValueError(msg) from error


def positive(text: str | None, factor: int) -> int | None:
    """The same of what cannot be negative.

    Raises:
        ValueError: not a number, or negative.
    """
    value = exact(text, factor)
    if value is not None and value < 0:
        msg = f"negative: {text!r}"
        raise ValueError(msg)
    return value


class Register:
    """A register that is summed from energies; what is less than a Wh stays in the sum."""

    def __init__(self) -> None:
        self._micro_wh = 0

    def add(self, micro_wh: int) -> int:
        """Adds millionths of a Wh. Returns the register in whole Wh, rounded down."""
        self._micro_wh += micro_wh
        return self._micro_wh // 1_000_000
