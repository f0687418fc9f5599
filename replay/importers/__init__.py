"""Logs → tapes: one module a format, discovered; a module's name, with `-` for `_`, is the format's."""

import gzip
import importlib
import pkgutil
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa

from replay.tape import Tape, log_schema, registry_of, write_tape
from schemas.errors import BadLog, ConfigError
from schemas.topics import METER_ID


class Defect(StrEnum):
    """What can be wrong with a log. All but the first two stay on the tape as they are."""

    CUT_OFF = "cut_off"
    REFUSED = "refused"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    BACKWARD_STEP = "backward_step"
    GAP = "gap"
    MISSING_READING = "missing_reading"
    AMBIGUOUS_LOCAL_TIME = "ambiguous_local_time"
    NONEXISTENT_LOCAL_TIME = "nonexistent_local_time"


@dataclass(frozen=True)
class Imported:
    """What an importer made of one log.

    Attributes:
        readings: columns of `replay.tape.log_schema("reading")`, oldest first as the log has them.
        events: the same of `event`; no format here has any.
        time_zone: of the usage point.
        defects: what was wrong, by `Defect`.
        rows_in: records in the log; those neither cut off nor refused are the readings.
        interval_s: usual step in whole seconds; null with fewer than two readings.
    """

    readings: pa.Table
    events: pa.Table
    time_zone: str
    defects: Counter[str]
    rows_in: int
    interval_s: int | None


def formats() -> dict[str, ModuleType]:
    """Format name → its module, whose docstring's first line is the description."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name.replace("_", "-"): importlib.import_module(f"{__name__}.{name}") for name in names}


def import_log(
    path: Path,
    format: str,
    folder: Path,
    *,
    meter_id: str | None = None,
    timezone: str | None = None,
    keep_going: bool = False,
) -> Tape:
    """Make a tape of a log.

    Args:
        path: the log, `.gz` or plain.
        format: a name of `formats`.
        folder: where the tape goes.
        meter_id: whose log it is; default is the format and `-1`.
        timezone: IANA name; default is the format's.
        keep_going: count and leave out what the format does not allow, instead of failing.

    Raises:
        ConfigError: no such file, format, time zone or a meter id that is not allowed.
        BadLog: a line that the format does not allow.
    """
    known = formats()
    if format not in known:
        msg = f"no format {format}: there are {', '.join(known)}"
        raise ConfigError(msg)
    imported: Imported = known[format].read(
        path, meter_id=meter_id or f"{format}-1", timezone=timezone, keep_going=keep_going
    )
    if not len(imported.readings):
        msg = f"{path}: no reading in it, {imported.rows_in} records refused or cut off"
        raise BadLog(msg)
    registry = registry_of(imported.readings, time_zone=imported.time_zone, interval_s=imported.interval_s)
    return write_tape(
        folder, readings=imported.readings, events=imported.events, registry=registry, format=format,
        source=path.name, time_zone=imported.time_zone, rows_in=imported.rows_in, defects=imported.defects,
        interval_s=imported.interval_s,
    )  # fmt: skip


class Log:
    """One log being read: its bytes, and the books over its records.

    Attributes:
        data: content, unpacked.
        zone: the usage point's time zone.
        rows_in: records met so far.
        defects: see `Defect`.
    """

    def __init__(self, path: Path, *, meter_id: str, timezone: str, keep_going: bool) -> None:
        self.path = path
        self.keep_going = keep_going
        self.meter_id = meter_id
        self.rows_in = 0
        self.defects: Counter[str] = Counter()
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

    def bad(self, line: int, reason: str) -> BadLog:
        """The error that names file, line and reason."""
        return BadLog(f"{self.path}:{line}: {reason}")

    def refuse(self, line: int, reason: str, defect: Defect = Defect.REFUSED) -> None:
        """Leave a record out, counted; unless told to keep going that is an error."""
        if not self.keep_going:
            raise self.bad(line, reason)
        self.defects[defect] += 1

    def close(self, rows: Sequence[Mapping[str, Any]]) -> Imported:
        """The result over all accepted rows, oldest first; counts what is odd in their times."""
        interval_s = _look_at_times(rows, self.defects)
        schema = log_schema("reading")
        records = [{**row, "meter_id": self.meter_id} for row in rows]
        readings = pa.Table.from_pylist(records, schema)
        return Imported(
            readings, log_schema("event").empty_table(), self.zone.key, +self.defects, self.rows_in, interval_s
        )


def _look_at_times(rows: Sequence[Mapping[str, Any]], defects: Counter[str]) -> int | None:
    """The usual step in seconds; counts steps that are none, backward, or longer than one and a half of it."""
    steps = [
        (later["observed_at"] - earlier["observed_at"]).total_seconds()
        for earlier, later in zip(rows, rows[1:], strict=False)
    ]
    forward = Counter(max(1, round(step)) for step in steps if step > 0)
    interval_s = min(forward, key=lambda step: (-forward[step], step)) if forward else None
    seen: dict[datetime, Mapping[str, Any]] = {}
    for row in rows:
        first = seen.setdefault(row["observed_at"], row)
        if first is not row:
            defects[Defect.DUPLICATE if first == row else Defect.CONFLICT] += 1
    for step in steps:
        if step < 0:
            defects[Defect.BACKWARD_STEP] += 1
        elif interval_s and step > 1.5 * interval_s:
            defects[Defect.GAP] += 1
            defects[Defect.MISSING_READING] += round(step / interval_s) - 1
    return interval_s


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
