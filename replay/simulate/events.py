"""What a grid's meters say: power, voltage, and what such a fleet says on any day."""

from collections.abc import Iterator
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from replay.arrays import Flags, Integers
from replay.grid import NOMINAL_V, Grid
from replay.simulate.power import Outage
from replay.tape import log_schema

UNDER_VOLTAGE_V, UNDER_VOLTAGE_CLEAR_V = 0.90 * NOMINAL_V, 0.91 * NOMINAL_V
Event = tuple[datetime, str, str, str, str, str | None]
"""observed_at, meter_id, dialect, source_table, code, argument."""


def power_events(
    outages: list[Outage], grid: Grid, meter_ids: list[str], generator: np.random.Generator
) -> Iterator[Event]:
    """Supply lost and back again, some seconds late, by every meter of a feeder without voltage."""
    for outage in outages:
        for meter_id, customer in zip(meter_ids, grid.customers, strict=True):
            if customer.feeder_id == outage.feeder_id:
                down = outage.begin + timedelta(seconds=int(generator.integers(0, 3)))
                up = outage.end + timedelta(seconds=int(generator.integers(0, 6)))
                yield down, meter_id, "c12.19", "ST76", "AE1", None
                yield up, meter_id, "c12.19", "ST76", "AE2", None


def voltage_events(
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


def other_events(
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


def event_table(events: list[Event]) -> pa.Table:
    """Events in order of time, columns of `replay.tape.log_schema("event")`."""
    names = ("observed_at", "meter_id", "dialect", "source_table", "code", "argument")
    ordered = sorted(events, key=lambda event: (event[:5], event[5] or ""))
    rows = [dict(zip(names, event, strict=True)) | {"dialect_version": "*"} for event in ordered]
    return pa.Table.from_pylist(rows, log_schema("event"))
