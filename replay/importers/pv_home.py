"""A home with panels and a battery by its inverter's export: grid volts, amperes, watts, totals in 0.1 kWh, UTC."""

from datetime import datetime
from pathlib import Path
from typing import Any

from replay.importers import Imported, Log, exact, positive

FILES = ("*.csv", "*.csv.gz")
TOTALS = {"import_t1_wh": "total.grid.import", "export_t1_wh": "total.grid.export"}


def read(
    path: Path,
    *,
    meter_id: str,
    timezone: str | None = None,
    keep_going: bool = False,
    first_at: datetime | None = None,
) -> Imported:
    """The readings at the grid's connection; the inverter's own side is left out.

    Power is positive while the home exports. The totals count in steps of 100 Wh.

    Raises:
        BadLog: a row that does not fit.
    """
    log = Log(path, meter_id=meter_id, timezone=timezone or "Europe/London", keep_going=keep_going)
    rows: list[dict[str, Any]] = []
    needed = ["time", "power.grid.voltage", "power.grid.current", "power.grid.power", *TOTALS.values()]
    for line, fields in log.table(needed):
        try:
            export_w = exact(fields["power.grid.power"], 1)
            rows.append(
                {
                    "observed_at": datetime.fromisoformat(_with_offset(fields["time"])),
                    "dialect": "pv-home",
                    "voltage_l1_mv": positive(fields["power.grid.voltage"], 1000),
                    "current_l1_ma": positive(fields["power.grid.current"], 1000),
                    "import_w": None if export_w is None else max(-export_w, 0),
                    "export_w": None if export_w is None else max(export_w, 0),
                    **{name: positive(fields[column], 1000) for name, column in TOTALS.items()},
                }
            )
        except ValueError as error:
            log.refuse(line, str(error))
    return log.close(rows)


def _with_offset(stamp: str) -> str:
    if not stamp.endswith("Z"):
        msg = f"not a time in UTC: {stamp!r}"
        raise ValueError(msg)
    return stamp
