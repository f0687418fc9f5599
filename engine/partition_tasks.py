"""A micro-batch, cut by Kafka partition: the one place where Spark hands work to Polars.

Kafka's key is the meter, so a Kafka partition has all rows of its meters and nothing need be shuffled. A task has one
partition or several. It fetches and decodes each once, for all jobs of the micro-batch; then each job's rule is applied
with what the job's batch before left for the partition (`engine/batch.py`), and rows and state are written to files of
the task's own. The driver gets the accounting and the names of the files. Rows lie under staging until the driver
renames them in; what a batch has no rows of keeps its state.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from pyspark.sql import SparkSession

from engine import state
from engine.batch import Arrived, BatchPlan, declared, settled
from engine.decoding import decoded
from engine.job import CLOCKS, MEMORY, Frames, Source
from kafka_io.ranges import KAFKA, Range
from lake.publishing import COMPRESSION
from lake.reading import RegistryFiles, newest_registry
from schemas.tables import DATED_BY, TABLES, polars_schema
from schemas.topics import Topic

CROSS_PARTITION = "cross_partition"
"""Name of the state that belongs to no partition."""
NO_DATE = "__HIVE_DEFAULT_PARTITION__"  # as Spark names it
RECORDS_OF_A_TASK = 20_000
"""Fewer go into one task: a second one costs what a few thousand records cost."""
OF_A_TASK = "t{}"
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
        at: when it was planned, seconds since 1970.
    """

    plans: tuple[BatchPlan, ...]
    ranges: tuple[Range, ...]
    fetch: Fetch
    registry: RegistryFiles
    at: float


@dataclass
class Done:
    """What a job's partitions of a task have come to.

    Attributes:
        job: its name.
        lines: run_id, bucket and records, of the accounting.
        kept: what changed of the state.
        clocks: partition → its clock, of a job that closes windows.
        ages: how long before the micro-batch was planned records reached Kafka: counts by `AGES_S`, upper ends.
    """

    job: str
    lines: list[tuple[str | None, str, int]] = field(default_factory=list)
    kept: list[state.Change] = field(default_factory=list)
    clocks: dict[str, pl.DataFrame] = field(default_factory=dict)
    ages: list[int] = field(default_factory=lambda: [0] * len(AGES_S))


@dataclass(frozen=True)
class Place:
    """A Kafka partition in a micro-batch, and what came of it; None where nothing did."""

    topic: str
    partition: int
    came: Range | None = None

    @property
    def name(self) -> str:
        """As state and files name it."""
        return f"{self.topic}-{self.partition}"

    @property
    def records(self) -> int:
        """How many came."""
        return self.came.end_offset - self.came.start_offset if self.came else 0


def run(session: SparkSession | None, micro_batch: MicroBatch) -> list[Done]:
    """Does every partition that has rows, or of which a window may be over.

    Args:
        session: whose tasks do it; without one it is done here.
        micro_batch: what.

    Raises:
        Py4JJavaError: a task failed.
    """
    places = _places(micro_batch)
    if session is None or not places:
        return _task(micro_batch, 0, places)
    context = session.sparkContext
    shares = _shares(places, context.defaultParallelism)

    def work(number: int, _: Iterable[int]) -> Iterator[Done]:
        return iter(_task(micro_batch, number, shares[number]))

    return list(context.parallelize(range(len(shares)), len(shares)).mapPartitionsWithIndex(work).collect())


def _places(micro_batch: MicroBatch) -> list[Place]:
    """Partitions of which a record came, and others that a rule is called for all the same."""
    places = {(each.topic, each.partition): Place(each.topic, each.partition, each) for each in micro_batch.ranges}
    for plan in micro_batch.plans:
        for name in sorted(set(plan.before) - {CROSS_PARTITION}):
            topic, _, partition = name.rpartition("-")
            place = Place(topic, int(partition))
            if _is_called(plan, place):
                places.setdefault((topic, int(partition)), place)
    return list(places.values())


def _is_called(plan: BatchPlan, place: Place) -> bool:
    """Whether a job's rule is called for a partition."""
    source = next((source for source in plan.job.sources if source.topic.name == place.topic), None)
    if source is None:
        return False
    return bool(place.came) or (place.name in plan.before and (source.closes_windows or plan.context.close_all))


def _shares(places: list[Place], most: int) -> list[list[Place]]:
    """The partitions of each task: few records in one, many in as many as there are cores, equal in records."""
    tasks = max(1, min(most, len(places), sum(place.records for place in places) // RECORDS_OF_A_TASK))
    shares: list[list[Place]] = [[] for _ in range(tasks)]
    sizes = [0] * tasks
    for place in sorted(places, key=lambda place: (-place.records, place.name)):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(place)
        sizes[smallest] += place.records + 1
    return shares


def _task(micro_batch: MicroBatch, number: int, places: list[Place]) -> list[Done]:
    """A task: its partitions one after the other, each read once; then the rows, a file of each table and day."""
    done = {plan.job.name: Done(plan.job.name) for plan in micro_batch.plans}
    rows: dict[tuple[str, str], list[pl.DataFrame]] = {}
    kept: dict[str, list[tuple[str, str, pl.DataFrame]]] = {name: [] for name in done}
    registry = newest_registry(micro_batch.registry)
    for place in places:
        plans = [plan for plan in micro_batch.plans if _is_called(plan, place)]
        topic = plans[0].job.source(place.topic).topic
        arrived = _arrived(place, topic, micro_batch.fetch)
        ages = _ages(arrived.rows, micro_batch.at)
        for plan in plans:
            source, mine = plan.job.source(place.topic), done[plan.job.name]
            known = state.read(plan.states, plan.before, place.name, source.kept)
            out = settled(arrived, plan.job, source, registry, _before(known, place), plan.context)
            mine.lines += out.accounting.rows()
            mine.ages = [one + other for one, other in zip(mine.ages, ages, strict=True)]
            kept[plan.job.name] += changed(out.state, known, source, place.name)
            if CLOCKS in out.state:
                mine.clocks[place.name] = out.state[CLOCKS]
            for table, frame in out.tables.items():
                if table in plan.job.current:
                    if place.came:
                        _written(frame, plan.staging / table / f"current-{place.name}.parquet")
                elif len(frame):
                    rows.setdefault((plan.job.name, table), []).append(frame)
    for plan in micro_batch.plans:
        mine = done[plan.job.name]
        mine.kept = state.write(plan.states, plan.number, kept[plan.job.name])
        for table in plan.job.tables:
            keep_rows(rows.pop((plan.job.name, table), []), table, plan, OF_A_TASK.format(number))
    return list(done.values())


def _arrived(place: Place, topic: Topic, fetch: Fetch) -> Arrived:
    """The decoded records of a partition."""
    records = fetch(place.came) if place.came else KAFKA.empty_table()
    return Arrived(decoded(records, topic))


def _ages(rows: pl.DataFrame, at: float) -> list[int]:
    """How many records reached Kafka how long before; see `Done.ages`."""
    if rows.is_empty():
        return [0] * len(AGES_S)
    ages_s = (at - rows.get_column("kafka_at").dt.epoch("us") / 1e6).fill_null(0.0).clip(0.0, AGES_S[-1])
    counts = np.bincount(np.searchsorted(AGES_S, ages_s.to_numpy()), minlength=len(AGES_S))
    return [int(count) for count in counts]


def _before(known: Frames, place: Place) -> Frames:
    """The state for the records of a place: originals at its offsets or behind them were of a topic made anew."""
    if MEMORY not in known or place.came is None:
        return known
    is_before = known[MEMORY].get_column("offset") < place.came.start_offset
    return known if is_before.all() else {**known, MEMORY: known[MEMORY].filter(is_before)}


def changed(after: Frames, before: Frames, source: Source, partition: str) -> list[tuple[str, str, pl.DataFrame]]:
    """Partition, kind and rows of the state that is not what it was."""
    return [
        (partition, kind, after[kind])
        for kind in source.kept
        if after[kind] is not before[kind] and not (after[kind].is_empty() and before[kind].is_empty())
    ]


def across(plan: BatchPlan, registry: pl.DataFrame) -> list[state.Change]:
    """The step after all partitions, on the driver, for what does not belong to one meter.

    Returns:
        What changed of its state.
    """
    assert plan.job.cross_partition
    kinds = plan.job.cross_partition_state
    known = state.read(plan.states, plan.before, CROSS_PARTITION, kinds)
    handed = {table: staged(plan, table) for table in plan.job.hands}
    output = declared(plan.job.cross_partition(handed, registry, known, plan.context), plan.job, kinds)
    for table, frame in output.tables.items():
        keep_rows([frame], table, plan, CROSS_PARTITION)
    after = [
        (CROSS_PARTITION, kind, frame)
        for kind, frame in output.state.items()
        if frame is not known[kind] and not (frame.is_empty() and known[kind].is_empty())
    ]
    return state.write(plan.states, plan.number, after)


def staged(plan: BatchPlan, table: str) -> pl.DataFrame:
    """The rows of a table that the partitions have written."""
    parts = sorted((plan.staging / table).glob("date=*/*.parquet"))
    schema = polars_schema(TABLES[table])
    return pl.concat([schema.to_frame(), *[pl.read_parquet(part, hive_partitioning=False) for part in parts]])


def keep_rows(frames: list[pl.DataFrame], table: str, plan: BatchPlan, name: str) -> None:
    """Writes rows of a table to staging, a file per date."""
    if not any(len(frame) for frame in frames):
        return
    dated = pl.concat(frames).with_columns(date=pl.col(DATED_BY[table]).dt.date())
    for (date,), those in dated.partition_by("date", as_dict=True, include_key=False).items():
        _written(those, plan.staging / table / f"date={date or NO_DATE}" / f"{name}.parquet")


def _written(frame: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    frame.write_parquet(part, compression=COMPRESSION)
    part.rename(path)
