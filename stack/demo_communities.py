"""Two energy communities of the demo's fleet, so that its night has something to settle: CSV files, imported."""

import csv
from pathlib import Path

import polars as pl

from lake.reading import Lake
from metering.sharing.settlement import ALL_PCT, PPM
from schemas.closed_lists import EnergyFlow, SharingModel
from schemas.tables import EXPORTS
from stack.communities import take

MODELS = {"sun-street": SharingModel.FLANDERS_OPTIMAL, "mill-lane": SharingModel.AUSTRIA_DYNAMIC}
SELLERS, BUYERS = 3, 9
"""Members of each at most: meters that have exported, and others."""
PRICES_MICRO = {
    EnergyFlow.COVERED: 150_000,
    EnergyFlow.RESIDUAL: 280_000,
    EnergyFlow.SOLD: 120_000,
    EnergyFlow.FEED_IN: 40_000,
}
"""Millionths of a euro per kWh."""


def take_communities(folder: Path, time_zone: str) -> int:
    """Writes the files, and takes them into the tables of communities. Returns how many members they have.

    Args:
        folder: gets the files.
        time_zone: of the fleet.
    """
    exported = pl.sum_horizontal([pl.col(f"{register}_wh").fill_null(0) for register in EXPORTS])
    fleet = Lake().polars("latest_readings").select("meter_id", exported=exported).sort("meter_id").collect()
    sellers, buyers = (fleet.filter(is_it).get_column("meter_id").to_list() for is_it in
                       (pl.col("exported") > 0, pl.col("exported") == 0))  # fmt: skip
    rows: dict[str, list[dict[str, str | int]]] = {
        name: [] for name in ("communities", "community_members", "community_keys", "community_prices")
    }
    for number, (community, model) in enumerate(MODELS.items()):
        these = [whose[number * most : (number + 1) * most] for whose, most in ((sellers, SELLERS), (buyers, BUYERS))]
        if not all(these):
            continue  # a log of one home, or a fleet without panels
        mine = {"community_id": community}
        rows["communities"].append({**mine, "model": model, "time_zone": time_zone, "currency": "EUR"})
        for meter_id in (*these[0], *these[1]):
            rows["community_members"].append({**mine, "meter_id": meter_id, "factor_pct": ALL_PCT})
        if model is SharingModel.FLANDERS_OPTIMAL:
            rows["community_keys"] += [
                {**mine, "meter_id": meter_id, "key_ppm": PPM // len(these[1])} for meter_id in these[1]
            ]
        rows["community_prices"] += [
            {**mine, "flow": flow, "price_micro_per_kwh": price} for flow, price in PRICES_MICRO.items()
        ]
    folder.mkdir(parents=True, exist_ok=True)
    for table, of_table in rows.items():
        if of_table:
            file = folder / f"{table}.csv"
            with file.open("w", newline="") as out:
                writer = csv.DictWriter(out, list(of_table[0]))
                writer.writeheader()
                writer.writerows(of_table)
            take(file, table)
    return len(rows["community_members"])
