"""The contract of a streaming job: what it declares, what its rule is handed, what that gives back.

The rule is `transform(rows, registry, state, context) -> Output`: pure, on the rows of one Kafka partition, of a batch
or of a static frame. All that is not its own the engine does, as declared: it decodes, refuses impossible clocks,
deduplicates, keeps late and quarantined records apart, and counts where each record went (`engine/batch.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import polars as pl
import pyarrow as pa

from engine.settings import StreamSettings
from engine.watermark import CLOCK
from metering.accounting import VERDICTS
from metering.deduplication import PLACE
from schemas.codec import arrow_schema
from schemas.errors import ContractBroken
from schemas.tables import DATED_BY, KAFKA_PLACE, TABLES, polars_schema
from schemas.topics import Topic

Frames = Mapping[str, pl.DataFrame]
STAMP = pl.Datetime("us", "UTC")
MEMORY, CLOCKS = "recent", "clock"
"""Kinds of state that the engine keeps: originals by which it deduplicates, the newest arrivals of each run."""
SAID = "print"
"""In `deduplicate_on`: a hash of all that the sender said, without what was added on the way."""


@dataclass(frozen=True)
class BatchContext:
    """What is the same for all partitions of a batch.

    Attributes:
        settings: of the streaming jobs.
        watermarks: per run_id `previous_watermark`, up to which the batch before closed its windows, and `watermark`,
            up to which this one does (`engine.watermark.watermarks`).
        close_all: a flush: every window is over.
        is_anew: the registry may have changed since the batch before.
    """

    settings: StreamSettings
    watermarks: pl.DataFrame
    close_all: bool = False
    is_anew: bool = True


@dataclass(frozen=True)
class Output:
    """What a rule gives back.

    Attributes:
        tables: lake table → rows to add.
        state: kind → frame that the next batch reads; what is left out stays as it was.
        verdicts: records that were not simply stored, columns `VERDICTS`: by its reason one is late, quarantined,
            duplicate or invalid (`metering.accounting.BUCKETS`). The engine adds its own.
    """

    tables: Frames
    state: Frames = field(default_factory=dict)
    verdicts: pl.DataFrame = field(default_factory=VERDICTS.to_frame)


Transform = Callable[[pl.DataFrame, pl.DataFrame, Frames, BatchContext], Output]
CrossPartition = Callable[[Frames, pl.DataFrame, Frames, BatchContext], Output]


@dataclass(frozen=True)
class Source:
    """A topic that a job reads, its rule, and what the engine does before and after it.

    Attributes:
        topic: its key is the meter, so a partition has all rows of its meters.
        transform: (rows, registry, state, context) → Output.
        columns: what the rule is handed, with topic, partition and offset; all columns where none is named.
        state: kinds of frames that are kept from batch to batch, a partition at a time.
        by: kind → columns: the rule is handed the rows of which a record of the batch has the same, and gives those
            that stand for them; it may be handed others, of whose meters the registry may have no row. Of a kind that
            is not named here it is handed all rows.
        due: kind → which further rows of a kind in `by` it is handed: those of which the time has come. When the
            registry has changed it is handed all of these kinds.
        refuses_impossible_clocks: a record whose clock cannot be right is quarantined and not handed over.
        deduplicate_on: records that are the same in these are one: the first within the last offsets of a partition is
            the original, the others are duplicates and not handed over.
        compares: columns in which records that are the same may contradict each other; then one is a conflict.
        hands_duplicates: those are handed over too: `seen` says duplicate or conflict, null of an original, and
            `first_<column>` what the original has in a column of `compares`.
        closes_windows: its arrivals move the watermarks; the rule is called for partitions without rows, too.
        keeps_undecoded: what cannot be decoded becomes a dead letter of this job; else another job's.
        beside: kinds of state of an earlier source of the job that the rule is handed too, to look at, of the meters of
            the records: as that source leaves them, which goes first, with what came in the same micro-batch.
    """

    topic: Topic
    transform: Transform
    columns: tuple[str, ...] = ()
    state: Mapping[str, pl.Schema] = field(default_factory=dict)
    by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    due: Mapping[str, Callable[[BatchContext], pl.Expr]] = field(default_factory=dict)
    refuses_impossible_clocks: bool = False
    deduplicate_on: tuple[str, ...] = ()
    compares: tuple[str, ...] = ()
    hands_duplicates: bool = False
    closes_windows: bool = False
    keeps_undecoded: bool = False
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses what cannot be done for the topic, or contradicts itself.

        Raises:
            ContractBroken: it says what.
        """
        known = {*self._columns, "topic", "arrival_at", "kafka_at", SAID}
        wrong = []
        for word in ("columns", "deduplicate_on", "compares"):
            names = getattr(self, word)
            unknown = [names] if isinstance(names, str) else sorted(set(names) - known)
            if unknown:
                wrong.append(f"{word} is a tuple of columns that it has, not {', '.join(unknown)}")
        if taken := sorted({MEMORY, CLOCKS} & set(self.state)):
            wrong.append(f"state named {', '.join(taken)} is the engine's")
        for kind, names in self.by.items():
            if unknown := sorted(set(names) - (set(self.state.get(kind, ())) & known)):
                wrong.append(f"by: {kind} and the records do not both have {', '.join(unknown)}")
        if unknown := sorted(set(self.due) - set(self.by)):
            wrong.append(f"due is of kinds in by, not of {', '.join(unknown)}")
        if self.due and not self.closes_windows:
            wrong.append("due needs closes_windows: without it nobody knows the time")
        if (self.compares or self.hands_duplicates) and not self.deduplicate_on:
            wrong.append("compares and hands_duplicates need deduplicate_on")
        if self.refuses_impossible_clocks and "observed_at" not in self._columns:
            wrong.append("refuses_impossible_clocks needs observed_at, which it does not have")
        if self.closes_windows and "run_id" not in self._columns:
            wrong.append("closes_windows needs run_id, which it does not have")
        if wrong:
            msg = f"source {self.topic.name}: {'; '.join(wrong)}"
            raise ContractBroken(msg)

    @property
    def _columns(self) -> pl.Schema:
        """What a record of the topic has, and its place in Kafka."""
        return polars_schema(pa.schema([*arrow_schema(self.topic.entity), *KAFKA_PLACE]))

    @cached_property
    def kept(self) -> dict[str, pl.Schema]:
        """All kinds of state: the rule's, and the engine's own."""
        own: dict[str, pl.Schema] = {}
        if self.deduplicate_on:
            known = {**self._columns, SAID: pl.UInt64(), "arrival_at": STAMP, "kafka_at": STAMP}
            columns = dict.fromkeys([*self.deduplicate_on, *PLACE, *self.compares])
            own[MEMORY] = pl.Schema({name: known[name] for name in columns})
        if self.closes_windows:
            own[CLOCKS] = CLOCK
        return {**self.state, **own}

    @property
    def is_by_meter(self) -> bool:
        """Whether all that the rule keeps belongs to a meter: then several partitions can be done at once."""
        return all("meter_id" in schema for schema in self.state.values())

    @cached_property
    def keys(self) -> dict[str, tuple[str, ...]]:
        """Kind → columns by which rows are found, the engine's own kinds too."""
        return {**self.by, **({MEMORY: self.deduplicate_on} if self.deduplicate_on else {})}

    @property
    def apart(self) -> list[str]:
        """Lake tables of the records that were not stored."""
        entity = f"{self.topic.entity}s"
        tables = [name for name in (f"quarantined_{entity}", f"late_{entity}") if name in TABLES]
        return [*tables, *(["dead_letters"] if self.keeps_undecoded else [])]


@dataclass(frozen=True)
class Current:
    """A lake table that has its newest version only: what it is made of.

    Attributes:
        kind: of the state of one of the job's sources.
        rows: all rows of that kind of a partition → rows of the table.
    """

    kind: str
    rows: Callable[[pl.DataFrame], pl.DataFrame]


@dataclass(frozen=True)
class StreamingJob:
    """One streaming job.

    Attributes:
        name: its module's name: query, folder of its state, begin of its files' names, CLI word.
        version: raised when the state changes its form; part of its folder's name.
        sources: what it reads, each with its rule.
        writes: lake tables that its rules give; their rows' dates are by `schemas.tables.DATED_BY`.
        current: lake table of the newest rows only → the kind of state that it is made of, and how; see `Current`.
        sends: lake table → the topic that gets its rows too.
        hands: tables whose rows of a batch are handed to `cross_partition`.
        cross_partition: the step after all partitions, for what does not belong to one meter: ({table: rows of all
            partitions}, registry, its state, context) → Output.
        cross_partition_state: kinds of frames that it keeps.
        shares: table that another job adds to as well, and that has no column `stage` → an SQL condition of its own
            rows there, for whoever lets the job begin anew.
    """

    name: str
    version: int
    sources: tuple[Source, ...]
    writes: tuple[str, ...]
    current: Mapping[str, Current] = field(default_factory=dict)
    sends: Mapping[str, Topic] = field(default_factory=dict)
    hands: tuple[str, ...] = ()
    cross_partition: CrossPartition | None = None
    cross_partition_state: Mapping[str, pl.Schema] = field(default_factory=dict)
    shares: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses what nobody could keep.

        Raises:
            ContractBroken: it says what.
        """
        wrong = []
        if len(set(self.topics)) < len(self.sources):
            wrong.append("two sources have one topic")
        if unknown := sorted({*self.tables, *self.current} - set(TABLES)):
            wrong.append(f"schemas/tables.py has no table {', '.join(unknown)}")
        if undated := sorted((set(self.tables) & set(TABLES)) - set(DATED_BY)):
            wrong.append(f"no column dates the rows of {', '.join(undated)}: DATED_BY in schemas/tables.py")
        for table, current in self.current.items():
            if sum(current.kind in source.state for source in self.sources) != 1:
                wrong.append(f"{table} is made of {current.kind}, which is no kind of state of just one source")
        for number, source in enumerate(self.sources):
            for kind in source.beside:
                owners = [other for other in self.sources[:number] if other.by.get(kind) == ("meter_id",)]
                if [other.topic.partitions for other in owners] != [source.topic.partitions]:
                    wrong.append(
                        f"{source.topic.name} looks at {kind}, which is no kind of state by meter_id of just one "
                        "source before it whose topic has as many partitions"
                    )
        if foreign := sorted({*self.hands, *self.sends} - set(self.writes)):
            wrong.append(f"hands or sends what it does not write: {', '.join(foreign)}")
        if wrong:
            msg = f"job {self.name}: {'; '.join(wrong)}"
            raise ContractBroken(msg)

    @property
    def topics(self) -> tuple[Topic, ...]:
        """What it reads."""
        return tuple(source.topic for source in self.sources)

    @property
    def tables(self) -> list[str]:
        """Lake tables that it adds rows to: its rules', and those of the records that were not stored."""
        return list(dict.fromkeys([*self.writes, *[name for source in self.sources for name in source.apart]]))

    def rows_of(self, table: str) -> str:
        """An SQL condition of its rows in a table that it adds to."""
        own = f"stage = '{self.name}'" if "stage" in TABLES[table].names else "true"
        return self.shares.get(table, own)

    def source(self, topic: str) -> Source:
        """Its source of a topic, by name."""
        return next(source for source in self.sources if source.topic.name == topic)

    def beside(self, source: Source) -> dict[str, Source]:
        """Kind of state that one of its sources looks at → the source that keeps it."""
        return {kind: next(other for other in self.sources if kind in other.state) for kind in source.beside}
