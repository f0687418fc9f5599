"""A streaming job without Spark and files: its partitions are settled batch by batch, state carried."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from engine.batch import Arrived, contract, declared
from engine.decoding import decoded
from engine.job import CLOCKS, BatchContext, StreamingJob
from engine.lots import Part, applied, looked_at, taken, together
from engine.settings import StreamSettings
from engine.state import Stock
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

    def __init__(
        self,
        job: StreamingJob,
        registry: pl.DataFrame,
        settings: StreamSettings | None = None,
        is_handed_all: bool = False,
        is_at_once: bool = False,
    ) -> None:
        """Before the first batch.

        Args:
            job: what it is.
            registry: the newest row of each meter.
            settings: of the streaming jobs.
            is_handed_all: the rules are handed all state, not only what a record or the time asks for.
            is_at_once: all partitions of a topic are one lot.
        """
        self.job = job
        self.registry = registry
        self.settings = settings or StreamSettings(kafka_bootstrap="nowhere:0")
        self.is_handed_all = is_handed_all
        self.is_at_once = is_at_once
        self.stocks: dict[tuple[str, int], dict[str, Stock]] = {}
        self.kept = kinds_of(job.cross_partition_state)

    def _lots(self) -> list[list[tuple[str, int]]]:
        """Topic and number of the partitions that are done at once."""
        topics = [topic.name for topic in self.job.topics]
        places = sorted(self.stocks, key=lambda place: topics.index(place[0]))
        if not self.is_at_once:
            return [[place] for place in places]
        return [lot for topic in topics if (lot := [place for place in places if place[0] == topic])]

    def batch(self, records: pa.Table, close_all: bool = False) -> dict[str, pl.DataFrame]:
        """What a batch adds to each table, and the lines of the accounting; of a current table all of the partitions.

        Args:
            records: columns `KAFKA`, each topic one of the job's.
            close_all: a flush.
        """
        clocks = [stocks[CLOCKS].present for stocks in self.stocks.values() if CLOCKS in stocks]
        over = watermarks(clocks, self.settings.allowed_lateness_s, PLANNED_AT)
        context = BatchContext(self.settings, over, close_all, is_anew=False)
        tables: defaultdict[str, list[pl.DataFrame]] = defaultdict(list)
        for place in records.group_by(["topic", "partition"]).aggregate([]).to_pylist():
            source = self.job.source(place["topic"])
            none = {
                kind: Stock.anew(schema.to_frame(), source.keys.get(kind, ())) for kind, schema in source.kept.items()
            }
            self.stocks.setdefault((place["topic"], place["partition"]), none)
        for lot in self._lots():
            topic, partitions = lot[0][0], [partition for _, partition in lot]
            source = self.job.source(topic)
            is_here = (pc.field("topic") == topic) & pc.field("partition").isin(partitions)
            arrived = Arrived(decoded(records.filter(is_here), source.topic))
            came = arrived.rows.group_by("partition").agg(begin=pl.col("offset").min(), records=pl.len())
            begins = {number: (begin, records) for number, begin, records in came.iter_rows()}
            parts = [
                Part(f"{topic}-{number}", number, *begins.get(number, (None, 0)), self.stocks[topic, number])
                for number in partitions
            ]
            asked = replace(context, close_all=close_all or self.is_handed_all)
            found = taken(parts, source, arrived, asked)
            known = together(source, found)
            for kind, other in self.job.beside(source).items():
                nothing = {kind: Stock.anew(other.state[kind].to_frame(), other.by[kind])}
                kept = [self.stocks.get((other.topic.name, number), nothing)[kind] for number in partitions]
                known[kind] = looked_at(kept, arrived)
            out = applied(parts, found, known, arrived, self.job, source, self.registry, context)
            for change in out.changed:
                place = topic, int(change.partition.rpartition("-")[2])
                self.stocks[place][change.kind] = replace(change.stock, files=(*change.stock.files, "a file"))
                assert change.new.schema == source.kept[change.kind], f"{self.job.name}: state {change.kind}"
            for name, frame in out.settled.tables.items():
                tables[name].append(frame)
            tables[ACCOUNTING].append(out.settled.accounting)
        whole = {name: pl.concat(tables[name]) if tables[name] else _none(name) for name in self.job.tables}
        whole[ACCOUNTING] = pl.concat([LINES.to_frame(), *tables[ACCOUNTING]])
        for name, current in self.job.current.items():
            kept = [stocks[current.kind] for stocks in self.stocks.values() if current.kind in stocks]
            newest = [contract(current.rows(stock.present), name) for stock in kept]
            whole[name] = pl.concat([_none(name), *newest])
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
