"""P1-monitor minute rows as CSV: local wall time without offset, cumulative kWh, mean kW."""

from datetime import datetime
from pathlib import Path
from typing import Any

from replay.importers import Imported, Log, positive

FILES = ("2*.csv", "2*.csv.gz", "*minutes*.csv", "*minutes*.csv.gz")
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


def read(
    path: Path,
    *,
    meter_id: str,
    timezone: str | None = None,
    keep_going: bool = False,
    first_at: datetime | None = None,
) -> Imported:
    """The readings of a P1-monitor export of minutes.

    Raises:
        BadLog: a row that does not fit.
    """
    log, rows = rows_of(path, meter_id, timezone, keep_going, "p1mon")
    for row, stamp in zip(rows, log.utc([row["observed_at"] for row in rows]), strict=True):
        row["observed_at"] = stamp
    return log.close(rows)


def rows_of(
    path: Path, meter_id: str, timezone: str | None, keep_going: bool, dialect: str
) -> tuple[Log, list[dict[str, Any]]]:
    """Rows of an export; observed_at is the wall time that stands there."""
    log = Log(path, meter_id=meter_id, timezone=timezone or "Europe/Amsterdam", keep_going=keep_going)
    rows = []
    for line, fields in log.table(["TIMESTAMP", "VERBR_KWH_181"]):
        try:
            rows.append(
                {
                    "observed_at": datetime.strptime(fields["TIMESTAMP"], "%Y-%m-%d %H:%M:%S"),  # noqa: DTZ007
                    "dialect": dialect,
                    "tariff": TARIFFS[fields.get("TARIEFCODE", "").strip()],
                    **{name: positive(fields.get(column), factor) for column, (name, factor) in COLUMNS.items()},
                }
            )
        except (ValueError, KeyError) as error:
            log.refuse(line, f"{type(error).__name__}: {error}")
    return log, rows
