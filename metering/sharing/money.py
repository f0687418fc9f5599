"""Bills of a community: Wh of a day by flow, and cents of which the days of a month add up exactly."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import polars as pl

from metering.sharing.rounding import with_carry
from metering.sharing.settlement import Row, valid
from schemas.closed_lists import EnergyFlow, SharingModel, SharingQuality
from schemas.tables import REPORTS, polars_schema

NANO_A_CENT = 10_000_000
"""Wh times millionths of the currency per kWh are 10⁻⁹ of the currency."""
BILLS = polars_schema(REPORTS["community_bills_v1"])
PRICE = ("flow", "tariff")
CAPPED = SharingModel.SPAIN_HOURLY
"""Its surplus is compensated by no more than the energy bought in the month costs (RD 244/2019)."""
EARNED = (EnergyFlow.SOLD, EnergyFlow.FEED_IN)


def nano(wh: int, flow: EnergyFlow, tariff: int | None, prices: Mapping[tuple[str, int | None], int]) -> int | None:
    """Price of energy, 10⁻⁹ of the currency; None where it has energy and no price.

    Args:
        wh: energy.
        flow: what it is.
        tariff: in which tariff it was taken.
        prices: (flow, tariff) → millionths per kWh; without tariff: of all that have none of their own.
    """
    price = prices.get((flow, tariff), prices.get((flow, None)))
    return wh * price if price is not None else None if wh else 0


def bills(shared: pl.DataFrame, prices: Sequence[Row], currency: str | None, day_start: datetime) -> pl.DataFrame:
    """A bill a member for the day that begins at `day_start`.

    Cents are rounded down with carry: those of a month's days add up to the month's money rounded down. A flow that has
    energy without a price on a day of the month so far has none from then on: null.

    Args:
        shared: rows of `energy_sharing_v1` of one community, from the begin of the month to this day.
        prices: its rows in `schemas.tables.COMMUNITY_PRICES`.
        currency: of the prices.
        day_start: when the day begins.

    Returns:
        Columns of `community_bills_v1`, by meter.
    """
    at_time: dict[datetime, dict[tuple[str, int | None], int]] = {}
    for at in shared["slot_start"].unique():
        rows = valid(prices, at, PRICE)
        at_time[at] = {(price["flow"], price["tariff"]): price["price_micro_per_kwh"] for price in rows}
    given = []
    for (meter_id,), mine in shared.sort("meter_id", "slot_start").partition_by("meter_id", as_dict=True).items():
        days: dict[datetime, list[Row]] = {}
        for row in mine.iter_rows(named=True):
            days.setdefault(row["day_start"], []).append(row)
        if day_start not in days:
            continue
        bill: dict[str, Any] = _energy(days[day_start]) | {
            "community_id": days[day_start][0]["community_id"],
            "meter_id": meter_id,
            "day_start": day_start,
            "day_end": days[day_start][0]["day_end"],
            "currency": currency,
        }
        money: dict[EnergyFlow, list[int] | None] = {}
        for flow in EnergyFlow:
            amounts = [
                nano(row[f"{flow}_wh"] or 0, flow, row["tariff"], at_time[row["slot_start"]])
                for at in sorted(days)
                for row in days[at]
            ]
            money[flow] = None if None in amounts else [amount for amount in amounts if amount is not None]
        bought, fed = money[EnergyFlow.RESIDUAL], money[EnergyFlow.FEED_IN]
        if days[day_start][-1]["model"] == CAPPED.value and fed is not None:
            money[EnergyFlow.FEED_IN] = None if bought is None else _capped(fed, bought)
        slots = len(days[day_start])
        cents = {
            flow: None if amounts is None else sum(with_carry(amounts, NANO_A_CENT)[-slots:])
            for flow, amounts in money.items()
        }
        bill |= {f"{flow}_cents": amount for flow, amount in cents.items()}
        if all(amount is not None for amount in cents.values()):
            signed = [(amount or 0) * (1 if flow in EARNED else -1) for flow, amount in cents.items()]
            bill["balance_cents"] = sum(signed)
        given.append(bill)
    return pl.DataFrame(given, schema=BILLS).sort("meter_id")


def _energy(rows: list[Row]) -> dict[str, Any]:
    """Sums of a member's day; null where no slot is known."""
    sums: dict[str, Any] = {"slots": len(rows)}
    sums["missing_slots"] = sum(row["quality"] == SharingQuality.MISSING.value for row in rows)
    for name in (*[f"{flow}_wh" for flow in EnergyFlow], "own_coverage_wh"):
        known = [row[name] for row in rows if row[name] is not None]
        sums[name] = sum(known) if known else None
    sources: dict[str, int] = {}
    for row in rows:
        for source in row["sources"] or []:
            sources[source["producer_id"]] = sources.get(source["producer_id"], 0) + source["wh"]
    sums["sources"] = [{"producer_id": producer, "wh": wh} for producer, wh in sorted(sources.items())]
    return sums


def _capped(amounts: list[int], limits: list[int]) -> list[int]:
    """Amounts of which the sum to any time is at most that of the limits."""
    given, total, limit = [0], 0, 0
    for amount, more in zip(amounts, limits, strict=True):
        total, limit = total + amount, limit + more
        given.append(min(total, limit))
    return [after - before for before, after in zip(given, given[1:], strict=False)]
