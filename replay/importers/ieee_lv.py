"""The IEEE European low-voltage feeder: one-day profiles of its single-phase homes, a minute a row, kW."""

import re
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from replay.fields import energy, number, summed
from replay.log import Asked, Defect, Imported, Log, as_frame
from schemas.errors import ConfigError

FILES = ("Loads.txt",)
ZONE = "Europe/London"
PROFILES = ("load_profiles_1min_*.csv", "load_profiles_1min_*.csv.gz")
LOAD = re.compile(r"New Load\.(\w+) .*\bBus1=(\d+)\.(\d)\b.*\bkW=1\b.*\bYearly=Shape_(\d+)")
"""Name, bus, phase and profile of a load whose profile is its kW as it stands."""
FIRST_DAY = datetime(2016, 6, 15)  # noqa: DTZ001  the profiles have no date; a Wednesday in summer
MILLIWATT_MINUTES_PER_WH = 60_000
HEADER_LINES = 1
GRID = {"transformer_id": "TR1", "feeder_id": "TR1-F1", "community_id": "TR1", "phases": "L1"}


def read(path: Path, asked: Asked) -> Imported:
    """The meters of the feeder's homes: power, and a register that is summed from it; no voltage.

    The log is `Loads.txt`; the profiles lie beside it. They have no date: `first_at`, by default 2016-06-15 00:00
    local time, is the begin of their first minute. A meter calls its only phase L1; its bus and the feeder's phase
    stand in usage_point_id.

    Raises:
        BadLog: a line that does not fit.
        ConfigError: no profiles beside it.
    """
    log = Log(path, asked, ZONE)
    beside = sorted(found for pattern in PROFILES for found in path.parent.glob(pattern))
    if not beside:
        msg = f"{path}: no {PROFILES[0]} beside it"
        raise ConfigError(msg)
    homes = {}
    for line, text in enumerate(log.text().splitlines(), 1):
        if load := LOAD.search(text):
            homes[load[1]] = (f"bus-{load[2]}-phase-{load[3]}", f"p{load[4]}")
        elif text.strip():
            log.rows_in += 1
            log.refuse(line, "not a load of 1 kW with bus, phase and profile")
    if not homes:
        return log.close(as_frame([]))
    profiles = Log(beside[0], asked, log.zone.key)
    table = profiles.table(sorted({profile for _, profile in homes.values()}))
    log.rows_in += len(table) * len(homes) + profiles.rows_in - len(table)
    begin = asked.first_at or FIRST_DAY.replace(tzinfo=log.zone)
    minutes = pl.concat(
        profiles.parsed(table, energy=energy(column, 10**6), import_w=number(column, 1000)).with_columns(
            meter_id=pl.lit(meter_id)
        )
        for meter_id, (_, column) in homes.items()
    )
    begun_at = pl.lit(begin.astimezone(UTC)) + pl.duration(minutes=pl.col("line") - HEADER_LINES - 1)
    minutes = minutes.with_columns(begun_at=begun_at, observed_at=begun_at + pl.duration(minutes=1))
    minutes = minutes.with_columns(import_l1_w="import_w")
    log.defects += profiles.defects
    log.defects[Defect.NO_CLOCK] += len(minutes)
    log.refused += profiles.refused
    registry = pl.DataFrame(
        [(meter_id, place) for meter_id, (place, _) in homes.items()],
        schema=["meter_id", "usage_point_id"],
        orient="row",
    ).with_columns(**{name: pl.lit(value) for name, value in GRID.items()})
    readings = summed(minutes, "import_t1_wh", MILLIWATT_MINUTES_PER_WH)
    return log.close(readings.with_columns(dialect=pl.lit("ieee-lv")), registry)
