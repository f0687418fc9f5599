"""A batch of one Kafka partition: decode, refuse, deduplicate, the job's rule, keep apart, account. Pure.

received = stored + duplicate + late + quarantined + invalid: the engine gives every record that came exactly one
verdict, so the accounting closes whatever a rule does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl
from polars import selectors

from engine.job import CLOCKS, MEMORY, SAID, BatchContext, Frames, Output, Source, StreamingJob
from engine.settings import ClockSettings
from engine.state import Manifest
from engine.watermark import clock
from metering import accounting
from metering.clocks import is_impossible
from metering.deduplication import FIRST, PLACE, is_recent, originals, with_seen
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
        before: what the batch before left.
        states: folder of the state's files.
        staging: where rows wait.
    """

    job: StreamingJob
    context: BatchContext
    number: int
    before: Manifest
    states: Path
    staging: Path


class Arrived:
    """What came in a Kafka partition, decoded: what several jobs want to know of it is worked out once.

    Attributes:
        rows: of `engine.decoding.decoded`.
    """

    def __init__(self, rows: pl.DataFrame) -> None:
        self.rows = rows
        self._possible: dict[tuple[int, int], tuple[pl.DataFrame, pl.DataFrame]] = {}

    @cached_property
    def valid(self) -> pl.DataFrame:
        """Rows that were decoded."""
        return accounting.only_valid(self.rows)

    def possible(self, settings: ClockSettings) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Valid rows whose clock can be right, and the verdicts of the others."""
        limits = settings.max_ahead_s, settings.max_behind_s
        if limits not in self._possible:
            wrong = self.valid.select(is_impossible(*limits).fill_null(False)).to_series()
            refused = accounting.verdicts(self.valid.filter(wrong), pl.lit(QuarantineReason.IMPOSSIBLE_CLOCK.value))
            self._possible[limits] = (self.valid.filter(~wrong) if len(refused) else self.valid), refused
        return self._possible[limits]


@dataclass(frozen=True)
class Settled:
    """What has become of a partition's records.

    Attributes:
        tables: lake table → rows, in the columns of the table.
        state: all kinds of the source's state.
        accounting: where each record went, columns `metering.accounting.LINES`.
    """

    tables: Frames
    state: Frames
    accounting: pl.DataFrame


def settled(
    arrived: Arrived, job: StreamingJob, source: Source, registry: pl.DataFrame, state: Frames, context: BatchContext
) -> Settled:
    """Does one partition.

    Args:
        arrived: its records, of the source's topic.
        job: whose.
        source: the rule, and what is to be done for it.
        registry: the newest row of each meter.
        state: what the batch before left, kinds of `source.kept`.
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
        handed, kept[MEMORY], seen = _deduplicated(handed, source, state[MEMORY], settings.recent_records)
        verdicts.append(seen)
    if source.closes_windows:
        kept[CLOCKS] = clock(valid, state[CLOCKS], context.watermarks)
    if source.topic == DEAD_LETTERS:
        verdicts.append(accounting.verdicts(handed, pl.col("reason")))
    if source.columns:
        marks = selectors.by_name("seen", require_all=False) | selectors.starts_with(FIRST)
        handed = handed.select(*dict.fromkeys([*source.columns, *PLACE]), marks)
    given = source.transform(handed, registry, {kind: state[kind] for kind in source.state}, context)
    output = declared(given, job, source.state)
    if lacking := sorted(set(job.current) - set(output.tables)):
        msg = f"{job.name} does not give all rows of {', '.join(lacking)}, which its newest version replaces"
        raise ContractBroken(msg)
    judged = _judged(valid, [*verdicts, output.verdicts])
    tables = dict(output.tables)
    for table, frame in _apart(arrived.rows, judged, source, job.name).items():
        tables[table] = pl.concat([tables[table], frame]) if table in tables else frame
    return Settled(
        tables,
        {**state, **output.state, **kept},
        pl.concat([accounting.count(judged), accounting.invalid(arrived.rows)]),
    )


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
    if frame.schema == schema:
        return frame
    if missing := sorted(set(schema) - set(frame.columns)):
        msg = f"{where} lacks {', '.join(missing)}: the rule gave {', '.join(frame.columns) or 'no column'}"
        raise ContractBroken(msg)
    chosen = frame.select(schema.names())
    for name, kind in schema.items():
        given = chosen.schema[name]
        if (given.is_float() and kind.is_integer()) or (given.is_integer() and kind == pl.String()):
            msg = f"{where}: {name} is declared as {kind}, and the rule gave {given}"
            raise ContractBroken(msg)
    return chosen.cast(schema)


def declared(output: Output, job: StreamingJob, kinds: Mapping[str, pl.Schema]) -> Output:
    """What a rule gives, in its declared columns; a frame that has them is the same one.

    Args:
        output: of a rule.
        job: whose.
        kinds: of state that are declared for the rule.

    Raises:
        ContractBroken: the rule gives a table or a kind of state that is not declared, or other columns.
    """
    known = {"table": {*job.writes, *job.current}, "state": set(kinds)}
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
    rows: pl.DataFrame, source: Source, memory: pl.DataFrame, horizon: int
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """The rows that are handed over, the originals to remember, and the verdicts of the others."""
    identity, values = list(source.deduplicate_on), list(source.compares)
    if SAID in identity:
        sent = rows.select(sorted(set(rows.columns) - set(ADDED)))
        rows = rows.with_columns(sent.hash_rows().alias(SAID))
    marked = with_seen(rows.select(*dict.fromkeys([*identity, *PLACE, *values])), memory, identity, values)
    known = originals(memory, marked).filter(is_recent(horizon))
    verdicts = accounting.verdicts(marked, pl.col("seen"))
    if source.hands_duplicates:
        return rows.with_columns(marked.select("seen", selectors.starts_with(FIRST))), known, verdicts
    return (rows.filter(marked.get_column("seen").is_null()) if len(verdicts) else rows), known, verdicts


def _judged(valid: pl.DataFrame, verdicts: list[pl.DataFrame]) -> pl.DataFrame:
    """Each decoded record with run_id, reason and bucket: the first verdict counts, without one it was stored."""
    run_id = pl.col("run_id") if "run_id" in valid.columns else pl.lit(None, pl.String).alias("run_id")
    first = pl.concat(verdicts).drop_nulls().unique("offset", keep="first", maintain_order=True)
    return (
        valid.select("offset", run_id)
        .join(first, on="offset", how="left", maintain_order="left")
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
