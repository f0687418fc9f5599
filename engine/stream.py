"""Running streaming jobs: Kafka → transform → tables, with state by batch, accounting and restart.

Batch N reads the state that batch N−1 wrote, never the newest; N−1 stays until Spark has committed N. So a batch that
is tried again gives the same rows in the same files, whenever the process died.
"""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

import polars as pl
import pyarrow as pa
import structlog
import typer
from confluent_kafka import KafkaError, Message
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming.query import StreamingQuery

from engine import metrics
from engine.batch import BatchPlan
from engine.checkpoint import (
    KAFKA_IS_AWAY,
    LOST_IN_KAFKA,
    STATE_LOST,
    drop_unfinished,
    from_the_beginning,
    last_commit,
    lost_in_kafka,
    offsets_after,
    planned,
    planned_at,
    query_id,
    require_whole,
)
from engine.job import BatchContext, StreamingJob
from engine.partition_tasks import across, staged
from engine.partition_tasks import run as run_partitions
from engine.session import spark_session
from engine.settings import StreamSettings
from engine.watermark import watermarks
from kafka_io import clients
from kafka_io.offsets import newest_offsets
from kafka_io.ranges import RANGES
from lake.compaction import Merger
from lake.locks import job_run
from lake.publishing import BatchKey, publish_small, remove_parts, rename_in, swap_in
from lake.reading import registry_files, spark_schema, uri
from schemas.closed_lists import Bucket
from schemas.codec import encode_batch
from schemas.errors import ContractBroken, MeterstreamError, RetryLater, StateLost, exits
from schemas.tables import ACCOUNTING
from schemas.topics import Topic
from settings import home, load

log = structlog.get_logger()
NEXT_TIME = "this batch came when all that Kafka had at the flush was taken: it is the first of the next start"
SEND_TIMEOUT_S = 60
JAVA_OPTIONS = "-XX:TieredStopAtLevel=1"
"""No record goes through the JVM, so its best compiler takes longer than it saves (docs/bench.md)."""


class Runner:
    """Feeds one job with batches and writes what comes out."""

    def __init__(self, job: StreamingJob, settings: StreamSettings) -> None:
        self.job = job
        self.settings = settings
        self.checkpoint = home() / "state" / "checkpoints" / f"{job.name}-v{job.version}"
        self._first = True
        self._merger: Merger | None = None
        self._last: dict[tuple[str, int], int] | None = None
        self._begun = -1
        self._gate = threading.Lock()

    @property
    def query_id(self) -> str:
        """The query's id, which its checkpoint keeps for life."""
        return query_id(self.checkpoint)

    @property
    def _states(self) -> Path:
        return home() / "state" / self.job.name / self.query_id

    def start(self, session: SparkSession) -> StreamingQuery:
        """Starts the query; it goes on where its checkpoint stands."""
        settings = self.settings
        self.tidy()
        drop_unfinished(self.checkpoint)
        records = (
            session.readStream.format("kafka")
            .option("kafka.bootstrap.servers", settings.kafka_bootstrap)
            .option("subscribe", ",".join(topic.name for topic in self.job.topics))
            .option("startingOffsets", "earliest")
            .option("failOnDataLoss", str(not settings.accept_loss).lower())
            .option("maxOffsetsPerTrigger", settings.max_offsets_per_trigger)
            .load()
        )
        return (
            records.writeStream.queryName(self.job.name)
            .option("checkpointLocation", uri(self.checkpoint))
            .trigger(processingTime=f"{settings.trigger_s} seconds")
            .foreachBatch(self._fetch)
            .start()
        )

    def _fetch(self, records: DataFrame, batch_id: int) -> None:
        """Spark has planned the batch; its records are not asked of Spark, the tasks fetch them."""
        with self._gate:
            if self.is_at_its_end:
                raise RetryLater(NEXT_TIME)
            self._begun = batch_id
        ranges = planned(self.checkpoint, batch_id)
        places = records.sparkSession.createDataFrame(ranges, spark_schema(RANGES)) if ranges else None
        self.process(places, batch_id)

    def process(self, records: DataFrame | None, batch_id: int) -> None:
        """Writes one batch; the same rows in the same files when it is tried again."""
        key = BatchKey(self.job.name, self.query_id, f"{batch_id:08d}")
        began, after = time.monotonic(), self._states / str(batch_id)
        buckets, watermark = self._write(records, self._state(batch_id - 1), key, after)
        seconds = round(time.monotonic() - began, 2)
        metrics.batch(self.job.name, batch_id, seconds, buckets, metrics.rows_of(after), watermark)
        log.info("batch", job=self.job.name, batch=batch_id, received=sum(buckets.values()), seconds=seconds)
        if self._merger:
            self._merger.merge(before=batch_id - 1)  # whose commit may be damaged, and is then done again
        for old in self._states.iterdir():
            if int(old.name.partition(".")[0]) < batch_id - 1:
                shutil.rmtree(old)

    def end_with(self, newest: Mapping[tuple[str, int], int]) -> None:
        """Sets what it shall take, and no batch more: topic and partition → the offset that comes next."""
        topics = {topic.name for topic in self.job.topics}
        with self._gate:
            self._last = {place: offset for place, offset in newest.items() if place[0] in topics}

    @property
    def is_at_its_end(self) -> bool:
        """Whether it has committed all that it shall take, and what it began; never, where nothing was set."""
        last = last_commit(self.checkpoint)
        if self._last is None or self._begun > (-1 if last is None else last):
            return False
        taken = offsets_after(self.checkpoint, None) | offsets_after(self.checkpoint, last)
        return all(taken.get(place, 0) >= offset for place, offset in self._last.items())

    def tell(self, listener: metrics.Listener) -> None:
        """Tells where the query stands before its first batch."""
        last = last_commit(self.checkpoint)
        if last is None:
            return
        listener.taken(self.job.name, offsets_after(self.checkpoint, last))
        state = self._state(last)
        metrics.stands(self.job.name, last, metrics.rows_of(state) if state else 0)

    @property
    def is_flushed(self) -> bool:
        """Whether nothing is open after the last batch; true where there was none."""
        last = last_commit(self.checkpoint)
        return last is None or (self._states / f"{last}.flushed").exists()

    def flush(self) -> None:
        """Closes what is open after the last batch; the query must have stopped.

        A marker is written first and the new state renamed in last: a flush that was killed is done again, with the
        same rows in the same files, before the query goes on.
        """
        last = last_commit(self.checkpoint)
        if last is None or self.is_flushed:
            return
        (self._states / f"{last}.flush").mkdir(parents=True, exist_ok=True)
        key = BatchKey(self.job.name, self.query_id, f"{last:08d}f")
        self._first = True
        staged = self._states / f"{last}.flushing"
        self._write(None, self._state(last), key, staged, close_all=True)
        staged.rename(self._states / f"{last}.flushed")

    def tidy(self) -> None:
        """Leaves nothing of the job under staging: of a query that has stopped, was killed, or came before this one."""
        for left in (home() / "staging").glob(f"{self.job.name}-*"):
            shutil.rmtree(left, ignore_errors=True)

    def finish_flush(self) -> None:
        """Does a flush again that an earlier process began and did not end."""
        last = last_commit(self.checkpoint)
        if last is not None and (self._states / f"{last}.flush").exists():
            self.flush()

    def _state(self, batch_id: int) -> Path | None:
        if batch_id < 0:
            return None
        flushed = self._states / f"{batch_id}.flushed"
        folder = flushed if flushed.exists() else self._states / str(batch_id)
        if not folder.exists():
            msg = f"{self.job.name}: the state of batch {batch_id} is gone ({folder}). "
            msg += from_the_beginning(self.job.name, self.checkpoint)
            raise StateLost(msg)
        return folder

    def _write(
        self, records: DataFrame | None, before: Path | None, key: BatchKey, after: Path, close_all: bool = False
    ) -> tuple[dict[str, int], datetime | None]:
        """Writes rows, accounting and state. Returns the records by bucket, and the newest watermark."""
        job, settings = self.job, self.settings
        for left in (after, key.staging):
            shutil.rmtree(left, ignore_errors=True)
        after.mkdir(parents=True)
        clocks = [pl.read_ipc(file) for file in sorted(before.glob("*/clock.arrow"))] if before else []
        over = watermarks(clocks, settings.allowed_lateness_s, planned_at(self.checkpoint, key.number))
        context = BatchContext(settings, over, close_all)
        plan = BatchPlan(job, registry_files(), context, before, after, key.staging)
        folders: list[Path] = []
        try:
            lines = run_partitions(records, plan)
            if job.cross_partition:
                across(job.cross_partition, plan)
            for table, topic in job.sends.items():
                send(staged(plan, table), topic, settings.kafka_bootstrap)
            if self._first:
                remove_parts(key, [*job.tables, "accounting"])
            for table in job.tables:
                folders += rename_in(table, key)
            folders += self._publish_accounting(lines, key)
            for table in job.current:
                swap_in(table, key)
        finally:
            shutil.rmtree(key.staging, ignore_errors=True)
        self._first = False
        if self._merger is None:  # finds what is there, these too
            tables = [*job.tables, "accounting"]
            self._merger = Merger(f"{job.name}-{self.query_id}", tables, settings.merge_files)
        else:
            self._merger.added(folders)
        newest = plan.context.watermarks.get_column("watermark").max()
        counted = lines.group_by("bucket").agg(pl.col("records").sum())
        return dict(counted.iter_rows()), newest if isinstance(newest, datetime) else None

    def _publish_accounting(self, lines: pl.DataFrame, key: BatchKey) -> list[Path]:
        """Writes the batch's lines. Returns their folder."""
        runs: dict[str | None, dict[str, int]] = {}
        for run_id, bucket, records in lines.iter_rows():
            runs.setdefault(run_id, dict.fromkeys(Bucket, 0))[bucket] += records
        if not runs:
            return []
        rows = [
            {"run_id": run, "stage": self.job.name, "batch": str(key), "received": sum(buckets.values()), **buckets}
            for run, buckets in sorted(runs.items(), key=lambda item: item[0] or "")
        ]
        day = planned_at(self.checkpoint, key.number).date()
        return publish_small(pa.Table.from_pylist(rows, ACCOUNTING), "accounting", key, day.isoformat())


def send(rows: pl.DataFrame, topic: Topic, bootstrap: str) -> None:
    """Sends rows to a topic and waits until Kafka has them; after a kill they may come again.

    Raises:
        RetryLater: Kafka did not take them.
    """
    if not len(rows):
        return
    producer = clients.producer(bootstrap)
    refused: list[str] = []

    def on_delivery(error: KafkaError | None, _: Message) -> None:
        if error:
            refused.append(error.str())

    for meter_id, value in zip(rows.get_column("meter_id"), encode_batch(topic.entity, rows.to_arrow()), strict=True):
        while True:
            try:
                producer.produce(topic.name, key=meter_id, value=value, on_delivery=on_delivery)
                break
            except BufferError:
                producer.poll(0.1)
    left = producer.flush(SEND_TIMEOUT_S)
    if left or refused:
        msg = f"Kafka did not take {left or len(refused)} records for {topic.name}: {'; '.join(refused[:1])}"
        raise RetryLater(msg)


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


def stay(queries: list[StreamingQuery], stop: threading.Event, is_over: Callable[[], bool] = lambda: False) -> None:
    """Waits until somebody asks for the end, or until it is over by itself.

    Raises:
        StateLost: Kafka no longer has what a query has not read.
        RetryLater: Kafka was away for longer than a batch waits.
        ContractBroken: a query ended by itself.
    """
    while not stop.wait(0.5) and not is_over():
        for query in queries:
            if not query.isActive:
                raise ended(query.name, str(query.exception()))


def ended(name: str, exception: str) -> MeterstreamError:
    """What a query that has ended by itself means for whoever runs it.

    Args:
        name: of the query.
        exception: its text.
    """
    if state := STATE_LOST.search(exception):
        return StateLost(state[1] if state[1].startswith(name) else f"{name}: {state[1]}")
    if lost := next((line for line in exception.splitlines() if LOST_IN_KAFKA.search(line)), None):
        return StateLost(lost_in_kafka(name, lost.strip()))
    msg = f"query {name} ended: {exception}"
    return (RetryLater if KAFKA_IS_AWAY.search(exception) else ContractBroken)(msg)


def flushed_mark() -> Path:
    """There since the jobs last ended with a flush, until they start again."""
    return home() / "run" / "streaming.flushed"


def run(jobs: list[StreamingJob], settings: StreamSettings) -> None:
    """Runs the jobs in one driver until SIGTERM or SIGINT; SIGUSR1 before that asks for a flush at the end.

    Raises:
        RetryLater: another process runs one of them on this home.
        ContractBroken: a query ended by itself; the others are stopped.
    """
    with only_one(*[job.name for job in jobs]):
        _run(jobs, settings)


@contextmanager
def only_one(*jobs: str) -> Iterator[None]:
    """While it holds, no other process runs these jobs on this home.

    Raises:
        RetryLater: one does.
    """
    with ExitStack() as held:
        for job in jobs:
            if not held.enter_context(job_run(job)):
                msg = f"{job} runs in another process with METERSTREAM_HOME={home()}; stop that one first"
                raise RetryLater(msg)
        yield


def _run(jobs: list[StreamingJob], settings: StreamSettings) -> None:
    runners = [Runner(job, settings) for job in jobs]
    for runner in runners:
        require_whole(runner.job.name, runner.job.version, runner.checkpoint)
    stop, flush = asked_to_end(), threading.Event()
    if settings.flush:
        flush.set()
    signal.signal(signal.SIGUSR1, lambda *_: flush.set())
    session = spark_session("meterstream-" + "-".join(job.name for job in jobs), JAVA_OPTIONS)
    listener = metrics.Listener(settings.kafka_bootstrap)
    session.streams.addListener(listener)
    if settings.metrics_port:
        metrics.serve(settings.metrics_port, settings.listen)
    for runner in runners:
        runner.finish_flush()
        runner.tell(listener)
    queries = [runner.start(session) for runner in runners]
    flushed_mark().unlink(missing_ok=True)
    with served("streaming", queries):
        log.info("streaming", jobs=[job.name for job in jobs], kafka=settings.kafka_bootstrap)
        stay(queries, stop)
        if flush.is_set():
            log.info("flush", takes="what Kafka has now")
            newest = newest_offsets(settings.kafka_bootstrap, {topic for job in jobs for topic in job.topics})
            for runner in runners:
                runner.end_with(newest)
            for runner, query in zip(runners, queries, strict=True):
                while not runner.is_at_its_end:
                    if not query.isActive:
                        raise ended(query.name, str(query.exception()))
                    time.sleep(0.1)
    for runner in runners:
        if flush.is_set():
            runner.flush()
        runner.tidy()
    if flush.is_set():
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
