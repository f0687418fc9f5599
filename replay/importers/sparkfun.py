"""The public stream's export, JSON or CSV, newest row first: p1, p2, t181 … t282, ti, timestamp of the server."""

import csv
import io
import json
from datetime import MAXYEAR, MINYEAR, UTC, datetime
from pathlib import Path
from typing import Any

from replay.fields import MAX_EXACT, exact
from replay.log import Asked, Imported, Log, as_frame, fields_of

FILES = ("*.json", "*.json.gz", "*.csv", "*.csv.gz")
ZONE = "Europe/Amsterdam"
COLUMNS = {
    "t181": ("import_t1_wh", 1000),
    "t182": ("import_t2_wh", 1000),
    "t281": ("export_t1_wh", 1000),
    "t282": ("export_t2_wh", 1000),
    "p1": ("import_w", 1000),
    "p2": ("export_w", 1000),
    "ti": ("tariff", 1),
}


def read(path: Path, asked: Asked) -> Imported:
    """The readings of an export, turned oldest first.

    The stamps are the server's arrival times in UTC, so steps are not whole; the time zone is for the reports only.
    The switch position and a column of unknown name say nothing that can be relied on and are left out.

    Raises:
        BadLog: a row that does not fit.
    """
    log = Log(path, asked, ZONE)
    rows = []
    for number, line in _lines(log):
        log.rows_in += 1
        try:
            rows.append(_row(line))
        except ValueError as error:
            log.refuse(number, str(error))
    if rows and rows[0]["observed_at"] > rows[-1]["observed_at"]:
        rows.reverse()
    return log.close(as_frame(rows))


def _lines(log: Log) -> list[tuple[int, Any]]:
    """(line number, or number of the object in JSON; columns, or what is wrong) of each row."""
    text = log.text()
    if text.lstrip()[:1] not in ("[", "{"):
        lines = fields_of(io.StringIO(text, newline=""))
        _, header = next(lines, (1, []))
        return [(number, _columns(header, fields)) for number, fields in lines if fields]
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise log.bad(error.lineno, f"not JSON: {error.msg}") from error
    if not isinstance(found, list):
        raise log.bad(1, "JSON that is no list of rows")
    return list(enumerate(found, 1))


def _columns(header: list[str] | csv.Error, fields: list[str] | csv.Error) -> dict[str, str] | csv.Error:
    if isinstance(header, csv.Error) or isinstance(fields, csv.Error):
        return fields if isinstance(fields, csv.Error) else {}
    return dict(zip(header, fields, strict=False))


def _row(line: Any) -> dict[str, Any]:
    if not isinstance(line, dict):
        raise ValueError(str(line) if isinstance(line, csv.Error) else f"not a row with names: {line!r:.80}")
    if missing := [name for name in ("timestamp", *COLUMNS) if name not in line]:
        msg = f"{missing[0]} is missing"
        raise ValueError(msg)
    try:
        stamp = datetime.fromisoformat(str(line["timestamp"]))
    except ValueError:
        stamp = None
    if stamp is None or stamp.tzinfo is None or stamp.year in (MINYEAR, MAXYEAR):
        msg = f"timestamp: {line['timestamp']!r}, expected ISO 8601 with an offset"
        raise ValueError(msg)
    row: dict[str, Any] = {"observed_at": stamp.astimezone(UTC), "dialect": "sparkfun"}
    for column, (field, factor) in COLUMNS.items():
        text = line[column]
        try:
            row[field] = exact(text if text is None else str(text), factor)
        except ValueError as error:
            msg = f"{column}: {error}"
            raise ValueError(msg) from error
        if not 0 <= (row[field] or 0) < MAX_EXACT:
            msg = f"{column} is {'too much' if row[field] > 0 else 'negative'}: {text}"
            raise ValueError(msg)
    return row
