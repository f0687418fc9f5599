"""Days of a low-voltage grid as a tape, with the truth beside it: what its meters read, said and could not know.

What is the grid's, what is ours and how the numbers were chosen: `docs/simulation.md`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from replay.arrays import SECOND, Flags, Floats, Integers
from replay.grid import (
    NOMINAL_V,
    PROFILE_BEGIN,
    PROFILE_STEP_S,
    TIME_ZONE,
    Customer,
    Grid,
    profile_grid,
    profile_rows,
    simbench_grid,
)
from replay.simulate.events import event_table, other_events, power_events, voltage_events
from replay.simulate.power import DAY_S, SHORT_OUTAGE, Course, Progress, TapChange, course, drawn_outages
from replay.tape import NOMINAL_MV, Tape, log_schema, write_tape
from schemas.codec import TIMESTAMP
from schemas.errors import ConfigError
from schemas.tables import REGISTRY

VERSION = 2  # raised when the same arguments give other rows: tapes that are kept by name are made anew
DEFAULT_DAY, DEFAULT_GRID = date(2016, 6, 15), "1-LV-rural3--1-sw"
FUSES_A = (63, 100, 160, 250, 400, 630)
"""Usual sizes of a house connection's fuse; the smallest that carries the customer's rating."""
CVR_EXPONENTS = (0.4, 1.4)
"""n of P = P₀ (V / Vn)ⁿ, even between: about what is published for homes, from electronics to resistive heating."""
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


@dataclass(frozen=True)
class Simulation:
    """What a grid's meters read and say, and the truth behind it: tables by name, see `docs/simulation.md`."""

    readings: pa.Table
    events: pa.Table
    registry: pa.Table
    truth: dict[str, pa.Table]


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


def registers(energy_wh: Floats, start_wh: Integers) -> Integers:
    """Whole Wh of running sums per customer; what is rounded off is never lost, it stays in the sum."""
    return start_wh[:, None] + np.floor(energy_wh + 0.5).astype(np.int64)


def _check(step_s: int) -> None:
    if step_s <= 0 or 3600 % step_s:
        msg = f"a step of {step_s} s does not divide an hour"
        raise ConfigError(msg)


def meters_of(
    grid: Grid,
    *,
    step_s: int = 300,
    seed: int = 1,
    changes: Sequence[TapChange] = (),
    progress: Progress | None = None,
) -> Simulation:
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
    outages = drawn_outages(grid, accidents, span_s)
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
        *power_events(outages, grid, meter_ids, accidents),
        *voltage_events(own_v[0], happened.is_alive, happened.at_s, grid.begin, meter_ids),
        *(
            event
            for day_s in range(0, span_s, DAY_S)
            for event in other_events(
                off_in, grid.begin + timedelta(seconds=day_s), min(DAY_S, span_s - day_s), meter_ids, messages
            )
        ),
    ]
    usage_points = [f"{grid.prefix}-up-{number:04d}" for number in range(1, count + 1)]
    registry = [
        {
            "meter_id": meter_id, "usage_point_id": usage_point, "equipment_id": own, "valid_from": PROFILE_BEGIN,
            "phases": "L1,L2,L3" if customer.three_phase else "L1", "nominal_mv": NOMINAL_MV,
            "fuse_a": _fuse_a(customer), "transformer_id": grid.transformer_id, "feeder_id": customer.feeder_id,
            "community_id": grid.transformer_id, "time_zone": TIME_ZONE, "jurisdiction": "EN50160",
            "interval_s": step_s,
        }
        for meter_id, usage_point, own, customer in zip(meter_ids, usage_points, equipment, grid.customers, strict=True)
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
    return Simulation(readings, event_table(events), pa.Table.from_pylist(registry, REGISTRY), truth)


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
    stamps = (happened.at_s + round(begin.timestamp())) * SECOND
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
        folder: the tape; its `truth/` holds what `Simulation.truth` does.
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
    simulation = meters_of(net, step_s=step_s, seed=seed, changes=changes, progress=progress)
    until = "" if days == 1 else f" to {day + timedelta(days=days - 1)}"
    return write_tape(
        folder, readings=simulation.readings, events=simulation.events, registry=simulation.registry, format=net.prefix,
        source=f"{net.name} {day}{until}", time_zone=TIME_ZONE, rows_in=len(simulation.readings), defects={},
        interval_s=step_s, truth=simulation.truth,
    )  # fmt: skip
