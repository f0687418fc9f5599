"""P1-monitor minute rows as CSV: local wall time without offset, cumulative kWh, mean kW."""

from pathlib import Path

import polars as pl

from replay.fields import number, stamp, word
from replay.log import Asked, Imported, Log

FILES = ("2*.csv", "2*.csv.gz", "*minutes*.csv", "*minutes*.csv.gz")
ZONE = "Europe/Amsterdam"
COLUMNS = {
    "VERBR_KWH_181": "import_t1_wh",
    "VERBR_KWH_182": "import_t2_wh",
    "GELVR_KWH_281": "export_t1_wh",
    "GELVR_KWH_282": "export_t2_wh",
    "ACT_VERBR_KW_170": "import_w",
    "ACT_GELVR_KW_270": "export_w",
}
TARIFFS = {"D": 1, "P": 2}
"""Dal (low) and piek (peak), in the Dutch order."""


def read(path: Path, asked: Asked) -> Imported:
    """The readings of a P1-monitor export of minutes.

    Raises:
        BadLog: a row that does not fit.
    """
    log, readings = wall_readings(path, asked, "p1mon")
    return log.close(log.utc(readings))


def wall_readings(path: Path, asked: Asked, dialect: str) -> tuple[Log, pl.DataFrame]:
    """Rows of an export; observed_at is the wall time that stands there."""
    log = Log(path, asked, ZONE)
    needed = ["TIMESTAMP", "VERBR_KWH_181"]
    table = log.table(needed, [*(name for name in COLUMNS if name not in needed), "TARIEFCODE"])
    measured = {name: number(column, 1000) for column, name in COLUMNS.items()}
    rows = log.parsed(
        table, observed_at=stamp("TIMESTAMP", "%Y-%m-%d %H:%M:%S"), tariff=word("TARIEFCODE", TARIFFS), **measured
    )
    return log, rows.with_columns(dialect=pl.lit(dialect))
