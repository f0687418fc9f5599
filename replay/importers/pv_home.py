"""A home with panels and a battery by its inverter's export: grid volts, amperes, watts, totals in 0.1 kWh, UTC."""

from pathlib import Path

import polars as pl

from replay.fields import number, stamp
from replay.log import Asked, Imported, Log

FILES = ("*.csv", "*.csv.gz")
ZONE = "Europe/London"
FIELDS = {
    "observed_at": stamp("time", "%Y-%m-%dT%H:%M:%S%.fZ"),
    "voltage_l1_mv": number("power.grid.voltage", 1000),
    "current_l1_ma": number("power.grid.current", 1000),
    "export_w": number("power.grid.power", 1, is_signed=True),
    "import_t1_wh": number("total.grid.import", 1000),
    "export_t1_wh": number("total.grid.export", 1000),
}


def read(path: Path, asked: Asked) -> Imported:
    """The readings at the grid's connection; the inverter's own side is left out.

    Power is positive while the home exports. The totals count in steps of 100 Wh.

    Raises:
        BadLog: a row that does not fit.
    """
    log = Log(path, asked, ZONE)
    rows = log.parsed(log.table([field.column for field in FIELDS.values()]), **FIELDS)
    export_w = pl.col("export_w")
    return log.close(
        rows.with_columns(
            pl.col("observed_at").dt.replace_time_zone("UTC"),
            import_w=(-export_w).clip(0),
            export_w=export_w.clip(0),
            dialect=pl.lit("pv-home"),
        )
    )
