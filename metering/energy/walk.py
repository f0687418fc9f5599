"""One register of one meter, reading by reading: the definition of what a step is, in plain Python.

One value says nothing against another: what does not follow from the baseline is held, and the next one decides which
of the two it follows from (docs/domain.md, Register steps): a wild value costs one true one at most. A baseline is a
dict of `delta_engine.BASELINE` without its key.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from schemas.closed_lists import DeltaReason

GAP_FACTOR = 1.5  # a span of one and a half expected intervals has lost a reading; jitter stays below
UNKNOWN_LIMIT_WH = 1_000  # so near to 0 is near in any case; to a rollover, where there is no limit
AN_HOUR_S = 3_600  # near to a register's begin or end is what flows in an hour, however long the silence was
MIN_REGISTER_DIGITS = 6  # no register in Wh is smaller than 1,000 kWh
COARSE_WH = (1_000, 100, 10, 1)  # registers count in whole kWh, tenths, hundredths or single Wh
HELD = ["held_at", "held_wh", "held_equipment", "held_run", "held_segment"]


@dataclass(frozen=True)
class Limits:
    """What is known of one meter.

    Attributes:
        max_w: the most plausible power, W; null is no limit, then no step is too large.
        interval_s: seconds between readings; null is unknown, then no step is a gap.
        quantum_wh: the register's step: in 0.1 kWh steps it jumps 100 Wh in a moment.
        wraps_wh: where the register begins again at 0; null is unknown, then at a power of ten.
    """

    max_w: int | None
    interval_s: int | None
    quantum_wh: int
    wraps_wh: int | None = None

    def step_wh(self, span_s: float, quantum_wh: int = 1) -> float | None:
        """The largest plausible step over a span, Wh; of a register in coarser steps than is known of it, too."""
        return None if self.max_w is None else self.max_w * span_s / 3600 + max(self.quantum_wh, quantum_wh)


def coarseness_wh(*values: int) -> int:
    """The coarsest step of a register, 1 Wh to 1 kWh, that both values can be of."""
    return next(step for step in COARSE_WH if not any(value % step for value in values))


def segment_id(meter_id: str, register: str, start: datetime) -> str:
    """Name of a segment: its meter, register and begin, so that reprocessing gives the same."""
    return f"{meter_id}/{register}/{start:%Y%m%dT%H%M%S.%fZ}"


class Walked(NamedTuple):
    """What `walk` returns.

    Attributes:
        steps: previous_at, previous_wh, delta_wh, reason, segment_id, inferred, `row`: of each reading once, in
            order; before the step of a reading that decides about a held value, what became of that: inferred, with
            its own observed_at, wh, equipment_id and run_id, of no `row`.
        baseline: columns `BASELINE` without the key; None where nothing was accepted.
    """

    steps: list[dict[str, Any]]
    baseline: dict[str, Any] | None


def walk(baseline: dict[str, Any] | None, rows: list[dict[str, Any]], limits: Limits) -> Walked:
    """The definition: one register of one meter, originals in the order of observed_at.

    Args:
        baseline: `BASELINE` columns, or None where the register has no accepted value.
        rows: meter_id, register, observed_at, wh, equipment_id, run_id.
        limits: what is known of the meter.
    """
    out: list[dict[str, Any]] = []
    last = {**dict.fromkeys(HELD), **baseline} if baseline else None
    for number, row in enumerate(rows):
        if last is None:
            last = begun(row, row["equipment_id"], is_alone=True)
            out.append(step_of(row, number, {}, DeltaReason.FIRST, 0, last["segment_id"]))
            continue
        if row["observed_at"] <= last["previous_at"]:
            reason = DeltaReason.OUT_OF_ORDER
            if row["observed_at"] == last["previous_at"]:
                reason = DeltaReason.DUPLICATE if row["wh"] == last["previous_wh"] else DeltaReason.CONFLICT
            out.append(step_of(row, number, {}, reason, None, None))
            continue
        held, before = _held(last, row), last
        if held and (row["observed_at"], row["wh"]) == (held["observed_at"], held["wh"]):
            out.append(step_of(row, number, {}, DeltaReason.DUPLICATE, None, None))
            continue
        found = step_between(last, row, limits)
        if last["held_segment"] and (found is None or found[0] is DeltaReason.METER_EXCHANGE):
            returned = _before_exchange(last)  # the other equipment's name came for one reading only
            if (back := step_between(returned, row, limits)) and back[0] is not DeltaReason.METER_EXCHANGE:
                before, found = returned, back
            elif row["equipment_id"] and row["equipment_id"] == returned["equipment_id"]:
                last, found = returned, None  # of the old equipment again, and wild
        if found:
            if held:
                out.append(step_of(held, None, last, DeltaReason.GLITCH, None, last["segment_id"]))
            reason, delta = found
            last = _exchanged(row, before) if reason is DeltaReason.METER_EXCHANGE else gone_on(before, row)
            out.append(step_of(row, number, before, reason, delta, last["segment_id"]))
        elif held and held["observed_at"] < row["observed_at"] and (
            found := step_between(begun(held, last["equipment_id"]), row, limits)
        ) and found[0] is not DeltaReason.METER_EXCHANGE:  # fmt: skip
            begin_reason, begin_wh = begin_of(last, held, limits)
            before = last if begin_reason is not DeltaReason.FIRST else {}
            first = begun(held, last["equipment_id"])
            out.append(step_of(held, None, before, begin_reason, begin_wh, first["segment_id"]))
            last = gone_on(first, row)
            out.append(step_of(row, number, first, *found, last["segment_id"]))
        else:
            if held:
                out.append(step_of(held, None, last, DeltaReason.GLITCH, None, last["segment_id"]))
            out.append(step_of(row, number, last, DeltaReason.IMPLAUSIBLE, None, last["segment_id"]))
            last |= {
                "held_at": row["observed_at"], "held_wh": row["wh"],
                "held_equipment": row["equipment_id"], "held_run": row["run_id"], "held_segment": None,
            }  # fmt: skip
    return Walked(out, last)


def _held(last: dict[str, Any], row: dict[str, Any]) -> dict[str, Any] | None:
    """The value that is held, as a reading; None where none is."""
    if last["held_at"] is None or last["held_segment"]:
        return None
    named = {"equipment_id": last["held_equipment"], "run_id": last["held_run"]}
    return {**row, "observed_at": last["held_at"], "wh": last["held_wh"], **named}


def _before_exchange(last: dict[str, Any]) -> dict[str, Any]:
    """The baseline that an exchange took the place of."""
    return {
        "previous_at": last["held_at"],
        "previous_wh": last["held_wh"],
        "segment_id": last["held_segment"],
        "equipment_id": last["held_equipment"],
        "run_id": last["held_run"],
        "is_alone": False,
        **dict.fromkeys(HELD),
    }


def _exchanged(row: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """The baseline where other equipment begins; what it takes the place of is held."""
    return {
        **begun(row, row["equipment_id"], is_alone=True),
        "held_at": last["previous_at"],
        "held_wh": last["previous_wh"],
        "held_equipment": last["equipment_id"],
        "held_run": last["run_id"],
        "held_segment": last["segment_id"],
    }


def begun(row: dict[str, Any], equipment_id: str | None, is_alone: bool = False) -> dict[str, Any]:
    """The baseline where a segment begins with a reading; its equipment is known, where it names none."""
    return {
        "previous_at": row["observed_at"],
        "previous_wh": row["wh"],
        "segment_id": segment_id(row["meter_id"], row["register"], row["observed_at"]),
        "equipment_id": row["equipment_id"] or equipment_id,
        "run_id": row["run_id"],
        "is_alone": is_alone,
        **dict.fromkeys(HELD),
    }


def gone_on(last: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The baseline where a reading goes on with a segment."""
    return {**begun(row, last["equipment_id"]), "segment_id": last["segment_id"]}


def step_of(
    row: dict[str, Any],
    number: int | None,
    before: dict[str, Any],
    reason: DeltaReason,
    delta_wh: int | None,
    segment: str | None,
) -> dict[str, Any]:
    """A step as `Walked` has it; without a number it says what became of a value that was held."""
    return {
        "row": number,
        **{name: row[name] for name in ("observed_at", "wh", "equipment_id", "run_id")},
        "previous_at": before.get("previous_at"),
        "previous_wh": before.get("previous_wh"),
        "delta_wh": delta_wh,
        "reason": reason.value,
        "segment_id": segment,
        "inferred": number is None,
    }


def begin_of(last: dict[str, Any], held: dict[str, Any], limits: Limits) -> tuple[DeltaReason, int]:
    """Reason and energy of the begin of a segment with a value that did not follow, and that the next one followed.

    Near to 0 is what flows in an hour, or 1 kWh: however long the silence was, what a register that began anew shows
    is taken for energy up to the first.
    """
    if last["is_alone"]:
        return DeltaReason.FIRST, 0
    an_hour = limits.step_wh(AN_HOUR_S)
    hour_wh = UNKNOWN_LIMIT_WH if an_hour is None else an_hour
    if 0 <= held["wh"] <= max(hour_wh, UNKNOWN_LIMIT_WH) and held["wh"] < last["previous_wh"] / 2:
        return DeltaReason.RESET, held["wh"] if held["wh"] <= hour_wh else 0
    return DeltaReason.METER_EXCHANGE, 0


def step_between(last: dict[str, Any], row: dict[str, Any], limits: Limits) -> tuple[DeltaReason, int] | None:
    """Reason and energy of a step forward in time; None where the value does not follow."""
    span_s = (row["observed_at"] - last["previous_at"]).total_seconds()
    before, value = last["previous_wh"], row["wh"]
    limit = limits.step_wh(span_s, coarseness_wh(before, value))
    if row["equipment_id"] and last["equipment_id"] and row["equipment_id"] != last["equipment_id"]:
        return DeltaReason.METER_EXCHANGE, 0
    if value >= before:
        if limit is not None and value - before > limit:
            return None
        is_gap = limits.interval_s is not None and span_s > GAP_FACTOR * limits.interval_s
        return (DeltaReason.GAP if is_gap else DeltaReason.OK), value - before
    unrolled = _unrolled_wh(before, value, limit, limits)
    return None if unrolled is None else (DeltaReason.ROLLOVER, unrolled)


def _unrolled_wh(before: int, value: int, limit: float | None, limits: Limits) -> int | None:
    """Energy of a step to a lower value over the register's end; None where it is none.

    Where nobody says at what the register ends, the value before is near to a power of ten: by what flows in an hour,
    however long the silence was.
    """
    if limits.wraps_wh:
        is_over = value < limits.wraps_wh / 4 and limits.wraps_wh * 3 / 4 <= before < limits.wraps_wh
        unrolled = limits.wraps_wh - before + value
        return unrolled if is_over and value >= 0 and (limit is None or unrolled <= limit) else None
    near = UNKNOWN_LIMIT_WH if limit is None else limit
    nearly = limits.step_wh(max(AN_HOUR_S, limits.interval_s or 0))
    left = 10 ** max(len(str(before)), MIN_REGISTER_DIGITS) - before
    is_near = value >= 0 and left + value <= near and left <= (near if nearly is None else nearly)
    return left + value if is_near else None


Judge = Callable[[dict[str, Any] | None, list[dict[str, Any]], Limits], Walked]
"""What judges a series whose readings do not simply go on: `walk`, or another of its kind."""
