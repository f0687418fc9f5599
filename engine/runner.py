"""One streaming job's batches: plan → tasks → intent → tables, with state by batch, accounting and restart.

Batch N reads the state that batch N−1 left, by its intent. What tasks write is there for nobody until the intent is
put; from then on the batch is not made again, and whoever comes adds its files to the tables, once. So whenever the
process dies, no row is missing and none is there twice.
"""

import time
from collections.abc import Iterable
from datetime import datetime

import polars as pl
import structlog
from confluent_kafka import KafkaError, Message

from engine import metrics, state
from engine.batch import BatchPlan, contract
from engine.intents import Intent, Intents
from engine.job import CLOCKS, BatchContext, Source, StreamingJob
from engine.partition_tasks import AGES_S, Done, across
from engine.settings import StreamSettings
from engine.watermark import watermarks
from kafka_io import clients
from kafka_io.offsets import Offsets
from kafka_io.ranges import Range
from lake.reading import RegistryFiles, newest_registry
from lake.store import store
from lake.tables import Commit, Part, Writer, put_part, read_parts
from schemas.closed_lists import Bucket
from schemas.codec import encode_batch
from schemas.errors import RetryLater
from schemas.tables import ACCOUNTING, polars_schema
from schemas.topics import Topic

log = structlog.get_logger()
SEND_TIMEOUT_S = 60


class Runner:
    """A job, and how far it has come.

    Attributes:
        job: what it is.
        settings: of the streaming jobs.
        intents: what its batches have come to.
        writer: of its tables.
        place: topic and partition → the offset that it takes next; what is not there it takes from the oldest on.
        topic_ids: topic → Kafka's id of it, which the place is of; what is not there nobody knows.
        is_flushed: whether nothing is open after the last batch; true where there was none.
    """

    def __init__(self, job: StreamingJob, settings: StreamSettings, writer: Writer | None = None) -> None:
        """Stands nowhere yet.

        Args:
            job: what it is.
            settings: of the streaming jobs.
            writer: of its tables, which the jobs of a driver share; else it has its own.
        """
        self.job = job
        self.settings = settings
        self.intents = Intents(job.name, job.version)
        self.place: Offsets = {}
        self.topic_ids: dict[str, str] = {}
        self.is_flushed = True
        self.writer = writer or Writer()
        self._older: state.Manifest = {}
        self._before: state.Manifest = {}
        self._clocks: dict[str, pl.DataFrame] = {}
        self._registry: RegistryFiles | None = None
        self._current: dict[tuple[str, str], state.Kept] = {}
        self._last = -1

    @property
    def topics(self) -> set[str]:
        """Names of what it reads."""
        return {topic.name for topic in self.job.topics}

    def resume(self) -> None:
        """Stands where the last batch that has an intent left it, and does what that batch has still to do.

        Raises:
            StateLost: what that left is gone.
            RetryLater: the store, or Kafka, does not answer.
        """
        self.intents.require_id()  # before somebody gives it one
        committed = self.writer.newest([*self.job.tables, "accounting"], self.intents.app)
        last = self.intents.newest()  # after the tables: what they have, an intent came before
        self.intents.require_all(last.number if last else -1, committed)
        if last:
            self.send(last)
            self.writer.add(last.parts, self.intents.commit(last.number))
        self._last = last.number if last else -1
        self.place = dict(last.ends) if last else {}
        self.topic_ids = dict(last.topic_ids) if last else {}
        self._before = last.state if last else {}
        self.is_flushed = last.is_flush if last else True
        self._clocks, self._older = {}, {}
        self._tidy()
        for source in self.job.sources:
            if source.closes_windows:
                for name in self._partitions(source.topic):
                    self._clocks[name] = self._kind(name, CLOCKS, source).present
        if last:
            metrics.stands(self.job.name, last.number, state.rows_of(self._before))

    def require_alone(self) -> None:
        """Raises RetryLater where another driver has gone on with the job: it removes state that this one reads."""
        self.intents.require_alone(self._last)

    def _tidy(self) -> None:
        """Removes state of batches up to the last one that it does not name: of tries that failed, and of before."""
        if self._last >= 0:
            named, folder = state.names(self._before), self.intents.states
            names = [path.rpartition("/")[2] for path in store().paths(folder)]
            store().delete(f"{folder}/{name}" for name in names if int(name[:8]) <= self._last and name not in named)

    def where(self) -> Offsets:
        """Its place, for who asks now and then."""
        return self.place

    def _partitions(self, topic: Topic) -> list[str]:
        """Names of the partitions that have state."""
        return [name for name in self._before if name.rpartition("-")[0] == topic.name]

    def _kind(self, partition: str, kind: str, source: Source) -> state.Stock:
        by = source.keys.get(kind, ())
        return state.stock(self.intents.states, self._before, partition, kind, source.kept[kind], by)

    def plan(
        self, ranges: Iterable[Range], at: datetime, registry: RegistryFiles, close_all: bool = False
    ) -> BatchPlan:
        """Plans the next batch.

        Args:
            ranges: what it takes.
            at: when that was planned.
            registry: files of the registry.
            close_all: whether it closes what is open, whatever the time.
        """
        taken = [each for each in ranges if each.topic in self.topics]
        starts = self.place | {(each.topic, each.partition): each.start_offset for each in taken}
        ends = starts | {(each.topic, each.partition): each.end_offset for each in taken}
        over = watermarks(self._clocks.values(), self.settings.allowed_lateness_s, at)
        context = BatchContext(self.settings, over, close_all, is_anew=registry != self._registry)
        return BatchPlan(self.job, context, self._last + 1, at, self._before, self.intents.states, starts, ends)

    def say(self, plan: BatchPlan, done: list[Done], registry: RegistryFiles) -> Intent:
        """Says what a batch has come to whose partitions are done: from now on it is not made again.

        Args:
            plan: of `plan`.
            done: of its tasks.
            registry: files of the registry.

        Raises:
            RetryLater: another driver has done it, or the store does not answer.
        """
        intent = self._intent(plan, done, registry)
        self.intents.put(intent)
        return intent

    def finish(self, plan: BatchPlan, intent: Intent, done: list[Done], registry: RegistryFiles, began: float) -> None:
        """Stands after a batch whose files are in their tables.

        Args:
            plan: of `plan`.
            intent: of `say`.
            done: of its tasks.
            registry: files of the registry.
            began: when the tasks began, on the monotonic clock.
        """
        self._forget(intent)
        self._older, self._before, self._last, self._registry = self._before, intent.state, intent.number, registry
        self.is_flushed = intent.is_flush
        for each in done:
            self._clocks |= each.clocks
        buckets: dict[str, int] = {}
        for _, bucket, records in [line for each in done for line in each.lines]:
            buckets[bucket] = buckets.get(bucket, 0) + records
        seconds = round(time.monotonic() - began, 2)
        newest = plan.context.watermarks.get_column("watermark").max()
        metrics.stands(self.job.name, intent.number, state.rows_of(intent.state))
        metrics.batch(self.job.name, seconds, buckets, newest if isinstance(newest, datetime) else None)
        self.place = dict(intent.ends)  # counted first: then it is no longer behind
        since_s = time.time() - plan.planned_at.timestamp()
        counts = [sum(each) for each in zip(*[one.ages for one in done], strict=True)]
        metrics.visible(self.job.name, [age_s + since_s for age_s in AGES_S], counts)
        log.info("batch", job=self.job.name, batch=intent.number, received=sum(buckets.values()), seconds=seconds)

    def _intent(self, plan: BatchPlan, done: list[Done], registry: RegistryFiles) -> Intent:
        """What a batch has come to: what tasks have written, the step across partitions, and the accounting."""
        changed = [change for each in done for change in each.kept]
        parts = [part for each in done for part in each.parts]
        if self.job.cross_partition:
            further, more = across(plan, newest_registry(registry), parts)
            changed, parts = changed + further, parts + more
        parts += self._put_accounting([line for each in done for line in each.lines], plan)
        after = state.merged(plan.before, changed)
        return Intent(
            plan.number, plan.planned_at, plan.starts, plan.ends, self.topic_ids, after, tuple(parts),
            plan.context.close_all,
        )  # fmt: skip

    def _put_accounting(self, lines: list[tuple[str | None, str, int]], plan: BatchPlan) -> list[Part]:
        """Writes the batch's lines."""
        runs: dict[str | None, dict[str, int]] = {}
        for run_id, bucket, records in lines:
            runs.setdefault(run_id, dict.fromkeys(Bucket, 0))[Bucket(bucket)] += records
        if not runs:
            return []
        batch = f"{self.intents.app}-{plan.number:08d}"
        rows = [
            {"run_id": run, "stage": self.job.name, "batch": batch, "received": sum(buckets.values()), **buckets}
            for run, buckets in sorted(runs.items(), key=lambda item: item[0] or "")
        ]
        frame = pl.DataFrame(rows, schema=polars_schema(ACCOUNTING))
        name = f"{self.job.name}-{plan.number:08d}-accounting"
        return [put_part("accounting", frame, name, plan.planned_at.date().isoformat())]

    def send(self, intent: Intent) -> None:
        """Sends what a batch has for Kafka, where that is not done yet; after a kill it may come again.

        Raises:
            RetryLater: Kafka, or the store, does not answer.
        """
        sent = {table: topic for table, topic in self.job.sends.items() if table in {p.table for p in intent.parts}}
        if sent and not self.intents.is_sent(intent.number):
            for table, topic in sent.items():
                send(read_parts(table, intent.parts), topic, self.settings.kafka_bootstrap)
            self.intents.sent(intent.number)

    def _forget(self, intent: Intent) -> None:
        """Removes state that neither this batch nor the one before it left."""
        gone = state.names(self._older) - state.names(self._before, intent.state)
        store().delete(f"{self.intents.states}/{name}" for name in gone)
        self.intents.forget(intent.number)

    def write_current(self) -> None:
        """Writes the tables that have their newest version only, of the partitions whose state has changed since."""
        for table, current in self.job.current.items():
            source = next(source for source in self.job.sources if current.kind in source.state)
            parts, written = [], {}
            for partition in self._partitions(source.topic):
                kept = self._before[partition].get(current.kind)
                if kept is None or self._current.get((table, partition)) == kept:
                    continue
                number = partition.rpartition("-")[2]
                rows = contract(current.rows(self._kind(partition, current.kind, source).present), table)
                parts.append(put_part(table, rows, f"{self.job.name}-{self._last:08d}-current", number))
                written[table, partition] = kept
            if parts:
                commit = Commit(f"{self.intents.app}-current", self._last)
                self.writer.replace(table, parts, commit)
                self._current |= written


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
