"""A batch of Kafka partitions: refuse, deduplicate, the job's rule, keep apart, account. Pure.

received = stored + duplicate + late + quarantined + invalid: the engine gives every record that came exactly one
verdict, so the accounting closes whatever a rule does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

import polars as pl
from polars import selectors

from engine.job import MEMORY, SAID, BatchContext, Frames, Output, Source, StreamingJob
from engine.settings import JudgeSettings
from engine.state import Manifest, hashes_of
from kafka_io.offsets import Offsets
from metering import accounting
from metering.clocks import is_impossible
from metering.deduplication import FIRST, PLACE, originals, with_seen
from schemas.closed_lists import Bucket, QuarantineReason
from schemas.errors import ContractBroken
from schemas.tables import TABLES, polars_schema
from schemas.topics import DEAD_LETTERS

ADDED = ("received_at", "arrival_at", "kafka_at", "refused_because", "refused_detail", "refused_payload", *PLACE)
"""Columns that differ when the same message is delivered again, and those that are no part of it."""


@dataclass(frozen=True)
class BatchPlan:
    """How one job's part of a micro-batch is done.

    Attributes:
        job: its rules and what the engine does for it.
        context: what is the same for all partitions.
        number: of the batch.
        planned_at: when it was planned.
        before: what the batch before left.
        states: folder of the state's objects.
        starts: topic and partition → the first offset that it takes.
        ends: the offset that comes next after it, of all that the job has read.
    """

    job: StreamingJob
    context: BatchContext
    number: int
    planned_at: datetime
    before: Manifest
    states: str
    starts: Offsets
    ends: Offsets


class Arrived:
    """What came in a Kafka partition or in several, decoded: what several jobs want to know is worked out once.

    Attributes:
        rows: of `engine.decoding.decoded`.
        registry: rows of the registry of its meters, where somebody has looked.
    """

    def __init__(self, rows: pl.DataFrame) -> None:
        self.rows = rows
        self.registry: pl.DataFrame | None = None
        self._hashes: dict[tuple[str, ...], pl.Series] = {}
        self._possible: dict[tuple[int, int], tuple[pl.DataFrame, pl.DataFrame]] = {}

    @cached_property
    def valid(self) -> pl.DataFrame:
        """Rows that were decoded."""
        return accounting.only_valid(self.rows)

    @cached_property
    def said(self) -> pl.Series:
        """A hash of all that the sender said, of the valid rows."""
        return said(self.valid)

    @cached_property
    def newest(self) -> dict[int, int]:
        """Partition → offset of its last record; without those of which none came."""
        return dict(self.rows.group_by("partition").agg(pl.col("offset").max()).iter_rows())

    def hashes(self, by: tuple[str, ...]) -> pl.Series:
        """The keys of the valid rows, each once, as `engine.state` finds rows by."""
        if by not in self._hashes:
            rows = self.valid.with_columns(self.said) if SAID in by else self.valid
            self._hashes[by] = hashes_of(rows, by).unique()
        return self._hashes[by]

    def possible(self, settings: JudgeSettings) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Valid rows whose clock can be right, and the verdicts of the others."""
        limits = settings.max_ahead_s, settings.max_behind_s
        if limits not in self._possible:
            wrong = self.valid.select(is_impossible(*limits).fill_null(False)).to_series()
            refused = accounting.verdicts(self.valid.filter(wrong), pl.lit(QuarantineReason.IMPOSSIBLE_CLOCK.value))
            self._possible[limits] = (self.valid.filter(~wrong) if len(refused) else self.valid), refused
        return self._possible[limits]


def said(rows: pl.DataFrame) -> pl.Series:
    """A hash of all that the sender said, without what was added on the way."""
    return rows.select(sorted(set(rows.columns) - set(ADDED))).hash_rows().alias(SAID)


@dataclass(frozen=True)
class Settled:
    """What has become of a partition's records.

    Attributes:
        tables: lake table → rows, in the columns of the table.
        state: all kinds of the source's state but the clock, which is by partition (`engine.watermark.clock`); and
            those that it looks at.
        accounting: where each record went, columns `metering.accounting.LINES`.
    """

    tables: Frames
    state: Frames
    accounting: pl.DataFrame


def settled(
    arrived: Arrived, job: StreamingJob, source: Source, registry: pl.DataFrame, state: Frames, context: BatchContext
) -> Settled:
    """Does one partition, or several of a topic at once.

    Args:
        arrived: its records, of the source's topic.
        job: whose.
        source: the rule, and what is to be done for it.
        registry: the newest row of each meter, at least of those in records and state.
        state: what the batch before left, kinds of `source.kept`: of those in `source.keys` at least the rows that are
            found by a record, or are due; and kinds of `source.beside`.
        context: what is the same for all partitions.

    Raises:
        ContractBroken: the rule gives what its job does not declare, or leaves out what it must give.
    """
    settings = context.settings
    valid = arrived.valid
    verdicts: list[pl.DataFrame] = []
    kept: dict[str, pl.DataFrame] = {}
    handed = valid
    if source.refuses_impossible_clocks:
        handed, refused = arrived.possible(settings)
        verdicts.append(refused)
    if source.deduplicate_on:
        if SAID in source.deduplicate_on:
            handed = handed.with_columns(arrived.said if handed is valid else said(handed))
        is_old = forgotten(arrived.newest, settings.recent_records)
        handed, kept[MEMORY], seen = _deduplicated(handed, source, state[MEMORY], is_old)
        verdicts.append(seen)
    if source.topic == DEAD_LETTERS:
        verdicts.append(accounting.verdicts(handed, pl.col("reason")))
    if source.columns:
        marks = selectors.by_name("seen", require_all=False) | selectors.starts_with(FIRST)
        handed = handed.select(*dict.fromkeys([*source.columns, *PLACE]), marks)
    given = source.transform(handed, registry, {kind: state[kind] for kind in (*source.state, *source.beside)}, context)
    output = declared(given, job, source.state)
    refused = pl.concat([*verdicts, output.verdicts])
    judged = _judged(valid, refused)
    lines = [accounting.count(judged)]
    tables = dict(output.tables)
    is_whole = len(valid) == len(arrived.rows)
    if not is_whole:
        lines.append(accounting.invalid(arrived.rows))
    if len(refused) or not is_whole:
        for table, frame in _apart(arrived.rows, judged, source, job.name).items():
            tables[table] = pl.concat([tables[table], frame]) if table in tables else frame
    return Settled(tables, {**state, **output.state, **kept}, pl.concat(lines))


def contract(frame: pl.DataFrame, table: str) -> pl.DataFrame:
    """A lake table's columns, as they are written.

    Raises:
        ContractBroken: a column is missing, or is of a kind that cannot become the declared one without a loss.
    """
    return typed(frame, polars_schema(TABLES[table]), f"table {table}")


def typed(frame: pl.DataFrame, schema: pl.Schema, where: str) -> pl.DataFrame:
    """The declared columns of a frame, in their order and kinds.

    Args:
        frame: has them, and others that are left out.
        schema: declared.
        where: for the error.

    Raises:
        ContractBroken: a column is missing, or is of a kind that cannot become the declared one without a loss.
    """
    given_schema = frame.schema
    if given_schema == schema:
        return frame
    if missing := sorted(set(schema) - set(given_schema)):
        msg = f"{where} lacks {', '.join(missing)}: the rule gave {', '.join(given_schema) or 'no column'}"
        raise ContractBroken(msg)
    for name, kind in schema.items():
        given = given_schema[name]
        if (given.is_float() and kind.is_integer()) or (given.is_integer() and kind == pl.String()):
            msg = f"{where}: {name} is declared as {kind}, and the rule gave {given}"
            raise ContractBroken(msg)
    return frame.select(schema.names()).cast(schema) if len(frame) else schema.to_frame()


def declared(output: Output, job: StreamingJob, kinds: Mapping[str, pl.Schema]) -> Output:
    """What a rule gives, in its declared columns; a frame that has them is the same one.

    Args:
        output: of a rule.
        job: whose.
        kinds: of state that are declared for the rule.

    Raises:
        ContractBroken: the rule gives a table or a kind of state that is not declared, or other columns.
    """
    known = {"table": {*job.writes}, "state": set(kinds)}
    for word, given in (("table", output.tables), ("state", output.state)):
        if unknown := sorted(set(given) - known[word]):
            names = ", ".join(sorted(known[word])) or "none"
            msg = f"{job.name} gives a {word} that it does not declare: {', '.join(unknown)}; it declares {names}"
            raise ContractBroken(msg)
    return Output(
        {table: contract(frame, table) for table, frame in output.tables.items()},
        {kind: typed(frame, kinds[kind], f"state {kind}") for kind, frame in output.state.items()},
        output.verdicts,
    )


def _deduplicated(
    rows: pl.DataFrame, source: Source, memory: pl.DataFrame, is_old: pl.Expr
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """The rows that are handed over, the originals to remember, and the verdicts of the others."""
    identity, values = list(source.deduplicate_on), list(source.compares)
    marked = with_seen(rows.select(*dict.fromkeys([*identity, *PLACE, *values])), memory, identity, values)
    known = originals(memory, marked).filter(~is_old)
    verdicts = accounting.verdicts(marked, pl.col("seen"))
    if source.hands_duplicates:
        return rows.with_columns(marked.select("seen", selectors.starts_with(FIRST))), known, verdicts
    return (rows.filter(marked.get_column("seen").is_null()) if len(verdicts) else rows), known, verdicts


def forgotten(newest: Mapping[int, int], horizon: int) -> pl.Expr:
    """True of an original that is no longer remembered.

    Args:
        newest: partition → offset of the last record; what is not there forgets nothing.
        horizon: how many offsets back are remembered.
    """
    found = pl.lit(False)
    for partition, offset in newest.items():
        found |= (pl.col("partition") == partition) & (pl.col("offset") <= offset - horizon)
    return found


def _judged(valid: pl.DataFrame, verdicts: pl.DataFrame) -> pl.DataFrame:
    """Each decoded record with run_id, reason and bucket: the first verdict counts, without one it was stored."""
    run_id = pl.col("run_id") if "run_id" in valid.columns else pl.lit(None, pl.String).alias("run_id")
    if verdicts.is_empty():
        stored = pl.lit(Bucket.STORED.value).alias("bucket")
        return valid.select("partition", "offset", run_id, pl.lit(None, pl.String).alias("reason"), stored)
    place = ["partition", "offset"]
    first = verdicts.drop_nulls().unique(place, keep="first", maintain_order=True)
    return (
        valid.select(*place, run_id)
        .join(first, on=place, how="left", maintain_order="left")
        .with_columns(bucket=accounting.bucket_of(pl.col("reason")))
    )


def _apart(rows: pl.DataFrame, judged: pl.DataFrame, source: Source, stage: str) -> dict[str, pl.DataFrame]:
    """Rows of the records that were not stored, by lake table."""
    found = {}
    for table in source.apart:
        bucket = Bucket.LATE if table.startswith("late_") else Bucket.QUARANTINED
        found[table] = contract(
            accounting.refused(rows) if table == "dead_letters" else accounting.kept_apart(rows, judged, bucket, stage),
            table,
        )
    return found
