"""A day of a real low-voltage grid as a tape: SimBench's loads and solar panels, pandapower's voltages.

What is the grid's, what is ours and why the unbalance term looks as it does: `docs/simbench.md`.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from replay.tape import NOMINAL_MV, Tape, log_schema, write_tape
from schemas.errors import ConfigError
from schemas.tables import REGISTRY

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]

DEFAULT_GRID = "1-LV-rural3--1-sw"
PROFILE_STEP_S = 900
PROFILE_BEGIN = datetime(2015, 12, 31, 23, tzinfo=UTC)
"""Row 0 of SimBench's year, 2016-01-01 00:00 in Germany; the rows go on evenly over both clock changes."""
TIME_ZONE = "Europe/Berlin"
NOMINAL_V = NOMINAL_MV / 1000
FUSE_A = 63
SINGLE_PHASE_LIMIT_VA = 4600
"""What may be connected to one phase in Germany (VDE-AR-N 4105: 4.6 kVA)."""
UNBALANCE_PER_OHM = 2.5
"""Drop of a phase per ohm of conductor and ampere above the mean of the phases: 1 for the phase conductor, and 1.5
times the neutral, of the same cross-section, which carries the three surpluses' vector sum."""
UPSTREAM_V, UPSTREAM_S = 1.3, 1500.0
"""Medium-voltage level above the fixed source of the flow: AR(1), the same for all, standard deviation and time."""
OWN_V, OWN_S = 0.35, 300.0
"""Switching in the home, within the quarter hour that the flow knows: AR(1) per meter and phase."""
SHORT_OUTAGE, LONG_OUTAGE = timedelta(minutes=3), timedelta(minutes=20)
UNDER_VOLTAGE_V, UNDER_VOLTAGE_CLEAR_V = 0.90 * NOMINAL_V, 0.91 * NOMINAL_V


@dataclass(frozen=True)
class Customer:
    """One load of the grid, with the solar panels behind its connection.

    Attributes:
        three_phase: by its rating and `SINGLE_PHASE_LIMIT_VA`.
        has_pv: whether there are panels.
        feeder_id: the feeder off the transformer's busbar that it hangs on.
    """

    three_phase: bool
    has_pv: bool
    feeder_id: str


@dataclass(frozen=True)
class SolvedDay:
    """A day of balanced power flows; nothing in it depends on a seed.

    Attributes:
        customers: in the grid's order of loads.
        transformer_id: the one that feeds them.
        begin: local midnight, UTC.
        net_w: per customer and quarter hour, load minus own panels.
        bus_v: the same of the phase-to-neutral voltage of the bus.
        shared_ohm: per pair of customers, resistance of the conductors that both are fed through.
    """

    customers: list[Customer]
    transformer_id: str
    begin: datetime
    net_w: Floats
    bus_v: Floats
    shared_ohm: Floats


@dataclass(frozen=True)
class Outage:
    """A feeder without voltage, from begin to before end."""

    feeder_id: str
    begin: datetime
    end: datetime


@dataclass(frozen=True)
class Fleet:
    """The meters' own view of a solved day."""

    readings: pa.Table
    events: pa.Table
    registry: pa.Table


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of pandas, no log of pandapower: they are about their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def profile_rows(day: date) -> range:
    """SimBench's rows of a local day, 00:00 and 24:00 included; it has 92, 96 or 100 quarter hours.

    Raises:
        ConfigError: the day is not wholly in SimBench's year.
    """
    if not date(2016, 1, 1) <= day <= date(2016, 12, 30):
        msg = f"{day} is not wholly in SimBench's year: 2016-01-01 to 2016-12-30 are"
        raise ConfigError(msg)
    zone = ZoneInfo(TIME_ZONE)
    midnights = [datetime.combine(one, time(), zone).astimezone(UTC) for one in (day, day + timedelta(days=1))]
    first, last = ((midnight - PROFILE_BEGIN) // timedelta(seconds=PROFILE_STEP_S) for midnight in midnights)
    return range(first, last + 1)


def solve(
    *,
    day: date = date(2016, 6, 15),
    grid: str = DEFAULT_GRID,
    flows: int | None = None,
    progress: Progress | None = None,
) -> SolvedDay:
    """A power flow for each quarter hour of a local day, 00:00 and 24:00 included.

    Args:
        day: in 2016, SimBench's year.
        grid: a SimBench code of a low-voltage grid.
        flows: stop after so many.
        progress: called with flows done and flows in all.

    Raises:
        ConfigError: no such grid or day.
    """
    rows = profile_rows(day)[:flows]
    with _quiet():
        import simbench

        if grid not in simbench.collect_all_simbench_codes() or "-LV-" not in grid:
            msg = f"no low-voltage grid {grid} in SimBench, for example {DEFAULT_GRID}"
            raise ConfigError(msg)
        net = simbench.get_simbench_net(grid)
        profiles = simbench.get_absolute_values(net, profiles_instead_of_study_cases=True)
        net.storage["in_service"] = False
        bus_v = _bus_voltages(net, profiles, rows, progress)
        return _solved(net, profiles, rows, bus_v)


def _bus_voltages(net: Any, profiles: Any, rows: range, progress: Progress | None) -> Floats:
    """Per load and row, V between phase and neutral."""
    import pandapower

    load_p, load_q = profiles["load", "p_mw"].to_numpy(), profiles["load", "q_mvar"].to_numpy()
    sgen_p = profiles["sgen", "p_mw"].to_numpy()
    level_v = (net.bus.vn_kv.loc[net.load.bus] * 1000 / math.sqrt(3)).to_numpy()
    volts = np.empty((len(net.load), len(rows)))
    for done, row in enumerate(rows):
        net.load["p_mw"], net.load["q_mvar"], net.sgen["p_mw"] = load_p[row], load_q[row], sgen_p[row]
        pandapower.runpp(net, numba=False, init="results" if done else "auto")
        volts[:, done] = net.res_bus.vm_pu.loc[net.load.bus].to_numpy() * level_v
        if progress:
            progress(done + 1, len(rows))
    return volts


def _solved(net: Any, profiles: Any, rows: range, bus_v: Floats) -> SolvedDay:
    import networkx
    import pandapower.topology

    graph = pandapower.topology.create_nxgraph(net, respect_switches=True, include_trafos=False, multi=False)
    busbar = net.trafo.lv_bus.iloc[0]
    paths = networkx.single_source_shortest_path(graph, busbar)
    line_of = {
        frozenset((line.from_bus, line.to_bus)): (number, line.r_ohm_per_km * line.length_km / line.parallel)
        for number, line in enumerate(net.line.itertuples())
    }
    ohm = np.zeros(len(net.line))
    fed_by = np.zeros((len(net.load), len(net.line)))
    first_lines = []
    for index, bus in enumerate(net.load.bus):
        hops = [line_of[frozenset(hop)] for hop in zip(paths[bus], paths[bus][1:], strict=False)]
        first_lines.append(hops[0][0] if hops else -1)
        for number, resistance in hops:
            ohm[number] = resistance
            fed_by[index, number] = 1
    feeders = {line: f"F{number:02d}" for number, line in enumerate(sorted(set(first_lines)), 1)}

    net_w = profiles["load", "p_mw"].to_numpy()[rows.start : rows.stop].T * 1e6
    made = profiles["sgen", "p_mw"].to_numpy()[rows.start : rows.stop].T * 1e6
    rated_va = net.load.sn_mva.to_numpy() * 1e6
    owner = {bus: index for index, bus in reversed(list(enumerate(net.load.bus)))}  # a bus's first load has its panels
    has_pv = [False] * len(net.load)
    for number, (bus, size_mva) in enumerate(zip(net.sgen.bus, net.sgen.sn_mva, strict=True)):
        home = owner[bus]
        net_w[home] -= made[number]
        has_pv[home] = True
        rated_va[home] = max(rated_va[home], size_mva * 1e6)
    transformer = str(net.trafo.name.iloc[0])
    customers = [
        Customer(bool(size > SINGLE_PHASE_LIMIT_VA), panels, f"{transformer}-{feeders[line]}")
        for size, panels, line in zip(rated_va, has_pv, first_lines, strict=True)
    ]
    begin = PROFILE_BEGIN + timedelta(seconds=rows.start * PROFILE_STEP_S)
    return SolvedDay(customers, transformer, begin, net_w, bus_v, fed_by @ np.diag(ohm) @ fed_by.T)


def unbalance(net_w: Floats, phase: Integers, three_phase: npt.NDArray[np.bool_], shared_ohm: Floats) -> Floats:
    """What a phase's voltage differs by from the balanced flow's, per phase, customer and step.

    A phase that carries more than the mean of the three drops more, over the conductors shared with those who load it.

    Args:
        net_w: per customer and step.
        phase: grid phase 0 to 2 of a single-phase customer.
        three_phase: those who load all phases alike.
        shared_ohm: see `SolvedDay`.
    """
    single = np.where(three_phase[:, None], 0.0, net_w)
    surplus = np.stack([np.where((phase == p)[:, None], single, 0.0) - single / 3 for p in range(3)])
    result: Floats = -UNBALANCE_PER_OHM / NOMINAL_V * (shared_ohm @ surplus)
    return result


def drift(generator: np.random.Generator, shape: tuple[int, ...], *, step_s: float, sd: float, time_s: float) -> Floats:
    """A seeded AR(1) along the last axis, stationary from its first value: noise with a memory of `time_s`."""
    keep = math.exp(-step_s / time_s)
    noise = generator.standard_normal(shape) * sd
    for step in range(1, shape[-1]):
        noise[..., step] = keep * noise[..., step - 1] + math.sqrt(1 - keep * keep) * noise[..., step]
    return noise


def positive_energy(power_w: Floats, step_s: float) -> Floats:
    """Wh of the positive part of a power that is straight between its points, per step."""
    a, b = power_w[:, :-1], power_w[:, 1:]
    high, low = np.maximum(a, b), np.minimum(a, b)
    span = np.where(high > low, high - low, 1.0)
    crossing = high * high / (2 * span)  # the triangle above zero
    mean_w = np.where(low >= 0, (a + b) / 2, np.where(high <= 0, 0.0, crossing))
    energy: Floats = mean_w * step_s / 3600
    return energy


def registers(energy_wh: Floats, start_wh: Integers) -> Integers:
    """Running sums in whole Wh, one more than steps; what is rounded off is never lost, it stays in the sum."""
    sums = np.cumsum(np.pad(energy_wh, ((0, 0), (1, 0))), axis=1)
    return start_wh[:, None] + np.floor(sums + 0.5).astype(np.int64)


def _check(step_s: int) -> None:
    if step_s <= 0 or 3600 % step_s:
        msg = f"a step of {step_s} s does not divide an hour"
        raise ConfigError(msg)


def meters_of(solved: SolvedDay, *, step_s: int = 300, seed: int = 1) -> Fleet:
    """What the customers' meters say about a solved day: readings, events, registry. Same seed, same rows.

    Raises:
        ConfigError: the step does not divide an hour.
    """
    _check(step_s)
    generator = np.random.default_rng(seed)
    count = len(solved.customers)
    solved_points = solved.net_w.shape[1]
    three_phase = np.array([customer.three_phase for customer in solved.customers])
    has_pv = np.array([customer.has_pv for customer in solved.customers])
    phase = generator.integers(0, 3, count)
    meter_ids = [f"simbench-{number:04d}" for number in range(1, count + 1)]
    equipment = [f"SB{generator.integers(0, 10**5):05d}{number:04d}" for number in range(1, count + 1)]
    start_import = generator.integers(1_000_000, 40_000_000, count)
    start_export = np.where(has_pv, generator.integers(100_000, 20_000_000, count), 0)
    failures = generator.integers(0, 12, count)
    long_failures = generator.integers(0, 4, count)
    span_s = (solved_points - 1) * PROFILE_STEP_S
    outages = _outages(solved, generator, span_s)

    # sums go over the common measure of reading step, profile step and the minutes that outages begin and end at
    base_s = math.gcd(step_s, 60)
    base = np.arange(0, span_s + 1, base_s)
    at = np.arange(0, span_s + 1, step_s)
    known = np.arange(solved_points) * PROFILE_STEP_S
    power = np.stack([np.interp(base, known, row) for row in solved.net_w])
    off_in = {
        number: [outage for outage in outages if outage.feeder_id == customer.feeder_id]
        for number, customer in enumerate(solved.customers)
    }
    alive = np.ones(power.shape, bool)
    for number, own in off_in.items():
        for outage in own:
            begin, end = ((moment - solved.begin).total_seconds() for moment in (outage.begin, outage.end))
            alive[number] &= (base < begin) | (base >= end)
    live_step = alive[:, :-1]
    every = step_s // base_s
    imported = registers(positive_energy(power, base_s) * live_step, start_import)[:, ::every]
    exported = registers(positive_energy(-power, base_s) * live_step, start_export)[:, ::every]
    now = np.rint(power[:, ::every]).astype(np.int64)
    is_read = alive[:, ::every]

    lower = unbalance(solved.net_w, phase, three_phase, solved.shared_ohm) + solved.bus_v
    smooth = np.stack([[np.interp(at, known, row) for row in of_phase] for of_phase in lower])
    smooth += drift(generator, (len(at),), step_s=step_s, sd=UPSTREAM_V, time_s=UPSTREAM_S)
    smooth += drift(generator, smooth.shape, step_s=step_s, sd=OWN_V, time_s=OWN_S)
    first_phase = np.where(three_phase, 0, phase)
    volts = [
        np.take_along_axis(smooth, first_phase[None, :, None], axis=0)[0],
        np.where(three_phase[:, None], smooth[1], np.nan),
        np.where(three_phase[:, None], smooth[2], np.nan),
    ]
    ends = {length: np.zeros(is_read.shape, np.int64) for length in ("any", "long")}
    for number, own in off_in.items():
        for outage in own:
            after = at >= (outage.end - solved.begin).total_seconds()
            ends["any"][number] += after
            ends["long"][number] += after & (outage.end - outage.begin > SHORT_OUTAGE)

    columns = {
        "meter_id": np.repeat(np.array(meter_ids)[:, None], len(at), axis=1),
        "observed_at": np.repeat(
            (at * 1_000_000 + round(solved.begin.timestamp()) * 1_000_000)[None, :], count, axis=0
        ),
        "equipment_id": np.repeat(np.array(equipment)[:, None], len(at), axis=1),
        "dialect": np.full(is_read.shape, "simbench"),
        "import_t1_wh": imported,
        "export_t1_wh": exported,
        "import_w": np.maximum(now, 0),
        "export_w": np.maximum(-now, 0),
        **{f"voltage_l{p}_mv": np.rint(volts[p - 1] * 1000) for p in (1, 2, 3)},
        "power_failure_count": failures[:, None] + long_failures[:, None] + ends["any"],
        "long_power_failure_count": long_failures[:, None] + ends["long"],
        "tariff": np.ones(is_read.shape, np.int64),
    }
    events = [
        *_power_events(outages, solved, meter_ids, generator),
        *_voltage_events(volts[0], is_read, at, solved.begin, meter_ids),
        *_other_events(off_in, solved.begin, span_s, meter_ids, generator),
    ]
    registry = [
        {
            "meter_id": meter_id, "usage_point_id": f"simbench-up-{number:04d}", "equipment_id": equipment[number - 1],
            "valid_from": PROFILE_BEGIN, "phases": "L1,L2,L3" if customer.three_phase else "L1",
            "nominal_mv": NOMINAL_MV, "fuse_a": FUSE_A, "transformer_id": solved.transformer_id,
            "feeder_id": customer.feeder_id, "community_id": solved.transformer_id, "time_zone": TIME_ZONE,
            "jurisdiction": "EN50160", "interval_s": step_s,
        }
        for number, (meter_id, customer) in enumerate(zip(meter_ids, solved.customers, strict=True), 1)
    ]  # fmt: skip
    return Fleet(_in_order_of_time(columns, is_read), _event_table(events), pa.Table.from_pylist(registry, REGISTRY))


def _in_order_of_time(columns: dict[str, npt.NDArray[Any]], is_read: npt.NDArray[np.bool_]) -> pa.Table:
    """Arrays by customer and moment → rows by moment and customer; not a number is null."""
    keep = is_read.T.ravel()
    schema = log_schema("reading")
    arrays = []
    for field in schema:
        if field.name not in columns:
            arrays.append(pa.nulls(int(keep.sum()), field.type))
            continue
        values = columns[field.name].T.ravel()[keep]
        if values.dtype.kind == "f":
            missing = np.isnan(values)
            arrays.append(pa.array(np.where(missing, 0, values).astype(np.int64), field.type, mask=missing))
        else:
            arrays.append(pa.array(values).cast(field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _outages(solved: SolvedDay, generator: np.random.Generator, span_s: int) -> list[Outage]:
    """A short one in the first half of the time and a longer one in the second, each of one of the larger feeders."""
    feeders = [customer.feeder_id for customer in solved.customers]
    large = sorted({feeder for feeder in feeders if feeders.count(feeder) >= 5}) or sorted(set(feeders))
    minutes = span_s // 60
    result = []
    for half, length in enumerate((SHORT_OUTAGE, LONG_OUTAGE)):
        share = half / 2 + generator.uniform(0.1, 0.4)
        begin = solved.begin + timedelta(minutes=round(minutes * share))
        result.append(Outage(str(generator.choice(large)), begin, begin + length))
    return result


Event = tuple[datetime, str, str, str, str, str | None]
"""observed_at, meter_id, dialect, source_table, code, argument."""


def _power_events(
    outages: list[Outage], solved: SolvedDay, meter_ids: list[str], generator: np.random.Generator
) -> Iterator[Event]:
    for outage in outages:
        for meter_id, customer in zip(meter_ids, solved.customers, strict=True):
            if customer.feeder_id == outage.feeder_id:
                down = outage.begin + timedelta(seconds=int(generator.integers(0, 3)))
                up = outage.end + timedelta(seconds=int(generator.integers(0, 6)))
                yield down, meter_id, "c12.19", "ST76", "AE1", None
                yield up, meter_id, "c12.19", "ST76", "AE2", None


def _voltage_events(
    volts: Floats, is_read: npt.NDArray[np.bool_], at: Integers, begin: datetime, meter_ids: list[str]
) -> Iterator[Event]:
    """Caution under-voltage where a meter leaves the limit, and its end where it has returned."""
    for number, meter_id in enumerate(meter_ids):
        low = False
        for second, value in zip(at[is_read[number]], volts[number][is_read[number]], strict=True):
            changed = value >= UNDER_VOLTAGE_CLEAR_V if low else value < UNDER_VOLTAGE_V
            if changed:
                low = not low
                moment = begin + timedelta(seconds=int(second))
                yield moment, meter_id, "itron", "MT76", "ME16" if low else "ME17", None


def _other_events(
    off_in: dict[int, list[Outage]],
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
    day: date = date(2016, 6, 15),
    grid: str = DEFAULT_GRID,
    step_s: int = 300,
    seed: int = 1,
    progress: Progress | None = None,
) -> Tape:
    """Solve a day and write it as a tape; the same arguments give the same bytes.

    Raises:
        ConfigError: no such grid or day, a step that does not divide an hour, or the folder holds something else.
    """
    _check(step_s)  # before the work, not after it
    fleet = meters_of(solve(day=day, grid=grid, progress=progress), step_s=step_s, seed=seed)
    return write_tape(
        folder, readings=fleet.readings, events=fleet.events, registry=fleet.registry, format="simbench",
        source=f"{grid} {day}", time_zone=TIME_ZONE, rows_in=len(fleet.readings), defects={}, interval_s=step_s,
    )  # fmt: skip
