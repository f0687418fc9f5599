"""A lot: partitions of a topic that a rule is applied to at once, each with state of its own.

A partition with a handful of records costs what the steps of the rules cost, however few rows they have; so of a small
micro-batch all partitions of a topic are one lot. Of the state a rule is handed what the records ask for, and what is
due, or all where that is little (`engine/state.py`); what it gives goes back to the partition that it came from.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import polars as pl

from engine.batch import Arrived, Settled, forgotten, settled
from engine.job import CLOCKS, MEMORY, BatchContext, Frames, Source, StreamingJob
from engine.state import Changed, Stock, Taken, changes
from engine.watermark import clock


class Part(NamedTuple):
    """A partition of a lot.

    Attributes:
        name: as state and files name it.
        partition: its number.
        begin: the first offset that came; None where nothing did.
        stocks: its state, by kind.
    """

    name: str
    partition: int
    begin: int | None
    stocks: Mapping[str, Stock]


class Applied(NamedTuple):
    """What has become of a lot.

    Attributes:
        settled: of its records.
        changed: of its state.
        clocks: name of a partition → its clock, of a job that closes windows.
    """

    settled: Settled
    changed: list[Changed]
    clocks: dict[str, pl.DataFrame]


def taken(parts: Sequence[Part], source: Source, arrived: Arrived, context: BatchContext) -> list[dict[str, Taken]]:
    """The state that a rule is handed of each partition of a lot, by kind."""
    due = {kind: is_due(context) for kind, is_due in source.due.items()}
    return [_taken(part, source, arrived, due, context) for part in parts]


def _taken(
    part: Part, source: Source, arrived: Arrived, due: Mapping[str, pl.Expr], context: BatchContext
) -> dict[str, Taken]:
    """The state that a rule is handed of a partition; `due` says kind → rows of which the time has come."""
    found = {}
    for kind, stock in part.stocks.items():
        is_all = kind not in source.keys or context.close_all or (context.is_anew and kind in source.due)
        is_small = part.begin is not None and stock.is_small
        if is_all or is_small:
            which, rows = stock.is_there, stock.present
        else:
            further = _expired(part, arrived, context) if kind == MEMORY else due.get(kind)
            which = stock.found(arrived.hashes(source.keys[kind]), further)
            rows = stock.rows.filter(pl.Series(which))
        if kind == MEMORY and part.begin is not None:  # originals there or behind were of a topic that was made anew
            rows = rows.filter(pl.col("offset") < part.begin)
        found[kind] = Taken(which, rows)
    return found


def _expired(part: Part, arrived: Arrived, context: BatchContext) -> pl.Expr | None:
    """Originals that are remembered no longer."""
    newest = {number: offset for number, offset in arrived.newest.items() if number == part.partition}
    if part.begin is None or not newest:
        return None
    return forgotten(newest, context.settings.recent_records) | (pl.col("offset") >= part.begin)


def together(source: Source, handed: Sequence[Mapping[str, Taken]]) -> dict[str, pl.DataFrame]:
    """The state that a rule is handed of all partitions, by kind; of one partition the frames themselves."""
    return {
        kind: handed[0][kind].rows if len(handed) == 1 else pl.concat([each[kind].rows for each in handed])
        for kind in source.kept
    }


def applied(
    parts: Sequence[Part],
    handed: Sequence[Mapping[str, Taken]],
    known: Frames,
    arrived: Arrived,
    job: StreamingJob,
    source: Source,
    registry: pl.DataFrame,
    context: BatchContext,
) -> Applied:
    """Applies a job's rule to a lot.

    Args:
        parts: partitions.
        handed: of `taken`, of each of them.
        known: of `together`.
        arrived: their records.
        job: whose.
        source: the rule, and what is to be done for it.
        registry: the newest row of each meter, at least of those in records and state.
        context: of the batch.
    """
    out = settled(arrived, job, source, registry, known, context)
    owners = _owners(parts, handed, arrived) if len(parts) > 1 else None
    changed, clocks = [], {}
    for part, mine in zip(parts, handed, strict=True):
        after = {
            kind: mine[kind].rows if out.state[kind] is known[kind] else _of(part, out.state[kind], owners)
            for kind in source.kept
        }
        if CLOCKS in source.kept:
            rows = arrived.valid if len(parts) == 1 else arrived.valid.filter(pl.col("partition") == part.partition)
            after[CLOCKS] = clocks[part.name] = clock(rows, mine[CLOCKS].rows, context.watermarks)
        changed += changes(part.name, part.stocks, mine, after, source.keys)
    return Applied(out, changed, clocks)


def _owners(parts: Sequence[Part], handed: Sequence[Mapping[str, Taken]], arrived: Arrived) -> pl.DataFrame:
    """Meter → number of its partition: of all meters of records and state."""
    found = [arrived.valid.select("meter_id", "partition")] if "meter_id" in arrived.valid.columns else []
    for part, mine in zip(parts, handed, strict=True):
        number = pl.lit(part.partition, pl.Int64).alias("partition")
        found += [one.rows.select("meter_id", number) for one in mine.values() if "meter_id" in one.rows.columns]
    return pl.concat(found).unique("meter_id", keep="first", maintain_order=True)


def _of(part: Part, rows: pl.DataFrame, owners: pl.DataFrame | None) -> pl.DataFrame:
    """The rows of a kind of state that belong to a partition."""
    if owners is None:
        return rows
    if "partition" in rows.columns:
        return rows.filter(pl.col("partition") == part.partition)
    mine = owners.filter(pl.col("partition") == part.partition)
    return rows.join(mine, on="meter_id", how="semi", maintain_order="left")
