"""The ledger: what a run says that it sent."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from replay.arrays import SECOND, Integers, from_microseconds
from replay.pace import Pace
from replay.run.digest import digest_text
from schemas.errors import ConfigError
from settings import home

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass
class Ledger:
    """What was sent.

    Attributes:
        records: readings, events and poison acknowledged by the other side.
        readings: handed over, copies too.
        events: handed over.
        poison: handed over.
        faults: number of injected faults by kind.
        cpu_s: CPU time of all processes since they began, set-up included.
        processes: how many it took; one where the tape is too sparse to share.
        late_mean_s: how late a record was handed over against its due time, wall time, mean over the records; what is
            due within a tick goes out at its end.
        late_p99_s: 99 of 100 records were less late.
        late_max_s: the latest one.
        pace: steady or open.
        slip_s: seconds of wall time that a steady run's clock has waited.
        speed_reached: run clock per wall clock from begin to end.
        waited_s: seconds spent waiting, by what for: mqtt or kafka (the sender's window was full), bridge (too much was
            between MQTT broker and Kafka).
        digest: hash of every meter's byte stream without run_id, sent_at and received_at; it does not depend on how
            meters interleave.
        is_whole: False when the run was stopped before its end.
    """

    run_id: str
    tape: str
    meters: int
    speed: float | None
    seed: int
    to: str
    clock: str
    processes: int
    first_at: str
    last_at: str
    started_at: str
    records: int = 0
    readings: int = 0
    events: int = 0
    poison: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    records_per_s: float = 0.0
    cpu_s: float = 0.0
    late_mean_s: float = 0.0
    late_p99_s: float = 0.0
    late_max_s: float = 0.0
    pace: str = Pace.OPEN.value
    slip_s: float = 0.0
    speed_reached: float = 0.0
    waited_s: dict[str, float] = field(default_factory=dict)
    digest: str = ""
    is_whole: bool = False


@dataclass
class Sent:
    """What one process has sent: arrays have one entry for each of its meters.

    Attributes:
        low: number of its first meter.
        counts: per readings, events and poison the records handed over.
        until: microseconds of the run up to which the meter's records were handed over.
        digest: sum of the records' hashes, two times 64 bits.
        late: lateness in milliseconds → records.
        acknowledged: records that are safe on the other side.
        cpu_s: of this process.
        slip_s: of its clock.
        played_s: wall time from the clock's begin.
        waited_s: by what for.
    """

    low: int
    counts: dict[str, npt.NDArray[np.int32]]
    until: Integers
    digest: npt.NDArray[np.uint64]
    late: dict[int, int] = field(default_factory=dict)
    acknowledged: int = 0
    cpu_s: float = 0.0
    slip_s: float = 0.0
    played_s: float = 0.0
    waited_s: dict[str, float] = field(default_factory=dict)

    @classmethod
    def nothing(cls, low: int, high: int) -> "Sent":
        """Nothing yet, of the meters low … high − 1."""
        counts = {kind: np.zeros(high - low, np.int32) for kind in ("readings", "events", "poison")}
        return cls(low, counts, np.zeros(high - low, np.int64), np.zeros(2, np.uint64))

    def total(self, kind: str) -> int:
        """Records of a kind."""
        return int(self.counts[kind].sum())


def run_folder(run_id: str) -> Path:
    """Where a run's ledger and truth lie.

    Raises:
        ConfigError: the name is none of a folder.
    """
    if not RUN_ID.fullmatch(run_id):
        msg = f"a run's name has letters, digits, '.', '_' and '-', and begins with a letter or digit: not {run_id!r}"
        raise ConfigError(msg)
    return home() / "runs" / run_id


def read_ledger(run_id: str) -> Ledger:
    """What a run has said of itself so far.

    Raises:
        OSError, ValueError, TypeError: it is not there, or not whole.
    """
    return Ledger(**json.loads((run_folder(run_id) / "run.json").read_text()))


def write_ledger(ledger: Ledger) -> None:
    """Writes run.json into the run's folder, which is there."""
    (run_folder(ledger.run_id) / "run.json").write_text(json.dumps(asdict(ledger), indent=2) + "\n")


def settle(ledger: Ledger, parts: list[Sent]) -> None:
    """Fills the ledger in, by what its processes have sent."""
    ledger.records = sum(part.acknowledged for part in parts)
    ledger.readings, ledger.events, ledger.poison = (
        sum(part.total(kind) for part in parts) for kind in ("readings", "events", "poison")
    )
    ledger.records_per_s = round(ledger.records / max(ledger.seconds, 1e-3), 1)
    ledger.slip_s = round(max((part.slip_s for part in parts), default=0.0), 3)
    for name in sorted({name for part in parts for name in part.waited_s}):
        ledger.waited_s[name] = round(max(part.waited_s.get(name, 0.0) for part in parts), 3)
    until_us = max((int(part.until.max(initial=0)) for part in parts), default=0)
    played_s = max((part.played_s for part in parts), default=0.0)
    ledger.speed_reached = round(until_us / SECOND / max(played_s, 1e-3), 1)
    ledger.cpu_s = round(time.process_time() + sum(part.cpu_s for part in parts), 3)
    total = np.zeros(2, np.uint64)
    late: dict[int, int] = {}
    for part in parts:
        total += part.digest
        for milliseconds, records in part.late.items():
            late[milliseconds] = late.get(milliseconds, 0) + records
    ledger.digest = digest_text(total)
    if late:
        lateness = np.array(sorted(late)) / 1_000
        counts = np.array([late[each] for each in sorted(late)])
        within_99 = np.searchsorted(np.cumsum(counts), 0.99 * counts.sum())
        ledger.late_max_s = round(float(lateness[-1]), 3)
        ledger.late_mean_s = round(float((lateness * counts).sum() / counts.sum()), 3)
        ledger.late_p99_s = round(float(lateness[within_99]), 3)


def ledger_rows(ids: pl.Series, parts: list[Sent], ledger: Ledger) -> Iterator[pa.Table]:
    """Per meter what was handed over, and up to when: meter_id, readings, events, poison, sent_until."""
    first_us = round(datetime.fromisoformat(ledger.first_at).timestamp() * SECOND)
    for part in sorted(parts, key=lambda part: part.low):
        counts = {kind: pl.Series(values, dtype=pl.Int64) for kind, values in part.counts.items()}
        until = from_microseconds(part.until + first_us)
        own = ids[part.low : part.low + len(part.until)]
        yield pl.DataFrame({"meter_id": own, **counts, "sent_until": until}).to_arrow()
