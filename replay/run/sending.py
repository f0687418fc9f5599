"""A process's part of a run: its meters' records, block by block, handed over when they are due."""

import threading
from bisect import bisect_right
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pyarrow as pa

from replay.arrays import SECOND, STAMP, Integers, from_microseconds
from replay.dirt.poison import Raw
from replay.pace import Way
from replay.run.blocks import Block, Game, slices, ticks_of
from replay.run.digest import UNSTAMPED, digest_of, raw_bytes
from replay.run.ledger import Sent
from replay.sinks import Sink
from schemas.codec import arrow_schema, encode_batch
from schemas.errors import MeterstreamError

SharedCounts = MutableSequence[int]
"""Records that the other side has acknowledged, by process."""


@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes:
        records: handed over so far.
        share: of the run's time, 0 to 1.
        late_s: present lateness, wall time.
        slip_s: what its clock has waited.
    """

    records: int
    share: float
    late_s: float
    slip_s: float


Progress = Callable[[Standing], None]


def play_meters(
    game: Game,
    low: int,
    high: int,
    open_sink: Callable[[], Sink],
    on_progress: Progress,
    meet: Callable[[], None] = lambda: None,
    acknowledged: SharedCounts | None = None,
    number: int = 0,
    begin: Callable[[], object] = lambda: None,
    open_way: Callable[[], Way | None] = lambda: None,
) -> tuple[Sent, MeterstreamError | None]:
    """Sends the records of the meters low … high − 1.

    Args:
        game: what is played.
        low: first meter.
        high: the one after the last.
        open_sink: where to.
        on_progress: called a few times a second.
        meet: called after each slice, to keep processes together.
        acknowledged: by each process of the run, where there are several.
        number: of this one; the first waits for the way, and the others for it.
        begin: called when everything is open: from then on the clock runs.
        open_way: gives what the first process waits for.

    Returns:
        What was sent, and what ended it before its time.
    """
    sent, clock, order = Sent.nothing(low, high), game.clock, game.order
    failure: MeterstreamError | None = None
    sink: Sink | None = None
    try:
        sink = open_sink()
        counts: SharedCounts = [0] if acknowledged is None else acknowledged
        way = open_way()
        begin()
        clock.start()
        for stretch in slices(game, low, high):
            counts[number] = sink.acknowledged
            if way:
                way.wait(lambda: sum(counts), game.is_stopped)
                sent.waited_s["bridge"] = way.waited_s
            blocks = list(stretch.cut())
            ticks = ticks_of(game, stretch, len(blocks)) if order.is_steady and order.speed else None
            if ticks is None:
                clock.wait_for(stretch.end_us, game.is_stopped)
            for block in blocks:
                if game.is_stopped():
                    break
                _send(block, game, sink, sent, ticks)
            if game.is_stopped():
                break
            handed_over = sum(sent.total(kind) for kind in sent.counts)
            late_s = float(clock.late_s(np.array([stretch.end_us]))[0])
            on_progress(Standing(handed_over, stretch.end_us / game.length_us, late_s, clock.slip_s))
            meet()
    except MeterstreamError as error:
        failure = error
    except threading.BrokenBarrierError:
        pass  # another process of the run ended, and says why
    if sink is not None:
        try:
            sink.close()
        except MeterstreamError as error:
            failure = failure or error
        sent.acknowledged = sink.acknowledged
        sent.waited_s[order.to] = sink.waited_s
    sent.slip_s, sent.played_s = clock.slip_s, clock.played_s
    return sent, failure


def _send(block: Block, game: Game, sink: Sink, sent: Sent, ticks: Integers | None) -> None:
    """Hands a block's records over. They count as sent before that: a sink that fails may have taken any of them.

    Args:
        block: what is to be sent.
        game: what is played.
        sink: where to.
        sent: counts them.
        ticks: when, at the ends of which ticks; at once where there are none.
    """
    ready: list[tuple[str, list[str], list[bytes], Integers]] = []
    for kind, rows in (("readings", _readings(block, game)), ("events", _events(block, game))):
        if rows is None or not len(rows):
            continue
        entity = kind.removesuffix("s")
        bare, due = _bare(rows, entity), rows.get_column("due").to_numpy()
        payloads = encode_batch(entity, _stamped(bare, due, game, ticks))
        ready.append((kind, rows.get_column("meter_id").to_list(), payloads, due))
        sent.digest += digest_of(encode_batch(entity, bare))
        counted = np.bincount(rows.get_column("meter").to_numpy() - block.low, minlength=block.high - block.low)
        sent.counts[kind][block.low - sent.low : block.high - sent.low] += counted.astype(np.int32)
    raws = game.dirt.raw_due(block.low, block.high, block.begin_us, block.end_us) if game.dirt else []
    for raw in raws:
        sent.digest += digest_of([raw_bytes(_name(game, raw), raw.encoding, raw.payload)])
        sent.counts["poison"][raw.meter - sent.low] += 1
    sent.until[block.low - sent.low : block.high - sent.low] = block.end_us
    if raws and (not ready or ready[0][0] != "readings"):
        ready.insert(0, ("readings", [], [], np.array([], np.int64)))
    begun = [0] * len(ready)
    for tick_us in (block.end_us,) if ticks is None else ticks.tolist():
        if ticks is not None:
            game.clock.wait_for(tick_us, game.is_stopped)
        for place, (kind, ids, payloads, due) in enumerate(ready):
            begin, last = begun[place], int(np.searchsorted(due, tick_us))
            among = [raw for raw in raws if raw.due < tick_us] if kind == "readings" else []
            raws = raws[len(among) :]
            handed_over = np.concatenate([due[begin:last], np.array([raw.due for raw in among], np.int64)])
            for raw in among:  # each at its time among the others
                end = bisect_right(due, raw.due)
                sink.send(kind, ids[begin:end], payloads[begin:end])
                sink.send(kind, [_name(game, raw)], [raw.payload], raw.encoding)
                begin = end
            sink.send(kind, ids[begin:last], payloads[begin:last])
            begun[place] = last
            if game.order.speed and len(handed_over):
                late = np.rint(game.clock.late_s(handed_over) * 1_000)
                for milliseconds, records in zip(*np.unique(late, return_counts=True), strict=True):
                    sent.late[int(milliseconds)] = sent.late.get(int(milliseconds), 0) + int(records)


def _name(game: Game, raw: Raw) -> str:
    return str(game.crew.meter_ids(np.array([raw.meter]))[0])


def _readings(block: Block, game: Game) -> pl.DataFrame | None:
    """Readings of a block in the order of their due times, with `due`, microseconds of the run."""
    crew, dirt = game.crew, game.dirt
    meters, numbers = crew.pairs("readings", block.low, block.high, block.begin["readings"], block.end["readings"])
    due = crew.due("readings", meters, numbers)
    touched = None
    if dirt is not None and dirt.has_readings[block.low : block.high].any():
        keep = ~(dirt.has_readings[meters] & dirt.is_withheld(meters, numbers))
        more = dirt.extras(block.low, block.high, block.begin_us, block.end_us)
        meters, numbers, due = (
            np.concatenate([rows[keep], extra]) for rows, extra in zip((meters, numbers, due), more, strict=True)
        )
        touched = dirt
    if not len(meters):
        return None
    order = np.argsort(due, kind="stable")
    meters, numbers, due = meters[order], numbers[order], due[order]
    if touched is None:
        return crew.readings(meters, numbers).with_columns(due=pl.Series(due))
    readings = crew.readings(meters, numbers, touched.shown(meters, numbers))
    bent = touched.bent(readings.with_columns(number=pl.Series(numbers)))
    return bent.with_columns(due=pl.Series(due))


def _events(block: Block, game: Game) -> pl.DataFrame | None:
    """Events of a block, the same way."""
    crew, dirt = game.crew, game.dirt
    meters, numbers = crew.pairs("events", block.low, block.high, block.begin["events"], block.end["events"])
    events = None
    if len(meters):
        due = crew.due("events", meters, numbers)
        order = np.argsort(due, kind="stable")
        meters, numbers, due = meters[order], numbers[order], due[order]
        events = crew.events(meters, numbers).with_columns(due=pl.Series(due))
        if dirt is not None:
            events = events.with_columns(seq=pl.col("seq") + pl.Series(dirt.events_before(meters, due)))
    said = dirt.events_due(block.low, block.high, block.begin_us, block.end_us) if dirt else None
    if said is None or not len(said):
        return events
    both = said if events is None else pl.concat([events, said], how="diagonal")
    return both.sort("due", "meter", "seq")


def _bare(rows: pl.DataFrame, entity: str) -> pa.Table:
    """The entity's columns of due records; what a run stamps is null."""
    schema = arrow_schema(entity)
    arrays = [
        rows.get_column(field.name).to_arrow().cast(field.type)
        if field.name in rows.columns and field.name not in UNSTAMPED
        else pa.nulls(len(rows), field.type)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)


def _stamped(bare: pa.Table, due: Integers, game: Game, ticks: Integers | None) -> pa.Table:
    """The same with the stamps of the run: sent_at is when they go out, at their tick's end where there are ticks."""
    order = game.order
    if ticks is None:
        sent_us = due + np.rint(game.clock.late_s(due) * ((order.speed or 0) * SECOND)).astype(np.int64)
    else:
        sent_us = ticks[np.searchsorted(ticks, due, side="right")]
    stamps = {
        "sent_at": from_microseconds(sent_us + game.crew.first_us),
        "run_id": pl.repeat(order.run_id, len(due), eager=True),
    }
    if order.to == "kafka":
        stamps["received_at"] = pl.repeat(datetime.now(UTC), len(due), dtype=STAMP, eager=True)
    for name, values in stamps.items():
        place = bare.schema.get_field_index(name)
        bare = bare.set_column(place, bare.schema.field(place), values.to_arrow().cast(bare.schema.field(place).type))
    return bare
