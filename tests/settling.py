"""A streaming job without Spark and files: its partitions are settled batch by batch, state carried."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from engine.batch import Arrived, declared, settled
from engine.decoding import decoded
from engine.job import CLOCKS, BatchContext, StreamingJob
from engine.settings import StreamSettings
from engine.watermark import watermarks
from kafka_io.ranges import KAFKA
from metering.accounting import LINES
from schemas.tables import TABLES, polars_schema

PLANNED_AT = datetime(2100, 1, 1, tzinfo=UTC)  # every arrival was before
ACCOUNTING = "accounting"


def kinds_of(schemas: Mapping[str, pl.Schema]) -> dict[str, pl.DataFrame]:
    """A state before the first batch."""
    return {kind: schema.to_frame() for kind, schema in schemas.items()}


class Settling:
    """One job and the state it is in."""

    def __init__(self, job: StreamingJob, registry: pl.DataFrame, settings: StreamSettings | None = None) -> None:
        self.job = job
        self.registry = registry
        self.settings = settings or StreamSettings(kafka_bootstrap="nowhere:0")
        self.states: dict[tuple[str, int], dict[str, pl.DataFrame]] = {}
        self.kept = kinds_of(job.cross_partition_state)

    def batch(self, records: pa.Table, close_all: bool = False) -> dict[str, pl.DataFrame]:
        """What a batch adds to each table, and the lines of the accounting; of a current table all of the partitions.

        Args:
            records: columns `KAFKA`, each topic one of the job's.
            close_all: a flush.
        """
        clocks = [state[CLOCKS] for state in self.states.values() if CLOCKS in state]
        context = BatchContext(
            self.settings, watermarks(clocks, self.settings.allowed_lateness_s, PLANNED_AT), close_all
        )
        tables: defaultdict[str, list[pl.DataFrame]] = defaultdict(list)
        for place in records.group_by(["topic", "partition"]).aggregate([]).to_pylist():
            source = self.job.source(place["topic"])
            self.states.setdefault((place["topic"], place["partition"]), kinds_of(source.kept))
        for (topic, partition), state in self.states.items():
            source = self.job.source(topic)
            is_here = (pc.field("topic") == topic) & (pc.field("partition") == partition)
            arrived = Arrived(decoded(records.filter(is_here), source.topic))
            done = settled(arrived, self.job, source, self.registry, state, context)
            self.states[topic, partition] = dict(done.state)
            for kind, schema in source.kept.items():
                assert done.state[kind].schema == schema, f"{self.job.name}: state {kind}"
            for name, frame in done.tables.items():
                tables[name].append(frame)
            tables[ACCOUNTING].append(done.accounting)
        whole = {name: pl.concat(tables[name]) if tables[name] else _none(name) for name in self.job.tables}
        whole[ACCOUNTING] = pl.concat([LINES.to_frame(), *tables[ACCOUNTING]])
        whole |= {name: pl.concat([_none(name), *tables[name]]) for name in self.job.current}
        if self.job.cross_partition:
            handed = {name: whole[name] for name in self.job.hands}
            given = self.job.cross_partition(handed, self.registry, self.kept, context)
            output = declared(given, self.job, self.job.cross_partition_state)
            self.kept |= output.state
            whole |= {name: pl.concat([whole[name], frame]) for name, frame in output.tables.items()}
        return whole


def _none(table: str) -> pl.DataFrame:
    return polars_schema(TABLES[table]).to_frame()


def kafka_table(rows: Sequence[tuple[object, ...]]) -> pa.Table:
    """Records as Spark's Kafka source gives them: rows of key, value, topic, partition, offset, timestamp."""
    return pa.Table.from_pylist([dict(zip(KAFKA.names, row, strict=True)) for row in rows], KAFKA)
