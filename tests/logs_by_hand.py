"""Logs that tests read: real ones of METER_LOGS where it is set, our own otherwise, and lines written by hand."""

import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from replay.importers import formats
from replay.log import Asked, Imported

OWN = Path(__file__).parent / "logs"
LOGS = Path(os.environ.get("METER_LOGS") or OWN)
UCI = "Date;Time;Global_active_power;Global_reactive_power;Voltage;Global_intensity;S1;S2;S3\n"
PV = "time,power.grid.voltage,power.grid.current,power.grid.power,total.grid.import,total.grid.export\n"
LONDON = "LCLid,tstp,energy(kWh/hh)\n"


def nem12(*records: str) -> str:
    return "".join(f"{record}\n" for record in ("100,NEM12,200405011135,MDA1,Ret1", *records, "900"))


def read(path: Path, format: str, **options: Any) -> Imported:
    imported: Imported = formats()[format].read(path, Asked(**{"meter_id": "m1", **options}))
    return imported


def log(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def column(imported: Imported, name: str) -> list[Any]:
    values: list[Any] = imported.readings[name].to_pylist()
    return values


def minutes_after(imported: Imported, begin: datetime) -> list[float]:
    return [(stamp - begin) / timedelta(minutes=1) for stamp in column(imported, "observed_at")]
