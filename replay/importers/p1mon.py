"""P1-monitor minute (or day) rows as CSV: local wall time without offset, cumulative kWh, mean kW."""

import csv
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from replay.importers import Defect, Imported, Log, exact

COLUMNS = {
    "VERBR_KWH_181": ("import_t1_wh", 1000),
    "VERBR_KWH_182": ("import_t2_wh", 1000),
    "GELVR_KWH_281": ("export_t1_wh", 1000),
    "GELVR_KWH_282": ("export_t2_wh", 1000),
    "ACT_VERBR_KW_170": ("import_w", 1000),
    "ACT_GELVR_KW_270": ("export_w", 1000),
}
TARIFFS = {"D": 1, "P": 2, "": None}
"""Dal (low) and piek (peak), in the Dutch order."""


def read(path: Path, *, meter_id: str, timezone: str | None = None, keep_going: bool = False) -> Imported:
    """The readings of a P1-monitor export.

    The autumn hour that comes twice is told apart by the order of the rows: where the clock steps back within it, the
    second pass begins. Where it does not, the rows are taken as the first pass and counted as ambiguous.

    Raises:
        BadLog: a row that does not fit.
    """
    log = Log(path, meter_id=meter_id, timezone=timezone or "Europe/Amsterdam", keep_going=keep_going)
    table = csv.DictReader(io.StringIO(log.text()))
    missing = sorted({"TIMESTAMP", "VERBR_KWH_181"} - set(table.fieldnames or ()))
    if missing:
        raise log.bad(1, f"no column {', '.join(missing)}")
    rows: list[dict[str, Any]] = []
    for line in table:
        log.rows_in += 1
        try:
            rows.append(_row(line))
        except (ValueError, KeyError, TypeError) as error:
            log.refuse(table.line_num, f"{type(error).__name__}: {error}")
    _to_utc(rows, log)
    return log.close(rows)


def _row(line: dict[str, str]) -> dict[str, Any]:
    if None in line or None in line.values():
        msg = "more or fewer fields than the header"
        raise ValueError(msg)
    row: dict[str, Any] = {
        # wall time: the zone is found out over all rows
        "observed_at": datetime.strptime(line["TIMESTAMP"], "%Y-%m-%d %H:%M:%S"),  # noqa: DTZ007
        "dialect": "p1mon",
        "tariff": TARIFFS[line.get("TARIEFCODE", "").strip()],
    }
    for column, (field, factor) in COLUMNS.items():
        row[field] = exact(line.get(column), factor)
        if (row[field] or 0) < 0:
            msg = f"{column} is negative: {line[column]}"
            raise ValueError(msg)
    return row


def _to_utc(rows: list[dict[str, Any]], log: Log) -> None:
    """Each row's wall time → UTC."""
    repeated: list[dict[str, Any]] = []  # rows of one repeated hour so far, in order
    for row in rows:
        wall = row["observed_at"]
        offsets = [wall.replace(tzinfo=log.zone, fold=fold).utcoffset() for fold in (0, 1)]
        if offsets[0] > offsets[1]:
            repeated.append(row)
            continue
        _settle(repeated, log)
        if offsets[0] < offsets[1]:  # skipped in spring: no clock that follows the zone can say it
            log.defects[Defect.NONEXISTENT_LOCAL_TIME] += 1
        row["observed_at"] = wall.replace(tzinfo=log.zone).astimezone(UTC)
    _settle(repeated, log)


def _settle(repeated: list[dict[str, Any]], log: Log) -> None:
    second = False
    previous = None
    for row in repeated:
        wall = row["observed_at"]
        second = second or (previous is not None and wall < previous)
        previous = wall
        row["observed_at"] = wall.replace(tzinfo=log.zone, fold=int(second)).astimezone(UTC)
    if not second:
        log.defects[Defect.AMBIGUOUS_LOCAL_TIME] += len(repeated)
    repeated.clear()
