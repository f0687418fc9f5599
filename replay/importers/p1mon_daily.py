"""P1-monitor day rows as CSV: the registers at the end of each local day."""

from datetime import time
from pathlib import Path

import polars as pl

from replay.importers import p1mon
from replay.log import Asked, Imported

FILES = ("*day*.csv", "*day*.csv.gz")
ZONE = p1mon.ZONE


def read(path: Path, asked: Asked) -> Imported:
    """The readings of a P1-monitor export of days.

    A row stamped with a day's 00:00 holds what the meter showed when that day was over (the minute rows of the same
    meter say so), so it is read at the next local midnight.

    Raises:
        BadLog: a row that does not fit, or is not stamped with a day's 00:00.
    """
    log, readings = p1mon.wall_readings(path, asked, "p1mon-daily")
    is_day = pl.col("observed_at").dt.time() == time()
    for line, at in readings.filter(~is_day).select("line", "observed_at").iter_rows():
        log.refuse(line, f"{at} is not the 00:00 of a day: rows of minutes are of format p1mon")
    readings = readings.filter(is_day)
    return log.close(log.utc(readings.with_columns(pl.col("observed_at") + pl.duration(days=1))))
