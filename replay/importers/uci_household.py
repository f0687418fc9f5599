"""The UCI household log: a minute's mean power, volts and amperes, local time, `;` between fields."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from replay.importers import Defect, Imported, Log, Register, exact, positive

FILES = ("*.txt", "*.txt.gz")
MINUTE = timedelta(minutes=1)
MEASURED = {
    "import_w": ("Global_active_power", 1000),
    "voltage_l1_mv": ("Voltage", 1000),
    "current_l1_ma": ("Global_intensity", 1000),
}


def read(
    path: Path,
    *,
    meter_id: str,
    timezone: str | None = None,
    keep_going: bool = False,
    first_at: datetime | None = None,
) -> Imported:
    """The readings of the log, with a register that is summed from the minutes' mean power.

    A row's minute is taken to end at its stamp. The log has no register: it begins at 0 a minute before the first row,
    and a minute that is missing (no row, or `?` in its fields) adds nothing to it.

    Raises:
        BadLog: a row that does not fit.
    """
    log = Log(path, meter_id=meter_id, timezone=timezone or "Europe/Paris", keep_going=keep_going)
    rows: list[dict[str, Any]] = []
    register = Register()
    for line, fields in log.table(["Date", "Time", "Global_active_power", "Voltage", "Global_intensity"], ";"):
        if "?" in fields["Global_active_power"]:
            log.defects[Defect.EMPTY_FIELDS] += 1
            continue
        try:
            stamp = datetime.strptime(f"{fields['Date']} {fields['Time']}", "%d/%m/%Y %H:%M:%S")  # noqa: DTZ007
            measured = {name: positive(fields[column], factor) for name, (column, factor) in MEASURED.items()}
            micro_wh = (exact(fields["Global_active_power"], 10**9) or 0) // 60
        except ValueError as error:
            log.refuse(line, str(error))
            continue
        if not rows:
            rows.append(
                {
                    "observed_at": stamp - MINUTE,
                    "dialect": "uci-household",
                    "import_t1_wh": 0,
                    **dict.fromkeys(measured),
                }
            )
        rows.append(
            {"observed_at": stamp, "dialect": "uci-household", "import_t1_wh": register.add(micro_wh), **measured}
        )
    for row, stamp in zip(rows, log.utc([row["observed_at"] for row in rows]), strict=True):
        row["observed_at"] = stamp
        row["import_l1_w"] = row["import_w"]
    return log.close(rows)
