"""A micro-batch, cut by Kafka partition: the one place where Spark hands work to Polars.

Kafka's key is the meter, so a Kafka partition has all rows of its meters and nothing need be shuffled. A task has one
partition or several. It fetches and decodes each once, for all jobs of the micro-batch; then each job's rule is applied
with what the job's batch before left for the partition (`engine/batch.py`), and rows and state are written under names
that nobody uses again. The driver gets the accounting and these names, and says by an intent that they count
(`engine/intents.py`); what a batch has no rows of keeps its state.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache

import numpy as np
import polars as pl
import pyarrow as pa
from pyspark.sql import SparkSession

from engine import lots, state
from engine.batch import Arrived, BatchPlan, declared
from engine.decoding import decoded
from engine.job import BatchContext, Frames, Source, StreamingJob
from engine.settings import StreamSettings
from engine.state import hashes_of, rows_of
from engine.watermark import watermarks
from kafka_io.ranges import KAFKA, Range
from lake.reading import RegistryFiles, newest_registry, registry_files
from lake.store import store, used
from lake.tables import Part, put_part, read_parts
from schemas.tables import DATED_BY

CROSS_PARTITION = "cross_partition"
"""Name of the state that belongs to no partition."""
ROWS_OF_A_TASK = 20_000
"""Fewer go into one task: a second one costs what a few thousand records cost."""
METER = ("meter_id",)
AGES_S = [0.0, *(0.01 * 1.25**step for step in range(73))]  # 10 ms to a day, each a quarter more
Fetch = Callable[[Range], pa.Table]


@dataclass(frozen=True)
class MicroBatch:
    """What is done at a time, by one set of tasks.

    Attributes:
        plans: of the jobs that take part.
        ranges: what came; each of the jobs reads all of its topics.
        fetch: gives the records of a range, columns `KAFKA`.
        registry: files of the registry.
        store: URL of what has tables and state.
    """

    plans: tuple[BatchPlan, ...]
    ranges: tuple[Range, ...]
    fetch: Fetch
    registry: RegistryFiles
    store: str

    @property
    def planned_at(self) -> float:
        """When it was planned, seconds since 1970: all of its batches are of one plan."""
        return self.plans[0].planned_at.timestamp()


@dataclass
class Done:
    """What a job's partitions of a task have come to.

    Attributes:
        job: its name.
        lines: run_id, bucket and records, of the accounting.
        kept: what changed of the state.
        parts: files of rows, in no commit yet.
        clocks: partition → its clock, of a job that closes windows.
        ages: how long before the micro-batch was planned records reached Kafka: counts by `AGES_S`, upper ends.
    """

    job: str
    lines: list[tuple[str | None, str, int]] = field(default_factory=list)
    kept: list[state.Change] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    clocks: dict[str, pl.DataFrame] = field(default_factory=dict)
    ages: list[int] = field(default_factory=lambda: [0] * len(AGES_S))


@dataclass(frozen=True)
class Place:
    """A Kafka partition in a micro-batch.

    Attributes:
        topic: its topic.
        partition: its number.
        came: what came of it; None where nothing did.
        state_rows: rows of state that rules are handed whatever came.
    """

    topic: str
    partition: int
    came: Range | None = None
    state_rows: int = 0

    @property
    def name(self) -> str:
        """As state and files name it."""
        return f"{self.topic}-{self.partition}"

    @property
    def records(self) -> int:
        """How many came."""
        return self.came.records if self.came else 0

    @property
    def rows(self) -> int:
        """How many a rule meets, about."""
        return self.records + self.state_rows


def run(session: SparkSession | None, micro_batch: MicroBatch) -> list[Done]:
    """Does every partition that has rows, or of which a window may be over.

    Args:
        session: whose tasks do it; without one it is done here.
        micro_batch: what.

    Raises:
        PySparkException, Py4JJavaError: a task failed.
    """
    places = _places(micro_batch)
    if session is None or not places:
        return _task(micro_batch, 0, places)
    context = session.sparkContext
    shares = _shares(places, context.defaultParallelism)

    def work(number: int, _: Iterable[int]) -> Iterator[Done]:
        with used(micro_batch.store):
            return iter(_task(micro_batch, number, shares[number]))

    return list(context.parallelize(range(len(shares)), len(shares)).mapPartitionsWithIndex(work).collect())


def warm_up(session: SparkSession, jobs: Sequence[StreamingJob], settings: StreamSettings) -> None:
    """Lets the process of each task slot apply all rules to no rows: what they load is not loaded by the first batch.

    Args:
        session: whose.
        jobs: whose rules.
        settings: of the jobs.
    """
    spark = session.sparkContext
    slots = spark.defaultParallelism
    registry, url = registry_files(), store().url
    context = BatchContext(settings, watermarks((), settings.allowed_lateness_s, datetime.now(UTC)))

    def work(_: int) -> None:
        with used(url):
            meters = _registry(registry)[0].clear()
        for job in jobs:
            for source in job.sources:
                arrived = Arrived(decoded(KAFKA.empty_table(), source.topic))
                kinds = source.kept.items()
                stocks = {
                    kind: state.Stock.anew(schema.to_frame(), source.keys.get(kind, ())) for kind, schema in kinds
                }
                parts = [lots.Part("", 0, 0, 0, stocks)]
                handed = lots.taken(parts, source, arrived, context)
                beside = {kind: other.state[kind].to_frame() for kind, other in job.beside(source).items()}
                known = {**lots.together(source, handed), **beside}
                lots.applied(parts, handed, known, arrived, job, source, meters, context)

    spark.parallelize(range(slots), slots).foreach(work)


def _places(micro_batch: MicroBatch) -> list[Place]:
    """Partitions of which a record came, and others that a rule is called for all the same."""
    places = {(each.topic, each.partition): Place(each.topic, each.partition, each) for each in micro_batch.ranges}
    for plan in micro_batch.plans:
        for name in sorted(set(plan.before) - {CROSS_PARTITION}):
            topic, _, partition = name.rpartition("-")
            place = Place(topic, int(partition))
            if _is_called(plan, place):
                places.setdefault((topic, int(partition)), place)
    whole = [plan.before for plan in micro_batch.plans if plan.context.close_all or plan.context.is_anew]
    return [
        replace(place, state_rows=sum(rows_of(before, place.name) for before in whole)) for place in places.values()
    ]


def _is_called(plan: BatchPlan, place: Place) -> bool:
    """Whether a job's rule is called for a partition."""
    source = next((source for source in plan.job.sources if source.topic.name == place.topic), None)
    if source is None:
        return False
    return bool(place.came) or (place.name in plan.before and (source.closes_windows or plan.context.close_all))


def _shares(places: list[Place], most: int) -> list[list[Place]]:
    """The partitions of each task: few rows in one, many in as many as there are cores, equal in rows.

    Partitions of one number, of whichever topics, have the same meters and stay together.
    """
    numbered: dict[int, list[Place]] = {}
    for place in places:
        numbered.setdefault(place.partition, []).append(place)
    rows = {number: sum(place.rows for place in those) for number, those in numbered.items()}
    tasks = max(1, min(most, len(numbered), sum(rows.values()) // ROWS_OF_A_TASK))
    shares: list[list[Place]] = [[] for _ in range(tasks)]
    sizes = [0] * tasks
    for number in sorted(numbered, key=lambda number: (-rows[number], number)):
        smallest = sizes.index(min(sizes))
        shares[smallest] += numbered[number]
        sizes[smallest] += rows[number] + 1
    return shares


def _task(micro_batch: MicroBatch, number: int, places: list[Place]) -> list[Done]:
    """A task: its partitions one after the other, each read once; then the rows, a file of each table and day."""
    done = {plan.job.name: Done(plan.job.name) for plan in micro_batch.plans}
    rows: dict[tuple[str, str], list[pl.DataFrame]] = {}
    kept: dict[str, list[state.Changed]] = {name: [] for name in done}
    for lot in _lots(micro_batch, places):
        arrived = _arrived(lot, micro_batch)
        ages = _ages(arrived.rows, micro_batch.planned_at)
        for plan in micro_batch.plans:
            called = [place for place in lot if _is_called(plan, place)]
            if not called:
                continue
            so_far = kept[plan.job.name]
            out, mine = _applied(plan, called, arrived, micro_batch.registry, so_far), done[plan.job.name]
            mine.lines += out.settled.accounting.rows()
            mine.ages = [one + other for one, other in zip(mine.ages, ages, strict=True)]
            mine.clocks |= out.clocks
            so_far += out.changed
            for table, frame in out.settled.tables.items():
                if len(frame):
                    rows.setdefault((plan.job.name, table), []).append(frame)
    for plan in micro_batch.plans:
        mine = done[plan.job.name]
        mine.kept = state.write(plan.states, plan.number, kept[plan.job.name])
        for table in plan.job.tables:
            mine.parts += _put_rows(rows.pop((plan.job.name, table), []), table, plan, f"t{number}")
    return list(done.values())


def _lots(micro_batch: MicroBatch, places: list[Place]) -> list[list[Place]]:
    """The partitions that are done at once: all of a topic where they are few rows, else each by itself.

    Topics whose state a rule looks at that reads another one come first.
    """
    lots = []
    jobs = [plan.job for plan in micro_batch.plans]
    first = {other.topic.name for job in jobs for source in job.sources for other in job.beside(source).values()}
    for topic in sorted(dict.fromkeys(place.topic for place in places), key=lambda topic: topic not in first):
        of_topic = sorted((place for place in places if place.topic == topic), key=lambda place: place.partition)
        sources = [source for plan in micro_batch.plans for source in plan.job.sources if source.topic.name == topic]
        is_small = sum(place.rows for place in of_topic) <= ROWS_OF_A_TASK
        at_once = is_small and all(source.is_by_meter for source in sources)
        lots += [of_topic] if at_once else [[place] for place in of_topic]
    return lots


def _arrived(lot: list[Place], micro_batch: MicroBatch) -> Arrived:
    """The decoded records of partitions of a topic."""
    topics = {topic.name: topic for plan in micro_batch.plans for topic in plan.job.topics}
    came = [micro_batch.fetch(place.came) for place in lot if place.came]
    return Arrived(decoded(pa.concat_tables([KAFKA.empty_table(), *came]), topics[lot[0].topic]))


def _applied(
    plan: BatchPlan, places: list[Place], arrived: Arrived, registry: RegistryFiles, so_far: list[state.Changed]
) -> lots.Applied:
    """A job's rule applied to partitions of a topic; `so_far` has what the task changed of the job's state before."""
    source, context = plan.job.source(places[0].topic), plan.context
    parts = [
        lots.Part(
            place.name,
            place.partition,
            place.came.start_offset if place.came else None,
            place.records,
            state.stocks(plan.states, plan.before, place.name, source.kept, source.keys),
        )
        for place in places
    ]
    handed = lots.taken(parts, source, arrived, context)
    known = lots.together(source, handed)
    newest = {(change.partition, change.kind): change.stock for change in so_far} if source.beside else {}
    for kind, other in plan.job.beside(source).items():
        names = [f"{other.topic.name}-{place.partition}" for place in places]
        kept = [
            newest.get((name, kind))
            or state.stock(plan.states, plan.before, name, kind, other.state[kind], other.by[kind])
            for name in names
        ]
        known[kind] = lots.looked_at(kept, arrived)
    meters = _registry_of(registry, context, source, arrived, known)
    return lots.applied(parts, handed, known, arrived, plan.job, source, meters, context)


def _ages(rows: pl.DataFrame, at: float) -> list[int]:
    """How many records reached Kafka how long before; see `Done.ages`."""
    if rows.is_empty():
        return [0] * len(AGES_S)
    ages_s = (at - rows.get_column("kafka_at").dt.epoch("us") / 1e6).fill_null(0.0).clip(0.0, AGES_S[-1])
    counts = np.bincount(np.searchsorted(AGES_S, ages_s.to_numpy()), minlength=len(AGES_S))
    return [int(count) for count in counts]


def _registry_of(
    files: RegistryFiles, context: BatchContext, source: Source, arrived: Arrived, known: Frames
) -> pl.DataFrame:
    """The registry's rows of the meters that a rule meets.

    Of state that is found by its meter the records' meters count, and what is due; others are not looked up.
    """
    if context.close_all or context.is_anew or "meter_id" not in arrived.valid.columns:
        return _registry(files)[0]
    meters = arrived.hashes(METER)
    others = [kind for kind in source.state if kind in source.due or "meter_id" not in source.by.get(kind, ())]
    kept = [known[kind].select("meter_id") for kind in others if "meter_id" in source.state[kind]]
    further = hashes_of(pl.concat(kept), METER) if kept else meters.clear()
    if (is_further := ~further.is_in(meters.implode())).any():
        return _rows_of(files, pl.concat([meters, further.filter(is_further)]))
    if arrived.registry is None:
        arrived.registry = _rows_of(files, meters)
    return arrived.registry


def _rows_of(files: RegistryFiles, meters: pl.Series) -> pl.DataFrame:
    registry, hashes = _registry(files)
    return registry.filter(hashes.is_in(meters.implode()))


@lru_cache(maxsize=1)
def _registry(files: RegistryFiles) -> tuple[pl.DataFrame, pl.Series]:
    """The registry and its meters' keys; made once per process and change of the files."""
    registry = newest_registry(files)
    return registry, hashes_of(registry, METER)


def across(plan: BatchPlan, registry: pl.DataFrame, parts: Sequence[Part]) -> tuple[list[state.Change], list[Part]]:
    """The step after all partitions, on the driver, for what does not belong to one meter.

    Args:
        plan: of the batch.
        registry: the newest row of each meter.
        parts: files of rows of its tasks.

    Returns:
        What changed of its state, and further files of rows.
    """
    assert plan.job.cross_partition
    kinds = plan.job.cross_partition_state
    stocks = state.stocks(plan.states, plan.before, CROSS_PARTITION, kinds, {})
    known = {kind: state.Taken(stock.is_there, stock.present) for kind, stock in stocks.items()}
    handed = {table: read_parts(table, parts) for table in plan.job.hands}
    given = plan.job.cross_partition(handed, registry, {kind: one.rows for kind, one in known.items()}, plan.context)
    output = declared(given, plan.job, kinds)
    further = [
        part for table, frame in output.tables.items() for part in _put_rows([frame], table, plan, CROSS_PARTITION)
    ]
    changed = state.changes(CROSS_PARTITION, stocks, known, output.state, {})
    return state.write(plan.states, plan.number, changed), further


def _put_rows(frames: list[pl.DataFrame], table: str, plan: BatchPlan, name: str) -> list[Part]:
    """Writes rows of a table, a file per date. Returns these."""
    if not any(len(frame) for frame in frames):
        return []
    rows = pl.concat(frames)
    dates = rows.select(date=pl.col(DATED_BY[table]).dt.date()).to_series()
    days = dates.unique().to_list()
    parts = []
    for date in days:
        those = rows if len(days) == 1 else rows.filter(dates.is_null() if date is None else dates == date)
        day = None if date is None else date.isoformat()
        parts.append(put_part(table, those, f"{plan.job.name}-{plan.number:08d}-{name}", day))
    return parts
