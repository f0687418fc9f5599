"""Labelled faults: planned from a file and the seed before the run begins, so that every one of them is a row of truth.

A meter carries the faults of one entry only, so that no two of them touch one record. Like the fleet, the plan is a
function of file, seed and meter number: it does not depend on slices or processes.
"""

from bisect import bisect_left
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from replay.arrays import SECOND, STAMP, Flags, Integers, from_microseconds
from replay.dirt.entries import Entry
from replay.dirt.injection import BENDS, Injection
from replay.dirt.poison import Raw
from replay.fleet import Fleet
from replay.fleet.rows import REGISTER_COLUMNS

FAULTS = pa.schema(
    [
        ("fault_id", pa.int64()),
        ("kind", pa.string()),
        ("meter_id", pa.string()),
        ("topic", pa.string()),
        ("seq", pa.int64()),
        ("due_at", pa.timestamp("us", "UTC")),
        ("observed_at", pa.timestamp("us", "UTC")),
        ("is_sent", pa.bool_()),
        ("amount", pa.int64()),
        ("detail", pa.string()),
        ("payload", pa.binary()),
    ]
)
"""The truth about faults, one row per record that is touched: `observed_at` as it is sent (or would have been);
`amount` in Wh (reset, rollover, meter_exchange, spike), seconds (late, clock_jump) or a factor (unit_slip); `detail`
the register, the event's code, the kind of poison or the transformer; `payload` the bytes of poison."""


class Dirt:
    """The faults of a run.

    Attributes:
        faults: the truth, columns `FAULTS`.
        has_readings: per meter whether any of its readings is touched.
        has_events: the same of its events.
    """

    def __init__(self, fleet: Fleet, entries: list[Entry], seed: int) -> None:
        """Plans all faults.

        Raises:
            ConfigError: an entry, named by its place, asks for more meters than are left, or for what the tape has not.
        """
        self._fleet = fleet
        planned = Injection(fleet, entries, seed)
        self.has_readings = np.zeros(len(fleet), bool)
        self.has_events = np.zeros(len(fleet), bool)
        self.has_readings[[row["meter"] for row in planned.truth]] = True
        self.has_events[[row["meter"] for row in planned.events]] = True
        withheld = np.array(planned.withheld, np.int64).reshape(-1, 2)
        self._withheld = np.sort(_codes(withheld[:, 0], withheld[:, 1]))
        extra = np.array(sorted(planned.extra, key=lambda row: row[2]), np.int64).reshape(-1, 3)
        self._extra_meter, self._extra_number, self._extra_due = extra[:, 0], extra[:, 1], extra[:, 2]
        stuck = np.array(sorted(planned.stuck), np.int64).reshape(-1, 3)
        self._stuck_code, self._stuck_number = _codes(stuck[:, 0], stuck[:, 1]), stuck[:, 2]
        self._bends = pl.DataFrame(planned.bends, schema=BENDS)
        self._raw = sorted(planned.raw, key=lambda raw: (raw.due, raw.meter))
        self._raw_due = [raw.due for raw in self._raw]
        self._event_meters = np.flatnonzero(self.has_events)
        self._event_times = np.unique(np.array([row["due"] for row in planned.events], np.int64))
        self._events = self._numbered_events(planned.events)
        self.faults = pl.concat([self._truth_of_readings(planned.truth), self._truth_of_events()])

    def _event_keys(self, meters: Integers, due: Integers) -> Integers:
        keys: Integers = np.searchsorted(self._event_meters, meters) * (len(self._event_times) + 1)
        keys += np.searchsorted(self._event_times, due)
        return keys

    def _numbered_events(self, planned: list[dict[str, Any]]) -> pl.DataFrame:
        """Events that are said on top of the tape's, with their place among these."""
        rows = sorted(planned, key=lambda row: (row["meter"], row["due"], row["code"]))
        meters = np.array([row["meter"] for row in rows], np.int64)
        due = np.array([row["due"] for row in rows], np.int64)
        self._event_key = self._event_keys(meters, due)
        of_tape = self._fleet.sent_before("events", meters, due + 1) - self._fleet.begin("events", meters)
        own = np.arange(len(rows)) - np.searchsorted(self._event_key, self._event_keys(meters, np.zeros_like(due)))
        frame = pl.DataFrame(
            rows,
            schema={
                "fault_id": pl.Int64, "kind": pl.String, "meter": pl.Int64, "due": pl.Int64, "dialect": pl.String,
                "dialect_version": pl.String, "source_table": pl.String, "code": pl.String,
            },
        )  # fmt: skip
        return frame.with_columns(
            meter_id=self._fleet.meter_ids(meters),
            seq=pl.Series(of_tape + own, dtype=pl.Int64),
            observed_at=from_microseconds((self._fleet.first_us + due) // SECOND * SECOND),  # meters log whole seconds
        )

    def events_before(self, meters: Integers, due: Integers) -> Integers:
        """How many events were said on top of the tape's before, per event of the tape."""
        mine = self.has_events[meters]
        before: Integers = np.zeros(len(meters), np.int64)
        own_meters, own_due = meters[mine], due[mine]
        before[mine] = np.searchsorted(self._event_key, self._event_keys(own_meters, own_due)) - np.searchsorted(
            self._event_key, self._event_keys(own_meters, np.zeros_like(own_due))
        )
        return before

    def is_withheld(self, meters: Integers, numbers: Integers) -> Flags:
        """Which readings are not sent at their time."""
        return np.isin(_codes(meters, numbers), self._withheld)

    def last_due(self) -> int:
        """When the last record is due that is delayed or added, microseconds of the run."""
        events: list[int] = self._events.get_column("due").to_list()
        readings: list[int] = self._extra_due.tolist()
        return max([0, *readings, *self._raw_due, *events])

    def extras(self, low: int, high: int, begin: int, end: int) -> tuple[Integers, Integers, Integers]:
        """Meter, unrolled row and due time of readings that are sent again, or later than their time."""
        first, last = np.searchsorted(self._extra_due, [begin, end])
        meters, numbers, due = (rows[first:last] for rows in (self._extra_meter, self._extra_number, self._extra_due))
        mine = (meters >= low) & (meters < high)
        return meters[mine], numbers[mine], due[mine]

    def raw_due(self, low: int, high: int, begin: int, end: int) -> list[Raw]:
        """Bytes of the meters low … high − 1 that are due in a stretch of the run."""
        first, last = bisect_left(self._raw_due, begin), bisect_left(self._raw_due, end)
        return [raw for raw in self._raw[first:last] if low <= raw.meter < high]

    def events_due(self, low: int, high: int, begin: int, end: int) -> pl.DataFrame:
        """Events that are said on top of the tape's in a stretch of the run."""
        is_due = pl.col("due").is_between(begin, end, closed="left") & pl.col("meter").is_between(low, high - 1)
        return self._events.filter(is_due).drop("fault_id", "kind")

    def shown(self, meters: Integers, numbers: Integers) -> Integers:
        """The rows whose values are shown: earlier ones where a meter is stuck."""
        if not len(self._stuck_code):
            return numbers
        codes = _codes(meters, numbers)
        place = np.minimum(np.searchsorted(self._stuck_code, codes), len(self._stuck_code) - 1)
        result: Integers = np.where(self._stuck_code[place] == codes, self._stuck_number[place], numbers)
        return result

    def bent(self, readings: pl.DataFrame) -> pl.DataFrame:
        """Readings with the faults of clock, registers and equipment; the other columns and the order stay.

        Args:
            readings: of `Fleet.readings`, with `number`, the unrolled row.
        """
        if "equipment_id" not in readings.columns:
            readings = readings.with_columns(equipment_id=pl.lit(None, pl.String))
        keys = readings.select("meter", "number")
        hits = (
            keys.unique()
            .join(self._bends.rename({name: f"bend_{name}" for name in BENDS if name != "meter"}), on="meter")
            .filter((pl.col("number") >= pl.col("bend_from_number")) & (pl.col("number") < pl.col("bend_to_number")))
        )
        if not len(hits):
            return readings
        both = readings.join(hits, on=["meter", "number"], how="left", maintain_order="left")
        begun = self._begun(hits)
        both = both.join(begun, on=["meter", "number"], how="left", maintain_order="left")
        since = pl.col("observed_at") - pl.col("begun_at")
        clock = pl.from_epoch("bend_clock_us", time_unit="us").dt.replace_time_zone("UTC") + since
        shifted = pl.col("observed_at") + pl.duration(microseconds=pl.col("bend_shift_us"))
        registers = []
        for name in (name for name in REGISTER_COLUMNS if name in readings.columns):
            value = (pl.col(name) * pl.col("bend_factor").fill_null(1.0)).round(0).cast(pl.Int64)
            value = value + pl.col(f"bend_{name}").fill_null(0)
            touched = pl.col("bend_full_wh").is_not_null() & pl.col(f"bend_{name}").is_not_null()
            registers.append(pl.when(touched).then(value % pl.col("bend_full_wh")).otherwise(value).alias(name))
        return both.with_columns(
            *registers,
            observed_at=pl.coalesce(clock, shifted, "observed_at").cast(STAMP),
            equipment_id=pl.coalesce("bend_equipment_id", "equipment_id"),
        ).select(readings.columns)

    def _begun(self, hits: pl.DataFrame) -> pl.DataFrame:
        """When the meter's clock was set, for readings whose clock is: null for others."""
        clocks = hits.filter(pl.col("bend_clock_us").is_not_null()).select("meter", "number", "bend_from_number")
        stamps = self._fleet.observed(
            "readings", clocks.get_column("meter").to_numpy(), clocks.get_column("bend_from_number").to_numpy()
        )
        return clocks.select("meter", "number").with_columns(begun_at=from_microseconds(stamps))

    def _truth_of_readings(self, planned: list[dict[str, Any]]) -> pl.DataFrame:
        schema = {"fault_id": pl.Int64, "kind": pl.String, "meter": pl.Int64, "number": pl.Int64, "due": pl.Int64,
                  "is_sent": pl.Boolean, "amount": pl.Int64, "detail": pl.String, "payload": pl.Binary}  # fmt: skip
        rows = pl.DataFrame(planned, schema=schema)
        meters, numbers = rows.get_column("meter").to_numpy(), rows.get_column("number").to_numpy()
        due = self._fleet.due("readings", meters, numbers) + self._fleet.first_us
        own_due = pl.from_epoch(pl.col("due") + self._fleet.first_us, time_unit="us").dt.replace_time_zone("UTC")
        sent = self.bent(self._fleet.readings(meters, numbers).with_columns(number=pl.Series(numbers)))
        return (
            rows.with_columns(
                topic=pl.lit("readings"),
                meter_id=sent.get_column("meter_id"),
                seq=sent.get_column("seq"),
                observed_at=sent.get_column("observed_at"),
                due_at=pl.coalesce(own_due, from_microseconds(due)),
            )
            .select(FAULTS.names)
        )  # fmt: skip

    def _truth_of_events(self) -> pl.DataFrame:
        return self._events.with_columns(
            topic=pl.lit("events"),
            due_at=from_microseconds(self._events.get_column("due").to_numpy() + self._fleet.first_us),
            is_sent=pl.lit(True),
            amount=pl.lit(None, pl.Int64),
            detail=pl.col("code"),
            payload=pl.lit(None, pl.Binary),
        ).select(FAULTS.names)


def _codes(meters: Integers, numbers: Integers) -> Integers:
    codes: Integers = meters.astype(np.int64) << 32 | numbers
    return codes
