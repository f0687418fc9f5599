"""DSMR P1 telegrams one after the other, as a serial port gives them (DSMR 2.2 to 5, eMUCS, Smarty)."""

from datetime import datetime, timedelta
from pathlib import Path

from replay.importers import Defect, Imported, Log
from replay.tape import STAMPED_BY_RUN
from schemas.dsmr import decode_telegram, is_whole, split_telegrams
from schemas.errors import InvalidMessage

FILES = ("*.txt", "*.txt.gz", "*.log", "*.log.gz")
TIME_ZONES = {"emucs": "Europe/Brussels", "smarty": "Europe/Luxembourg"}
STEP = timedelta(seconds=10)  # DSMR 2.2 and 3 send a telegram every ten seconds and no time


def read(
    path: Path,
    *,
    meter_id: str,
    timezone: str | None = None,
    keep_going: bool = False,
    first_at: datetime | None = None,
) -> Imported:
    """The readings of a telegram log.

    Its first record is mostly cut off, and its last may be: these are counted. The stamps carry their season, so that
    the time zone is for the reports only; its default goes by the first telegram's dialect. DSMR 2.2 and 3 have no
    clock: `first_at` is taken for the first telegram, and ten seconds more for each one that follows.

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
            rows.append(decode_telegram(piece, meter_id, clock=first_at and first_at + index * STEP))
        except InvalidMessage as error:
            hint = "" if first_at or "without a time" not in error.detail else "; --first-at gives it one"
            log.refuse(line, error.detail + hint)
    if timezone is None and rows:
        log.zone = type(log.zone)(TIME_ZONES.get(rows[0]["dialect"], log.zone.key))
    return log.close([{name: row[name] for name in row if name not in STAMPED_BY_RUN} for row in rows])
