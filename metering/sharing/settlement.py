"""A community's local day: a row a member and slot, of what its meters took and gave and of what is valid then."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import polars as pl

from metering.sharing.models import MODELS, QUARTER_S, Key, Slot, as_the_operator, share
from schemas.closed_lists import IntervalQuality, SharingModel, SharingQuality, SharingSide
from schemas.tables import EXPORTS, IMPORTS, REPORTS, polars_schema

PPM, MILLI = 1_000_000, 1000
ALL_PCT = 100
ROWS = polars_schema(REPORTS["energy_sharing_v1"])
WORST = list(SharingQuality)
"""The last is the worst."""
WORTH = {
    IntervalQuality.MEASURED: SharingQuality.MEASURED,
    IntervalQuality.POWER_FAIL: SharingQuality.MEASURED,
    IntervalQuality.INTERPOLATED: SharingQuality.ESTIMATED,
    IntervalQuality.ESTIMATED: SharingQuality.ESTIMATED,
    IntervalQuality.INCOMPLETE: SharingQuality.INCOMPLETE,
}
WAYS = {"import": IMPORTS, "export": EXPORTS}
MEMBER, KEY = ("meter_id",), ("meter_id", "producer_id", "round", "hour")
"""What two rows of members or keys are of the same by."""
Row = Mapping[str, Any]


class Metered(NamedTuple):
    """What a meter took or gave in a slot.

    Attributes:
        wh: None: not known.
        tariff: of which most is; None where nothing is known.
        quality: of the worst part of it.
    """

    wh: int | None
    tariff: int | None
    quality: SharingQuality


ABSENT = Metered(0, None, SharingQuality.MEASURED)
"""Of a meter that has the other way's registers alone."""


def valid(rows: Iterable[Row], at: datetime, same: Sequence[str]) -> list[Row]:
    """The rows valid at a time; of several of the same the one that began last.

    Args:
        rows: with valid_from and valid_to; null is always, for ever.
        at: the time; a row that ends then is not valid any more.
        same: columns in which rows of the same are equal.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        since, until = row["valid_from"], row["valid_to"]
        if (since is None or since <= at) and (until is None or at < until):
            of_same = tuple(row[name] for name in same)
            before = found.get(of_same)
            if before is None or (since is not None and (before["valid_from"] is None or before["valid_from"] < since)):
                found[of_same] = row
    return list(found.values())


def settle(
    intervals: pl.DataFrame,
    communities: Sequence[Row],
    members: Sequence[Row],
    keys: Sequence[Row],
    day: tuple[datetime, datetime],
) -> pl.DataFrame:
    """Shares each slot of a day.

    Args:
        intervals: quarter hours of the members: meter_id, register, interval_start, energy_wh, quality.
        communities: rows of one community in `schemas.tables.COMMUNITIES`.
        members: its rows in `COMMUNITY_MEMBERS`.
        keys: its rows in `COMMUNITY_KEYS`.
        day: begin and end of the local day.

    Returns:
        Columns of `energy_sharing_v1`, by meter and slot: a row per slot and member that is valid when the slot begins.

    Raises:
        ContractBroken: an invariant of the model does not hold.
    """
    quarters = _quarters(intervals)
    has = {way: _registers(intervals, registers) for way, registers in WAYS.items()}
    anything = {meter_id for registers in has.values() for meter_id in registers}
    rows: list[dict[str, Any]] = []
    for at, end, community in _slots(communities, day):
        factors = {row["meter_id"]: row["factor_pct"] or ALL_PCT for row in valid(members, at, MEMBER)}
        metered = {
            way: {
                i: ABSENT if i in anything and i not in has[way] else _metered(quarters, has[way], i, way, at, end)
                for i in factors
            }
            for way in WAYS
        }
        hour = at.astimezone(ZoneInfo(community["time_zone"] or "UTC")).hour
        slot_keys = tuple(_key(row) for row in of_hour(valid(keys, at, KEY), hour))
        for row in _shared(community, metered, factors, slot_keys):
            rows.append({"slot_start": at, "slot_end": end, "day_start": day[0], "day_end": day[1], **row})
    return pl.DataFrame(rows, schema=ROWS).sort("meter_id", "slot_start")


def _slots(communities: Sequence[Row], day: tuple[datetime, datetime]) -> Iterator[tuple[datetime, datetime, Row]]:
    """Begin and end of each slot of a day, and the community's row that is valid then; none where it is not."""
    at = day[0]
    while at < day[1]:
        step = timedelta(seconds=QUARTER_S)
        for community in valid(communities, at, ("community_id",)):
            step = timedelta(seconds=MODELS[SharingModel(community["model"])].slot_s)
            yield at, min(at + step, day[1]), community
        at += step


def _quarters(intervals: pl.DataFrame) -> dict[tuple[str, str, datetime], list[Row]]:
    """Rows by meter, way and begin of the quarter hour."""
    found: dict[tuple[str, str, datetime], list[Row]] = {}
    for row in intervals.iter_rows(named=True):
        way = "import" if row["register"] in IMPORTS else "export"
        found.setdefault((row["meter_id"], way, row["interval_start"]), []).append(row)
    return found


def _registers(intervals: pl.DataFrame, registers: Sequence[str]) -> dict[str, int]:
    """How many of these registers each meter has on the day."""
    mine = intervals.filter(pl.col("register").is_in(registers))
    return dict(mine.group_by("meter_id").agg(pl.col("register").n_unique()).iter_rows())


def _metered(
    quarters: Mapping[tuple[str, str, datetime], list[Row]],
    registers: Mapping[str, int],
    meter_id: str,
    way: str,
    at: datetime,
    end: datetime,
) -> Metered:
    """What a meter took or gave from `at` to `end`; a part of it that is not there makes it incomplete."""
    found: list[Row] = []
    expected = 0
    while at < end:
        found += quarters.get((meter_id, way, at), [])
        expected += registers.get(meter_id, 0)
        at += timedelta(seconds=QUARTER_S)
    if not found:
        return Metered(None, None, SharingQuality.MISSING)
    qualities = {WORTH[IntervalQuality(row["quality"])] for row in found}
    if len(found) < expected:
        qualities.add(SharingQuality.INCOMPLETE)
    of_tariff: dict[int, int] = {}
    for row in found:
        tariff = int(row["register"][-1])
        of_tariff[tariff] = of_tariff.get(tariff, 0) + row["energy_wh"]
    most = min(of_tariff, key=lambda tariff: (-of_tariff[tariff], tariff))
    return Metered(sum(of_tariff.values()), most, max(qualities, key=WORST.index))


def of_hour(keys: Iterable[Row], hour: int | None) -> list[Row]:
    """The keys of a local hour of the day: one of that hour goes before one of all hours."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in sorted(keys, key=lambda row: row["hour"] is not None):
        if row["hour"] in (None, hour):
            found[row["meter_id"], row["producer_id"], row["round"]] = row
    return list(found.values())


def _key(row: Row) -> Key:
    part = None if row["key_ppm"] is None else Fraction(row["key_ppm"], PPM)
    return Key(row["meter_id"], part, row["producer_id"], row["round"] or 1, row["tier"] or 1)


def _shared(
    community: Row, metered: Mapping[str, Mapping[str, Metered]], factors: Mapping[str, int], keys: tuple[Key, ...]
) -> Iterator[dict[str, Any]]:
    """A row a member of one slot; who is not known takes part with nothing."""
    imports, exports = metered["import"], metered["export"]
    taking = {i: (found.wh or 0) * factors[i] // ALL_PCT for i, found in imports.items()}
    giving = {i: (found.wh or 0) * factors[i] // ALL_PCT for i, found in exports.items()}
    model = SharingModel(community["model"])
    sides = [SharingSide(community[f"{name}_side"] or SharingSide.PRO_RATA) for name in ("consumption", "production")]
    shared = share(model, Slot(taking, {i: wh for i, wh in giving.items() if wh}, keys, (sides[0], sides[1])))
    operator = None
    if model is SharingModel.AUSTRIA_DYNAMIC:
        in_mwh = [
            {i: (found.wh or 0) * factors[i] * (MILLI // ALL_PCT) for i, found in way.items()}
            for way in (imports, exports)
        ]
        operator = as_the_operator(*in_mwh)
    qualities = {i: max((way[i].quality for way in (imports, exports)), key=WORST.index) for i in factors}
    sources: dict[str, list[dict[str, Any]]] = {}
    for (member, producer), wh in shared.sources.items():
        sources.setdefault(member, []).append({"producer_id": producer, "wh": wh})
    for i in factors:
        row = {
            "community_id": community["community_id"],
            "meter_id": i,
            "model": model.value,
            "missing_members": sum(quality is SharingQuality.MISSING for quality in qualities.values()),
            "quality": qualities[i].value,
        }
        if imports[i].wh is not None:
            row |= {
                "tariff": imports[i].tariff,
                "metered_wh": imports[i].wh,
                "consumption_wh": taking[i],
                "own_coverage_wh": shared.sources.get((i, i), 0),
                "ideal_share_wh": shared.ideal[i],
                "covered_wh": shared.covered[i],
                "sources": sources.get(i, []),
                "residual_wh": taking[i] - shared.covered[i],
                "operator_share_kwh": _kwh(operator.share[i]) if operator else None,
                "operator_covered_kwh": _kwh(operator.covered[i]) if operator else None,
            }
        if exports[i].wh is not None:
            sold = shared.sold.get(i, 0)
            row |= {
                "surplus_wh": giving[i],
                "sold_wh": sold,
                "feed_in_wh": giving[i] - sold,
                "operator_feed_in_kwh": _kwh(operator.feed_in[i]) if operator else None,
            }
        yield row


def _kwh(mwh: int) -> Decimal:
    return Decimal(mwh).scaleb(-6)
