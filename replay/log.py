"""A log being read: its bytes, rows and clock, and what is wrong with it."""

import csv
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pyarrow as pa

from replay.fields import Field
from replay.tape import log_schema
from schemas.errors import BadLog, ConfigError
from schemas.tables import polars_schema
from schemas.topics import METER_ID

READING = polars_schema(log_schema("reading"))
NAMED = 5  # refused records that are named; the others are counted
CHUNK_ROWS = 100_000  # rows of a CSV log that are held as Python objects at once
GAP_FACTOR = 1.5  # as the delta engine: a step of one and a half usual ones has lost a reading
USUAL_SHARE = 0.1  # of a meter's steps, and
USUAL_COUNT = 10  # steps: so many make a second length usual too
BIN = 0.1  # steps that differ by less are of one length: clocks and senders jitter
AT_THE_END = 101  # steps, of which the last usual length is taken
AROUND = 1001  # steps, in which a length is frequent or is not


class Defect(StrEnum):
    """What can be wrong with a log.

    Cut off, refused, other quantity, superseded and empty fields are left out; all else stays.
    """

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
    SUPERSEDED = "superseded"
    OTHER_SUM = "other_sum"
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
        events: columns of `replay.tape.log_schema("event")`, where the log has some.
    """

    readings: pa.Table
    time_zone: str
    defects: Counter[str]
    rows_in: int
    intervals_s: dict[str, int | None]
    refused: list[str] = field(default_factory=list)
    registry: pl.DataFrame | None = None
    events: pa.Table | None = None

    @property
    def interval_s(self) -> int | None:
        """The usual step of most of the meters."""
        return most_common(self.intervals_s.values())


def most_common(intervals_s: Any) -> int | None:
    """The step that most have; the shortest of equals."""
    counted = Counter(interval for interval in intervals_s if interval)
    return min(counted, key=lambda interval: (-counted[interval], interval)) if counted else None


class Log:
    """One log being read: its bytes, and the count of its records.

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

    def parsed(self, table: pl.DataFrame, **fields: Field) -> pl.DataFrame:
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
        """Leave the records of a line out, counted; without `keep_going` that is an error."""
        if not self.keep_going:
            raise self.bad(line, reason)
        self.defects[defect] += records
        if len(self.refused) < NAMED:
            self.refused.append(f"{self.path}:{line}: {reason}")

    def utc(self, readings: pl.DataFrame) -> pl.DataFrame:
        """The same rows with `observed_at` in UTC, where it is local wall time.

        In the autumn hour that comes twice the order of a meter's rows says which pass it is: where the clock steps
        back, the second begins. Where it does not, the rows are taken as the first pass and counted as ambiguous. A
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
            yield (
                number,
                csv.Error("a quotation mark that does not enclose a whole field") if '"' in str(error) else error,
            )


def look_at_times(readings: pl.DataFrame, defects: Counter[str]) -> dict[str, int | None]:
    """Each meter's usual step in seconds; counts steps that are none, backward, of another usual length, or too long.

    A log may mix steps of several usual lengths, or change from one to another: a gap is longer than the longest that
    is usual where it lies, and the meter's step is the one at the log's end.
    """
    intervals_s: dict[str, int | None] = {}
    for (meter_id,), own in readings.group_by("meter_id", maintain_order=True):
        step = own.get_column("observed_at").diff().dt.total_microseconds().drop_nulls() / 1e6
        usual = _usual_steps_s(step.filter(step > 0).round(0).cast(pl.Int64).clip(1))
        local = _usual_where_it_lies(step, usual)
        at_the_end = _usual_where_it_lies(step.tail(AT_THE_END), usual)
        intervals_s[str(meter_id)] = int(at_the_end[-1]) if usual else None
        defects[Defect.BACKWARD_STEP] += int((step < 0).sum())
        if usual:
            is_long = step > GAP_FACTOR * local
            defects[Defect.GAP] += int(is_long.sum())
            defects[Defect.MISSING_READING] += int(((step / local).filter(is_long).round(0) - 1).sum())
            defects[Defect.MIXED_STEP] += int(((step > GAP_FACTOR * usual[0]) & ~is_long).sum())
        again = own.filter(~pl.col("observed_at").is_first_distinct())
        if len(again):
            first = own.unique("observed_at", keep="first", maintain_order=True)
            same = len(again.join(first, on=own.columns, how="semi", nulls_equal=True))
            defects[Defect.DUPLICATE] += same
            defects[Defect.CONFLICT] += len(again) - same
    return intervals_s


def _usual_steps_s(steps_s: pl.Series) -> list[int]:
    """The most frequent step, and longer ones that are frequent too, ascending; what is within 10 % counts as one."""
    usual: list[int] = []
    longer = steps_s
    while len(longer):
        counted = longer.value_counts().sort(longer.name)
        lengths, counts = (counted.get_column(name).to_numpy() for name in (longer.name, "count"))
        until = np.concatenate([[0], np.cumsum(counts)])
        low = np.searchsorted(lengths, lengths * (1 - BIN), side="left")
        high = np.searchsorted(lengths, lengths * (1 + BIN), side="right")
        within = until[high] - until[low]
        best = max(range(len(lengths)), key=lambda place: (within[place], counts[place], -lengths[place]))
        if usual and within[best] < max(USUAL_SHARE * len(steps_s), USUAL_COUNT):
            break
        middle = np.searchsorted(until, (until[low[best]] + until[high[best]]) / 2, side="left")
        step_s = int(lengths[middle - 1])
        usual.append(step_s)
        longer = longer.filter(longer > GAP_FACTOR * step_s)
    return usual


def _usual_where_it_lies(step: pl.Series, usual: list[int]) -> pl.Series:
    """Of each step the longest of the usual ones that is frequent around it; where none is, the longest of all."""
    frequent = pl.DataFrame(
        {
            f"{length}": ((step >= length * (1 - BIN)) & (step <= length * (1 + BIN))).cast(pl.Float64)
            for length in usual
        }
    )
    near = [
        pl.when(pl.col(f"{length}").rolling_mean(AROUND, min_samples=1, center=True) >= USUAL_SHARE).then(length)
        for length in usual
    ]
    if not usual:
        return pl.Series([None] * len(step), dtype=pl.Int64)
    return frequent.select(pl.coalesce(pl.max_horizontal(near), pl.lit(usual[-1]))).to_series()


def as_frame(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Rows with the same columns of the reading in each."""
    names = list(rows[0]) if rows else ["observed_at", "dialect"]
    return pl.DataFrame(rows, schema={name: READING[name] for name in names})
