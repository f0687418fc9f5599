"""What the registry knows of meters, corrected from a CSV: `stack registry import`.

A row names a meter and what is to be put right; an empty field stays as it was, `null` makes it unknown. The newest row
of the meter is corrected; a `valid_from` that the meter has not makes a row of its own from then on, and
a meter that the registry has not is added. Either all rows of a file are taken or none.
"""

import csv
import json
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from zoneinfo import available_timezones

import polars as pl
import pyarrow as pa
import typer
from rich.console import Console

from lake.reading import Lake, all_registered
from lake.tables import Commit, Writer, put_part
from metering.registry import MOST
from metering.voltage.norms import NORMS_OF
from schemas.errors import ConfigError, exits
from schemas.tables import BY_IMPORT, OF_COMMUNITIES, PHASES, REGISTERED, REGISTRY, polars_schema
from schemas.topics import METER_ID

UNKNOWN = "null"
FIRST = datetime(1, 1, 1, tzinfo=UTC)
LEAST = {"nominal_mv": 10_000}  # less is in volts
NAMED = 5  # wrong fields that are named; the others are counted
ROWS = polars_schema(REGISTRY)
app = typer.Typer(help="What the registry knows of meters.", no_args_is_help=True, add_completion=False)


class Corrected(NamedTuple):
    """What `correct` returns.

    Attributes:
        corrected: meters whose newest row was put right.
        dated: meters that have a further row from a date on.
        added: meters that the registry had not.
        notes: what is as it was written and may not be meant.
    """

    corrected: int
    dated: int
    added: int
    notes: list[str]


def correct(file: Path, today: date) -> Corrected:
    """Takes the rows of a CSV into the registry.

    Args:
        file: with a header: meter_id and other columns of `schemas.tables.REGISTRY`.
        today: dates the file of what is new.

    Raises:
        ConfigError: a field is wrong: file, line, column, found, expected; nothing was taken.
    """
    given = _rows(file)
    known = all_registered(pl.Series("meter_id", [row["meter_id"] for _, row in given], pl.String))
    of_meter: dict[str, list[dict[str, Any]]] = {}
    for row in known.iter_rows(named=True):  # the newest first
        of_meter.setdefault(row["meter_id"], []).append({**row, "key": _key(row)})
    new: list[dict[str, Any]] = []
    replaced: dict[date, dict[tuple[Any, ...], dict[str, Any]]] = {}
    counts = {"corrected": 0, "dated": 0, "added": 0}
    for _, row in given:
        rows = of_meter.setdefault(row["meter_id"], [])
        since = row.get("valid_from")
        same = next((each for each in rows if since in (None, each["valid_from"])), None)
        older = [each for each in rows if since and each["valid_from"] and each["valid_from"] < since]
        before = same or next(iter([*older, *rows]), None) or dict.fromkeys(ROWS)
        whole = {name: row.get(name, before[name]) for name in ROWS}
        whole["usage_point_id"] = whole["usage_point_id"] or row["meter_id"]
        if same is None:
            counts["dated" if rows else "added"] += 1
            new.append(whole)
            rows.append({**whole, "date": None, "key": _key(whole)})
            rows.sort(key=lambda each: each["valid_from"] or FIRST, reverse=True)
        elif same["date"] is None:  # of a line before
            same |= whole
            new[:] = [whole if _key(each) == same["key"] else each for each in new]
        else:
            counts["corrected"] += 1
            replaced.setdefault(same["date"], {})[same["key"]] = whole
            same |= whole
    _write(replaced, new, today, file.name)
    places = sorted({row["jurisdiction"] for _, row in given if row.get("jurisdiction")} - set(NORMS_OF))
    notes = [f"jurisdiction {', '.join(places)}: no limits are known, voltages are not judged"] if places else []
    return Corrected(**counts, notes=notes)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["meter_id"], row["valid_from"], row["usage_point_id"]


def _write(
    replaced: dict[date, dict[tuple[Any, ...], dict[str, Any]]], new: list[dict[str, Any]], today: date, source: str
) -> None:
    """Puts rows of the registry right and adds new ones, in one commit.

    Args:
        replaced: day of the table → key of a row → the row as it shall be.
        new: rows that the registry has not.
        today: their day.
        source: name of the file that they come of.
    """
    days = sorted({*replaced, *([today] if new else [])})
    kept = Lake().polars("registry", days).collect()
    schema, parts = polars_schema(REGISTERED), []
    for day in days:
        before = kept.filter(pl.col("date") == day).drop("date")
        right = replaced.get(day, {})
        by = {"registered_by": f"{BY_IMPORT} {source}"}
        rows = [
            {**row, **right[_key(row)], **by} if _key(row) in right else row for row in before.iter_rows(named=True)
        ]
        rows += [{**row, **by} for row in new] if day == today else []
        parts.append(put_part("registry", pl.DataFrame(rows, schema=schema), "import", day.isoformat()))
    Writer().replace("registry", parts, Commit(f"registry-import-{uuid.uuid4()}", 0))


def _rows(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """Line and fields of each row, of those that are not empty.

    Raises:
        ConfigError: see `correct`.
    """
    header, lines = lines_of(file)
    unknown = sorted(set(header) - set(ROWS))
    if unknown or "meter_id" not in header or len(set(header)) < len(header):
        wrong = f"no such column: {', '.join(unknown)}" if unknown else f"the header is {','.join(header)!r}"
        msg = f"{file}:1: {wrong}; expected meter_id and others of {', '.join(ROWS)}, each once"
        raise ConfigError(msg)
    problems: list[str] = []
    rows: list[tuple[int, dict[str, Any]]] = []
    seen: dict[tuple[Any, Any], int] = {}
    for number, fields in lines:
        if len(fields) != len(header):
            problems.append(f"{file}:{number}: {len(fields)} fields, expected {len(header)}")
            continue
        row: dict[str, Any] = {}
        for name, text in zip(header, fields, strict=True):
            try:
                if text:
                    row[name] = None if text == UNKNOWN and name != "meter_id" else _value(name, text)
            except (ValueError, OverflowError):
                problems.append(f"{file}:{number}: {name} is {text!r}, expected {_expected(name)}")
        if not row.get("meter_id"):
            problems += [] if fields[header.index("meter_id")] else [f"{file}:{number}: meter_id is empty"]
            continue
        key = row["meter_id"], row.get("valid_from")
        if key in seen:
            problems.append(f"{file}:{number}: {row['meter_id']} has a row in line {seen[key]} already")
        seen.setdefault(key, number)
        rows.append((number, row))
    refused(problems if problems or rows else [f"{file} has no row below its header"])
    return rows


def lines_of(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header of a CSV, and number and fields of each line below it that is not empty.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        lines = list(csv.reader(file.read_text(encoding="utf-8-sig").splitlines(), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        msg = f"cannot read {file}: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(msg) from error
    stripped = [[field.strip() for field in fields] for fields in lines]
    return (stripped[0] if stripped else []), [each for each in enumerate(stripped[1:], 2) if any(each[1])]


def refused(problems: Iterable[str]) -> None:
    """Refuses a file that has problems.

    Raises:
        ConfigError: there are some; it names the first.
    """
    found = list(problems)
    if found:
        more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise ConfigError("; ".join(found[:NAMED]) + more)


def _expected(name: str) -> str:
    """What a field may be, in words."""
    kind = REGISTRY.field(name).type
    words = {
        "meter_id": "1 to 64 letters, digits, _ and -",
        "phases": f"some of {','.join(PHASES)}, in this order",
        "time_zone": "an IANA time zone such as Europe/Amsterdam",
        **{name: f"a whole number of {LEAST.get(name, 1):,} to {most:,}" for name, most in MOST.items()},
    }
    if pa.types.is_timestamp(kind):
        return "a time with its offset, such as 2024-05-01T00:00:00+02:00"
    return words.get(name) or ("true or false" if kind == pa.bool_() else "a text")


def _value(name: str, text: str) -> Any:
    """A field's value; raises ValueError where it is none (`_expected`)."""
    kind = REGISTRY.field(name).type
    value: Any = text
    if pa.types.is_timestamp(kind):
        value = datetime.fromisoformat(text)
        is_right = value.tzinfo is not None
    elif kind == pa.bool_():
        is_right, value = text.lower() in ("true", "false"), text.lower() == "true"
    elif kind == pa.int64():
        value = int(text)
        is_right = text.isascii() and text.isdecimal() and LEAST.get(name, 1) <= value <= MOST[name]
    elif name == "phases":
        phases = [each.strip() for each in text.split(",")]
        is_right, value = phases == [each for each in PHASES if each in phases], ",".join(phases)
    else:
        is_right = (name != "meter_id" or bool(METER_ID.fullmatch(text))) and (
            name != "time_zone" or text in available_timezones()
        )
    if not is_right:
        raise ValueError
    return value.astimezone(UTC) if isinstance(value, datetime) else value


@app.callback()
def _registry() -> None:
    """What the registry knows of meters."""


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="CSV files, each with a header of the registry's columns.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per file on standard output.")] = False,
    table: Annotated[
        str, typer.Option(help=f"What the files are of: registry, or of communities: {', '.join(OF_COMMUNITIES)}.")
    ] = "registry",
) -> None:
    """Put right what the registry knows of meters, and add meters; or take what communities agreed on.

    A row names a meter and what is to be put right. An empty field stays as it was, null makes it unknown.

    For example, a meter in a net of 3 × 230 V without neutral, and one behind current transformers:

    meter_id,nominal_mv,phases,is_unlimited

    m1,133000,"L1,L3",

    m2,,,true

    .venv/bin/stack registry import meters.csv
    """
    console = Console(highlight=False)
    with exits():
        if table != "registry":
            _of_communities(files, table, as_json, console)
            return
        for file, done in _done(files):
            if as_json:
                typer.echo(json.dumps({"file": str(file), **done._asdict()}))
                continue
            line = f"{file}: {done.corrected:,} corrected, {done.dated:,} dated, {done.added:,} added"
            console.print(line, markup=False, soft_wrap=True)
            for note in done.notes:
                console.print(f"  {note}", markup=False, soft_wrap=True)


def _of_communities(files: list[Path], table: str, as_json: bool, console: Console) -> None:
    from stack.communities import take

    if table not in OF_COMMUNITIES:
        msg = f"--table is registry, {', '.join(OF_COMMUNITIES)}; not {table}"
        raise ConfigError(msg)
    for file in files:
        done = take(file, table)
        if as_json:
            typer.echo(json.dumps({"file": str(file), **done._asdict()}))
        else:
            line = f"{file}: {done.added:,} added, {done.replaced:,} replaced"
            console.print(line, markup=False, soft_wrap=True)


def _done(files: list[Path]) -> Iterator[tuple[Path, Corrected]]:
    for file in files:
        _rows(file)  # all are right before one is taken
    for file in files:
        yield file, correct(file, datetime.now(UTC).date())
