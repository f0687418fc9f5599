"""The plan of a replay's bench: what is asked for, and the records that all contenders send by it."""

import statistics
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from replay.arrays import STAMP
from replay.fleet import fleet
from replay.sinks import BATCHING
from replay.tape import read_tape
from schemas.codec import arrow_schema, encode_batch

PRINTABLE = bytes(33 + byte % 94 for byte in range(256))
"""Payload files are text, one record a line: each byte becomes a printable one, repetitions stay where they are."""


@dataclass(frozen=True)
class Plan:
    """What is asked for: tape, fleet, rounds, records, how much of the log, and a folder for what comes and goes."""

    tape: Path
    meters: int
    rounds: int
    records: int
    duration: timedelta
    folder: Path


def readings_of(plan: Plan) -> pa.Table:
    """Records as a run would send them: of meters of the fleet in the order of their due times, stamped."""
    crew = fleet(read_tape(plan.tape), plan.meters, duration=plan.duration)
    chosen = np.random.default_rng(1).choice(len(crew), min(plan.records, len(crew)), replace=False)
    numbers = crew.begin("readings", chosen)
    order = np.argsort(crew.due("readings", chosen, numbers), kind="stable")
    rows = crew.readings(chosen[order], numbers[order])
    stamps = {
        "sent_at": rows.get_column("observed_at"),
        "received_at": pl.repeat(datetime.now(UTC), len(rows), dtype=STAMP, eager=True),
        "run_id": pl.repeat("20260101T000000-abcd", len(rows), eager=True),
    }
    rows = rows.with_columns(**stamps)
    return pa.table({
        each.name: rows.get_column(each.name).to_arrow().cast(each.type) if each.name in rows.columns
        else pa.nulls(len(rows), each.type)
        for each in arrow_schema("reading")
    }, schema=arrow_schema("reading"))  # fmt: skip


def keyed_payloads(plan: Plan) -> list[tuple[bytes, bytes]]:
    """Keys and framed Avro of the readings."""
    readings = readings_of(plan)
    keys = [key.encode() for key in readings.column("meter_id").to_pylist()]
    return list(zip(keys, encode_batch("reading", readings), strict=True))


def text_file(path: Path, payloads: list[bytes]) -> str:
    """Writes a line of text as long as each payload. Returns what they are, and how well either side compresses."""
    texts = [payload.translate(PRINTABLE) for payload in payloads]
    path.write_bytes(b"\n".join(texts) + b"\n")
    left = [_left_by_lz4(each) for each in (payloads, texts)]
    return (
        f"{len(texts):,} different lines of {mean_size(texts):.0f} bytes, made from encoded readings; "
        f"lz4 leaves {left[1]:.0%} of them, of the readings {left[0]:.0%}"
    )


def _left_by_lz4(payloads: list[bytes]) -> float:
    """What share is left of a producer's batch."""
    batch = b"".join(payloads)[: int(BATCHING["batch.size"])]
    left: float = pa.Codec("lz4").compress(batch).size / len(batch)
    return left


def mean_size(payloads: list[bytes]) -> float:
    """Bytes of a payload, in the mean."""
    return statistics.fmean(map(len, payloads))
