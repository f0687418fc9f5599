"""DSMR P1 telegrams one after the other, as a serial port gives them (DSMR 2.2 to 5, eMUCS, Smarty, P1 of others)."""

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from replay.log import Asked, Defect, Imported, Log, as_frame
from replay.tape import STAMPED_BY_RUN, log_schema
from schemas.dsmr import (
    beyond_tariffs_wh,
    decode_telegram,
    failure_events,
    is_whole,
    power_failures,
    split_telegrams,
)
from schemas.errors import InvalidMessage

FILES = ("*.txt", "*.txt.gz", "*.log", "*.log.gz")
ZONE = "Europe/Amsterdam"
TIME_ZONES = {"emucs": "Europe/Brussels", "smarty": "Europe/Luxembourg"}
WITHOUT_CLOCK = ("dsmr-2.2", "dsmr-3", "iec62056-21")
STEP = timedelta(seconds=10)  # DSMR 2.2 and 3 send a telegram every ten seconds and no time


def read(path: Path, asked: Asked) -> Imported:
    """The readings of a telegram log.

    Its first record is mostly cut off, and its last may be: these are counted. The stamps carry their season, so that
    the time zone is for the reports only; its default goes by the first telegram's dialect. DSMR 2.2 and 3 have no
    clock: `first_at` is taken for the first telegram, and ten seconds more for each one that follows. Long power
    failures of the telegrams' failure log that ended within the log become events, each once.

    Raises:
        BadLog: a telegram that does not decode, or half of one in the middle.
    """
    log = Log(path, asked, ZONE)
    pieces = list(split_telegrams(log.data))
    rows, failures, totals = [], set[tuple[datetime, datetime]](), dict[str, int]()
    for index, (line, piece) in enumerate(pieces):
        log.rows_in += 1
        if not is_whole(piece):
            if index in (0, len(pieces) - 1):
                log.defects[Defect.CUT_OFF] += 1
            else:
                log.refuse(line, "part of a telegram", Defect.CUT_OFF)
            continue
        at = asked.first_at and asked.first_at + index * STEP
        try:
            rows.append(_decoded(log, piece, asked, at))
            failures |= set(power_failures(piece))
            for way, (beyond, step) in beyond_tariffs_wh(piece, rows[-1]).items():
                before = totals.setdefault(way, beyond)
                log.defects[Defect.OTHER_SUM] += abs(beyond - before) > step
                totals[way] = before if abs(beyond - before) <= step else beyond
            log.defects[Defect.NO_CLOCK] += rows[-1]["dialect"] in WITHOUT_CLOCK
        except InvalidMessage as error:
            hint = "" if at or "without a time" not in error.detail else "; --first-at gives it one"
            log.refuse(line, error.detail + hint)
    if asked.timezone is None and rows:
        log.zone = type(log.zone)(TIME_ZONES.get(rows[0]["dialect"], log.zone.key))
    imported = log.close(as_frame([{name: row[name] for name in row if name not in STAMPED_BY_RUN} for row in rows]))
    return replace(imported, events=_events(failures, rows))


def _events(failures: set[tuple[datetime, datetime]], rows: list[dict[str, Any]]) -> pa.Table:
    """Failure and return of the power failures that ended within the log, in the order of time."""
    times = [row["observed_at"] for row in rows]
    known = [(begin, end) for begin, end in failures if times and min(times) <= end <= max(times)]
    events = failure_events(rows[0]["meter_id"], known) if rows else []
    return pa.Table.from_pylist(events, log_schema("event"))


def _decoded(log: Log, telegram: bytes, asked: Asked, at: datetime | None) -> dict[str, Any]:
    try:
        return decode_telegram(telegram, asked.meter_id, clock=at)
    except InvalidMessage:
        if not asked.ignore_crc:
            raise
    row = decode_telegram(telegram, asked.meter_id, clock=at, check_crc=False)
    log.defects[Defect.WRONG_CRC] += 1
    return row
