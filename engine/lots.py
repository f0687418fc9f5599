"""A lot: partitions of a topic that a rule is applied to at once, each with state of its own.

A partition with a handful of records costs what the steps of the rules cost, however few rows they have; so of a small
micro-batch all partitions of a topic are one lot. Of the state a rule is handed what the records ask for, and what is
due, or all where that is little (`engine/state.py`); what it gives goes back to the partition that it came from.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
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
        records: how many came.
        stocks: its state, by kind.
    """

    name: str
    partition: int
    begin: int | None
    records: int
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
        is_small = part.begin is not None and stock.is_small(part.records)
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


def looked_at(stocks: Sequence[Stock], arrived: Arrived) -> pl.DataFrame:
    """The rows of a kind of state of another source that belong to the meters of the records.

    Args:
        stocks: the kind, of the partitions with the numbers of the lot.
        arrived: the records.
    """
    meters = arrived.hashes(("meter_id",))
    return pl.concat(
        [
            stock.present
            if stock.is_small(len(arrived.rows))
            else stock.rows.filter(pl.Series(stock.found(meters, None)))
            for stock in stocks
        ]
    )


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
        known: of `together`, and of `looked_at` what the rule looks at.
        arrived: their records.
        job: whose.
        source: the rule, and what is to be done for it.
        registry: the newest row of each meter, at least of those in records and state.
        context: of the batch.
    """
    out = settled(arrived, job, source, registry, known, context)
    owners = _owners(parts, handed, known, arrived) if len(parts) > 1 else None
    after = [{kind: mine[kind].rows for kind in source.kept} for mine in handed]
    for kind in source.kept:
        if out.state[kind] is not known[kind]:
            for new, rows in zip(after, _split(parts, out.state[kind], owners), strict=True):
                new[kind] = rows
    clocks = _clocks(parts, handed, known, arrived, context) if CLOCKS in source.kept else {}
    changed = []
    for part, mine, new in zip(parts, handed, after, strict=True):
        if clocks:
            new[CLOCKS] = clocks[part.name]
        changed += changes(part.name, part.stocks, mine, new, source.keys)
    return Applied(out, changed, clocks)


def _clocks(
    parts: Sequence[Part], handed: Sequence[Mapping[str, Taken]], known: Frames, arrived: Arrived, context: BatchContext
) -> dict[str, pl.DataFrame]:
    """Name of a partition → its clock after the batch."""
    if len(parts) == 1:
        return {parts[0].name: clock(arrived.valid, known[CLOCKS], context.watermarks)}
    before = _numbered(parts, handed, known[CLOCKS], CLOCKS)
    after = clock(arrived.valid, before, context.watermarks, ("partition", "run_id"))
    found = after.partition_by("partition", include_key=False, as_dict=True)
    return {part.name: found.get((part.partition,), known[CLOCKS].clear()) for part in parts}


def _owners(
    parts: Sequence[Part], handed: Sequence[Mapping[str, Taken]], known: Frames, arrived: Arrived
) -> pl.DataFrame:
    """Meter → number of its partition: of all meters of records and state."""
    found = [arrived.valid.select("meter_id", "partition")] if "meter_id" in arrived.valid.columns else []
    found += [
        _numbered(parts, handed, rows.select("meter_id"), kind)
        for kind, rows in known.items()
        if kind in handed[0] and "meter_id" in rows.columns and "partition" not in rows.columns
    ]
    return pl.concat(found).unique("meter_id", keep="first", maintain_order=True)


def _numbered(
    parts: Sequence[Part], handed: Sequence[Mapping[str, Taken]], rows: pl.DataFrame, kind: str
) -> pl.DataFrame:
    """The rows of a kind of all partitions, each with the number of its partition."""
    numbers = np.repeat([part.partition for part in parts], [len(mine[kind].rows) for mine in handed])
    return rows.with_columns(pl.Series("partition", numbers, pl.Int64))


def _split(parts: Sequence[Part], rows: pl.DataFrame, owners: pl.DataFrame | None) -> list[pl.DataFrame]:
    """The rows of a kind of state by the partition that they belong to."""
    if owners is None or rows.is_empty():
        return [rows] * len(parts)
    is_placed = "partition" in rows.columns
    placed = rows if is_placed else rows.join(owners, on="meter_id", how="left", maintain_order="left")
    found = placed.partition_by("partition", include_key=is_placed, as_dict=True)
    return [found.get((part.partition,), rows.clear()) for part in parts]
