"""A tape of our own: twenty homes, half a day of readings every five minutes, power failures and a tamper."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from replay.tape import log_schema, write_tape
from schemas.tables import REGISTRY

BEGIN = datetime(2024, 3, 4, 6, tzinfo=UTC)
METERS = 20
READINGS = 144
STEP = timedelta(minutes=5)


def write(folder: Path) -> None:
    readings, events, registry = [], [], []
    for index in range(METERS):
        meter_id = f"home-{index:02d}"
        registry.append(
            {
                "meter_id": meter_id,
                "usage_point_id": f"up-{index}",
                "equipment_id": f"box-{index}",
                "valid_from": BEGIN,
                "phases": "L1",
                "nominal_mv": 230_000,
                "fuse_a": 63,
                "transformer_id": "T1",
                "feeder_id": f"F{index % 2}",
                "community_id": "T1",
                "time_zone": "Europe/Berlin",
                "jurisdiction": "EN50160",
                "interval_s": 300,
            }
        )
        for tick in range(READINGS):
            readings.append(_reading(meter_id, index, tick))
        events += [
            _event(meter_id, index, 40, "AE1"),
            _event(meter_id, index, 44, "AE2"),
            *([_event(meter_id, index, 60, "AE47")] if index % 5 == 0 else []),
        ]
    write_tape(
        folder,
        readings=_table(sorted(readings, key=lambda row: (row["observed_at"], row["meter_id"])), "reading"),
        events=_table(sorted(events, key=lambda row: (row["observed_at"], row["meter_id"])), "event"),
        registry=pa.Table.from_pylist(registry, REGISTRY),
        format="own",
        source="small_tape",
        time_zone="Europe/Berlin",
        rows_in=len(readings),
        defects={},
        interval_s=300,
    )


def _table(rows: list[dict[str, Any]], entity: str) -> pa.Table:
    return pa.Table.from_pylist(rows, log_schema(entity))


def _reading(meter_id: str, index: int, tick: int) -> dict[str, Any]:
    wh = 1_000_000 * (index + 1) + 17 * tick + (tick * tick * (index + 3)) % 11
    return {
        "meter_id": meter_id,
        "observed_at": BEGIN + tick * STEP,
        "equipment_id": f"box-{index}",
        "dialect": "own",
        "import_t1_wh": wh + 11 * tick,
        "export_t1_wh": 500_000 + 3 * tick,
        "import_w": 300 + index,
        "voltage_l1_mv": 228_000 + 37 * ((tick * (index + 1)) % 101),
    }


def _event(meter_id: str, index: int, tick: int, code: str) -> dict[str, Any]:
    return {
        "meter_id": meter_id,
        "observed_at": BEGIN + tick * STEP + timedelta(seconds=index),
        "dialect": "c12.19",
        "dialect_version": "1",
        "source_table": "ST76",
        "code": code,
    }
