"""A tape: a log or a simulation as a folder of Parquet, in sending order, ready to be replayed.

`readings.parquet` and `events.parquet` have `log_row` (from 0, the sending order) and the entity's columns without what
a run stamps; `registry.parquet` says whose meters they are, `tape.json` where all came from and what was wrong with it.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.codec import arrow_schema
from schemas.errors import ConfigError, ContractBroken
from schemas.tables import PHASES, REGISTRY

STAMPED_BY_RUN = ("sent_at", "received_at", "run_id", "seq")
NOMINAL_MV = 230_000
A_VOLTAGE_MV = 50_000  # what an unconnected terminal reads is less
NEAR_NOMINAL = 0.15  # what EN 50160 lets a mean deviate at most


def log_schema(entity: str) -> pa.Schema:
    """Columns of `reading` or `event` that a log has: all but what a run stamps."""
    return pa.schema([field for field in arrow_schema(entity) if field.name not in STAMPED_BY_RUN])


def _tape_schema(entity: str) -> pa.Schema:
    return pa.schema([pa.field("log_row", pa.int64(), nullable=False), *log_schema(entity)])


TABLES = {"readings": _tape_schema("reading"), "events": _tape_schema("event"), "registry": REGISTRY}


@dataclass(frozen=True)
class TapeInfo:
    """What `tape.json` says.

    Attributes:
        format: importer, or `simbench`.
        source: name of the log file, or of the grid and day.
        time_zone: of the usage points.
        rows_in: records in the log, cut-off and refused ones too.
        rows_out: readings on the tape.
        defects: what was wrong with the log, counted by name.
        first_at: earliest observed_at, ISO 8601; null on an empty tape.
        last_at: latest observed_at.
        interval_s: usual step between a meter's readings; null where there is none.
    """

    format: str
    source: str
    time_zone: str
    rows_in: int
    rows_out: int
    defects: dict[str, int]
    first_at: str | None
    last_at: str | None
    interval_s: int | None


@dataclass(frozen=True)
class Tape:
    """A tape in memory."""

    readings: pa.Table
    events: pa.Table
    registry: pa.Table
    info: TapeInfo


def _numbered(table: pa.Table, entity: str) -> pa.Table:
    try:
        rows = table.select(log_schema(entity).names).cast(log_schema(entity))
    except (KeyError, ValueError) as error:  # pyarrow's own errors are ValueErrors too
        msg = f"rows do not fit {entity}: {error}"
        raise ContractBroken(msg) from error
    numbers = pa.array(np.arange(len(rows)), pa.int64())
    return rows.add_column(0, TABLES[f"{entity}s"].field("log_row"), numbers)


def registry_of(readings: pa.Table, *, time_zone: str, interval_s: int | None) -> pa.Table:
    """The registry of a log, which names no fleet: one row per meter; what a log cannot tell is null.

    A phase that never has a voltage is an unconnected terminal. The nominal voltage is that of European low voltage
    where all phases stand by it, as they do not in a net of 3 × 230 V without neutral; EN 50160 is that of Europe.
    """
    rows = []
    for meter_id in pc.unique(readings["meter_id"]).to_pylist():
        own = readings.filter(pc.equal(readings["meter_id"], meter_id))
        volts = {phase: _typical_mv(own[f"voltage_{phase.lower()}_mv"]) for phase in PHASES}
        measured = {phase: mv for phase, mv in volts.items() if mv is not None}
        is_usual = measured and all(abs(mv - NOMINAL_MV) <= NOMINAL_MV * NEAR_NOMINAL for mv in measured.values())
        equipment = own["equipment_id"].drop_null()
        rows.append(
            {
                "meter_id": meter_id,
                "usage_point_id": meter_id,
                "equipment_id": equipment[0].as_py() if len(equipment) else None,
                "valid_from": pc.min(own["observed_at"]).as_py(),
                "phases": ",".join(measured) or None,
                "nominal_mv": NOMINAL_MV if is_usual else None,
                "time_zone": time_zone,
                "jurisdiction": "EN50160" if time_zone.startswith("Europe/") else None,
                "interval_s": interval_s,
            }
        )
    return pa.Table.from_pylist(rows, REGISTRY)


def _typical_mv(voltages: pa.ChunkedArray) -> float | None:
    """The median of a phase's voltages; None where it never had one."""
    known = pl.DataFrame({"mv": voltages}).filter(pl.col("mv") >= A_VOLTAGE_MV)
    median: float | None = known.select(pl.col("mv").median()).item()
    return median


def _iso(stamp: datetime | None) -> str | None:
    return stamp.astimezone(UTC).isoformat() if stamp else None


def has_tape(folder: Path) -> bool:
    """Whether there is a tape in a folder."""
    return (folder / "tape.json").is_file()


def write_tape(
    folder: Path,
    *,
    readings: pa.Table,
    events: pa.Table,
    registry: pa.Table,
    format: str,
    source: str,
    time_zone: str,
    rows_in: int,
    defects: Mapping[str, int],
    interval_s: int | None,
    truth: Mapping[str, pa.Table] | None = None,
) -> Tape:
    """Write a tape, whole or not at all; one that is there already is replaced.

    Args:
        folder: the tape.
        readings: columns of `log_schema("reading")` in sending order; `log_row` is added here.
        events: columns of `log_schema("event")` in sending order; may be empty.
        registry: columns of `schemas.tables.REGISTRY`.
        format: see `TapeInfo`, and so on for the rest.
        source: file name only, so that a tape tells nothing of the machine that made it.
        time_zone: of the usage points.
        rows_in: records in the log.
        defects: counted by name.
        interval_s: usual step.
        truth: tables by name, written under `truth/`: what a log cannot know, and no reader of the tape needs.

    Raises:
        ConfigError: the folder holds something else than a tape.
    """
    folder = folder.absolute()
    if folder.exists() and not has_tape(folder) and (not folder.is_dir() or any(folder.iterdir())):
        msg = f"{folder} is there and is no tape: name another place"
        raise ConfigError(msg)
    span = pc.min_max(readings["observed_at"]).as_py()
    info = TapeInfo(
        format=format, source=source, time_zone=time_zone, rows_in=rows_in, rows_out=len(readings),
        defects={str(name): count for name, count in sorted(defects.items())},
        first_at=_iso(span["min"]), last_at=_iso(span["max"]), interval_s=interval_s,
    )  # fmt: skip
    tape = Tape(_numbered(readings, "reading"), _numbered(events, "event"), registry.cast(REGISTRY), info)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name in TABLES:
            pq.write_table(getattr(tape, name), staging / f"{name}.parquet", compression="zstd")
        for name, table in (truth or {}).items():
            (staging / "truth").mkdir(exist_ok=True)
            pq.write_table(table, staging / "truth" / f"{name}.parquet", compression="zstd")
        (staging / "tape.json").write_text(json.dumps(asdict(info), indent=2) + "\n")
        staging.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return tape


def _filled(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table with the columns that there were not yet when it was written, null."""
    for field in list(schema)[1:]:  # the first was always there
        if field.nullable and field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table


def read_tape(folder: Path) -> Tape:
    """The tape in a folder.

    Raises:
        ConfigError: there is none, or it lacks a file or column.
    """
    if not folder.exists():
        msg = f"{folder} is no tape: there is nothing; replay simulate and replay import make one"
        raise ConfigError(msg)
    try:
        found = json.loads((folder / "tape.json").read_text())
        info = TapeInfo(**{field.name: found[field.name] for field in fields(TapeInfo)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{folder} is no tape: tape.json is missing or incomplete ({type(error).__name__}: {error})"
        raise ConfigError(msg) from error
    tables = {}
    for name, schema in TABLES.items():
        try:
            # ParquetFile, not read_table: the folder's own path may look like a partition (`date=…`)
            with pq.ParquetFile(folder / f"{name}.parquet") as file:
                tables[name] = _filled(file.read(), schema).select(schema.names).cast(schema)
        except (OSError, KeyError, ValueError) as error:
            msg = f"{folder} is no tape: {name}.parquet: {error}"
            raise ConfigError(msg) from error
    return Tape(**tables, info=info)
