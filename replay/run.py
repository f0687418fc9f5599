"""Playing a tape: pacing, sending, and the ledger of what was sent.

A record is due when the run's clock says so (`replay.pace`); how late it is handed over is measured for every record
against its own due time. sent_at is the run's clock when it is sent; flat out, its due time.

The run's time is cut into slices, the fleet into blocks of meters; processes share the fleet, each its own meters. None
of that changes what a meter sends.
"""

import json
import multiprocessing
import os
import queue
import re
import signal
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from xxhash import xxh3_128_digest

from lake.paths import table_path
from lake.reading import registered, registry_files
from replay.dirt import FAULTS, Dirt, Entry, Raw
from replay.fleet import PREFIX, STAMP, Fleet, Integers, fleet, from_microseconds
from replay.pace import ON_THE_WAY, SECOND, Pace, RunClock, Way
from replay.sinks import Sink
from replay.tape import read_tape
from schemas.codec import arrow_schema, encode_batch
from schemas.errors import ConfigError, MeterstreamError, RetryLater
from schemas.tables import REGISTRY, polars_schema
from settings import home

TICK_S = 0.1  # wall time between two bursts of a paced run
AHEAD_S = 1.0  # of wall time that a steady run makes at once: each time costs 30 ms, however few the records
TICK_PER_METER_S = 1e-6  # looking for what is due costs 0.2 s per million meters
BLOCK_RECORDS = 20_000  # records that are in memory at once: some MB
BLOCK_METERS = 100_000  # rows of registry and truth that are in memory at once
FARTHEST_US = 10 * 60 * 1_000_000
"""Meters and processes keep this close together on the run's clock: a third of what the jobs allow as late."""
LAST_WORDS_S = 1.0  # what a process said before it died is heard by then
SHARED_RECORDS = BLOCK_RECORDS  # fewer in a slice of that length cost less than meeting after it
ENDING = (signal.SIGINT, signal.SIGTERM)
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
FACTS = [name for name in REGISTRY.names if name not in ("meter_id", "valid_from", "valid_to")]
"""What the registry says of a meter at all times."""
SharedCounts = MutableSequence[int]
"""Records that the other side has acknowledged, by process."""
UNSTAMPED = ("sent_at", "received_at", "run_id")
"""What of a record the digest leaves out."""


@dataclass(frozen=True)
class Order:
    """What to play, and how: all that a process has to know.

    Attributes:
        tape: folder.
        run_id: the run's name.
        to: mqtt, kafka or null.
        meters: how many; the tape's own number if None.
        seed: of fleet and faults.
        speed: run clock per wall clock; None is flat out.
        start: run clock's begin; the tape's own if None.
        own_clock: the log as it is.
        duration: how much of the log each meter plays.
        loop: begin the log again at its end.
        burst: all meters report at the same moment.
        processes: how many share the meters.
        dirt: faults to inject.
        prefix: of the meters' ids.
        again: add to what this data folder has of the same meters already.
        pace: whether the run's clock waits for the way.
        way: host:port of the Kafka behind the MQTT broker, where a steady run can see what has come through.
        on_the_way: records between the two at which it waits.
    """

    tape: Path
    run_id: str
    to: str
    meters: int | None = None
    seed: int = 1
    speed: float | None = None
    start: datetime | None = None
    own_clock: bool = False
    duration: timedelta | None = None
    loop: bool = False
    burst: bool = False
    processes: int = 1
    dirt: tuple[Entry, ...] = ()
    prefix: str = PREFIX
    again: bool = False
    pace: Pace = Pace.STEADY
    way: str | None = None
    on_the_way: int = ON_THE_WAY

    def open_way(self) -> Way | None:
        """What a steady run waits for behind the MQTT broker, where it can see that.

        Raises:
            RetryLater: Kafka does not answer.
        """
        return Way(self.way, self.on_the_way) if self.is_steady and self.way else None

    @property
    def is_steady(self) -> bool:
        """Whether the run's clock waits for the way."""
        return self.pace == Pace.STEADY

    def fleet(self) -> Fleet:
        """The fleet; the same in every process."""
        return fleet(
            read_tape(self.tape), self.meters, self.seed, start=self.start, own_clock=self.own_clock,
            duration=self.duration, loop=self.loop, burst=self.burst, prefix=self.prefix,
        )  # fmt: skip

    def faults(self, crew: Fleet) -> Dirt | None:
        """The faults; the same in every process."""
        return Dirt(crew, list(self.dirt), self.seed) if self.dirt else None


@dataclass
class Ledger:
    """What was sent.

    Attributes:
        records: readings, events and poison acknowledged by the other side.
        readings: handed over, copies too.
        events: handed over.
        poison: handed over.
        faults: number of injected faults by kind.
        cpu_s: CPU time of all processes since they began, set-up included.
        processes: how many it took; one where the tape is too sparse to share.
        late_mean_s: how late a record was handed over against its due time, wall time, mean over the records; what is
            due within a tick goes out at its end.
        late_p99_s: 99 of 100 records were less late.
        late_max_s: the latest one.
        pace: steady or open.
        slip_s: seconds of wall time that a steady run's clock has waited.
        speed_reached: run clock per wall clock from begin to end.
        waited_s: seconds spent waiting, by what for: mqtt or kafka (the sender's window was full), bridge (too much was
            between MQTT broker and Kafka).
        digest: hash of every meter's byte stream without run_id, sent_at and received_at; it does not depend on how
            meters interleave.
        is_whole: False when the run was stopped before its end.
    """

    run_id: str
    tape: str
    meters: int
    speed: float | None
    seed: int
    to: str
    clock: str
    processes: int
    first_at: str
    last_at: str
    started_at: str
    records: int = 0
    readings: int = 0
    events: int = 0
    poison: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    records_per_s: float = 0.0
    cpu_s: float = 0.0
    late_mean_s: float = 0.0
    late_p99_s: float = 0.0
    late_max_s: float = 0.0
    pace: str = Pace.OPEN.value
    slip_s: float = 0.0
    speed_reached: float = 0.0
    waited_s: dict[str, float] = field(default_factory=dict)
    digest: str = ""
    is_whole: bool = False


@dataclass
class Sent:
    """What one process has sent: arrays have one entry for each of its meters.

    Attributes:
        low: number of its first meter.
        counts: per readings, events and poison the records handed over.
        until: microseconds of the run up to which the meter's records were handed over.
        digest: sum of the records' hashes, two times 64 bits.
        late: lateness in milliseconds → records.
        acknowledged: records that are safe on the other side.
        cpu_s: of this process.
        slip_s: of its clock.
        played_s: wall time from the clock's begin.
        waited_s: by what for.
    """

    low: int
    counts: dict[str, npt.NDArray[np.int32]]
    until: Integers
    digest: npt.NDArray[np.uint64]
    late: dict[int, int] = field(default_factory=dict)
    acknowledged: int = 0
    cpu_s: float = 0.0
    slip_s: float = 0.0
    played_s: float = 0.0
    waited_s: dict[str, float] = field(default_factory=dict)

    def total(self, kind: str) -> int:
        """Records of a kind."""
        return int(self.counts[kind].sum())


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


def run_folder(run_id: str) -> Path:
    """Where a run's ledger and truth lie.

    Raises:
        ConfigError: the name is none of a folder.
    """
    if not RUN_ID.fullmatch(run_id):
        msg = f"a run's name has letters, digits, '.', '_' and '-', and begins with a letter or digit: not {run_id!r}"
        raise ConfigError(msg)
    return home() / "runs" / run_id


def _write(pieces: Iterator[pa.Table], path: Path) -> None:
    """Writes beside the tables, then renames: no reader sees half a file."""
    staged = home() / "staging" / f"{path.parent.name}-{path.name}"
    staged.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    first = next(pieces)
    with pq.ParquetWriter(staged, first.schema, compression="zstd", use_dictionary=False) as file:
        file.write_table(first)
        for piece in pieces:
            file.write_table(piece)
    staged.rename(path)


def _blocks(meters: int) -> Iterator[tuple[int, int]]:
    for low in range(0, meters, BLOCK_METERS):
        yield low, min(low + BLOCK_METERS, meters)


def _prepare(crew: Fleet, dirt: Dirt | None, ledger: Ledger, again: bool) -> None:
    """Registry and truth are there before the first record; the lake's registry only where records follow."""
    folder = run_folder(ledger.run_id)
    if (folder / "run.json").exists():
        msg = f"run {ledger.run_id} is there already ({folder}): a run's name is used once"
        raise ConfigError(msg)
    if ledger.to != "null":
        _check_is_new(crew, again)
        registry = (crew.registry(low, high).to_arrow().cast(REGISTRY) for low, high in _blocks(len(crew)))
        _write(registry, _registry_file(ledger))
    _write((crew.truth(low, high).to_arrow() for low, high in _blocks(len(crew))), folder / "truth.parquet")
    faults = (dirt.faults if dirt else pl.DataFrame(schema=polars_schema(FAULTS))).to_arrow().cast(FAULTS)
    _write(iter([faults]), folder / "faults.parquet")
    _write_ledger(ledger)


def _registry_file(ledger: Ledger) -> Path:
    """The run's part of the lake's registry."""
    return table_path("registry") / f"date={ledger.first_at[:10]}" / f"{ledger.run_id}.parquet"


def _check_is_new(crew: Fleet, again: bool) -> None:
    """Raises ConfigError where the lake's registry has a meter of the fleet: nobody could tell the two apart."""
    for low, high in _blocks(len(crew)) if registry_files() else ():
        mine = crew.registry(low, high)
        newest = registered(mine.get_column("meter_id"))
        other = "METERSTREAM_HOME names another data folder"
        if not crew.own_clock:
            other = f"--meter-prefix gives the fleet other names, {other}"
        both = newest.join(mine, on="meter_id", suffix="_mine").sort("meter_id", "file")
        is_another = pl.any_horizontal(pl.col(name).ne_missing(pl.col(f"{name}_mine")) for name in FACTS)
        for row in (both.filter(is_another) if again else both).head(1).iter_rows(named=True):
            whose = f"{row['meter_id']} is known by {Path(row['file']).stem}"
            if differing := [name for name in FACTS if row[name] != row[f"{name}_mine"]]:
                name = differing[0]
                msg = f"{whose} as another meter ({name} {row[name]}, not {row[f'{name}_mine']}): {other}"
                raise ConfigError(msg)
            msg = f"{whose} already: {other}, --again adds to what is there of the same meters"
            raise ConfigError(msg)


def read_ledger(run_id: str) -> Ledger:
    """What a run has said of itself so far.

    Raises:
        OSError, ValueError, TypeError: it is not there, or not whole.
    """
    return Ledger(**json.loads((run_folder(run_id) / "run.json").read_text()))


def _write_ledger(ledger: Ledger) -> None:
    (run_folder(ledger.run_id) / "run.json").write_text(json.dumps(asdict(ledger), indent=2) + "\n")


def play(order: Order, open_sink: Callable[[], Sink], on_progress: Progress = lambda *_: None) -> Ledger:
    """Sends everything, then writes the ledger; SIGINT or SIGTERM ends it with a ledger that is right.

    Args:
        order: what to play.
        open_sink: makes a sink; in another process where there are several, so it has to be picklable then.
        on_progress: called a few times a second.

    Raises:
        ConfigError: the tape or the faults cannot be played so, or the run's name is taken.
        RetryLater: the other side did not take all; the ledger says what it has.
    """
    crew = order.fleet()
    if not 1 <= order.processes <= len(crew):
        msg = f"--processes is 1 to the number of meters ({len(crew)}), not {order.processes}"
        raise ConfigError(msg)
    dirt = order.faults(crew)
    counted = dirt.faults.unique("fault_id").group_by("kind").len().sort("kind").iter_rows() if dirt else ()
    ledger = Ledger(
        run_id=order.run_id, tape=order.tape.name, meters=len(crew), speed=order.speed, seed=order.seed, to=order.to,
        clock="original" if order.own_clock else "run", processes=order.processes,
        first_at=crew.first_at.isoformat(), last_at=crew.last_at.isoformat(), started_at=datetime.now(UTC).isoformat(),
        faults=dict(counted), pace=order.pace.value,
    )  # fmt: skip
    processes = order.processes if _is_dense(order, crew) else 1
    ledger.processes = processes
    failure: MeterstreamError | None = None
    with _stopped_by_signals() as stop:
        _prepare(crew, dirt, ledger, order.again)
        ids = crew.meter_ids(np.arange(len(crew)))
        began = time.monotonic()
        if processes == 1:
            game = Game(order, crew, dirt, RunClock(order.speed, order.is_steady), lambda: stop.is_asked)
            sent, failure = _play_meters(game, 0, len(crew), open_sink, on_progress, open_way=order.open_way)
            parts = [sent]
        else:
            del crew, dirt
            parts, failure = _share(order, ledger.meters, open_sink, stop, on_progress)
    ledger.seconds = round(time.monotonic() - began, 3)
    _settle(ledger, parts)
    ledger.is_whole = failure is None and not stop.is_asked
    if failure and not ledger.readings + ledger.events + ledger.poison:
        _registry_file(ledger).unlink(missing_ok=True)  # it sent nothing: the same run again is no second one
    _write(_per_meter(ids, parts, ledger), run_folder(ledger.run_id) / "ledger.parquet")
    _write_ledger(ledger)
    if failure:
        raise failure
    return ledger


def _is_dense(order: Order, crew: Fleet) -> bool:
    """Whether a run has enough to share: flat out, processes meet after every slice of `FARTHEST_US`."""
    if order.speed or order.processes == 1:
        return True
    return crew.records * FARTHEST_US >= SHARED_RECORDS * ((crew.last_at - crew.first_at) // timedelta(microseconds=1))


@dataclass
class Stop:
    """Whether somebody asked for the end. A plain flag: a signal may come while a lock is held."""

    is_asked: bool = False


@contextmanager
def _stopped_by_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM let the block at hand go out; a second one ends at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def end(number: int, _: Any) -> None:
        if stop.is_asked:
            raise KeyboardInterrupt
        stop.is_asked = True

    before = {number: signal.signal(number, end) for number in ENDING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _settle(ledger: Ledger, parts: list[Sent]) -> None:
    """Fills the ledger in."""
    ledger.records = sum(part.acknowledged for part in parts)
    ledger.readings, ledger.events, ledger.poison = (
        sum(part.total(kind) for part in parts) for kind in ("readings", "events", "poison")
    )
    ledger.records_per_s = round(ledger.records / max(ledger.seconds, 1e-3), 1)
    ledger.slip_s = round(max((part.slip_s for part in parts), default=0.0), 3)
    for name in sorted({name for part in parts for name in part.waited_s}):
        ledger.waited_s[name] = round(max(part.waited_s.get(name, 0.0) for part in parts), 3)
    until_us = max((int(part.until.max(initial=0)) for part in parts), default=0)
    played_s = max((part.played_s for part in parts), default=0.0)
    ledger.speed_reached = round(until_us / SECOND / max(played_s, 1e-3), 1)
    ledger.cpu_s = round(time.process_time() + sum(part.cpu_s for part in parts), 3)
    total = np.zeros(2, np.uint64)
    late: dict[int, int] = {}
    for part in parts:
        total += part.digest
        for milliseconds, records in part.late.items():
            late[milliseconds] = late.get(milliseconds, 0) + records
    ledger.digest = digest_text(total)
    if late:
        lateness = np.array(sorted(late)) / 1_000
        counts = np.array([late[each] for each in sorted(late)])
        within_99 = np.searchsorted(np.cumsum(counts), 0.99 * counts.sum())
        ledger.late_max_s = round(float(lateness[-1]), 3)
        ledger.late_mean_s = round(float((lateness * counts).sum() / counts.sum()), 3)
        ledger.late_p99_s = round(float(lateness[within_99]), 3)


def _per_meter(ids: pl.Series, parts: list[Sent], ledger: Ledger) -> Iterator[pa.Table]:
    """Per meter what was handed over, and up to when: meter_id, readings, events, poison, sent_until."""
    first_us = round(datetime.fromisoformat(ledger.first_at).timestamp() * SECOND)
    for part in sorted(parts, key=lambda part: part.low):
        counts = {kind: pl.Series(values, dtype=pl.Int64) for kind, values in part.counts.items()}
        until = from_microseconds(part.until + first_us)
        own = ids[part.low : part.low + len(part.until)]
        yield pl.DataFrame({"meter_id": own, **counts, "sent_until": until}).to_arrow()


@dataclass(frozen=True)
class Game:
    """What a process plays.

    Attributes:
        order: of the run.
        crew: the whole fleet.
        dirt: its faults.
        clock: the run's.
        is_stopped: whether to end after the block at hand.
    """

    order: Order
    crew: Fleet
    dirt: Dirt | None
    clock: RunClock
    is_stopped: Callable[[], bool]

    @property
    def length_us(self) -> int:
        """Of the run, microseconds of its clock."""
        whole = (self.crew.last_at - self.crew.first_at) // timedelta(microseconds=1)
        return max(whole, self.dirt.last_due() + 1 if self.dirt else 0)


def _play_meters(
    game: Game,
    low: int,
    high: int,
    open_sink: Callable[[], Sink],
    on_progress: Progress,
    meet: Callable[[], None] = lambda: None,
    acknowledged: "SharedCounts | None" = None,
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
    """
    sent, clock, order = _nothing(low, high), game.clock, game.order
    failure: MeterstreamError | None = None
    sink: Sink | None = None
    try:
        sink = open_sink()
        counts: SharedCounts = [0] if acknowledged is None else acknowledged
        way = open_way()
        begin()
        clock.start()
        for stretch in _slices(game, low, high):
            counts[number] = sink.acknowledged
            if way:
                way.wait(lambda: sum(counts), game.is_stopped)
                sent.waited_s["bridge"] = way.waited_s
            blocks = list(stretch.cut())
            ticks = _ticks(game, stretch, len(blocks)) if order.is_steady and order.speed else None
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


@dataclass(frozen=True)
class Block:
    """The meters low … high − 1 in a stretch of the run's clock: per kind the unrolled rows from `begin` to `end`."""

    low: int
    high: int
    begin_us: int
    end_us: int
    begin: dict[str, Integers]
    end: dict[str, Integers]

    def halves(self, crew: Fleet) -> Iterator["Block"]:
        """The same, halved in time until a piece fits into a block or all its meters keep close together."""
        records = sum(int((self.end[kind] - self.begin[kind]).sum()) for kind in self.end)
        if records <= BLOCK_RECORDS or self.end_us - self.begin_us <= FARTHEST_US:
            yield self
            return
        middle_us = (self.begin_us + self.end_us) // 2
        meters = np.arange(self.low, self.high)
        middle = {kind: crew.sent_before(kind, meters, middle_us) for kind in crew.kinds}
        yield from replace(self, end_us=middle_us, end=middle).halves(crew)
        yield from replace(self, begin_us=middle_us, begin=middle).halves(crew)

    def cut(self) -> Iterator["Block"]:
        """The same in pieces of about `BLOCK_RECORDS` records each, by meters."""
        counts = np.cumsum(sum(self.end[kind] - self.begin[kind] for kind in self.end))
        edges = np.searchsorted(counts, np.arange(BLOCK_RECORDS, counts[-1] + 1, BLOCK_RECORDS), side="right")
        cuts = np.unique(np.concatenate([[0], edges, [len(counts)]]))
        for low, high in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            begin, end = ({kind: rows[low:high] for kind, rows in each.items()} for each in (self.begin, self.end))
            yield Block(self.low + low, self.low + high, self.begin_us, self.end_us, begin, end)


def _slices(game: Game, low: int, high: int) -> Iterator[Block]:
    """The run's time, cut so that a paced run goes out in ticks, and one flat out in slices that fit into memory.

    A steady run is cut into stretches of several ticks, as many as fit into memory: it makes them before their time.
    """
    order, crew = game.order, game.crew
    meters = np.arange(low, high)
    whole = game.length_us
    is_shared = len(meters) < len(crew)
    if order.speed:
        step = _tick_us(game)
        if order.is_steady:
            fitting = BLOCK_RECORDS * whole // max(2 * crew.records, 1)
            step = min(max(step, min(round(AHEAD_S * order.speed * SECOND), fitting)), FARTHEST_US)
        elif is_shared:
            step = min(step, FARTHEST_US)
    else:
        records = sum(int(crew.counts(kind, meters).sum()) for kind in crew.kinds)
        step = FARTHEST_US if is_shared else max(FARTHEST_US, whole * BLOCK_RECORDS // max(records, 1))
    step = max(step, 1)
    first = {kind: crew.begin(kind, meters) for kind in crew.kinds}
    for begin in range(0, whole, step):
        end = min(begin + step, whole)
        last = {kind: crew.sent_before(kind, meters, end) for kind in crew.kinds}
        yield from Block(low, high, begin, end, first, last).halves(crew)
        first = last


def _tick_us(game: Game) -> int:
    """How long a tick of a paced run is on its clock."""
    return round((TICK_S + TICK_PER_METER_S * len(game.crew)) * (game.order.speed or 0) * SECOND)


def _ticks(game: Game, stretch: Block, blocks: int) -> Integers:
    """Ends of a paced run's ticks in a stretch; what is due before one of them goes out then.

    Several blocks go out one after the other, each at the stretch's end: the clock does not go back.
    """
    if blocks > 1:
        return np.array([stretch.end_us])
    tick_us = max(1, _tick_us(game))
    return np.append(np.arange(stretch.begin_us + tick_us, stretch.end_us, tick_us), stretch.end_us)


def _send(block: Block, game: Game, sink: Sink, sent: Sent, ticks: Integers | None) -> None:
    """Hands a block's records over. They count as sent before that: a sink that fails may have taken any of them.

    Args:
        block: what is to be sent.
        game: what is played.
        sink: where to.
        sent: is told of them.
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
            told = np.concatenate([due[begin:last], np.array([raw.due for raw in among], np.int64)])
            for raw in among:  # each at its time among the others
                end = bisect_right(due, raw.due)
                sink.send(kind, ids[begin:end], payloads[begin:end])
                sink.send(kind, [_name(game, raw)], [raw.payload], raw.encoding)
                begin = end
            sink.send(kind, ids[begin:last], payloads[begin:last])
            begun[place] = last
            if game.order.speed and len(told):
                late = np.rint(game.clock.late_s(told) * 1_000)
                for milliseconds, records in zip(*np.unique(late, return_counts=True), strict=True):
                    sent.late[int(milliseconds)] = sent.late.get(int(milliseconds), 0) + int(records)


def _name(game: Game, raw: Raw) -> str:
    return str(game.crew.meter_ids(np.array([raw.meter]))[0])


def digest_of(payloads: list[bytes]) -> npt.NDArray[np.uint64]:
    """Sum of the payloads' hashes modulo 2⁶⁴, in two lanes: it depends on all of them, and not on their order.

    A record carries its meter and its seq, so the order within a meter's stream is in it all the same.
    """
    joined = b"".join([xxh3_128_digest(payload) for payload in payloads])
    lanes: npt.NDArray[np.uint64] = np.frombuffer(joined, "<u8").reshape(-1, 2).sum(axis=0, dtype=np.uint64)
    return lanes


def raw_bytes(meter_id: str, encoding: str, payload: bytes) -> bytes:
    """What the digest takes of bytes that are sent as they are: they need not name their meter themselves."""
    return f"{meter_id}/{encoding}/".encode() + payload


def digest_text(lanes: npt.NDArray[np.uint64]) -> str:
    """A digest as the ledger has it."""
    return "".join(f"{int(lane):016x}" for lane in lanes)


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


def _share(
    order: Order, meters: int, open_sink: Callable[[], Sink], stop: Stop, on_progress: Progress
) -> tuple[list[Sent], MeterstreamError | None]:
    """Plays in several processes, each its own meters."""
    context = multiprocessing.get_context("spawn")
    edges = np.linspace(0, meters, order.processes + 1).astype(int).tolist()
    told: Any = context.Queue()
    barrier, is_stopped = context.Barrier(order.processes), context.Event()
    counts = context.Array("q", order.processes, lock=False)
    workers = [
        context.Process(target=_work, args=(order, number, low, high, open_sink, is_stopped, barrier, counts, told))
        for number, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True))
    ]
    # they inherit this for life: Ctrl-C goes to all of a terminal's processes, and the parent says when to stop
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    for worker in workers:
        worker.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    parts: dict[int, Sent] = {}
    failure: MeterstreamError | None = None
    done = dict.fromkeys(range(order.processes), Standing(0, 0.0, 0.0, 0.0))
    died: dict[int, float] = {}
    try:
        while len(parts) < order.processes:
            if stop.is_asked:
                is_stopped.set()
            for number, worker in enumerate(workers):
                if number in parts or worker.is_alive():
                    continue
                if time.monotonic() - died.setdefault(number, time.monotonic()) > LAST_WORDS_S:
                    parts[number] = _nothing(edges[number], edges[number + 1])  # what it had sent is not known
                    failure = failure or RetryLater(f"process {number + 1} of {order.processes} of the run died")
                    is_stopped.set()
                    barrier.abort()
            try:
                number, what = told.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(what, Sent):
                parts[number] = what
            elif isinstance(what, MeterstreamError):
                failure = failure or what
                is_stopped.set()
                barrier.abort()
            else:
                done[number] = what
                on_progress(_together(list(done.values())))
        for worker in workers:
            worker.join()
    finally:  # on a second Ctrl-C they end at once
        for worker in workers:
            worker.kill()
    return [parts[number] for number in sorted(parts)], failure


def _together(standings: list[Standing]) -> Standing:
    """Where a run stands by its processes: the one that is furthest back says how far it has come."""
    return Standing(
        sum(each.records for each in standings),
        min(each.share for each in standings),
        max(each.late_s for each in standings),
        max(each.slip_s for each in standings),
    )


def _nothing(low: int, high: int) -> Sent:
    counts = {kind: np.zeros(high - low, np.int32) for kind in ("readings", "events", "poison")}
    return Sent(low, counts, np.zeros(high - low, np.int64), np.zeros(2, np.uint64))


def _end_with_parent() -> None:
    """Kills this process when its parent dies: nobody would write the ledger."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _work(
    order: Order,
    number: int,
    low: int,
    high: int,
    open_sink: Callable[[], Sink],
    is_stopped: Event,
    barrier: Barrier,
    counts: SharedCounts,
    told: Any,
) -> None:
    """One of several processes of a run; it ends when its parent does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    shown = 0.0

    def on_progress(standing: Standing) -> None:
        nonlocal shown
        if time.monotonic() - shown > 0.2:
            shown = time.monotonic()
            told.put((number, standing))

    def meet() -> None:
        if order.speed is None or order.is_steady:
            barrier.wait()

    try:
        crew = order.fleet()
        game = Game(order, crew, order.faults(crew), RunClock(order.speed, order.is_steady), is_stopped.is_set)
        open_way = order.open_way if number == 0 else lambda: None
        sent, failure = _play_meters(
            game, low, high, open_sink, on_progress, meet, counts, number, barrier.wait, open_way
        )  # fmt: skip
    except MeterstreamError as error:
        sent, failure = _nothing(low, high), error
    except threading.BrokenBarrierError:  # another one ended before the run began, and says why
        sent, failure = _nothing(low, high), None
    sent.cpu_s = time.process_time()
    if failure:
        told.put((number, failure))
    elif is_stopped.is_set():
        barrier.abort()
    told.put((number, sent))
