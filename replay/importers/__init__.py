"""Logs → tapes: one module a format, discovered; a module's name, with `-` for `_`, is the format's.

A module has `read(path, asked) -> Imported`, `FILES`: which files of a folder are logs of its format, and `ZONE`: the
usage points' time zone where the operator names none.
"""

import csv
import gzip
import importlib
import io
import pkgutil
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from zoneinfo import ZoneInfo

import polars as pl
import pyarrow as pa

from replay.tape import Tape, log_schema, registry_of, write_tape
from schemas.errors import BadLog, ConfigError
from schemas.tables import REGISTRY, polars_schema
from schemas.topics import METER_ID

READING = polars_schema(log_schema("reading"))
TOLD = 5  # refused records that are named; the others are counted
CHUNK_ROWS = 100_000  # rows of a CSV log that are held as Python objects at once
MAX_EXACT = 2**53  # below it a double holds every integer
GAP_FACTOR = 1.5  # as the delta engine: a step of one and a half usual ones has lost a reading
USUAL_SHARE = 0.1  # of a meter's steps, and
USUAL_COUNT = 10  # steps: so many make a second length usual too


class Defect(StrEnum):
    """What can be wrong with a log. Cut off, refused, other quantity and empty fields are left out; all else stays."""

    CUT_OFF = "cut_off"
    REFUSED = "refused"
    WRONG_CRC = "wrong_crc"
    OTHER_QUANTITY = "other_quantity"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    BACKWARD_STEP = "backward_step"
    MIXED_STEP = "mixed_step"
    GAP = "gap"
    MISSING_READING = "missing_reading"
    EMPTY_FIELDS = "empty_fields"
    SUBSTITUTED = "substituted"
    ESTIMATED = "estimated"
    NO_CLOCK = "no_clock"
    SAME_METER_AGAIN = "same_meter_again"
    AMBIGUOUS_LOCAL_TIME = "ambiguous_local_time"
    NONEXISTENT_LOCAL_TIME = "nonexistent_local_time"


@dataclass(frozen=True)
class Asked:
    """What the operator says about a log.

    Attributes:
        meter_id: whose log it is, where the log does not say.
        timezone: IANA name; default is the format's.
        keep_going: count and leave out what the format does not allow, instead of failing.
        first_at: begin of a log whose records have no clock.
        ignore_crc: take telegrams whose CRC is wrong or absent, such as those from which somebody took a name.
    """

    meter_id: str
    timezone: str | None = None
    keep_going: bool = False
    first_at: datetime | None = None
    ignore_crc: bool = False


@dataclass(frozen=True)
class Imported:
    """What an importer made of one log.

    Attributes:
        readings: columns of `replay.tape.log_schema("reading")`, oldest first as the log has them.
        time_zone: of the usage point.
        defects: what was wrong, by `Defect`.
        rows_in: records in the log.
        intervals_s: usual step of each meter in whole seconds; null with fewer than two readings.
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
    ignore_crc: bool = False,
) -> tuple[Tape, list[str]]:
    """Make a tape of one or several logs.

    Args:
        paths: logs, `.gz` or plain, or folders of them.
        format: a name of `formats`.
        folder: where the tape goes.
        meter_id: whose log it is, where there is one that names no meter; default is the file's stem.
        timezone: see `Asked`, and so on for the rest.
        keep_going: of all logs.
        first_at: of each log.
        ignore_crc: of all logs.

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
        asked = Asked(meter_id or stem(path), timezone, keep_going, first_at, ignore_crc)
        imported: Imported = known[format].read(path, asked)
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
    registries = pl.concat(_registry(imported) for imported in done)
    registry = registries.unique("meter_id", keep="first", maintain_order=True)
    again = registries.filter(pl.col("meter_id").is_duplicated()).get_column("meter_id").unique()
    defects[Defect.SAME_METER_AGAIN] += len(registries) - len(registry)
    defects.update(_between_logs(done, again))
    tape = write_tape(
        folder, readings=pa.concat_tables(imported.readings for imported in done),
        events=log_schema("event").empty_table(), registry=registry.to_arrow().cast(REGISTRY),
        format=format, source=logs[0].name if len(logs) == 1 else f"{len(logs)} logs",
        time_zone=done[0].time_zone, rows_in=rows_in, defects=+defects,
        interval_s=most_common(step for imported in done for step in imported.intervals_s.values()),
    )  # fmt: skip
    return tape, refused


def _between_logs(done: list[Imported], meters: pl.Series) -> Counter[str]:
    """What is odd in the times of meters that come in several logs, beyond what is odd within each log."""
    parts = [pl.DataFrame(pl.from_arrow(imported.readings)) for imported in done if len(meters)]
    parts = [part.filter(pl.col("meter_id").is_in(meters.implode())) for part in parts]
    odd: Counter[str] = Counter()
    if parts:
        look_at_times(pl.concat(parts), odd)
    for part in parts:
        own: Counter[str] = Counter()
        look_at_times(part, own)
        odd.subtract(own)
    return odd


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
    return list(dict.fromkeys(found))


def stem(path: Path) -> str:
    """A file's name without its endings, as a meter id."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", re.sub(r"(\.(csv|txt|json|gz|log))+$", "", path.name))[:64]


def _registry(imported: Imported) -> pl.DataFrame:
    """Registry rows of one log's meters."""
    own = pl.DataFrame(registry_of(imported.readings, time_zone=imported.time_zone, interval_s=None))
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

    def __init__(self, path: Path, asked: Asked, timezone: str) -> None:
        """Reads the bytes.

        Args:
            path: of the log, plain or `.gz`.
            asked: what the operator says.
            timezone: the format's own, where he names none.

        Raises:
            ConfigError: no such file or time zone, or a meter id that is not allowed.
            BadLog: broken gzip.
        """
        self.path = path
        self.keep_going = asked.keep_going
        self.meter_id = asked.meter_id
        self.rows_in = 0
        self.defects: Counter[str] = Counter()
        self.refused: list[str] = []
        if not METER_ID.fullmatch(asked.meter_id):
            msg = f"meter id {asked.meter_id!r}: 1 to 64 letters, digits, _ and - are allowed"
            raise ConfigError(msg)
        timezone = asked.timezone or timezone
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

    def table(
        self, needed: Sequence[str], others: Sequence[str] = (), delimiter: str = ",", blanks: Sequence[str] = ()
    ) -> pl.DataFrame:
        """The columns of a CSV log as text without blanks around it, and `line`; a row of another length is refused.

        Args:
            needed: columns that must be there.
            others: columns that may be there; empty text where they are not.
            delimiter: between two fields.
            blanks: what stands for a value that is missing; it becomes empty text.

        Raises:
            BadLog: a needed column is missing, or a row is refused.
        """
        self.text()  # names the line that is no text; the rows are read as a stream, for a large log's memory
        rows = fields_of(io.TextIOWrapper(io.BytesIO(self.data), "utf-8-sig", newline=""), delimiter)
        _, names = next(rows, (1, []))
        if isinstance(names, csv.Error):
            raise self.bad(1, str(names))
        header = [name.strip() for name in names]
        missing = [name for name in needed if name not in header]
        if missing:
            raise self.bad(1, f"no column {', '.join(missing)}")
        there = [name for name in (*needed, *others) if name in header]
        places = [header.index(name) for name in there]
        schema = dict.fromkeys(there, pl.String()) | {"line": pl.Int64()}
        chunk: list[list[Any]] = []
        chunks = [pl.DataFrame(schema=schema)]
        for line, fields in rows:
            if not fields:
                continue
            self.rows_in += 1
            if isinstance(fields, csv.Error):
                self.refuse(line, str(fields))
                continue
            if len(fields) != len(header):
                self.refuse(line, f"{len(fields)} fields, the header has {len(header)}")
                continue
            chunk.append([*(fields[place] for place in places), line])
            if len(chunk) == CHUNK_ROWS:
                chunks.append(pl.DataFrame(chunk, schema, orient="row"))
                chunk = []
        table = pl.concat([*chunks, pl.DataFrame(chunk, schema, orient="row")])
        return table.with_columns(
            pl.col(there).str.strip_chars().replace(list(blanks), [""] * len(blanks)),
            **{name: pl.lit("") for name in others if name not in header},
        )

    def parsed(self, table: pl.DataFrame, **fields: "Field") -> pl.DataFrame:
        """Columns of the reading out of a table's text; a row with a field that does not fit is refused.

        Raises:
            BadLog: such a row.
        """
        found = table.with_columns(**{name: field.value for name, field in fields.items()})
        is_wrong = {
            name: found[name].is_null() & (table[field.column] != "" if field.may_be_empty else True)
            for name, field in fields.items()
        }
        wrong = pl.select(pl.any_horizontal(*is_wrong.values())).to_series()
        for row in wrong.arg_true():
            field = next(field for name, field in fields.items() if is_wrong[name][row])
            self.refuse(table["line"][row], f"{field.column} is no {field.kind}: {table[field.column][row]!r}")
        return found.filter(~wrong).select("line", *fields)

    def bad(self, line: int, reason: str) -> BadLog:
        """The error that names file, line and reason."""
        return BadLog(f"{self.path}:{line}: {reason}")

    def refuse(self, line: int, reason: str, defect: Defect = Defect.REFUSED, records: int = 1) -> None:
        """Leave the records of a line out, counted; unless told to keep going that is an error."""
        if not self.keep_going:
            raise self.bad(line, reason)
        self.defects[defect] += records
        if len(self.refused) < TOLD:
            self.refused.append(f"{self.path}:{line}: {reason}")

    def utc(self, readings: pl.DataFrame) -> pl.DataFrame:
        """The same rows with `observed_at` in UTC, where it is local wall time.

        The autumn hour that comes twice is told apart by the order of a meter's rows: where the clock steps back within
        it, the second pass begins. Where it does not, the rows are taken as the first pass and counted as ambiguous. A
        time that spring skips is taken by the offset before the change, and counted: no clock that follows the zone can
        say it.
        """
        wall = pl.col("observed_at")

        def at(time: pl.Expr, passing: Literal["earliest", "latest"]) -> pl.Expr:
            local = time.dt.replace_time_zone(self.zone.key, ambiguous=passing, non_existent="null")
            return local.dt.convert_time_zone("UTC")

        a_day = pl.duration(days=1)  # no zone changes its clock twice within one
        rows = readings if "meter_id" in readings else readings.with_columns(meter_id=pl.lit(self.meter_id))
        rows = rows.with_columns(first=at(wall, "earliest"), second=at(wall, "latest"))
        rows = rows.with_columns(is_repeated=(pl.col("first") != pl.col("second")).fill_null(False))
        rows = rows.with_columns(spell=pl.struct("meter_id", "is_repeated").rle_id())
        steps_back = (wall.diff().over("spell") < pl.duration()).fill_null(False)
        rows = rows.with_columns(steps_back=steps_back)
        rows = rows.with_columns(is_second=pl.col("is_repeated") & pl.col("steps_back").cum_max().over("spell"))
        is_ambiguous = pl.col("is_repeated") & ~pl.col("is_second").any().over("spell")
        self.defects[Defect.NONEXISTENT_LOCAL_TIME] += rows["first"].null_count()
        self.defects[Defect.AMBIGUOUS_LOCAL_TIME] += rows.select(is_ambiguous.sum()).item()
        before_change = at(wall - a_day, "earliest") + a_day
        settled = pl.when("is_second").then("second").otherwise(pl.coalesce("first", before_change))
        return rows.with_columns(observed_at=settled).select(readings.columns)

    def close(self, readings: pl.DataFrame, registry: pl.DataFrame | None = None) -> Imported:
        """The result over all accepted rows, oldest first; counts what is odd in their times.

        Args:
            readings: columns of the reading that the log has; meter_id where the log names it.
            registry: see `Imported`.
        """
        own = {} if "meter_id" in readings else {"meter_id": pl.lit(self.meter_id)}
        absent = {name: pl.lit(None, kind) for name, kind in READING.items() if name not in readings}
        readings = readings.with_columns(**absent | own).select(pl.col(name).cast(READING[name]) for name in READING)
        intervals_s = look_at_times(readings, self.defects)
        return Imported(
            readings.to_arrow().cast(log_schema("reading")), self.zone.key, +self.defects, self.rows_in, intervals_s,
            self.refused, registry,
        )  # fmt: skip


def fields_of(lines: Iterable[str], delimiter: str = ",") -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Number and fields of each line of a CSV log, or what is wrong with it.

    Each line is read by itself: a stray quotation mark harms no other.
    """
    for number, line in enumerate(lines, 1):
        try:
            yield number, next(csv.reader([line], delimiter=delimiter, strict=True), [])
        except csv.Error as error:
            yield number, error


def look_at_times(readings: pl.DataFrame, defects: Counter[str]) -> dict[str, int | None]:
    """Each meter's usual step in seconds; counts steps that are none, backward, of another usual length, or too long.

    A log may mix steps of several usual lengths; the longest of them is what tells a gap.
    """
    intervals_s: dict[str, int | None] = {}
    for (meter_id,), own in readings.group_by("meter_id", maintain_order=True):
        step = own.get_column("observed_at").diff().dt.total_microseconds().drop_nulls() / 1e6
        usual = _usual_steps_s(step.filter(step > 0).round(0).cast(pl.Int64).clip(1))
        intervals_s[str(meter_id)] = usual[-1] if usual else None
        defects[Defect.BACKWARD_STEP] += int((step < 0).sum())
        if usual:
            long = step.filter(step > GAP_FACTOR * usual[-1])
            defects[Defect.GAP] += len(long)
            defects[Defect.MISSING_READING] += int(((long / usual[-1]).round(0) - 1).sum())
            defects[Defect.MIXED_STEP] += int((step > GAP_FACTOR * usual[0]).sum()) - len(long)
        again = own.filter(~pl.col("observed_at").is_first_distinct())
        if len(again):
            first = own.unique("observed_at", keep="first", maintain_order=True)
            same = len(again.join(first, on=own.columns, how="semi", nulls_equal=True))
            defects[Defect.DUPLICATE] += same
            defects[Defect.CONFLICT] += len(again) - same
    return intervals_s


def _usual_steps_s(steps_s: pl.Series) -> list[int]:
    """The most frequent step, and longer ones that are frequent too, ascending."""
    usual: list[int] = []
    longer = steps_s
    while len(longer):
        counted = longer.value_counts().sort(["count", longer.name], descending=[True, False])
        step_s, count = counted.row(0)
        if usual and count < max(USUAL_SHARE * len(steps_s), USUAL_COUNT):
            break
        usual.append(step_s)
        longer = longer.filter(longer > GAP_FACTOR * step_s)
    return usual


@dataclass(frozen=True)
class Field:
    """How a column's text becomes a value.

    Attributes:
        column: of the log.
        value: from its text; null where that does not fit, and where it is empty.
        kind: what it must be, for the reason of a refusal.
        may_be_empty: empty text is no error.
    """

    column: str
    value: pl.Expr
    kind: str
    may_be_empty: bool = True


def number(column: str, factor: int, *, is_signed: bool = False) -> Field:
    """A decimal number times a factor, rounded to an integer; exact for numbers of up to 15 digits."""
    # 6 places first: a half stays a half in binary too
    product = (pl.col(column).cast(pl.Float64, strict=False) * factor).round(6).round()
    is_sound = product.abs() < MAX_EXACT if is_signed else product.is_between(0, MAX_EXACT)
    value = pl.when(is_sound).then(product.cast(pl.Int64, strict=False))
    return Field(column, value, "number" if is_signed else "number from 0")


def energy(column: str, factor: int) -> Field:
    """The same of an energy that a register is summed from: it must be there."""
    return Field(column, number(column, factor).value, "number from 0", may_be_empty=False)


def stamp(column: str, format: str) -> Field:
    """Date and time by strptime's format."""
    value = pl.col(column).str.to_datetime(format, time_unit="us", strict=False)
    return Field(column, value, f"time as {format}", may_be_empty=False)


def meter(column: str) -> Field:
    """The id of a meter."""
    value = pl.when(pl.col(column).str.contains(f"^(?:{METER_ID.pattern})$")).then(column)
    return Field(column, value, "meter id", may_be_empty=False)


def word(column: str, words: Mapping[str, Any]) -> Field:
    """One of a list of words."""
    value = pl.col(column).replace_strict(list(words), list(words.values()), default=None, return_dtype=pl.Int64)
    return Field(column, value, " or ".join(words))


def summed(intervals: pl.DataFrame, register: str, per_wh: int) -> pl.DataFrame:
    """The intervals with a register in whole Wh, rounded down: what is less than a Wh stays in the sum.

    The register begins at 0 with a row of its own. An interval that comes again adds nothing: its row has the register
    as it would stand with that row's energy. So the register does not depend on the order of the rows.

    Args:
        intervals: meter_id, begun_at, observed_at (its end), `energy`, and what else there is; each meter's in the
            order of the log.
        register: column that is added.
        per_wh: how much of `energy` is a Wh.
    """
    interval = ["meter_id", "observed_at"]
    before = (pl.col("energy").cum_sum() - pl.col("energy")).over("meter_id")
    first = intervals.unique(interval, keep="first").sort(interval).select(*interval, before=before)
    rows = intervals.join(first, on=interval, how="left", maintain_order="left")
    rows = rows.with_columns(((pl.col("before") + pl.col("energy")) // per_wh).alias(register))
    begins = intervals.group_by("meter_id").agg(pl.col("begun_at").min().alias("observed_at"))
    begins = begins.with_columns(pl.lit(0, pl.Int64).alias(register))
    rows = pl.concat([begins, rows.drop("begun_at", "energy", "before")], how="diagonal")
    meters = pl.Enum(intervals["meter_id"].unique(maintain_order=True))
    return rows.sort(pl.col("meter_id").cast(meters), maintain_order=True)


def as_frame(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Rows with the same columns of the reading in each."""
    names = list(rows[0]) if rows else ["observed_at", "dialect"]
    return pl.DataFrame(rows, schema={name: READING[name] for name in names})


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
