"""The IEEE European low-voltage feeder: one-day profiles of its single-phase homes, a minute a row, kW."""

import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl

from replay.importers import Imported, Log, Register, exact, positive
from schemas.errors import ConfigError

FILES = ("Loads.txt",)
PROFILES = ("load_profiles_1min_*.csv", "load_profiles_1min_*.csv.gz")
LOAD = re.compile(r"New Load\.(\w+) .*\bBus1=(\d+)\.(\d)\b.*\bYearly=Shape_(\d+)")
FIRST_DAY = datetime(2016, 6, 15)  # noqa: DTZ001  the profiles have no date; a Wednesday in summer
MINUTE = timedelta(minutes=1)


def read(
    path: Path,
    *,
    meter_id: str,
    timezone: str | None = None,
    keep_going: bool = False,
    first_at: datetime | None = None,
) -> Imported:
    """The meters of the feeder's homes: power, and a register that is summed from it; no voltage.

    The log is `Loads.txt`; the profiles lie beside it. They have no date: `first_at`, by default 2016-06-15 00:00
    local time, is the begin of their first minute. A meter calls its only phase L1; its bus and the feeder's phase
    stand in usage_point_id.

    Raises:
        BadLog: a line that does not fit.
        ConfigError: no profiles beside it.
    """
    log = Log(path, meter_id=meter_id, timezone=timezone or "Europe/London", keep_going=keep_going)
    begin = first_at or FIRST_DAY.replace(tzinfo=ZoneInfo(log.zone.key))
    beside = sorted(found for pattern in PROFILES for found in path.parent.glob(pattern))
    if not beside:
        msg = f"{path}: no {PROFILES[0]} beside it"
        raise ConfigError(msg)
    profiles = list(Log(beside[0], meter_id=meter_id, timezone="UTC", keep_going=False).table(["p1"]))
    rows: list[dict[str, Any]] = []
    homes: list[dict[str, str]] = []
    for number, text in enumerate(log.text().splitlines(), 1):
        if not text.strip():
            continue
        load = LOAD.search(text)
        if not load or f"p{load[4]}" not in profiles[0][1]:
            log.rows_in += 1
            log.refuse(number, "not a load with bus, phase and profile")
            continue
        homes.append({"meter_id": load[1], "usage_point_id": f"bus-{load[2]}-phase-{load[3]}"})
        rows += _minutes(log, load[1], f"p{load[4]}", profiles, begin)
    grid = {"transformer_id": "TR1", "feeder_id": "TR1-F1", "community_id": "TR1", "phases": "L1"}
    registry = pl.DataFrame(homes, schema=["meter_id", "usage_point_id"]).with_columns(
        **{name: pl.lit(value) for name, value in grid.items()}
    )
    return log.close(rows, registry)


def _minutes(
    log: Log, meter_id: str, profile: str, profiles: list[tuple[int, dict[str, str]]], begin: datetime
) -> list[dict[str, Any]]:
    register = Register()
    own = {"meter_id": meter_id, "dialect": "ieee-lv"}
    rows = [{**own, "observed_at": begin, "import_t1_wh": 0, "import_w": None, "import_l1_w": None}]
    for minute, (line, fields) in enumerate(profiles, 1):
        log.rows_in += 1
        try:
            power_w, micro_wh = positive(fields[profile], 1000), (exact(fields[profile], 10**9) or 0) // 60
        except ValueError as error:
            log.refuse(line, f"{profile}: {error}")
            continue
        at, wh = begin + minute * MINUTE, register.add(micro_wh)
        rows.append({**own, "observed_at": at, "import_t1_wh": wh, "import_w": power_w, "import_l1_w": power_w})
    return rows
