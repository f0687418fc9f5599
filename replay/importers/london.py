"""Low Carbon London: kWh per half hour, UTC; the dynamic tariff where its file lies beside the logs."""

from pathlib import Path

import polars as pl

from replay.fields import energy, meter, stamp, summed, word
from replay.log import Asked, Defect, Imported, Log

FILES = ("MAC*.csv", "MAC*.csv.gz")
ZONE = "Europe/London"
TARIFF_FILES = ("dtou_tariffs_*.csv", "dtou_tariffs_*.csv.gz")
TARIFFS = {"Normal": 1, "Low": 2, "High": 3}
HALF_HOUR = pl.duration(minutes=30)
TIME = "%Y-%m-%d %H:%M:%S%.f"
MICRO_WH_PER_WH = 10**6


def read(path: Path, asked: Asked) -> Imported:
    """The registers of the homes in a log, summed from their half hours.

    A stamp is the end of its half hour: records stop at 00:00, a day without any leaves out 00:30 to 00:00, and homes
    answer a change of the tariff from the next stamp on. The register begins at 0 with the first half hour, and one
    that is missing adds nothing. `tariff` is that of the half hour which has just ended; its file is in local time, as
    the homes' answers in summer show, and does not say which homes it is for. There is no power and no voltage in the
    log, and none is made up.

    Raises:
        BadLog: a row that does not fit.
    """
    log = Log(path, asked, ZONE)
    table = log.table(["LCLid", "tstp", "energy(kWh/hh)"], blanks=["Null"])
    measured = table.filter(pl.col("energy(kWh/hh)") != "")
    log.defects[Defect.EMPTY_FIELDS] += len(table) - len(measured)
    half_hours = log.parsed(
        measured, meter_id=meter("LCLid"), observed_at=stamp("tstp", TIME), energy=energy("energy(kWh/hh)", 10**9)
    )
    half_hours = half_hours.with_columns(pl.col("observed_at").dt.replace_time_zone("UTC"))
    half_hours = half_hours.with_columns(begun_at=pl.col("observed_at") - HALF_HOUR)
    local = pl.col("begun_at").dt.convert_time_zone("Europe/London").dt.replace_time_zone(None)
    half_hours = half_hours.with_columns(local_begin=local).join(
        _tariffs(path.parent), on="local_begin", how="left", maintain_order="left"
    )
    readings = summed(half_hours.drop("local_begin"), "import_t1_wh", MICRO_WH_PER_WH)
    return log.close(readings.with_columns(dialect=pl.lit("london")))


def _tariffs(folder: Path) -> pl.DataFrame:
    """local_begin of a half hour and its tariff, from the files beside the logs; empty where there is none."""
    tariffs = [pl.DataFrame(schema={"local_begin": pl.Datetime("us"), "tariff": pl.Int64})]
    for path in sorted(found for pattern in TARIFF_FILES for found in folder.glob(pattern)):
        log = Log(path, Asked("tariff"), "UTC")
        table = log.table(["TariffDateTime", "Tariff"])
        rows = log.parsed(table, local_begin=stamp("TariffDateTime", TIME), tariff=word("Tariff", TARIFFS))
        tariffs.append(rows.drop("line"))
    return pl.concat(tariffs).unique("local_begin", keep="first")
