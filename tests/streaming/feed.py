"""Batches for real queries: one Parquet file with the columns of Spark's Kafka source is one micro-batch."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming.query import StreamingQuery

from engine.job import StreamingJob
from engine.settings import StreamSettings
from engine.stream import Runner
from kafka_io.ranges import KAFKA
from lake.paths import glob_of, table_path
from lake.reading import spark_schema
from schemas.codec import encode
from schemas.tables import REGISTRY
from schemas.topics import READINGS, Topic
from settings import home

KAFKA_AT = datetime(2024, 3, 31, 1, tzinfo=UTC)
SETTINGS = StreamSettings(kafka_bootstrap="none:0", allowed_lateness_s=60)
Process = Callable[[DataFrame, int], None]


def at(clock: str, day: str = "2024-03-31") -> datetime:
    return datetime.fromisoformat(f"{day}T{clock}:00+00:00")


def reading(meter_id: str, clock: datetime, arrival: datetime | None = None, **values: Any) -> tuple[str, bytes]:
    record = {"meter_id": meter_id, "observed_at": clock, "received_at": arrival or clock, "dialect": "dsmr-5"}
    return meter_id, encode("reading", {**record, **values})


def pair(minute: int, wh: int, volts: int) -> list[tuple[str, bytes]]:
    """Readings of two meters, so many minutes after 00:50 UTC on the night of the spring clock change."""
    clock = at(f"{(50 + minute) // 60:02d}:{(50 + minute) % 60:02d}")
    return [
        reading(meter_id, clock, import_t1_wh=wh + plus, voltage_l1_mv=(volts + plus) * 1_000)
        for meter_id, plus in (("m1", 0), ("m2", 5))
    ]


def batches() -> list[list[tuple[str, bytes]]]:
    """Three batches with ordinary records and one of each kind that has a bucket of its own."""
    twice = pair(14, 114, 233)[0]
    return [
        [*pair(0, 100, 230), *pair(5, 105, 231), ("m1", b"\x00poison"), *pair(12, 112, 232)],
        [
            twice,
            *pair(13, 113, 232),
            twice,
            pair(5, 105, 231)[0],
            reading("m1", at("01:05")),
            reading("m1", at("00:51"), at("01:05"), import_t1_wh=101, voltage_l1_mv=230_000),
        ],
        [
            reading("m1", at("00:00", "2099-01-01"), at("01:25"), import_t1_wh=9),
            pair(14, 999, 233)[0],
            *pair(30, 10**7, 200),
            *pair(35, 140, 190),
        ],
    ]


def write_registry() -> None:
    folder = table_path("registry") / "date=2024-01-01"
    folder.mkdir(parents=True)
    rows = [
        {"meter_id": meter_id, "phases": "L1", "nominal_mv": 230_000, "fuse_a": 25, "interval_s": 300}
        for meter_id in ("m1", "m2")
    ]
    pq.write_table(pa.Table.from_pylist(rows, REGISTRY), folder / "fleet-0.parquet")


class Feed:
    """The source of one query, in its own home."""

    def __init__(self) -> None:
        self.folder = home() / "source"
        self.folder.mkdir()
        self.offset = 0
        self.files = 0
        write_registry()

    def add(self, *batches: list[tuple[str, bytes]], topic: Topic = READINGS, apart: str | None = None) -> None:
        """Batches for partition 0; the meter that is `apart` has partition 1."""
        for batch in batches:
            rows = []
            for key, value in batch:
                row = (key.encode(), value, topic.name, int(key == apart), self.offset, KAFKA_AT)
                rows.append(dict(zip(KAFKA.names, row, strict=True)))
                self.offset += 1
            path = self.folder / f"{self.files:04d}.parquet"
            pq.write_table(pa.Table.from_pylist(rows, KAFKA), path)
            os.utime(path, (self.files, self.files))  # the source takes the oldest first
            self.files += 1

    def start(self, session: SparkSession, runner: Runner, process: Process) -> StreamingQuery:
        source = session.readStream.schema(spark_schema(KAFKA)).option("maxFilesPerTrigger", 1)
        records = source.parquet(self.folder.as_uri())
        writer = records.writeStream.option("checkpointLocation", runner.checkpoint.as_uri())
        return writer.foreachBatch(process).start()


def run(session: SparkSession, feed: Feed, job: StreamingJob, process: Process | None = None) -> Runner:
    """A process that takes what there is and stops; `process` stands in for the runner's."""
    runner = Runner(job, SETTINGS)
    runner.finish_flush()
    take(session, feed, runner, process)
    return runner


def take(session: SparkSession, feed: Feed, runner: Runner, process: Process | None = None) -> None:
    query = feed.start(session, runner, process or runner.process)
    try:
        query.processAllAvailable()
    finally:
        query.stop()


def rows(table: str) -> list[tuple[Any, ...]]:
    """What any reader sees by the contract's glob, the query's own id left out."""
    pattern = glob_of(table_path(table))
    if not list(table_path(table).glob("date=*/*.parquet")):
        return []
    renamed = "replace (regexp_replace(batch, '-[0-9a-f-]{36}-', '-') as batch)" if table == "accounting" else ""
    dated = "exclude (date)" if table == "accounting" else ""  # the day of the test
    return sorted(duckdb.execute(f"select * {dated} {renamed} from '{pattern}'").fetchall(), key=repr)


def lake(runner: Runner) -> dict[str, Any]:
    """All that the job wrote: rows per table, and which files hold them."""
    found: dict[str, Any] = {table: rows(table) for table in [*runner.job.tables, "accounting"]}
    parts = (home() / "lake").glob("*/date=*/*.parquet")
    found["files"] = sorted(
        (part.parts[-3], part.name.replace(runner.query_id, "id")) for part in parts if part.parts[-3] != "registry"
    )
    found["current"] = sorted(duckdb.execute(f"select * from '{part}'").fetchall() for part in _current())
    return found


def _current() -> list[Path]:
    return sorted((home() / "lake").glob("*/current-*.parquet"))
