"""Playing a tape: pacing, sending, and the ledger of what was sent.

Open loop: a record is due when the run's clock says so, however late the one before was; the sender's own lateness is
measured. sent_at is the run's clock when the record is sent: its due time plus that lateness × speed.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from replay.bad_input import bad_records
from replay.fleet import Fleet, Slice
from replay.sinks import Sink
from schemas.codec import TIMESTAMP, arrow_schema, encode_batch
from schemas.tables import REGISTRY, home, table_path

TICK_S = 0.2  # wall time between two bursts of a paced run
FULL_SPEED_RECORDS = 20_000  # records of a slice when nothing is waited for: some MB


@dataclass
class Ledger:
    """What was sent.

    Attributes:
        records: readings and events acknowledged by the other side, bad ones too.
        bad: names of the bad records that were sent on purpose.
        late_max_s: the sender's own greatest lateness, wall time.
        late_mean_s: its mean over the slices.
        is_whole: False when the run was stopped before its end.
    """

    run_id: str
    tape: str
    meters: int
    speed: float | None
    seed: int
    to: str
    clock: str
    first_at: str
    last_at: str
    started_at: str
    records: int = 0
    readings: int = 0
    events: int = 0
    bad: list[str] = field(default_factory=list)
    seconds: float = 0.0
    records_per_s: float = 0.0
    late_max_s: float = 0.0
    late_mean_s: float = 0.0
    is_whole: bool = False


def run_folder(run_id: str) -> Path:
    """Where a run's ledger and truth lie."""
    return home() / "runs" / run_id


def register(fleet: Fleet, run_id: str) -> None:
    """Writes the fleet's registry to the lake."""
    target = table_path("registry") / f"date={fleet.first_at:%Y-%m-%d}"
    target.mkdir(parents=True, exist_ok=True)
    _write(fleet.registry.to_arrow().cast(REGISTRY), target / f"{run_id}.parquet")


def _write(table: pa.Table, path: Path) -> None:
    """Writes beside the tables, then renames: no reader sees half a file."""
    staged = home() / "staging" / f"{path.parent.name}-{path.name}"
    staged.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, staged)
    staged.rename(path)


def play(
    fleet: Fleet,
    sink: Sink,
    ledger: Ledger,
    on_progress: Callable[[Ledger, float], None] = lambda *_: None,
    with_bad_input: bool = False,
) -> Ledger:
    """Sends everything, then writes ledger and truth; Ctrl-C ends it with a ledger that is right.

    Args:
        fleet: what to send.
        sink: where to.
        ledger: filled in as the run goes.
        on_progress: gets the ledger and the present lateness in seconds, every slice.
        with_bad_input: send one of each kind of bad record after the first slice.
    """
    folder = run_folder(ledger.run_id)
    folder.mkdir(parents=True, exist_ok=True)
    register(fleet, ledger.run_id)
    _write(fleet.truth().to_arrow(), folder / "truth.parquet")
    span = fleet.last_at - fleet.first_at
    if ledger.speed is None:
        step = max(span * FULL_SPEED_RECORDS / max(fleet.records, 1), timedelta(seconds=1))
    else:
        step = timedelta(seconds=TICK_S * ledger.speed)
    sent: list[pl.DataFrame] = []
    began = time.monotonic()
    slices = late_total = 0.0
    try:
        for piece in fleet.slices(step):
            late_s = 0.0
            if ledger.speed is not None:
                due_s = (piece.until - step - fleet.first_at).total_seconds() / ledger.speed
                late_s = time.monotonic() - began - due_s
                if late_s < 0:
                    time.sleep(-late_s)
                    late_s = 0.0
            _send(piece, sink, ledger, late_s)
            sent += [rows.group_by("meter_id").len("sent") for rows in (piece.readings, piece.events)]
            if with_bad_input and not ledger.bad and len(piece.readings):
                _send_bad(piece, sink, ledger)
            slices, late_total = slices + 1, late_total + late_s
            ledger.late_max_s = round(max(ledger.late_max_s, late_s), 3)
            ledger.late_mean_s = round(late_total / slices, 3)
            ledger.seconds = round(time.monotonic() - began, 3)
            on_progress(ledger, late_s)
        ledger.is_whole = True
    except KeyboardInterrupt:
        pass
    finally:
        try:
            sink.close()
        finally:
            ledger.seconds = round(time.monotonic() - began, 3)
            ledger.records = sink.acknowledged
            ledger.records_per_s = round(ledger.records / max(ledger.seconds, 1e-3), 1)
            per_meter = pl.concat(sent).group_by("meter_id").agg(pl.col("sent").sum()) if sent else None
            if per_meter is not None:
                _write(per_meter.sort("meter_id").to_arrow(), folder / "ledger.parquet")
            (folder / "run.json").write_text(json.dumps(asdict(ledger), indent=2) + "\n")
    return ledger


def _stamped(rows: pl.DataFrame, entity: str, ledger: Ledger, late_s: float) -> pa.Table:
    """The entity's columns of due records, with the stamps of the run."""
    lateness = timedelta(seconds=late_s * (ledger.speed or 0))
    received_at = datetime.now(UTC) if ledger.to == "kafka" else None
    return (
        rows.with_columns(
            sent_at=pl.col("due_at") + lateness,
            received_at=pl.lit(received_at, pl.Datetime("us", "UTC")),
            run_id=pl.lit(ledger.run_id),
        )
        .select(arrow_schema(entity).names)
        .to_arrow()
    )


def _send(piece: Slice, sink: Sink, ledger: Ledger, late_s: float) -> None:
    for kind, rows in (("readings", piece.readings), ("events", piece.events)):
        if not len(rows):
            continue
        payloads = encode_batch(kind.removesuffix("s"), _stamped(rows, kind.removesuffix("s"), ledger, late_s))
        for meter_id, payload in zip(rows.get_column("meter_id"), payloads, strict=True):
            sink.send(meter_id, kind, payload)
        setattr(ledger, kind, getattr(ledger, kind) + len(rows))
    ledger.records = sink.acknowledged


def _send_bad(piece: Slice, sink: Sink, ledger: Ledger) -> None:
    reading = (
        _stamped(piece.readings.head(1), "reading", ledger, 0.0)
        .cast(
            pa.schema([f.with_type(TIMESTAMP) if pa.types.is_timestamp(f.type) else f for f in arrow_schema("reading")])
        )
        .to_pylist()[0]
    )
    for name, encoding, payload in bad_records(reading):
        sink.send(reading["meter_id"], "readings", payload, encoding)
        ledger.bad.append(name)
