"""The UCI household log: a minute's mean power, volts and amperes, local time, `;` between fields."""

from pathlib import Path

import polars as pl

from replay.fields import energy, number, stamp, summed
from replay.log import Asked, Defect, Imported, Log

FILES = ("*.txt", "*.txt.gz")
ZONE = "Europe/Paris"
MILLIWATT_MINUTES_PER_WH = 60_000
MEASURED = {
    "import_w": number("Global_active_power", 1000),
    "voltage_l1_mv": number("Voltage", 1000),
    "current_l1_ma": number("Global_intensity", 1000),
}


def read(path: Path, asked: Asked) -> Imported:
    """The readings of the log, with a register that is summed from the minutes' mean power.

    A row's minute is taken to end at its stamp. The log has no register: it begins at 0 a minute before the first row,
    and a minute that is missing (no row, or `?` in its fields) adds nothing to it. Reactive power and sub-meters have
    no place in a reading and are left out.

    Raises:
        BadLog: a row that does not fit.
    """
    log = Log(path, asked, ZONE)
    columns = ["Date", "Time", "Global_active_power", "Voltage", "Global_intensity"]
    table = log.table(columns, delimiter=";", blanks=["?"])
    measured = table.filter(pl.col("Global_active_power") != "")
    log.defects[Defect.EMPTY_FIELDS] += len(table) - len(measured)
    measured = measured.with_columns(stamp=pl.concat_str("Date", "Time", separator=" "))
    minutes = log.parsed(
        measured,
        observed_at=stamp("stamp", "%d/%m/%Y %H:%M:%S"),
        energy=energy("Global_active_power", 10**6),
        **MEASURED,
    )
    minutes = log.utc(minutes.with_columns(meter_id=pl.lit(asked.meter_id), import_l1_w="import_w"))
    minutes = minutes.with_columns(begun_at=pl.col("observed_at") - pl.duration(minutes=1))
    readings = summed(minutes, "import_t1_wh", MILLIWATT_MINUTES_PER_WH)
    return log.close(readings.with_columns(dialect=pl.lit("uci-household")))
