"""What happens in a grid by moments: load, switching, medium voltage, outages, power flow and registers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from replay.arrays import Flags, Floats, Integers
from replay.grid import NOMINAL_V, PROFILE_STEP_S, Complexes, Grid, flow

Number = TypeVar("Number", np.float64, np.complex128)
Progress = Callable[[int, int], None]
REGION_V = 0.06 * NOMINAL_V
"""What the voltage before the transformer sinks by at the year's highest load: of EN 50160's 10 % the larger half."""
REGION_PANELS = 0.35
"""Panels of the region beside this grid's, per load: not every grid has as many."""
REGION_RISE_V = 0.02 * NOMINAL_V
"""Its highest rise by what is fed in: the 2 % that German rules allow all plants of a medium-voltage grid together."""
WANDER_V, WANDER_S = 0.9, 750.0
"""Other customers of the medium voltage, and the dead band of the tap changer that holds it: an AR(1)."""
FLICKER_V, FLICKER_S = 0.55, 60.0
"""Large machines and motors of the neighbourhood: a faster AR(1)."""
UNIT_S = 10
"""What is drawn by seed changes every ten seconds, at any reading step: so a step changes what is read, not what is."""
STEADY_SHARE = 0.5
SWITCHED = ((60.0, 0.10, 1.0), (300.0, 0.15, 1.0), (1500.0, 0.3, 0.6))
"""Appliances of a home: seconds that one stays on, share of time that it is on, weight beside `STEADY_SHARE`."""
DAY_S = 86_400
MOMENTS = 1440
"""Moments whose flow is solved at once: enough for fast matrix products, few enough for the memory."""
SHORT_OUTAGE, LONG_OUTAGE = timedelta(minutes=3), timedelta(minutes=20)


@dataclass(frozen=True)
class Outage:
    """A feeder without voltage, from begin to before end."""

    feeder_id: str
    begin: datetime
    end: datetime


@dataclass(frozen=True)
class TapChange:
    """From `at` on the transformer stands `steps` above where the grid's own data have it."""

    at: datetime
    steps: int


@dataclass(frozen=True)
class Course:
    """What happened, per customer and moment; moments are the reading steps, both ends included.

    Attributes:
        at_s: seconds since the begin.
        import_wh: since the begin, per customer and moment, unrounded.
        export_wh: the same of export.
        net_w: load minus panels, mean of the time from that moment on that the registers are summed by.
        volts: per phase of the grid, of the same time.
        is_alive: whether there is voltage.
    """

    at_s: Integers
    import_wh: Floats
    export_wh: Floats
    net_w: Floats
    volts: npt.NDArray[np.float32]
    is_alive: Flags


def drawn_outages(grid: Grid, generator: np.random.Generator, span_s: int) -> list[Outage]:
    """A short one in the first half of the time and a longer one in the second, each of one of the larger feeders."""
    feeders = [customer.feeder_id for customer in grid.customers]
    large = sorted({feeder for feeder in feeders if feeders.count(feeder) >= 5}) or sorted(set(feeders))
    minutes = span_s // 60
    result = []
    for half, length in enumerate((SHORT_OUTAGE, LONG_OUTAGE)):
        share = half / 2 + generator.uniform(0.1, 0.4)
        begin = grid.begin + timedelta(minutes=round(minutes * share))
        result.append(Outage(str(generator.choice(large)), begin, begin + length))
    return result


def drift(generator: np.random.Generator, count: int, *, step_s: float, sd: float, time_s: float) -> Floats:
    """A seeded AR(1), stationary from its first value: noise of a standard deviation with a memory of `time_s`."""
    keep = math.exp(-step_s / time_s)
    value = 0.0
    values = generator.standard_normal(count) * sd
    for step, fresh in enumerate(values):
        value = keep * value + math.sqrt(1 - keep * keep) * fresh if step else fresh
        values[step] = value
    return values


def switching(generator: np.random.Generator, count: int, steps: int) -> npt.NDArray[np.float32]:
    """How a home's load stands to its usual, per customer and step of `UNIT_S`: a steady part and `SWITCHED`."""
    factor = np.full((count, steps), STEADY_SHARE, np.float32)
    for on_s, duty, weight in SWITCHED:
        goes_off, goes_on = UNIT_S / on_s, UNIT_S / on_s * duty / (1 - duty)
        chance = generator.random((count, steps), np.float32)
        turns_on, turns = chance < goes_on, (chance < goes_on) | (chance >= 1 - goes_off)
        turns_on[:, 0], turns[:, 0] = chance[:, 0] < duty, True
        last_turn = np.maximum.accumulate(np.where(turns, np.arange(steps), 0), axis=1)
        factor += np.float32(weight) * np.take_along_axis(turns_on, last_turn, axis=1)
    return factor


def switched(straight_w: Floats, factor: npt.NDArray[np.float32], even_steps: int) -> Floats:
    """A load by units, switched so that the energy of every `even_steps` of them is what it was."""
    result = straight_w * factor
    edges = np.arange(0, straight_w.shape[1], even_steps)
    keep = np.add.reduceat(straight_w, edges, axis=1) / np.maximum(np.add.reduceat(result, edges, axis=1), 1e-9)
    lengths = np.diff(np.append(edges, straight_w.shape[1]))
    scaled: Floats = result * np.repeat(keep, lengths, axis=1)
    return scaled


def _means(values: npt.NDArray[Number], base_s: int) -> npt.NDArray[Number]:
    """Per base step the mean of what is constant by units of `UNIT_S`, along the last axis."""
    length_s = values.shape[-1] * UNIT_S
    sums = np.zeros((*values.shape[:-1], values.shape[-1] + 1), values.dtype)
    np.cumsum(values * UNIT_S, axis=-1, out=sums[..., 1:])
    at = np.arange(0, length_s + 1, base_s)
    left = np.minimum(at // UNIT_S, values.shape[-1] - 1)
    whole = sums[..., left] + values[..., left] * (at - left * UNIT_S)
    means: npt.NDArray[Number] = np.diff(whole, axis=-1) / base_s
    return means


def course(
    grid: Grid,
    share: Floats,
    exponent: Floats,
    outages: list[Outage],
    changes: list[TapChange],
    generator: np.random.Generator,
    step_s: int,
    progress: Progress | None = None,
) -> Course:
    """Load, switching, medium voltage, power flow and registers, on the common measure of reading step and minute.

    Args:
        grid: grid and profiles.
        share: see `replay.grid.flow`.
        exponent: likewise.
        outages: of feeders, beginning and ending with a minute; their customers load the grid no more.
        changes: of the tap, in order of time.
        generator: of switching and medium voltage.
        step_s: of the readings; divides an hour.
        progress: called with moments solved and moments in all.
    """
    count, quarters = grid.load_w.shape
    span_s = (quarters - 1) * PROFILE_STEP_S
    base_s = math.gcd(step_s, 60)
    base_begin_s = np.arange(0, span_s, base_s)
    bases = len(base_begin_s)
    level_v = _means(_level(grid, generator, span_s // UNIT_S), base_s)
    factor = switching(generator, count, span_s // UNIT_S)
    tap = np.zeros(bases, np.int64)
    for change in changes:
        tap[base_begin_s >= (change.at - grid.begin).total_seconds()] = change.steps
    is_alive = np.ones((count, bases), bool)
    for outage in outages:
        begin_s, end_s = ((moment - grid.begin).total_seconds() for moment in (outage.begin, outage.end))
        is_off = np.array([customer.feeder_id == outage.feeder_id for customer in grid.customers])
        is_alive &= ~(is_off[:, None] & (base_begin_s >= begin_s) & (base_begin_s < end_s))

    net_w = np.empty((count, bases))
    volts = np.empty((3, count, bases), np.float32)
    edges = sorted({*range(0, bases, MOMENTS), *(np.flatnonzero(np.diff(tap)) + 1).tolist(), bases})
    for day_s in range(0, span_s, DAY_S):
        until_s = min(day_s + DAY_S, span_s)
        load_va, made_w = _day_of_units(grid, factor[:, day_s // UNIT_S : until_s // UNIT_S], day_s, base_s)
        offset = day_s // base_s
        own_edges = sorted({offset, *(edge for edge in edges if offset < edge < until_s // base_s), until_s // base_s})
        for first, end in zip(own_edges, own_edges[1:], strict=False):
            here, there = slice(first - offset, end - offset), slice(first, end)
            alive = is_alive[:, there]
            volts[:, :, there], load_w = flow(
                grid.supplies[int(tap[first])], share, load_va[:, here] * alive, made_w[:, here] * alive, exponent,
                level_v[there],
            )  # fmt: skip
            net_w[:, there] = load_w - made_w[:, here] * alive
            if progress:
                progress(end, bases)

    every = step_s // base_s
    at_s = np.arange(0, span_s + 1, step_s)
    now = np.minimum(at_s // base_s, bases - 1)
    sums = [np.cumsum(np.pad(np.maximum(way, 0) * base_s / 3600, ((0, 0), (1, 0))), axis=1) for way in (net_w, -net_w)]
    alive_now = is_alive[:, now]
    return Course(
        at_s, sums[0][:, ::every], sums[1][:, ::every], net_w[:, now], volts[:, :, now] * alive_now, alive_now
    )


def _level(grid: Grid, generator: np.random.Generator, units: int) -> Floats:
    """V of the medium voltage above the grid's fixed source, per unit: it sinks with the load of a region like it."""
    region_w = (grid.load_w - REGION_PANELS * grid.made_w).sum(axis=0)
    region_v = np.maximum(region_w / grid.peak_w * REGION_V, -REGION_RISE_V)
    level = drift(generator, units, step_s=UNIT_S, sd=WANDER_V, time_s=WANDER_S)
    level += drift(generator, units, step_s=UNIT_S, sd=FLICKER_V, time_s=FLICKER_S)
    unit_s = (np.arange(units) + 0.5) * UNIT_S
    level -= np.interp(unit_s, np.arange(len(region_v)) * PROFILE_STEP_S, region_v)
    return level


def _day_of_units(grid: Grid, factor: npt.NDArray[np.float32], begin_s: int, base_s: int) -> tuple[Complexes, Floats]:
    """VA of load, switched, and W of the panels, straight between the quarter hours, per customer and base step."""
    unit_s = begin_s + (np.arange(factor.shape[1]) + 0.5) * UNIT_S
    known_s = np.arange(grid.load_w.shape[1]) * PROFILE_STEP_S
    load_w, load_var, made_w = (
        np.stack([np.interp(unit_s, known_s, row) for row in rows])
        for rows in (grid.load_w, grid.load_var, grid.made_w)
    )
    follows = switched(load_w, factor, grid.even_s // UNIT_S) / np.where(load_w > 0, load_w, 1)
    return _means((load_w + 1j * load_var) * follows, base_s), _means(made_w, base_s)
