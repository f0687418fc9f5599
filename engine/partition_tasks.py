"""A batch, cut by Kafka partition: the one place where Spark hands rows to Polars.

Kafka's key is the meter, so a Kafka partition has all rows of its meters and nothing need be shuffled. A task fetches
its partition, reads what the batch before left for it, settles it (`engine/batch.py`) and writes rows and state to
files of its own; the driver gets the accounting only. What a batch has no rows of keeps its state.

A task that is tried again writes the same files again. Files lie under staging until the driver renames them in.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from pyspark import TaskContext
from pyspark.sql import DataFrame

from engine.batch import BatchPlan, declared, settled
from engine.job import MEMORY, CrossPartition, Frames
from engine.settings import StreamSettings
from kafka_io.ranges import KAFKA, RANGES, Range, fetched
from lake.publishing import COMPRESSION
from lake.reading import newest_registry, spark_schema
from metering.accounting import LINES
from schemas.errors import ContractBroken, StateLost
from schemas.tables import DATED_BY, TABLES, arrow_of, polars_schema

COUNTED = pa.schema([pa.field("partition", pa.string()), pa.field("task", pa.int64()), *arrow_of(LINES)])
CROSS_PARTITION = "cross_partition"
"""Name of the state that belongs to no partition."""
NO_DATE = "__HIVE_DEFAULT_PARTITION__"  # as Spark names it


def run(records: DataFrame | None, plan: BatchPlan) -> pl.DataFrame:
    """Does every partition that has rows or state. Returns the lines of the accounting.

    Args:
        records: what came, columns `KAFKA`, or where it lies, columns `RANGES`; None where nothing came.
        plan: how.

    Raises:
        ContractBroken: a Kafka partition came in two tasks.
    """
    counted = pl.DataFrame(schema=polars_schema(COUNTED))
    if records is not None:

        def work(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            context = TaskContext.get()
            task = context.partitionId() if context else 0
            yield from _task(batches, plan, task)

        lines = records.mapInArrow(work, spark_schema(COUNTED)).collect()
        counted = pl.DataFrame(lines, schema=counted.schema, orient="row")
    tasks = counted.group_by("partition").agg(pl.col("task").n_unique())
    if len(tasks) and tasks.get_column("task").max() != 1:
        msg = "a Kafka partition came in two tasks: leave minPartitions and maxRecordsPerPartition alone"
        raise ContractBroken(msg)
    silent = sorted(_partitions(plan.before) - set(tasks.get_column("partition")))
    for partition in silent:
        source = plan.job.source(_topic(partition))
        if plan.context.close_all or source.closes_windows:
            _partition(partition, KAFKA.empty_table(), plan)
        else:
            _link(plan, partition, source.kept)
    return counted.select(LINES.names())


def _partitions(folder: Path | None) -> set[str]:
    return {partition.name for partition in folder.iterdir() if partition.name != CROSS_PARTITION} if folder else set()


def _topic(partition: str) -> str:
    return partition.rpartition("-")[0]


def _task(batches: Iterable[pa.RecordBatch], plan: BatchPlan, task: int) -> Iterator[pa.RecordBatch]:
    pieces = list(batches)
    if not pieces:
        return
    for partition, records in _by_partition(pa.Table.from_batches(pieces), plan.context.settings):
        lines = _partition(partition, records, plan)
        table = (
            lines.with_columns(partition=pl.lit(partition), task=pl.lit(task, pl.Int64))
            .select(COUNTED.names)
            .to_arrow()
            .cast(COUNTED)
        )
        yield from table.combine_chunks().to_batches()


def _by_partition(given: pa.Table, settings: StreamSettings) -> Iterator[tuple[str, pa.Table]]:
    """Name and records of each Kafka partition of a task, one after the other; columns `KAFKA`."""
    if given.schema.names == RANGES.names:
        for row in given.to_pylist():
            place = Range(**row)
            records = fetched(place, settings.kafka_bootstrap, settings.accept_loss)
            yield f"{place.topic}-{place.partition}", records
        return
    for place in given.group_by(["topic", "partition"]).aggregate([]).to_pylist():
        is_here = (pc.field("topic") == place["topic"]) & (pc.field("partition") == place["partition"])
        yield f"{place['topic']}-{place['partition']}", given.filter(is_here)


def _partition(partition: str, records: pa.Table, plan: BatchPlan) -> pl.DataFrame:
    """One Kafka partition: settles it and writes what came out. Returns its lines of the accounting."""
    source = plan.job.source(_topic(partition))
    known = known_frames(plan.before, partition, source.kept)
    before = known
    if MEMORY in known and len(records):
        before = {**known, MEMORY: _of_this_topic(known[MEMORY], records.column("offset")[0].as_py())}
    registry = newest_registry(plan.registry)
    done = settled(records, plan.job, source, registry, before, plan.context)
    _keep_state(done.state, known, partition, source.kept, plan)
    for table, rows in done.tables.items():
        if table not in plan.job.current:
            _keep_rows(rows, table, partition, plan)
        elif len(records):
            _written(rows, plan.staging / table / f"current-{partition}.parquet")
    return done.accounting


def across(step: CrossPartition, plan: BatchPlan) -> None:
    """The step after all partitions, on the driver, for what does not belong to one meter."""
    kinds = plan.job.cross_partition_state
    known = known_frames(plan.before, CROSS_PARTITION, kinds)
    handed = {table: staged(plan, table) for table in plan.job.hands}
    output = declared(step(handed, newest_registry(plan.registry), known, plan.context), plan.job, kinds)
    _keep_state({**known, **output.state}, known, CROSS_PARTITION, kinds, plan)
    for table, frame in output.tables.items():
        _keep_rows(frame, table, CROSS_PARTITION, plan)


def _of_this_topic(recent: pl.DataFrame, first_offset: int) -> pl.DataFrame:
    """Records that came before a batch; those at its offsets or behind them were of a topic that was made anew."""
    is_before = recent.get_column("offset") < first_offset
    return recent if is_before.all() else recent.filter(is_before)


def known_frames(before: Path | None, partition: str, state: Mapping[str, pl.Schema]) -> dict[str, pl.DataFrame]:
    """The state that the batch before left for a partition; empty where it had none of it.

    Raises:
        StateLost: of what it left a file is gone, or cannot be read.
    """
    folder = before / partition if before else None
    if folder is None or not folder.exists():
        return {kind: pl.DataFrame(schema=schema) for kind, schema in state.items()}
    try:
        return {kind: pl.read_ipc(folder / f"{kind}.arrow") for kind in state}
    except (OSError, pl.exceptions.PolarsError) as error:
        msg = f"the state in {folder} cannot be read ({error}). Repair: from the beginning (docs/operations.md)"
        raise StateLost(msg) from error


def staged(plan: BatchPlan, table: str) -> pl.DataFrame:
    """The rows of a table that the partitions have written."""
    parts = sorted((plan.staging / table).glob("date=*/*.parquet"))
    schema = polars_schema(TABLES[table])
    return pl.concat([schema.to_frame(), *[pl.read_parquet(part, hive_partitioning=False) for part in parts]])


def _keep_state(state: Frames, known: Frames, partition: str, kinds: Iterable[str], plan: BatchPlan) -> None:
    """Writes a partition's state; what did not change is linked."""
    for kind in kinds:
        if state[kind] is known[kind] and plan.before and (plan.before / partition / f"{kind}.arrow").exists():
            _link(plan, partition, [kind])
            continue
        path = plan.after / partition / f"{kind}.arrow"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        state[kind].rechunk().write_ipc(part)
        part.rename(path)


def _keep_rows(rows: pl.DataFrame, table: str, partition: str, plan: BatchPlan) -> None:
    """Writes a partition's rows of a table to staging, a file per date."""
    dated = rows.with_columns(date=pl.col(DATED_BY[table]).dt.date())
    for (date,), those in dated.partition_by("date", as_dict=True, include_key=False).items():
        _written(those, plan.staging / table / f"date={date or NO_DATE}" / f"{partition}.parquet")


def _written(frame: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    frame.write_parquet(part, compression=COMPRESSION)
    part.rename(path)


def _link(plan: BatchPlan, partition: str, kinds: Iterable[str]) -> None:
    """Hands a partition's state on as it is."""
    assert plan.before
    (plan.after / partition).mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        source, target = plan.before / partition / f"{kind}.arrow", plan.after / partition / f"{kind}.arrow"
        if source.exists():
            target.unlink(missing_ok=True)
            os.link(source, target)
