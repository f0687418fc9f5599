"""Where everything lies, and the columns that others rely on: add, never rename.

A table is Parquet under `lake/<table>/date=YYYY-MM-DD/`, a report under `reports/<name>_v<N>/date=YYYY-MM-DD/`;
`glob_of` gives the plain glob by which DuckDB, Polars, pandas and Spark read the committed rows.
"""

import os
from pathlib import Path

import polars as pl
import pyarrow as pa

from schemas.codec import TIMESTAMP, arrow_schema

STRING, LONG, DOUBLE = pa.string(), pa.int64(), pa.float64()
REGISTERS = ("import_t1", "import_t2", "export_t1", "export_t2")
PHASES = ("L1", "L2", "L3")


def home() -> Path:
    """Root of all data: `METERSTREAM_HOME`, else `data/` in the checkout."""
    return Path(os.environ.get("METERSTREAM_HOME") or Path(__file__).parent.parent / "data").resolve()


def _columns(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


def _nullable(entity: str) -> list[pa.Field]:
    return [field.with_nullable(True) for field in arrow_schema(entity)]


def polars_schema(schema: pa.Schema) -> pl.Schema:
    """The Polars form of a table's columns."""
    return pl.Schema(schema)


def arrow_of(schema: pl.Schema) -> pa.Schema:
    """The Arrow form of a Polars frame's columns."""
    large = pl.DataFrame(schema=schema).to_arrow(compat_level=pl.CompatLevel.oldest()).schema
    return pa.schema([field.with_type(STRING) if field.type == pa.large_string() else field for field in large])


KAFKA_PLACE = [pa.field("topic", STRING), pa.field("partition", LONG), pa.field("offset", LONG)]

READINGS = pa.schema([*_nullable("reading"), pa.field("arrival_at", TIMESTAMP), *KAFKA_PLACE])
EVENTS = pa.schema([*_nullable("event"), pa.field("arrival_at", TIMESTAMP), *KAFKA_PLACE])
DEAD_LETTERS = pa.schema(_nullable("dead-letter"))
REGISTRY = _columns(
    meter_id=STRING, usage_point_id=STRING, equipment_id=STRING, valid_from=TIMESTAMP, valid_to=TIMESTAMP,
    phases=STRING, nominal_mv=LONG, fuse_a=LONG, transformer_id=STRING, feeder_id=STRING, community_id=STRING,
    time_zone=STRING, jurisdiction=STRING, interval_s=LONG,
)  # fmt: skip
"""One row per meter and usage point; `phases` is `L1` or `L1,L2,L3`, `interval_s` the expected seconds between
readings; null is unknown, and then no rule that needs it applies."""
CONSUMPTION_DELTAS = _columns(
    meter_id=STRING, register=STRING, previous_at=TIMESTAMP, observed_at=TIMESTAMP, previous_wh=LONG, wh=LONG,
    delta_wh=LONG, reason=STRING, segment_id=STRING, equipment_id=STRING, run_id=STRING,
)  # fmt: skip
VOLTAGE_WINDOWS = _columns(
    meter_id=STRING, phase=STRING, window_start=TIMESTAMP, window_end=TIMESTAMP, sample_count=LONG, mean_mv=LONG,
    min_mv=LONG, max_mv=LONG, stddev_mv=DOUBLE, deviation_pct=DOUBLE, band=STRING, run_id=STRING,
)  # fmt: skip
ALARMS = pa.schema(_nullable("alarm"))
QUARANTINED = pa.schema([*READINGS, pa.field("reason", STRING), pa.field("stage", STRING)])
LATE_READINGS = pa.schema([*READINGS, pa.field("reason", STRING), pa.field("stage", STRING)])
QUARANTINED_EVENTS = pa.schema([*EVENTS, pa.field("reason", STRING), pa.field("stage", STRING)])
LATE_EVENTS = QUARANTINED_EVENTS
ACCOUNTING = _columns(
    run_id=STRING, stage=STRING, batch=STRING, received=LONG, stored=LONG, duplicate=LONG, late=LONG,
    quarantined=LONG, invalid=LONG,
)  # fmt: skip
LATEST_READINGS = _columns(
    meter_id=STRING, observed_at=TIMESTAMP, import_t1_wh=LONG, import_t2_wh=LONG, export_t1_wh=LONG,
    export_t2_wh=LONG, equipment_id=STRING, run_id=STRING,
)  # fmt: skip

TABLES = {
    "readings": READINGS,
    "events": EVENTS,
    "dead_letters": DEAD_LETTERS,
    "registry": REGISTRY,
    "consumption_deltas": CONSUMPTION_DELTAS,
    "voltage_windows": VOLTAGE_WINDOWS,
    "alarms": ALARMS,
    "quarantined_readings": QUARANTINED,
    "quarantined_events": QUARANTINED_EVENTS,
    "late_readings": LATE_READINGS,
    "late_events": LATE_EVENTS,
    "accounting": ACCOUNTING,
    "latest_readings": LATEST_READINGS,
}


def table_path(table: str) -> Path:
    """Folder of a lake table."""
    return home() / "lake" / table


def report_path(report: str) -> Path:
    """Folder of a report, `report` with its version: `daily_consumption_v1`."""
    return home() / "reports" / report


def glob_of(folder: Path) -> str:
    """The glob that gives a table's or report's committed rows to any reader."""
    return str(folder / "date=*" / "*.parquet")
