"""The public stream's export, JSON or CSV, newest row first: p1, p2, t181 … t282, ti, timestamp of the server."""

import csv
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from replay.fields import exact
from replay.log import Asked, Imported, Log, as_frame

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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.refuse(number, f"{type(error).__name__}: {error}")
    if rows and rows[0]["observed_at"] > rows[-1]["observed_at"]:
        rows.reverse()
    return log.close(as_frame(rows))


def _lines(log: Log) -> list[tuple[int, Any]]:
    """(line number, or number of the object in JSON; columns) of each row."""
    text = log.text()
    if not text.lstrip().startswith("["):
        table = csv.DictReader(io.StringIO(text))
        return [(table.line_num, line) for line in table]
    try:
        return list(enumerate(json.loads(text), 1))
    except json.JSONDecodeError as error:
        raise log.bad(error.lineno, f"not JSON: {error.msg}") from error


def _row(line: dict[str, str]) -> dict[str, Any]:
    stamp = datetime.fromisoformat(line["timestamp"])
    if stamp.tzinfo is None:
        msg = f"timestamp without offset: {line['timestamp']}"
        raise ValueError(msg)
    row: dict[str, Any] = {"observed_at": stamp.astimezone(UTC), "dialect": "sparkfun"}
    for column, (field, factor) in COLUMNS.items():
        row[field] = exact(line[column], factor)
        if (row[field] or 0) < 0:
            msg = f"{column} is negative: {line[column]}"
            raise ValueError(msg)
    return row
