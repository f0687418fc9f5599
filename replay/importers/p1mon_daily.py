"""P1-monitor day rows as CSV: the registers at the end of each local day."""

from datetime import datetime, timedelta
from pathlib import Path

from replay.importers import Imported
from replay.importers.p1mon import rows_of

FILES = ("*day*.csv", "*day*.csv.gz")


def read(
    path: Path,
    *,
    meter_id: str,
    timezone: str | None = None,
    keep_going: bool = False,
    first_at: datetime | None = None,
) -> Imported:
    """The readings of a P1-monitor export of days.

    A row stamped with a day's 00:00 holds what the meter showed when that day was over (the minute rows of the same
    meter say so), so it is read at the next local midnight.

    Raises:
        BadLog: a row that does not fit.
    """
    log, rows = rows_of(path, meter_id, timezone, keep_going, "p1mon-daily")
    ends = log.utc([row["observed_at"] + timedelta(days=1) for row in rows])
    for row, stamp in zip(rows, ends, strict=True):
        row["observed_at"] = stamp
    return log.close(rows)
