"""Batches for real queries: one Parquet file with the columns of Spark's Kafka source is one micro-batch."""

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from engine.job import StreamingJob
from engine.partition_tasks import Fetch
from engine.runner import Runner
from engine.settings import StreamSettings
from engine.stream import Stream
from kafka_io.offsets import Offsets
from kafka_io.ranges import KAFKA, Range
from lake.reading import Lake
from schemas.codec import encode
from schemas.topics import READINGS, Topic
from settings import home
from tests.lake_by_hand import add_rows

KAFKA_AT = datetime(2024, 3, 31, 1, tzinfo=UTC)
PLANNED_AT = datetime(2024, 3, 31, 2, tzinfo=UTC)
SETTINGS = StreamSettings(kafka_bootstrap="none:0", allowed_lateness_s=60)


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
    known = {"phases": "L1", "nominal_mv": 230_000, "fuse_a": 25, "interval_s": 300}
    add_rows("registry", [{"meter_id": meter_id, **known} for meter_id in ("m1", "m2")], "2024-01-01")


class Feed:
    """The records of one home's Kafka: each batch says how far it goes."""

    def __init__(self) -> None:
        self.folder = home() / "source"
        self.folder.mkdir()
        self.offset = 0
        self.ends: list[Offsets] = []
        write_registry()

    @property
    def files(self) -> int:
        """How many batches there are."""
        return len(self.ends)

    def add(self, *batches: list[tuple[str, bytes]], topic: Topic = READINGS, apart: str | None = None) -> None:
        """Batches for partition 0; the meter that is `apart` has partition 1."""
        for batch in batches:
            rows = []
            ends = dict(self.ends[-1]) if self.ends else {}
            for key, value in batch:
                row = (key.encode(), value, topic.name, int(key == apart), self.offset, KAFKA_AT)
                rows.append(dict(zip(KAFKA.names, row, strict=True)))
                self.offset += 1
                ends[topic.name, int(key == apart)] = self.offset
            pq.write_table(pa.Table.from_pylist(rows, KAFKA), self.folder / f"{self.files:04d}.parquet")
            self.ends.append(ends)

    @property
    def fetch(self) -> Fetch:
        """What gives the records of a range, in whatever process."""
        return partial(fetched, self.folder)


def fetched(folder: Path, place: Range) -> pa.Table:
    """The records of a range, of the files of a feed."""
    tables = [pq.read_table(file, schema=KAFKA) for file in sorted(folder.glob("*.parquet"))]
    is_here = (pc.field("topic") == place.topic) & (pc.field("partition") == place.partition)
    is_here &= (pc.field("offset") >= place.start_offset) & (pc.field("offset") < place.end_offset)
    return pa.concat_tables([KAFKA.empty_table(), *tables]).filter(is_here)


def run(session: SparkSession, feed: Feed, *jobs: StreamingJob) -> Runner:
    """A process of these jobs that takes what there is and stops. Returns the first one's runner."""
    runners = [Runner(job, SETTINGS) for job in jobs]
    take(session, feed, *runners)
    return runners[0]


def take(session: SparkSession | None, feed: Feed, *runners: Runner, topic_id: str = "one") -> None:
    """Takes what there is: what only some of the jobs have taken first, then batch by batch."""
    stream = Stream(session, runners, feed.fetch)
    for runner in runners:
        runner.resume()
    stream.catch_up({}, feed.ends[-1], {READINGS.name: topic_id})
    for ends in feed.ends:
        stream.process(ends, PLANNED_AT)
    stream.write_current(is_last=True)


def flush(runner: Runner) -> None:
    """A process that closes what is open after the last batch."""
    runner.resume()
    Stream(None, [runner]).flush(runner)


def rows(table: str) -> list[tuple[Any, ...]]:
    """What any reader sees, the query's own id and the day that it was written left out."""
    renamed = "replace (regexp_replace(batch, '-[0-9a-f-]{36}-', '-') as batch)" if table == "accounting" else ""
    dated = "exclude (date)" if table == "accounting" else ""  # the day of the test
    with Lake().duckdb() as lake:
        return sorted(lake.execute(f"select * {dated} {renamed} from {table}").fetchall(), key=repr)


def lake(runner: Runner) -> dict[str, Any]:
    """All that the job wrote: rows per table."""
    return {table: rows(table) for table in [*runner.job.tables, *runner.job.current, "accounting"]}
