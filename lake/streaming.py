"""Running streaming jobs: Kafka → transform → tables, with state by batch, books and restart.

Batch N reads the state that batch N−1 wrote, never the newest; N−1 stays until Spark has committed N. So a batch that
is tried again gives the same rows in the same files, whenever the process died.
"""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import structlog
import typer
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.streaming.query import StreamingQuery
from pyspark.sql.types import StructType

from lake.decoding import KAFKA_COLUMNS
from lake.publishing import BatchKey, publish, publish_small, remove_parts, swap_file
from lake.reading import read_registry
from lake.session import spark_session, uri
from schemas.closed_lists import Bucket
from schemas.codec import arrow_schema, encode_batch
from schemas.errors import ContractBroken, StateLost, exits
from schemas.settings import Settings, load
from schemas.tables import ACCOUNTING, home, table_path
from schemas.topics import Topic

log = structlog.get_logger()


class StreamSettings(Settings):
    """Settings of the streaming jobs.

    Attributes:
        kafka_bootstrap: host:port of a Kafka broker.
        trigger_s: seconds between batches.
        max_offsets_per_trigger: most records of a batch, catch-up included; bounds memory.
        allowed_lateness_s: how far behind the newest arrival of its run a record may come, s on the arrival clock.
        recent_records: offsets per Kafka partition within which a redelivered record is recognised; several times what
            the broker leaves unacknowledged.
        max_ahead_s: how far a meter's clock may be ahead of the arrival before it is impossible.
        max_behind_s: how far behind; a meter that was offline sends readings of months ago.
        flush: on the way out take what Kafka still has, then close what is open.
        close_all: set by a flush: every window is over.
    """

    kafka_bootstrap: str
    trigger_s: float = 5
    max_offsets_per_trigger: int = 100_000
    allowed_lateness_s: int = 1_800
    recent_records: int = 10_000
    max_ahead_s: int = 36 * 3600
    max_behind_s: int = 400 * 24 * 3600
    flush: bool = False
    close_all: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a transform gives back for one batch.

    Attributes:
        tables: rows to add per lake table.
        books: run_id, bucket, records: where each input record went.
        state: what the next batch reads.
        topics: rows to send per Kafka topic, with the columns of its entity.
        current: tables that are replaced by a new version each batch.
        held: frames that several of the others come from: kept in memory until the batch is written.
    """

    tables: Mapping[str, DataFrame]
    books: DataFrame
    state: DataFrame
    topics: Mapping[Topic, DataFrame] = field(default_factory=dict)
    current: Mapping[str, DataFrame] = field(default_factory=dict)
    held: tuple[DataFrame, ...] = ()


Transform = Callable[[DataFrame, DataFrame, DataFrame, StreamSettings], Outcome]


@dataclass(frozen=True)
class StreamingJob:
    """One streaming job.

    Attributes:
        name: its module's name: query, checkpoint, output prefix, CLI word.
        version: raised when the state changes its form; part of the checkpoint's path.
        topics: what it reads.
        writes: lake table → the timestamp column that dates its rows.
        state: columns of its state.
        transform: (records, registry, state, settings) → outcome; pure, runs on static frames too.
    """

    name: str
    version: int
    topics: tuple[Topic, ...]
    writes: Mapping[str, str]
    state: StructType
    transform: Transform


class Runner:
    """Feeds one job with batches and writes what comes out."""

    def __init__(self, job: StreamingJob, settings: StreamSettings) -> None:
        self.job = job
        self.settings = settings
        self.checkpoint = home() / "state" / "checkpoints" / f"{job.name}-v{job.version}"
        self._first = True

    @property
    def query_id(self) -> str:
        """The query's id, which its checkpoint keeps for life."""
        return str(json.loads((self.checkpoint / "metadata").read_text())["id"])

    @property
    def _states(self) -> Path:
        return home() / "state" / self.job.name / self.query_id

    def start(self, session: SparkSession) -> StreamingQuery:
        """Starts the query; it goes on where its checkpoint stands."""
        settings = self.settings
        records = (
            session.readStream.format("kafka")
            .option("kafka.bootstrap.servers", settings.kafka_bootstrap)
            .option("subscribe", ",".join(topic.name for topic in self.job.topics))
            .option("startingOffsets", "earliest")
            .option("failOnDataLoss", "true")
            .option("maxOffsetsPerTrigger", settings.max_offsets_per_trigger)
            .load()
            .select(*KAFKA_COLUMNS)
        )
        return (
            records.writeStream.queryName(self.job.name)
            .option("checkpointLocation", uri(self.checkpoint))
            .trigger(processingTime=f"{settings.trigger_s} seconds")
            .foreachBatch(self.process)
            .start()
        )

    def process(self, records: DataFrame, batch_id: int) -> None:
        """Writes one batch; the same rows in the same files when it is tried again."""
        key = BatchKey(self.job.name, self.query_id, f"{batch_id:08d}")
        began = time.monotonic()
        state = self._state(records.sparkSession, batch_id - 1)
        received = self._write(records, state, key, self.settings, self._states / str(batch_id))
        seconds = round(time.monotonic() - began, 2)
        log.info("batch", job=self.job.name, batch=batch_id, received=received, seconds=seconds)
        for old in self._states.iterdir():
            if int(old.name.partition(".")[0]) < batch_id - 1:
                shutil.rmtree(old)

    @property
    def is_flushed(self) -> bool:
        """Whether nothing is open after the last batch; true where there was none."""
        last = self._last_commit()
        return last is None or (self._states / f"{last}.flushed").exists()

    def _last_commit(self) -> int | None:
        return max((int(commit.name) for commit in (self.checkpoint / "commits").glob("[0-9]*")), default=None)

    def flush(self, session: SparkSession) -> None:
        """Closes what is open after the last batch; the query must have stopped.

        A marker is written first and the new state renamed in last: a flush that was killed is done again, with the
        same rows in the same files, before the query goes on.
        """
        last = self._last_commit()
        if last is None or self.is_flushed:
            return
        (self._states / f"{last}.flush").mkdir(parents=True, exist_ok=True)
        nothing = session.createDataFrame(
            [], "key binary, value binary, topic string, partition int, offset long, timestamp timestamp"
        )
        settings = self.settings.model_copy(update={"close_all": True})
        key = BatchKey(self.job.name, self.query_id, f"{last:08d}f")
        self._first = True
        staged = self._states / f"{last}.flushing"
        self._write(nothing, self._state(session, last), key, settings, staged)
        staged.rename(self._states / f"{last}.flushed")

    def finish_flush(self, session: SparkSession) -> None:
        """Does a flush again that an earlier process began and did not end."""
        last = self._last_commit()
        if last is not None and (self._states / f"{last}.flush").exists():
            self.flush(session)

    def _state(self, session: SparkSession, batch_id: int) -> DataFrame:
        if batch_id < 0:
            return session.createDataFrame([], self.job.state)
        flushed = self._states / f"{batch_id}.flushed"
        folder = flushed if flushed.exists() else self._states / str(batch_id)
        if not folder.exists():
            msg = (
                f"{self.job.name}: the state of batch {batch_id} is gone ({folder}). Repair: stop the jobs, remove "
                f"{self.checkpoint}, remove the files {self.job.name}-{self.query_id}-* under {home() / 'lake'}, and "
                "start again: the job reads Kafka from the beginning."
            )
            raise StateLost(msg)
        return session.read.schema(self.job.state).parquet(uri(folder))

    def _write(
        self, records: DataFrame, state: DataFrame, key: BatchKey, settings: StreamSettings, next_state: Path
    ) -> int:
        outcome = self.job.transform(records, read_registry(records.sparkSession), state, settings)
        for frame in outcome.held:
            frame.persist()
        try:
            if self._first:
                shutil.rmtree(key.staging, ignore_errors=True)
                remove_parts(key, [*self.job.writes, "accounting"])
            outcome.state.coalesce(2).write.mode("overwrite").parquet(uri(next_state))
            for table, dated_by in self.job.writes.items():
                publish(outcome.tables[table], table, key, dated_by)
            for topic, rows in outcome.topics.items():
                _send(rows, topic, settings.kafka_bootstrap)
            received = self._publish_books(outcome.books, key)
            for table, rows in outcome.current.items():
                swap_file(rows, table_path(table) / "current.parquet")
        finally:
            for frame in outcome.held:
                frame.unpersist()
            shutil.rmtree(key.staging, ignore_errors=True)
        self._first = False
        return received

    def _publish_books(self, books: DataFrame, key: BatchKey) -> int:
        """Writes the batch's lines. Returns the records received."""
        runs: dict[str | None, dict[str, int]] = {}
        for row in books.groupBy("run_id", "bucket").agg(F.sum("records").alias("records")).collect():
            runs.setdefault(row.run_id, dict.fromkeys(Bucket, 0))[row.bucket] += row.records
        if not runs:
            return 0
        rows = [
            {"run_id": run, "stage": self.job.name, "batch": str(key), "received": sum(buckets.values()), **buckets}
            for run, buckets in sorted(runs.items(), key=lambda item: item[0] or "")
        ]
        batch = self.checkpoint / "offsets" / str(int(key.batch.rstrip("f")))
        started_ms = json.loads(batch.read_text().splitlines()[1])["batchTimestampMs"]  # the same when tried again
        day = datetime.fromtimestamp(started_ms / 1000, UTC).date()
        publish_small(pa.Table.from_pylist(rows, ACCOUNTING), "accounting", key, day.isoformat())
        return sum(sum(buckets.values()) for buckets in runs.values())


def _send(rows: DataFrame, topic: Topic, bootstrap: str) -> None:
    schema = arrow_schema(topic.entity)

    def encode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            table = pa.Table.from_batches([batch])
            yield pa.record_batch(
                [table.column("meter_id").combine_chunks(), pa.array(encode_batch(topic.entity, table), pa.binary())],
                names=["key", "value"],
            )

    (
        rows.select(*schema.names)
        .mapInArrow(encode, "key string, value binary")
        .write.format("kafka")
        .option("kafka.bootstrap.servers", bootstrap)
        .option("kafka.compression.type", "lz4")
        .option("topic", topic.name)
        .save()
    )


def asked_to_end() -> threading.Event:
    """Set by SIGTERM or SIGINT from now on."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


@contextmanager
def served(name: str, queries: list[StreamingQuery]) -> Iterator[None]:
    """Says by `run/<name>.ready` that a driver's queries run; at the end they are stopped."""
    ready = home() / "run" / f"{name}.ready"
    ready.parent.mkdir(parents=True, exist_ok=True)
    ready.write_text(str(os.getpid()))
    try:
        yield
    finally:
        ready.unlink(missing_ok=True)
        for query in queries:
            query.stop()


def stay(queries: list[StreamingQuery], stop: threading.Event) -> None:
    """Waits until somebody asks for the end.

    Raises:
        ContractBroken: a query ended by itself.
    """
    while not stop.wait(0.5):
        for query in queries:
            if not query.isActive:
                msg = f"query {query.name} ended: {query.exception()}"
                raise ContractBroken(msg)


def flushed_mark() -> Path:
    """There since the jobs last ended with a flush, until they start again."""
    return home() / "run" / "streaming.flushed"


def run(jobs: list[StreamingJob], settings: StreamSettings) -> None:
    """Runs the jobs in one driver until SIGTERM or SIGINT; SIGUSR1 before that asks for a flush at the end.

    Raises:
        ContractBroken: a query ended by itself; the others are stopped.
    """
    stop, flush = asked_to_end(), threading.Event()
    if settings.flush:
        flush.set()
    signal.signal(signal.SIGUSR1, lambda *_: flush.set())
    session = spark_session("meterstream-" + "-".join(job.name for job in jobs))
    runners = [Runner(job, settings) for job in jobs]
    for runner in runners:
        runner.finish_flush(session)
    queries = [runner.start(session) for runner in runners]
    flushed_mark().unlink(missing_ok=True)
    with served("streaming", queries):
        log.info("streaming", jobs=[job.name for job in jobs], kafka=settings.kafka_bootstrap)
        stay(queries, stop)
        if flush.is_set():
            for query in queries:
                query.processAllAvailable()
    if flush.is_set():
        for runner in runners:
            runner.flush(session)
        flushed_mark().touch()
    log.info("stopped", flushed=flush.is_set())
    session.stop()


def command(jobs: list[StreamingJob]) -> None:
    """The command line of one job, or of all in one driver."""

    def main(
        flush: Annotated[bool, typer.Option(help="When stopped, take what Kafka has and close open windows.")] = False,
        kafka_bootstrap: Annotated[str | None, typer.Option(help="host:port of a Kafka broker.")] = None,
        trigger_s: Annotated[float | None, typer.Option(help="Seconds between batches.")] = None,
    ) -> None:
        with exits():
            settings = load(StreamSettings, flush=flush or None, kafka_bootstrap=kafka_bootstrap, trigger_s=trigger_s)
            run(jobs, settings)

    main.__doc__ = f"Runs {', '.join(job.name for job in jobs)} on Kafka until SIGTERM or Ctrl-C."
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
