"""P1-monitor day rows as CSV: the registers at the end of each local day."""

from pathlib import Path

import polars as pl

from replay.importers import Asked, Imported
from replay.importers.p1mon import wall_readings

FILES = ("*day*.csv", "*day*.csv.gz")


def read(path: Path, asked: Asked) -> Imported:
    """The readings of a P1-monitor export of days.

    A row stamped with a day's 00:00 holds what the meter showed when that day was over (the minute rows of the same
    meter say so), so it is read at the next local midnight.

    Raises:
        BadLog: a row that does not fit.
    """
    log, readings = wall_readings(path, asked, "p1mon-daily")
    return log.close(log.utc(readings.with_columns(pl.col("observed_at") + pl.duration(days=1))))
