"""DSMR P1 telegrams one after the other, as a serial port gives them (DSMR 4 and 5, eMUCS, Smarty)."""

from pathlib import Path

from replay.importers import Defect, Imported, Log
from schemas.dsmr import decode_telegram, is_whole, split_telegrams
from schemas.errors import InvalidMessage

TIME_ZONES = {"emucs": "Europe/Brussels", "smarty": "Europe/Luxembourg"}


def read(path: Path, *, meter_id: str, timezone: str | None = None, keep_going: bool = False) -> Imported:
    """The readings of a telegram log.

    Its first record is mostly cut off, and its last may be: these are counted. The stamps carry their season, so that
    the time zone is for the reports only; its default goes by the first telegram's dialect.

    Raises:
        BadLog: a telegram that does not decode, or half of one in the middle.
    """
    log = Log(path, meter_id=meter_id, timezone=timezone or "Europe/Amsterdam", keep_going=keep_going)
    pieces = list(split_telegrams(log.data))
    rows = []
    for index, (line, piece) in enumerate(pieces):
        log.rows_in += 1
        if not is_whole(piece):
            if index in (0, len(pieces) - 1):
                log.defects[Defect.CUT_OFF] += 1
            else:
                log.refuse(line, "part of a telegram", Defect.CUT_OFF)
            continue
        try:
            rows.append(decode_telegram(piece, meter_id))
        except InvalidMessage as error:
            log.refuse(line, error.detail)
    if timezone is None and rows:
        log.zone = type(log.zone)(TIME_ZONES.get(rows[0]["dialect"], log.zone.key))
    return log.close(rows)
