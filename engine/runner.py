"""One streaming job's batches: plan → tasks → tables → commit, with state by batch, accounting and restart.

Batch N reads the state that batch N−1 left, never the newest; N−1's stays until N+1 is done. So a batch that is tried
again gives the same rows in the same files, whenever the process died.
"""

import json
import shutil
import time
import uuid
from collections.abc import Iterable
from datetime import datetime
from functools import cached_property
from pathlib import Path

import polars as pl
import pyarrow as pa
import structlog
from confluent_kafka import KafkaError, Message

from engine import checkpoint as checkpoints
from engine import metrics, state
from engine.batch import BatchPlan, contract
from engine.job import CLOCKS, BatchContext, Source, StreamingJob
from engine.partition_tasks import AGES_S, Done, across, staged
from engine.settings import StreamSettings
from engine.watermark import watermarks
from kafka_io import clients
from kafka_io.offsets import Offsets
from kafka_io.ranges import Range
from lake.compaction import Merger
from lake.publishing import BatchKey, publish_small, remove_parts, rename_in, replace
from lake.reading import RegistryFiles, newest_registry
from schemas.closed_lists import Bucket
from schemas.codec import encode_batch
from schemas.errors import RetryLater, StateLost
from schemas.tables import ACCOUNTING
from schemas.topics import Topic
from settings import home

log = structlog.get_logger()
SEND_TIMEOUT_S = 60


class Runner:
    """A job, and how far it has come.

    Attributes:
        job: what it is.
        settings: of the streaming jobs.
        checkpoint: folder of its checkpoint.
        place: topic and partition → the offset that it takes next; what is not there it takes from the oldest on.
        topic_ids: topic → Kafka's id of it, which the place is of; what is not there nobody knows.
    """

    def __init__(self, job: StreamingJob, settings: StreamSettings) -> None:
        self.job = job
        self.settings = settings
        self.checkpoint = home() / "state" / "checkpoints" / f"{job.name}-v{job.version}"
        self.place: Offsets = {}
        self.topic_ids: dict[str, str] = {}
        self._is_first = True
        self._merger: Merger | None = None
        self._before: state.Manifest = {}
        self._clocks: dict[str, pl.DataFrame] = {}
        self._registry: RegistryFiles | None = None
        self._current: dict[tuple[str, str], state.Kept] = {}
        self._last = -1

    @cached_property
    def query_id(self) -> str:
        """The id in the names of its files."""
        return checkpoints.query_id(self.checkpoint)

    @property
    def topics(self) -> set[str]:
        """Names of what it reads."""
        return {topic.name for topic in self.job.topics}

    @property
    def _states(self) -> Path:
        return home() / "state" / self.job.name / self.query_id

    def resume(self) -> None:
        """Stands where the last batch that is done left it.

        Raises:
            StateLost: what that left is gone.
        """
        checkpoints.require_whole(self.job.name, self.job.version, self.checkpoint)
        last = checkpoints.last_commit(self.checkpoint)
        self._last, self._is_first = (-1 if last is None else last), True
        self.place = {} if last is None else checkpoints.offsets_after(self.checkpoint, last)
        self.topic_ids = {} if last is None else checkpoints.topic_ids(self.checkpoint, last)
        self._before = {} if last is None else self._left_by(last)
        self._clocks = {}
        for source in self.job.sources:
            if source.closes_windows:
                for name in self._partitions(source.topic):
                    self._clocks[name] = self._kind(name, CLOCKS, source).present
        self.tidy()
        if last is not None:
            metrics.stands(self.job.name, last, state.rows_of(self._before))

    def where(self) -> Offsets:
        """Its place, for who asks now and then."""
        return self.place

    def _partitions(self, topic: Topic) -> list[str]:
        """Names of the partitions that have state."""
        return [name for name in self._before if name.rpartition("-")[0] == topic.name]

    def _kind(self, partition: str, kind: str, source: Source) -> state.Stock:
        by = source.keys.get(kind, ())
        return state.stock(self._states, self._before, partition, kind, source.kept[kind], by)

    def unfinished(self) -> list[Range]:
        """What a batch that was begun and is not done takes: it comes first; nothing where there is none."""
        begun = checkpoints.last_plan(self.checkpoint)
        return [] if begun is None or begun == self._last else checkpoints.planned(self.checkpoint, begun)

    def begin(self, ranges: Iterable[Range], at: datetime, registry: RegistryFiles) -> BatchPlan:
        """Plans the next batch, or goes on with the one that was planned.

        Args:
            ranges: what it takes.
            at: when that was planned.
            registry: files of the registry.
        """
        number = self._last + 1
        self._undo_flush(number)
        if checkpoints.last_plan(self.checkpoint) != number:
            taken = [each for each in ranges if each.topic in self.topics]
            starts = self.place | {(each.topic, each.partition): each.start_offset for each in taken}
            ends = starts | {(each.topic, each.partition): each.end_offset for each in taken}
            checkpoints.plan(self.checkpoint, number, starts, ends, at, self.topic_ids)
        return self._plan(f"{number:08d}", registry)

    def _undo_flush(self, number: int) -> None:
        """A batch that is done again: what was closed after it, and what that left, goes."""
        marks = [mark for mark in (self._flush(number), self._flushed(number)) if mark.exists()]
        if marks:
            key = BatchKey(self.job.name, self.query_id, f"{number:08d}f")
            remove_parts(key, [*self.job.tables, "accounting"])
        for mark in marks:
            mark.unlink() if mark.is_file() else mark.rmdir()

    def forget_unfinished(self) -> None:
        """What a batch takes that was begun and is not done is gone: it is planned anew."""
        checkpoints.forget_plan(self.checkpoint, self._last + 1)

    def _plan(self, batch: str, registry: RegistryFiles, close_all: bool = False) -> BatchPlan:
        key = BatchKey(self.job.name, self.query_id, batch, f".{uuid.uuid4().hex[:8]}")
        planned_at = checkpoints.planned_at(self.checkpoint, key.number)
        over = watermarks(self._clocks.values(), self.settings.allowed_lateness_s, planned_at)
        context = BatchContext(self.settings, over, close_all, is_anew=registry != self._registry)
        return BatchPlan(self.job, context, key, planned_at, self._before, self._states, key.staging)

    def finish(self, plan: BatchPlan, done: list[Done], registry: RegistryFiles, began: float) -> None:
        """Makes a batch visible whose partitions are done, and commits it.

        Args:
            plan: of `begin`.
            done: of its tasks.
            registry: files of the registry.
            began: when the tasks began, on the monotonic clock.
        """
        number = plan.key.number
        buckets, after = self._published(plan, done, registry)
        checkpoints.commit(self.checkpoint, number, after)
        state.forget(self._states, self._before, after)
        self._before, self._last, self._registry = after, number, registry
        for each in done:
            self._clocks |= each.clocks
        seconds = round(time.monotonic() - began, 2)
        newest = plan.context.watermarks.get_column("watermark").max()
        metrics.stands(self.job.name, number, state.rows_of(after))
        metrics.batch(self.job.name, seconds, buckets, newest if isinstance(newest, datetime) else None)
        self.place = checkpoints.offsets_after(self.checkpoint, number)  # counted first: then it is no longer behind
        since_s = time.time() - plan.planned_at.timestamp()
        counts = [sum(each) for each in zip(*[one.ages for one in done], strict=True)]
        metrics.visible(self.job.name, [age_s + since_s for age_s in AGES_S], counts)
        log.info("batch", job=self.job.name, batch=number, received=sum(buckets.values()), seconds=seconds)
        if self._merger:
            self._merger.merge(before=number - 1)  # whose commit may be damaged, and is then done again
        self._forget_flushes(number - 1)

    def _published(
        self, plan: BatchPlan, done: list[Done], registry: RegistryFiles
    ) -> tuple[dict[str, int], state.Manifest]:
        """Renames rows into their tables. Returns the records by bucket, and what the batch leaves."""
        job, key = self.job, plan.key
        changed = [change for each in done for change in each.kept]
        if job.cross_partition:
            changed += across(plan, newest_registry(registry))
        for table, topic in job.sends.items():
            send(staged(plan, table), topic, self.settings.kafka_bootstrap)
        if self._is_first:
            remove_parts(key, [*job.tables, "accounting"])
        folders: list[Path] = []
        for table in job.tables:
            folders += rename_in(table, key)
        lines = [line for each in done for line in each.lines]
        folders += self._publish_accounting(lines, plan)
        shutil.rmtree(plan.staging, ignore_errors=True)
        self._is_first = False
        if self._merger is None:  # finds what is there, these too
            tables = [*job.tables, "accounting"]
            self._merger = Merger(f"{job.name}-{self.query_id}", tables, self.settings.merge_files)
        else:
            self._merger.added(folders)
        buckets: dict[str, int] = {}
        for _, bucket, records in lines:
            buckets[bucket] = buckets.get(bucket, 0) + records
        return buckets, state.merged(plan.before, changed)

    def _publish_accounting(self, lines: list[tuple[str | None, str, int]], plan: BatchPlan) -> list[Path]:
        """Writes the batch's lines. Returns their folder."""
        runs: dict[str | None, dict[str, int]] = {}
        for run_id, bucket, records in lines:
            runs.setdefault(run_id, dict.fromkeys(Bucket, 0))[Bucket(bucket)] += records
        if not runs:
            return []
        rows = [
            {
                "run_id": run,
                "stage": self.job.name,
                "batch": str(plan.key),
                "received": sum(buckets.values()),
                **buckets,
            }
            for run, buckets in sorted(runs.items(), key=lambda item: item[0] or "")
        ]
        day = plan.planned_at.date().isoformat()
        return publish_small(pa.Table.from_pylist(rows, ACCOUNTING), "accounting", plan.key, day)

    def write_current(self) -> None:
        """Writes the tables that have their newest version only, of the partitions whose state has changed since."""
        for table, current in self.job.current.items():
            source = next(source for source in self.job.sources if current.kind in source.state)
            for partition in self._partitions(source.topic):
                kept = self._before[partition].get(current.kind)
                if kept is None or self._current.get((table, partition)) == kept:
                    continue
                rows = contract(current.rows(self._kind(partition, current.kind, source).present), table)
                replace(table, f"current-{partition}.parquet", rows)
                self._current[table, partition] = kept

    @property
    def is_flushed(self) -> bool:
        """Whether nothing is open after the last batch; true where there was none."""
        last = checkpoints.last_commit(self.checkpoint)
        return last is None or self._flushed(last).exists()

    def flush_plan(self, registry: RegistryFiles) -> BatchPlan | None:
        """Begins to close what is open after the last batch; None where nothing is.

        A marker is written first and what is left then, last: a flush that was killed is done again, with the same rows
        in the same files, before the job goes on.
        """
        if self._last < 0 or self.is_flushed:
            return None
        self._flush(self._last).mkdir(parents=True, exist_ok=True)
        self._is_first = True
        return self._plan(f"{self._last:08d}f", registry, close_all=True)

    def finish_flush(self, plan: BatchPlan, done: list[Done], registry: RegistryFiles) -> None:
        """Makes visible what a flush has closed."""
        _, after = self._published(plan, done, registry)
        checkpoints.write(self._flushed(plan.key.number), json.dumps(after))
        self.resume()

    @property
    def is_flush_begun(self) -> bool:
        """Whether an earlier process began a flush and did not end it."""
        return self._last >= 0 and self._flush(self._last).exists() and not self.is_flushed

    def tidy(self) -> None:
        """Leaves nothing of the job under staging: of one that has stopped, was killed, or came before this one."""
        for left in (home() / "staging").glob(f"{self.job.name}-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _flush(self, batch: int) -> Path:
        return self._states / f"{batch}.flush"

    def _flushed(self, batch: int) -> Path:
        return self._states / f"{batch}.flushed"

    def _forget_flushes(self, before: int) -> None:
        for mark in self._states.glob("*.flush*"):
            if int(mark.name.partition(".")[0]) < before:
                mark.unlink() if mark.is_file() else mark.rmdir()

    def _left_by(self, batch: int) -> state.Manifest:
        """What a batch, or the flush after it, left.

        Raises:
            StateLost: it is gone, or cannot be read.
        """
        flushed = self._flushed(batch)
        try:
            found: state.Manifest
            found = (
                json.loads(flushed.read_text()) if flushed.exists() else checkpoints.state_after(self.checkpoint, batch)
            )
        except (OSError, ValueError, LookupError) as error:
            msg = f"{self.job.name}: the state of batch {batch} is gone ({error}). "
            raise StateLost(msg + checkpoints.from_the_beginning(self.job.name, self.checkpoint)) from error
        return found


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
