"""Days of a low-voltage grid as a tape, with the truth beside it: what its meters read, said and could not know.

What is the grid's, what is ours and how the numbers were chosen: `docs/simulation.md`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from replay.grid import (
    NOMINAL_V,
    PROFILE_BEGIN,
    PROFILE_STEP_S,
    TIME_ZONE,
    Complexes,
    Customer,
    Floats,
    Grid,
    flow,
    profile_grid,
    profile_rows,
    simbench_grid,
)
from replay.tape import NOMINAL_MV, Tape, log_schema, write_tape
from schemas.codec import TIMESTAMP
from schemas.errors import ConfigError
from schemas.tables import REGISTRY

VERSION = 2  # raised when the same arguments give other rows: tapes that are kept by name are made anew
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Number = TypeVar("Number", np.float64, np.complex128)
Progress = Callable[[int, int], None]

DEFAULT_DAY, DEFAULT_GRID = date(2016, 6, 15), "1-LV-rural3--1-sw"
FUSES_A = (63, 100, 160, 250, 400, 630)
"""Usual sizes of a house connection's fuse; the smallest that carries the customer's rating."""
CVR_EXPONENTS = (0.4, 1.4)
"""n of P = P₀ (V / Vn)ⁿ, even between: about what is published for homes, from electronics to resistive heating."""
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
TOPOLOGY = pa.schema(
    [
        *[(name, pa.string()) for name in ("meter_id", "usage_point_id", "grid", "bus", "phase", "transformer_id")],
        ("feeder_id", pa.string()), ("phase_ohm", pa.float64()), ("neutral_ohm", pa.float64()), ("has_pv", pa.bool_()),
        ("pv_w", pa.float64()), ("annual_kwh", pa.float64()), ("cvr_exponent", pa.float64()),
    ]
)  # fmt: skip
TRUE_READINGS = pa.schema(
    [
        ("meter_id", pa.dictionary(pa.int32(), pa.string())), ("observed_at", TIMESTAMP), ("import_wh", pa.float64()),
        ("export_wh", pa.float64()),
        *[(name, pa.float32()) for name in ("power_w", "voltage_l1_v", "voltage_l2_v", "voltage_l3_v")],
    ]
)  # fmt: skip
TAP_CHANGES = pa.schema(
    [("transformer_id", pa.string()), ("at", TIMESTAMP), ("steps", pa.int64()), ("open_v", pa.float64())]
)
OUTAGES = pa.schema([("feeder_id", pa.string()), ("begin", TIMESTAMP), ("end", TIMESTAMP)])
DAY_S = 86_400
MOMENTS = 1440
"""Moments whose flow is solved at once: enough for fast matrix products, few enough for the memory."""
SHORT_OUTAGE, LONG_OUTAGE = timedelta(minutes=3), timedelta(minutes=20)
UNDER_VOLTAGE_V, UNDER_VOLTAGE_CLEAR_V = 0.90 * NOMINAL_V, 0.91 * NOMINAL_V


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
class Fleet:
    """The meters' own view of a grid, and the truth behind it: tables by name, see `docs/simulation.md`."""

    readings: pa.Table
    events: pa.Table
    registry: pa.Table
    truth: dict[str, pa.Table]


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


def tap_changes(wishes: Mapping[str, int], day: date, days: int) -> list[TapChange]:
    """Tap changes in order of time, from `HH:MM` (of every day) or `YYYY-MM-DDTHH:MM`, local time, → steps.

    Raises:
        ConfigError: no such time, or outside the days.
    """
    zone = ZoneInfo(TIME_ZONE)
    own_days = [day + timedelta(days=number) for number in range(days)]
    changes: dict[datetime, int] = {}
    for wish, steps in sorted(wishes.items(), key=lambda pair: len(pair[0]), reverse=True):
        try:
            if "T" in wish:
                moments = [datetime.fromisoformat(wish)]
            else:
                moments = [datetime.fromisoformat(f"{own}T{wish}") for own in own_days]
        except ValueError as error:
            msg = f"a tap is changed at HH:MM or YYYY-MM-DDTHH:MM, not {wish}"
            raise ConfigError(msg) from error
        for moment in moments:
            if moment.date() not in own_days:
                msg = f"the tap change at {wish} is outside the simulated days"
                raise ConfigError(msg)
            changes.setdefault(moment.replace(tzinfo=zone).astimezone(UTC), steps)  # one day's own time goes first
    return [TapChange(at, steps) for at, steps in sorted(changes.items())]


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


def registers(energy_wh: Floats, start_wh: Integers) -> Integers:
    """Whole Wh of running sums per customer; what is rounded off is never lost, it stays in the sum."""
    return start_wh[:, None] + np.floor(energy_wh + 0.5).astype(np.int64)


def _check(step_s: int) -> None:
    if step_s <= 0 or 3600 % step_s:
        msg = f"a step of {step_s} s does not divide an hour"
        raise ConfigError(msg)


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


def meters_of(
    grid: Grid,
    *,
    step_s: int = 300,
    seed: int = 1,
    changes: Sequence[TapChange] = (),
    progress: Progress | None = None,
) -> Fleet:
    """What the customers' meters read and say, and the truth. The same seed gives the same rows.

    Raises:
        ConfigError: the step does not divide an hour, or the grid cannot carry its load.
    """
    _check(step_s)
    people, accidents, weather, messages = np.random.default_rng(seed).spawn(4)
    count = len(grid.customers)
    span_s = (grid.load_w.shape[1] - 1) * PROFILE_STEP_S
    three_phase = np.array([customer.three_phase for customer in grid.customers])
    has_pv = np.array([customer.pv_w > 0 for customer in grid.customers])
    phase = people.integers(0, 3, count)
    share = np.where(three_phase, 1 / 3, phase == np.arange(3)[:, None])
    exponent = people.uniform(*CVR_EXPONENTS, count)
    meter_ids = [f"{grid.prefix}-{number:04d}" for number in range(1, count + 1)]
    equipment = [f"SB{people.integers(0, 10**5):05d}{number:04d}" for number in range(1, count + 1)]
    start_import = people.integers(1_000_000, 40_000_000, count)
    start_export = np.where(has_pv, people.integers(100_000, 20_000_000, count), 0)
    failures, long_failures = people.integers(0, 12, count), people.integers(0, 4, count)
    outages = _outages(grid, accidents, span_s)
    off_in = [[one for one in outages if one.feeder_id == customer.feeder_id] for customer in grid.customers]
    happened = course(grid, share, exponent, outages, list(changes), weather, step_s, progress)

    first_phase = np.where(three_phase, 0, phase)
    own_v = np.full(happened.volts.shape, np.nan, np.float32)
    own_v[0] = np.take_along_axis(happened.volts, first_phase[None, :, None], axis=0)[0]
    own_v[1:, three_phase] = happened.volts[1:, three_phase]
    ended = {length: np.zeros(happened.is_alive.shape, np.int64) for length in ("any", "long")}
    for number, own in enumerate(off_in):
        for outage in own:
            after = happened.at_s >= (outage.end - grid.begin).total_seconds()
            ended["any"][number] += after
            ended["long"][number] += after & (outage.end - outage.begin > SHORT_OUTAGE)
    now_w = np.rint(happened.net_w).astype(np.int64)
    columns = {
        "import_t1_wh": registers(happened.import_wh, start_import),
        "export_t1_wh": registers(happened.export_wh, start_export),
        "import_w": np.maximum(now_w, 0),
        "export_w": np.maximum(-now_w, 0),
        **{f"voltage_l{p}_mv": np.rint(own_v[p - 1].astype(np.float64) * 1000) for p in (1, 2, 3)},
        "power_failure_count": failures[:, None] + long_failures[:, None] + ended["any"],
        "long_power_failure_count": long_failures[:, None] + ended["long"],
        "tariff": np.ones(now_w.shape, np.int64),
    }
    true_columns = {
        "import_wh": start_import[:, None] + happened.import_wh,
        "export_wh": start_export[:, None] + happened.export_wh,
        "power_w": happened.net_w.astype(np.float32),
        **{f"voltage_l{p}_v": own_v[p - 1] for p in (1, 2, 3)},
    }
    names = {"meter_id": meter_ids, "equipment_id": equipment, "dialect": [grid.prefix] * count}
    events = [
        *_power_events(outages, grid, meter_ids, accidents),
        *_voltage_events(own_v[0], happened.is_alive, happened.at_s, grid.begin, meter_ids),
        *(
            event
            for day_s in range(0, span_s, DAY_S)
            for event in _other_events(
                off_in, grid.begin + timedelta(seconds=day_s), min(DAY_S, span_s - day_s), meter_ids, messages
            )
        ),
    ]
    usage_points = [f"{grid.prefix}-up-{number:04d}" for number in range(1, count + 1)]
    registry = [
        {
            "meter_id": meter_id, "usage_point_id": usage_point, "equipment_id": box, "valid_from": PROFILE_BEGIN,
            "phases": "L1,L2,L3" if customer.three_phase else "L1", "nominal_mv": NOMINAL_MV,
            "fuse_a": _fuse_a(customer), "transformer_id": grid.transformer_id, "feeder_id": customer.feeder_id,
            "community_id": grid.transformer_id, "time_zone": TIME_ZONE, "jurisdiction": "EN50160",
            "interval_s": step_s,
        }
        for meter_id, usage_point, box, customer in zip(meter_ids, usage_points, equipment, grid.customers, strict=True)
    ]  # fmt: skip
    supply = grid.supplies[0]
    topology = [
        {
            "meter_id": meter_id, "usage_point_id": usage_point, "grid": grid.name, "bus": customer.bus,
            "phase": "L1,L2,L3" if customer.three_phase else f"L{phase[number] + 1}",
            "transformer_id": grid.transformer_id, "feeder_id": customer.feeder_id,
            "phase_ohm": supply.phase_ohm[number, number].real, "neutral_ohm": supply.neutral_ohm[number, number].real,
            "has_pv": bool(has_pv[number]), "pv_w": customer.pv_w, "annual_kwh": customer.annual_kwh,
            "cvr_exponent": exponent[number],
        }
        for number, (meter_id, usage_point, customer) in enumerate(
            zip(meter_ids, usage_points, grid.customers, strict=True)
        )
    ]  # fmt: skip
    truth = {
        "topology": pa.Table.from_pylist(topology, TOPOLOGY),
        "true_readings": _table(
            TRUE_READINGS, true_columns, names, happened, grid.begin, np.ones_like(happened.is_alive)
        ),
        "tap_changes": pa.Table.from_pylist(
            [
                {
                    "transformer_id": grid.transformer_id, "at": change.at, "steps": change.steps,
                    "open_v": float(np.abs(grid.supplies[change.steps].open_v).mean()),
                }
                for change in (TapChange(grid.begin, 0), *changes)
            ],
            TAP_CHANGES,
        ),
        "outages": pa.Table.from_pylist(
            [{"feeder_id": one.feeder_id, "begin": one.begin, "end": one.end} for one in outages], OUTAGES
        ),
    }  # fmt: skip
    readings = _table(log_schema("reading"), columns, names, happened, grid.begin, happened.is_alive)
    return Fleet(readings, _event_table(events), pa.Table.from_pylist(registry, REGISTRY), truth)


def _fuse_a(customer: Customer) -> int:
    """The smallest fuse that carries what a customer is rated for."""
    need_a = customer.rated_va / NOMINAL_V / (3 if customer.three_phase else 1)
    return next((size for size in FUSES_A if size >= need_a), FUSES_A[-1])


def _table(
    schema: pa.Schema,
    columns: Mapping[str, npt.NDArray[Any]],
    names: Mapping[str, list[str]],
    happened: Course,
    begin: datetime,
    is_kept: Flags,
) -> pa.Table:
    """Arrays by customer and moment, and names by customer → rows by moment and customer; not a number is null."""
    moments, numbers = np.nonzero(is_kept.T)
    stamps = (happened.at_s + round(begin.timestamp())) * 1_000_000
    arrays = []
    for field in schema:
        if field.name == "observed_at":
            arrays.append(pa.array(stamps[moments]).cast(field.type))
        elif field.name in names:
            words = pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), pa.array(names[field.name]))
            arrays.append(words.cast(field.type))
        elif field.name in columns:
            values = columns[field.name].T[moments, numbers]
            missing = np.isnan(values) if values.dtype.kind == "f" else None
            if missing is not None and pa.types.is_integer(field.type):
                values = np.where(missing, 0, values).astype(np.int64)
            arrays.append(pa.array(values, mask=missing).cast(field.type))
        else:
            arrays.append(pa.nulls(len(moments), field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _outages(grid: Grid, generator: np.random.Generator, span_s: int) -> list[Outage]:
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


Event = tuple[datetime, str, str, str, str, str | None]
"""observed_at, meter_id, dialect, source_table, code, argument."""


def _power_events(
    outages: list[Outage], grid: Grid, meter_ids: list[str], generator: np.random.Generator
) -> Iterator[Event]:
    for outage in outages:
        for meter_id, customer in zip(meter_ids, grid.customers, strict=True):
            if customer.feeder_id == outage.feeder_id:
                down = outage.begin + timedelta(seconds=int(generator.integers(0, 3)))
                up = outage.end + timedelta(seconds=int(generator.integers(0, 6)))
                yield down, meter_id, "c12.19", "ST76", "AE1", None
                yield up, meter_id, "c12.19", "ST76", "AE2", None


def _voltage_events(
    volts: npt.NDArray[np.float32], is_read: Flags, at_s: Integers, begin: datetime, meter_ids: list[str]
) -> Iterator[Event]:
    """Caution under-voltage where a meter leaves the limit, and its end where it has returned."""
    says_low, says_fine = is_read & (volts < UNDER_VOLTAGE_V), is_read & (volts >= UNDER_VOLTAGE_CLEAR_V)
    for number in np.flatnonzero(says_low.any(axis=1)):
        low = False
        for moment in np.flatnonzero(says_low[number] | says_fine[number]):
            if low != says_low[number, moment]:
                low = not low
                at = begin + timedelta(seconds=int(at_s[moment]))
                yield at, meter_ids[number], "itron", "MT76", "ME16" if low else "ME17", None


def _other_events(
    off_in: list[list[Outage]],
    begin: datetime,
    span_s: int,
    meter_ids: list[str],
    generator: np.random.Generator,
) -> Iterator[Event]:
    """By seed: what such a fleet says on any day; nothing from a meter without voltage."""
    count = len(meter_ids)

    def some(share: float) -> list[int]:
        chosen = generator.choice(count, max(1, round(share * count)), replace=False)
        return [int(number) for number in chosen]

    planned: list[tuple[int, float, str, str, str | None]] = []
    for table, code, share in (("ST76", "AE47", 0.02), ("ST76", "AE44", 0.02)):
        planned += [(number, generator.uniform(0, span_s), table, code, None) for number in some(share)]
    for number in some(0.015):
        second = generator.uniform(0, 0.7 * span_s)
        planned.append((number, second, "ST3", "A513", "1"))
        planned.append((number, second + generator.uniform(0.05, 0.25) * span_s, "ST3", "A513", "0"))
    for number in some(0.1):  # the network card and the meter's log both say it
        second = generator.uniform(0, 0.99 * span_s)
        planned.append((number, second, "ST76", "AE20", None))
        planned.append((number, second + generator.uniform(1, 30), "ST76", "AE20", None))
    for number in range(count):
        planned += [(number, generator.uniform(0, span_s), "ST76", "AE7", None) for _ in range(2)]
    for number, second, table, code, argument in planned:
        moment = begin + timedelta(seconds=int(second))
        if not any(outage.begin <= moment < outage.end for outage in off_in[number]):
            yield moment, meter_ids[number], "c12.19", table, code, argument


def _event_table(events: list[Event]) -> pa.Table:
    names = ("observed_at", "meter_id", "dialect", "source_table", "code", "argument")
    ordered = sorted(events, key=lambda event: (event[:5], event[5] or ""))
    rows = [dict(zip(names, event, strict=True)) | {"dialect_version": "*"} for event in ordered]
    return pa.Table.from_pylist(rows, log_schema("event"))


def simulate(
    folder: Path,
    *,
    day: date = DEFAULT_DAY,
    days: int = 1,
    grid: str = DEFAULT_GRID,
    homes: int | None = None,
    step_s: int = 300,
    seed: int = 1,
    taps: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Tape:
    """Simulate local days and write them as a tape; the same arguments give the same bytes.

    Args:
        folder: the tape; its `truth/` holds what `Fleet.truth` does.
        day: the first one.
        days: how many.
        grid: a SimBench code of a low-voltage grid.
        homes: so many homes with demandlib's profile instead of a grid.
        step_s: of the readings.
        seed: of all that is drawn.
        taps: see `tap_changes`.
        progress: see `course`.

    Raises:
        ConfigError: no such grid, day or tap step, a reading step that does not divide an hour, or the folder holds
            something else.
    """
    _check(step_s)  # before the work, not after it
    rows = profile_rows(day, days)
    changes = tap_changes(taps or {}, day, days)
    if homes is not None and changes:
        msg = "homes without a grid have no transformer whose tap could be changed"
        raise ConfigError(msg)
    steps = {change.steps for change in changes}
    net = profile_grid(homes, rows, seed) if homes is not None else simbench_grid(grid, rows, steps)
    fleet = meters_of(net, step_s=step_s, seed=seed, changes=changes, progress=progress)
    until = "" if days == 1 else f" to {day + timedelta(days=days - 1)}"
    return write_tape(
        folder, readings=fleet.readings, events=fleet.events, registry=fleet.registry, format=net.prefix,
        source=f"{net.name} {day}{until}", time_zone=TIME_ZONE, rows_in=len(fleet.readings), defects={},
        interval_s=step_s, truth=fleet.truth,
    )  # fmt: skip
