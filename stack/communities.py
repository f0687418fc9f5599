"""What communities agreed on, taken from a CSV: `stack registry import --table communities` and its companions.

A row is dated. One of the same and the same `valid_from` as a row that is there replaces it, any other is added; so a
row is ended by giving it again with a `valid_to`. Either all rows of a file are taken or none, and only such as leave
what all communities agreed on right: keys and percentages add up to the whole at most at any time.
"""

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import available_timezones

import polars as pl
import pyarrow as pa

from lake.reading import Lake, all_registered
from lake.tables import Commit, Writer, put_part
from metering.sharing.settlement import ALL_PCT, KEY, PPM, of_hour, valid
from schemas.closed_lists import EnergyFlow, SharingModel, SharingSide
from schemas.errors import ConfigError
from schemas.tables import OF_COMMUNITIES, TARIFFS, polars_schema
from schemas.topics import METER_ID
from stack.registry import lines_of, refused

SAME = {
    "communities": ("community_id",),
    "community_members": ("community_id", "meter_id"),
    "community_keys": ("community_id", "meter_id", "producer_id", "round", "hour"),
    "community_prices": ("community_id", "flow", "tariff"),
}
"""Columns in which rows of the same are equal."""
NEEDED = {
    "communities": ("community_id", "model", "time_zone"),
    "community_members": ("community_id", "meter_id"),
    "community_keys": ("community_id",),
    "community_prices": ("community_id", "flow", "price_micro_per_kwh"),
}
METERS = ("meter_id", "producer_id")
WORDS = {"model": SharingModel, "consumption_side": SharingSide, "production_side": SharingSide, "flow": EnergyFlow}
NUMBERS = {
    "factor_pct": (1, ALL_PCT),
    "round": (1, 99),
    "tier": (1, 99),
    "hour": (0, 23),
    "key_ppm": (0, PPM),
    "tariff": (TARIFFS.start, TARIFFS.stop - 1),
    "price_micro_per_kwh": (-(10**9), 10**9),
}
"""The least and the most; a price may be below 0."""
CURRENCY = re.compile(r"[A-Z]{3}")
MOST_COMMUNITIES = 5
"""Of one meter at a time, as Austria has it."""
WHOLE = "1970-01-01"
"""Day of the one file that each of these tables is: it is small, and replaced as a whole."""
ALWAYS = datetime(1, 1, 1, tzinfo=UTC)
Row = dict[str, Any]


class Taken(NamedTuple):
    """What `take` returns.

    Attributes:
        added: rows that the table had not.
        replaced: rows that it had.
    """

    added: int
    replaced: int


def take(file: Path, table: str) -> Taken:
    """Takes the rows of a CSV into a table of communities.

    Args:
        file: with a header of columns of `schemas.tables.OF_COMMUNITIES`.
        table: which of them.

    Raises:
        ConfigError: a field is wrong: file, line, column, found, expected; nothing was taken.
    """
    given = _rows(file, table)
    known: dict[tuple[Any, ...], Row] = {}
    for row in Lake().polars(table).drop("date").collect().iter_rows(named=True):
        known[_key(row, table)] = row
    before = set(known)
    known |= {_key(row, table): row for _, row in given}
    lines = {_key(row, table): number for number, row in given}
    refused([f"{file}:{lines[_key(row, table)]}: {words}" for row, words in _unfit(table, known, lines)])
    rows = pl.DataFrame(list(known.values()), schema=polars_schema(OF_COMMUNITIES[table]))
    Writer().replace(table, [put_part(table, rows, "import", WHOLE)], Commit(f"import-{uuid.uuid4()}", 0))
    return Taken(len(set(known) - before), len(before & set(lines)))


def _key(row: Row, table: str) -> tuple[Any, ...]:
    return tuple(row[name] for name in (*SAME[table], "valid_from"))


def _rows(file: Path, table: str) -> list[tuple[int, Row]]:
    """Line and fields of each row.

    Raises:
        ConfigError: see `take`.
    """
    schema, needed = OF_COMMUNITIES[table], NEEDED[table]
    header, lines = lines_of(file)
    unknown = sorted(set(header) - set(schema.names))
    if unknown or set(needed) - set(header) or len(set(header)) < len(header):
        wrong = f"no such column: {', '.join(unknown)}" if unknown else f"the header is {','.join(header)!r}"
        msg = f"{file}:1: {wrong}; expected {', '.join(needed)} and others of {', '.join(schema.names)}, each once"
        raise ConfigError(msg)
    problems: list[str] = []
    rows: list[tuple[int, Row]] = []
    seen: dict[tuple[Any, ...], int] = {}
    for number, fields in lines:
        if len(fields) != len(header):
            problems.append(f"{file}:{number}: {len(fields)} fields, expected {len(header)}")
            continue
        row: Row = dict.fromkeys(schema.names) | {name: 1 for name in ("round", "tier") if name in schema.names}
        wrong_fields = []
        for name, text in zip(header, fields, strict=True):
            try:
                row |= {name: _value(schema.field(name), text)} if text else {}
            except (ValueError, OverflowError):
                wrong_fields.append(f"{file}:{number}: {name} is {text!r}, expected {_expected(schema.field(name))}")
        wrong_fields += [f"{file}:{number}: {name} is empty" for name in needed if not fields[header.index(name)]]
        if not wrong_fields and _key(row, table) in seen:
            wrong_fields.append(f"{file}:{number}: the same as line {seen[_key(row, table)]}")
        seen.setdefault(_key(row, table), number)
        if row["valid_from"] and row["valid_to"] and row["valid_to"] <= row["valid_from"]:
            wrong_fields.append(f"{file}:{number}: valid_to is not after valid_from")
        problems += wrong_fields
        rows.append((number, row))
    refused(problems if problems or rows else [f"{file} has no row below its header"])
    named = {row[name] for _, row in rows for name in METERS if row.get(name)}
    meters = set(all_registered(pl.Series("meter_id", sorted(named), pl.String))["meter_id"]) if named else set()
    refused(
        f"{file}:{number}: {name} is {row[name]!r}, expected a meter of the registry"
        for number, row in rows
        for name in METERS
        if row.get(name) and row[name] not in meters
    )
    if table != "communities":
        communities = set(Lake().polars("communities").select("community_id").collect()["community_id"])
        refused(
            f"{file}:{number}: community_id is {row['community_id']!r}, expected one of table communities"
            for number, row in rows
            if row["community_id"] not in communities
        )
    return rows


def _value(field: pa.Field, text: str) -> Any:
    """A field's value; raises ValueError where it is none (`_expected`)."""
    value: Any = text
    if pa.types.is_timestamp(field.type):
        value = datetime.fromisoformat(text)
        is_right = value.tzinfo is not None
    elif field.name in NUMBERS:
        least, most = NUMBERS[field.name]
        value = int(text)
        is_right = text.isascii() and least <= value <= most
    elif field.name in WORDS:
        value, is_right = WORDS[field.name](text).value, True
    elif field.name == "time_zone":
        is_right = text in available_timezones()
    else:
        is_right = bool((CURRENCY if field.name == "currency" else METER_ID).fullmatch(text))
    if not is_right:
        raise ValueError
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def _expected(field: pa.Field) -> str:
    """What a field may be, in words."""
    if pa.types.is_timestamp(field.type):
        return "a time with its offset, such as 2024-05-01T00:00:00+02:00"
    if field.name in NUMBERS:
        least, most = NUMBERS[field.name]
        return f"a whole number of {least:,} to {most:,}"
    if field.name in WORDS:
        return f"one of {', '.join(WORDS[field.name])}"
    words = {"time_zone": "an IANA time zone such as Europe/Amsterdam", "currency": "three letters such as EUR"}
    return words.get(field.name, "1 to 64 letters, digits, _ and -")


def _unfit(table: str, known: dict[tuple[Any, ...], Row], mine: Iterable[tuple[Any, ...]]) -> Iterable[tuple[Row, str]]:
    """Given rows that are part of more than there is at some time, and of how much.

    Args:
        table: which.
        known: all its rows as they would be.
        mine: keys of those that were given.
    """
    if table not in ("community_members", "community_keys"):
        return
    is_keys = table == "community_keys"
    of_whole, same = ("community_id", KEY) if is_keys else ("meter_id", ("community_id",))
    given: dict[Any, list[Row]] = {}
    for key in mine:
        given.setdefault(known[key][of_whole], []).append(known[key])
    groups: dict[Any, list[Row]] = {}
    for row in known.values():
        groups.setdefault(row[of_whole], []).append(row)
    for name, rows in given.items():
        ends = {row["valid_to"] for row in groups[name] if row["valid_to"]}  # then an older row may count again
        for at in sorted({row["valid_from"] or ALWAYS for row in groups[name]} | ends):
            now = valid(groups[name], at, same)
            words = _too_much_of_keys(now) if is_keys else _too_much_of_a_meter(now)
            blamed = [row for row in rows if any(row is each for each in now)]
            if words:
                yield (blamed or rows)[-1], words + ("" if at == ALWAYS else f" from {at.isoformat()}")
                break


def _too_much_of_a_meter(now: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with the communities that a meter is in at a time."""
    total = sum(row["factor_pct"] or ALL_PCT for row in now)
    if total > ALL_PCT:
        return f"factor_pct of the meter adds up to {total}, expected {ALL_PCT} at most"
    few = len(now) <= MOST_COMMUNITIES
    return None if few else f"the meter is in {len(now)} communities, expected {MOST_COMMUNITIES} at most"


def _too_much_of_keys(now: Sequence[Mapping[str, Any]]) -> str | None:
    """Which keys add up to more than the whole at a time and hour: a round's, the rounds', the production points'."""
    for hour in {None, *(row["hour"] for row in now)}:
        keys = of_hour(now, hour)
        wholes = {
            "of the rounds": [row for row in keys if row["meter_id"] is None and row["producer_id"] is None],
            "of the production points": [row for row in keys if row["meter_id"] is None and row["producer_id"]],
        }
        members = [row for row in keys if row["meter_id"]]
        for number in {row["round"] for row in members}:
            for producer in {None, *(row["producer_id"] for row in members)}:
                wholes[f"of round {number}" + (f" and {producer}" if producer else "")] = [
                    row for row in members if row["round"] == number and row["producer_id"] in (None, producer)
                ]
        for whose, parts in wholes.items():
            total = sum(row["key_ppm"] or 0 for row in parts)
            if total > PPM:
                when = "" if hour is None else f" in hour {hour}"
                return f"key_ppm {whose} adds up to {total:,}{when}, expected {PPM:,} at most"
    return None
