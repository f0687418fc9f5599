"""A disputed series, seen from both sides: the readings that agree with the most others are kept. For the night.

Of all ways to leave readings out, the best keeps the most, less a price for each place where a register begins anew: so
wild values go, two or three that agree with each other too, and what goes on from its second reading on is a register
that was reset or exchanged. What is left out is a `glitch`.
"""

from collections.abc import Callable
from typing import Any

from metering.energy.walk import Limits, Walked, begin_of, begun, gone_on, step_between, step_of
from schemas.closed_lists import DeltaReason

AT_MOST_OUT = 32
"""Readings that may be left out in a row, before what comes then must be another segment."""
BREAK_PRICE = 1.5
"""Readings that the begin of a segment is worth: two that agree with each other begin one, one alone does not."""
NAMED_PRICE = 0.75
"""The same where the equipment is another by its name: one reading is enough."""
RETURN_PRICE = 33.0
"""The same where the reading follows from one before those that it does not follow from: they are wild rather. So is a
segment from which a reading goes on that follows from the one before the segment, too, with less energy: but not where
the segment has risen so far by itself, in `OWN_READINGS` or more, that it passes the old register on its way."""
OWN_READINGS = 4


def agreed(baseline: dict[str, Any] | None, rows: list[dict[str, Any]], limits: Limits) -> Walked:
    """Judges a series as `walk.walk` does, with its arguments; both sides of each reading are known.

    Args:
        baseline: none: the night has all readings.
        rows: of one register, in the order of observed_at.
        limits: what is known of the meter.
    """
    assert baseline is None, "the night begins with the first reading that it has"
    kept = _kept(rows, limits)
    out: list[dict[str, Any]] = []
    last: dict[str, Any] | None = None
    for number, row in enumerate(rows):
        if number not in kept:
            segment = last["segment_id"] if last else None
            out.append(step_of(row, number, last or {}, DeltaReason.GLITCH, None, segment))
        elif last is None:
            last = begun(row, row["equipment_id"])
            out.append(step_of(row, number, {}, DeltaReason.FIRST, 0, last["segment_id"]))
        else:
            before, found = last, step_between(last, row, limits)
            reason, delta = found or begin_of(last, row, limits)
            is_begin = reason in (DeltaReason.METER_EXCHANGE, DeltaReason.RESET)
            last = begun(row, row["equipment_id"] or last["equipment_id"]) if is_begin else gone_on(last, row)
            step = step_of(row, number, before, reason, delta, last["segment_id"])
            out.append({**step, "inferred": found is None})
    return Walked(out, last)


def _kept(rows: list[dict[str, Any]], limits: Limits) -> set[int]:
    """The readings that agree with the most others, by number."""
    points: list[dict[str, Any]] = []
    for row in rows:
        points.append(begun(row, points[-1]["equipment_id"] if points else None))

    def follows(one: int, other: int) -> bool:
        found = step_between(points[one], rows[other], limits)
        return found is not None and found[0] is not DeltaReason.METER_EXCHANGE

    def is_edge(one: int, other: int) -> bool:
        return follows(one, other) and not _passes_over(rows, one, other, follows)

    worth: list[float] = []
    before: list[int | None] = []
    broken_at: list[int | None] = []  # the reading before the last begin of a segment on the way, while it is near
    own: list[tuple[int, int]] = []  # of the segment that a reading is of: its first reading, and how many it has
    best_so_far: tuple[float, int | None] = (0.0, None)
    for number, row in enumerate(rows):
        best, at, broken, has_edge = 0.0, None, None, False  # the first reading that counts
        mine = (number, 1)
        for other in range(number - 1, max(number - 2 - AT_MOST_OUT, -1), -1):
            if is_edge(other, number):
                old = broken_at[other]
                if not has_edge:  # a reading that others went on from is no sign of it
                    has_edge = number - other <= OWN_READINGS or not is_edge(other, other + 1)
                if old is not None and number - old > 2 * AT_MOST_OUT:
                    old = None
                olds = [] if old is None else [each for each in (old, before[old]) if each is not None]
                first, count = own[other]
                rise, risen = row["wh"] - rows[other]["wh"], rows[other]["wh"] - rows[first]["wh"]
                is_passing = count >= OWN_READINGS and 0 <= rise <= risen
                is_return = not is_passing and any(
                    0 <= row["wh"] - rows[each]["wh"] < rise and is_edge(each, number) for each in olds
                )
                value = worth[other] - (RETURN_PRICE if is_return else 0)
                if value > best:
                    best, at, broken, mine = value, other, None if is_return else old, (first, count + 1)
                    if limits.max_w is None and row["wh"] < rows[other]["wh"]:  # over its end, or wild
                        broken, mine = other, (number, 1)
                if worth[other] >= best_so_far[0] and not is_return:
                    break  # nothing before it is worth more
        near = range(max(number - 1 - AT_MOST_OUT, 0), number)
        for begin in {best_so_far[1], *near} - {None}:
            price = RETURN_PRICE if has_edge else _price(points[begin], row)
            if worth[begin] - price > best:
                best, at, broken, mine = worth[begin] - price, begin, begin, (number, 1)
        worth.append(best + 1)
        before.append(at)
        broken_at.append(broken)
        own.append(mine)
        if worth[-1] > best_so_far[0]:
            best_so_far = worth[-1], number
    kept: set[int] = set()
    at = best_so_far[1]
    while at is not None:
        kept.add(at)
        at = before[at]
    return kept


def _passes_over(rows: list[dict[str, Any]], one: int, other: int, follows: Callable[[int, int], bool]) -> bool:
    """Whether a step leaves out two readings or more that lie on its way, on this or on that side of a jump in it.

    The longer the span, the more energy is plausible: what lies between would then be left out for a step that only its
    length makes possible. Of a step over the register's end one is enough.
    """
    least, most = rows[one]["wh"], rows[other]["wh"]
    is_over_its_end = least > most
    values = ((number, rows[number]["wh"]) for number in range(one + 1, other))
    between = [
        number for number, wh in values if (wh >= least or wh <= most if is_over_its_end else least <= wh <= most)
    ]
    return sum(follows(one, number) != follows(number, other) for number in between) > (not is_over_its_end)


def _price(before: dict[str, Any], row: dict[str, Any]) -> float:
    """What it costs that a segment begins with a reading."""
    is_named = row["equipment_id"] and before["equipment_id"] and row["equipment_id"] != before["equipment_id"]
    return NAMED_PRICE if is_named else BREAK_PRICE
