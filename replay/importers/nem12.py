"""Australian NEM12 interval files and NEM13 register reads, market time (UTC+10)."""

import csv
import io
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from replay.importers import Defect, Imported, Log, Register, exact

FILES = ("*.csv", "*.csv.gz")
MICRO_WH = {"KWH": 10**9, "WH": 10**6, "MWH": 10**12}
"""Unit of energy, in capitals → millionths of a Wh."""
CHANNELS = {"E1": "import_t1_wh", "E2": "import_t2_wh", "B1": "export_t1_wh", "B2": "export_t2_wh"}
"""NMI suffix → register: E is drawn from the grid, B fed into it."""
NEM13_WAYS = {"E": ("import_t1_wh", "import_t2_wh"), "I": ("export_t1_wh", "export_t2_wh")}
QUALITIES = {"S": Defect.SUBSTITUTED, "F": Defect.SUBSTITUTED, "E": Defect.ESTIMATED, "N": Defect.EMPTY_FIELDS}
"""First letter of a quality method that is not actual (A)."""
ALL_REGISTERS = list(CHANNELS.values())


class _Channel:
    """One register of one meter."""

    def __init__(self, meter_id: str, serial: str, register: str, micro_wh: int, length: timedelta) -> None:
        self.meter_id, self.serial, self.register = meter_id, serial, register
        self.micro_wh, self.length = micro_wh, length
        self.sum = Register()
        self.is_open = False


def read(
    path: Path,
    *,
    meter_id: str,
    timezone: str | None = None,
    keep_going: bool = False,
    first_at: datetime | None = None,
) -> Imported:
    """The registers of the meters (NMI) of a file: summed from a NEM12's intervals, as read of a NEM13.

    An interval is read at its end; each channel's register begins at 0 with its first interval. Values of other
    quantities than energy are left out and counted. A record in is one interval value, or one NEM13 row.

    Raises:
        BadLog: a record that does not fit, or the file is no NEM12 or NEM13.
    """
    log = Log(path, meter_id=meter_id, timezone=timezone or "Australia/Brisbane", keep_going=keep_going)
    values: dict[tuple[str, datetime], dict[str, Any]] = {}
    channels: dict[tuple[str, str], _Channel] = {}
    channel: _Channel | None = None
    day: tuple[int, list[str]] | None = None
    lines = csv.reader(io.StringIO(log.text()))
    for record in lines:
        number, kind = lines.line_num, record[0].strip() if record else ""
        if number == 1 and (kind != "100" or len(record) < 2 or record[1].strip() not in ("NEM12", "NEM13")):
            raise log.bad(1, "no header (100,NEM12 or 100,NEM13)")
        try:
            match kind:
                case "200":
                    channel = _channel(record, channels)
                case "300":
                    day = number, record
                    _intervals(log, record, channel, values)
                case "400" if day:
                    _qualities(log, record)
                case "250":
                    log.rows_in += 1
                    _register_read(log, record, values)
                case "100" | "500" | "550" | "900" | "":
                    continue
                case _:
                    log.rows_in += 1
                    log.refuse(number, f"record {kind!r} is none that we know")
        except (ValueError, IndexError, KeyError) as error:
            log.refuse(number, f"{type(error).__name__}: {error}")
    rows = sorted(values.values(), key=lambda row: (row["meter_id"], row["observed_at"]))
    stamps = log.utc([row["observed_at"] for row in rows])
    for row, stamp in zip(rows, stamps, strict=True):
        row["observed_at"] = stamp
    names = sorted({row["meter_id"] for row in rows})
    return log.close(rows, pl.DataFrame({"meter_id": names, "jurisdiction": ["AS60038"] * len(names)}))


def _channel(record: list[str], channels: dict[tuple[str, str], _Channel]) -> _Channel | None:
    nmi, suffix, serial, unit, length = record[1], record[4].strip(), record[6], record[7].strip().upper(), record[8]
    if suffix not in CHANNELS or unit not in MICRO_WH:
        return None
    channel = _Channel(nmi.strip(), serial.strip(), CHANNELS[suffix], MICRO_WH[unit], timedelta(minutes=int(length)))
    return channels.setdefault((channel.meter_id, channel.register), channel)


def _intervals(
    log: Log, record: list[str], channel: _Channel | None, values: dict[tuple[str, datetime], dict[str, Any]]
) -> None:
    """The intervals of a day."""
    if channel is None:
        count = sum(1 for field in record[2:] if field.strip()[:1].isdigit() or field.startswith("."))
        log.rows_in += count
        log.defects[Defect.OTHER_QUANTITY] += count
        return
    begin = datetime.strptime(record[1].strip(), "%Y%m%d")  # noqa: DTZ007
    count = timedelta(days=1) // channel.length
    quality = record[2 + count].strip()
    energies = [exact(field, channel.micro_wh) for field in record[2 : 2 + count]]
    if not quality[:1].isalpha() or any(energy is None or energy < 0 for energy in energies):
        msg = f"not {count} values of energy and a quality"
        raise ValueError(msg)
    log.rows_in += count
    if quality[0] in QUALITIES:
        log.defects[QUALITIES[quality[0]]] += count
    if not channel.is_open:
        _at(values, channel, begin)[channel.register] = 0
        channel.is_open = True
    for place, energy in enumerate(energies, 1):
        _at(values, channel, begin + place * channel.length)[channel.register] = channel.sum.add(energy or 0)


def _at(values: dict[tuple[str, datetime], dict[str, Any]], channel: _Channel, at: datetime) -> dict[str, Any]:
    row = {"meter_id": channel.meter_id, "observed_at": at, "dialect": "nem12", "equipment_id": channel.serial or None}
    return values.setdefault((channel.meter_id, at), row | dict.fromkeys(ALL_REGISTERS))


def _qualities(log: Log, record: list[str]) -> None:
    """Quality of a stretch of intervals, where the day's own is V: mixed."""
    first, last, quality = int(record[1]), int(record[2]), record[3].strip()
    if quality[:1] in QUALITIES:
        log.defects[QUALITIES[quality[0]]] += last - first + 1


def _register_read(log: Log, record: list[str], values: dict[tuple[str, datetime], dict[str, Any]]) -> None:
    """Previous and current read of one register."""
    nmi, serial, way = record[1].strip(), record[6].strip(), record[7].strip()
    unit = record[19].strip().upper() if len(record) > 19 else ""
    factor = MICRO_WH[unit] // 10**6
    registers = NEM13_WAYS[way]
    taken = {row["equipment_id"] for (of, _), row in values.items() if of == nmi and row[registers[0]] is not None}
    register = registers[0] if not taken or taken == {serial} else registers[1]
    for place in (8, 13):
        quality = record[place + 2].strip()
        if quality[:1] in QUALITIES:
            log.defects[QUALITIES[quality[0]]] += 1
        at = datetime.strptime(record[place + 1].strip(), "%Y%m%d%H%M%S").replace(microsecond=0)  # noqa: DTZ007
        row = {"meter_id": nmi, "observed_at": at, "dialect": "nem13", "equipment_id": serial or None}
        found = values.setdefault((nmi, at), row | dict.fromkeys(ALL_REGISTERS))
        found[register] = exact(record[place], factor)
