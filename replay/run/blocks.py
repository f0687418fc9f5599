"""A run cut into blocks: its time into slices and ticks, its fleet into meters whose records fit into memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np

from replay.arrays import SECOND, Integers
from replay.dirt import Dirt
from replay.fleet import Fleet
from replay.pace import RunClock
from replay.run.order import Order

TICK_S = 0.1  # wall time between two bursts of a paced run
AHEAD_S = 1.0  # of wall time that a steady run makes at once: each time costs 30 ms, however few the records
TICK_PER_METER_S = 1e-6  # looking for what is due costs 0.2 s per million meters
BLOCK_RECORDS = 20_000  # records that are in memory at once: some MB
FARTHEST_US = 10 * 60 * 1_000_000
"""Meters and processes keep this close together on the run's clock: a third of what the jobs allow as late."""


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


def slices(game: Game, low: int, high: int) -> Iterator[Block]:
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


def ticks_of(game: Game, stretch: Block, blocks: int) -> Integers:
    """Ends of a paced run's ticks in a stretch; what is due before one of them goes out then.

    Several blocks go out one after the other, each at the stretch's end: the clock does not go back.
    """
    if blocks > 1:
        return np.array([stretch.end_us])
    tick_us = max(1, _tick_us(game))
    return np.append(np.arange(stretch.begin_us + tick_us, stretch.end_us, tick_us), stretch.end_us)
