"""Low Carbon London: kWh per half hour of one home a file, UTC; the dynamic tariff where its file lies beside it."""

from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from replay.importers import Defect, Imported, Log, Register, exact
from schemas.errors import BadLog

FILES = ("MAC*.csv", "MAC*.csv.gz")
TARIFF_FILES = ("dtou_tariffs_*.csv", "dtou_tariffs_*.csv.gz")
TARIFFS = {"Normal": 1, "Low": 2, "High": 3}
HALF_HOUR = timedelta(minutes=30)


def read(
    path: Path,
    *,
    meter_id: str,
    timezone: str | None = None,
    keep_going: bool = False,
    first_at: datetime | None = None,
) -> Imported:
    """The register of one home, summed from its half hours.

    A stamp is the begin of its half hour, so the register is read half an hour later; it begins at 0 with the first
    one, and a half hour that is missing adds nothing. `tariff` is that of the half hour which has just ended. There is
    no power and no voltage in the log, and none is made up.

    Raises:
        BadLog: a row that does not fit.
    """
    log = Log(path, meter_id=meter_id, timezone=timezone or "Europe/London", keep_going=keep_going)
    tariffs = _tariffs(path.parent)
    rows: list[dict[str, Any]] = []
    register = Register()
    for line, fields in log.table(["LCLid", "tstp", "energy(kWh/hh)"]):
        try:
            begin = datetime.fromisoformat(fields["tstp"]).replace(tzinfo=UTC)
            micro_wh = exact(fields["energy(kWh/hh)"].replace("Null", ""), 10**9)
            if micro_wh is not None and micro_wh < 0:
                msg = f"negative: {fields['energy(kWh/hh)']!r}"
                raise ValueError(msg)
        except ValueError as error:
            log.refuse(line, str(error))
            continue
        if micro_wh is None:
            log.defects[Defect.EMPTY_FIELDS] += 1
            continue
        log.meter_id = fields["LCLid"].strip()
        if not rows:
            rows.append({"observed_at": begin, "dialect": "london", "import_t1_wh": 0, "tariff": None})
        rows.append(
            {
                "observed_at": begin + HALF_HOUR,
                "dialect": "london",
                "import_t1_wh": register.add(micro_wh),
                "tariff": tariffs.get(begin),
            }
        )
    return log.close(rows)


@cache
def _tariffs(folder: Path) -> dict[datetime, int]:
    """Begin of a half hour → tariff, from the file beside the logs; empty where there is none."""
    for path in sorted(found for pattern in TARIFF_FILES for found in folder.glob(pattern)):
        log = Log(path, meter_id="tariff", timezone="Europe/London", keep_going=False)
        try:
            return {
                datetime.fromisoformat(fields["TariffDateTime"]).replace(tzinfo=UTC): TARIFFS[fields["Tariff"].strip()]
                for _, fields in log.table(["TariffDateTime", "Tariff"])
            }
        except (ValueError, KeyError) as error:
            msg = f"{path}: {type(error).__name__}: {error}"
            raise BadLog(msg) from error
    return {}
