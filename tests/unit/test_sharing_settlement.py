"""A community's day: every row adds up, whatever the model, and is the same in any order of what comes."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest

from metering.sharing.models import MODELS
from metering.sharing.settlement import of_hour, settle, valid
from schemas.closed_lists import SharingModel
from schemas.tables import COMMUNITY_KEYS, COMMUNITY_MEMBERS

BEGIN = datetime(2024, 6, 11, 22, tzinfo=UTC)
DAY = (BEGIN, BEGIN + timedelta(hours=6))
METERS = [f"m{n}" for n in range(8)]
ONE = {"community_id": "c", "valid_from": None, "valid_to": None}


def rows_of(model: SharingModel, seed: int) -> tuple[pl.DataFrame, list[dict[str, Any]], list[dict[str, Any]]]:
    """Six hours of eight meters of which three inject, members and keys of all kinds, some quarters missing."""
    chance = random.Random(seed)
    intervals = [
        {"meter_id": meter, "register": register, "interval_start": BEGIN + timedelta(minutes=15 * n),
         "energy_wh": chance.randrange(2000), "quality": chance.choice(["measured", "interpolated", "power_fail"])}
        for n in range(24) for meter in METERS for register in ("import_t1", "import_t2", "export_t1")
        if (register != "export_t1" or meter < "m3") and chance.random() > 0.02
    ]  # fmt: skip
    members = [
        dict.fromkeys(COMMUNITY_MEMBERS.names) | ONE | {"meter_id": meter, "factor_pct": chance.choice([None, 33, 70])}
        for meter in METERS
    ]
    keys = [
        dict.fromkeys(COMMUNITY_KEYS.names) | ONE
        | {"meter_id": meter, "key_ppm": 125_000, "tier": 1 + n % 3, "round": 1, "valid_from": since}
        for n, meter in enumerate(METERS) for since in (None, BEGIN + timedelta(hours=3))
    ]  # fmt: skip
    return pl.DataFrame(intervals), members, keys


@pytest.mark.parametrize("model", SharingModel)
def test_every_row_adds_up_and_the_order_of_what_comes_is_nothing(model: SharingModel) -> None:
    intervals, members, keys = rows_of(model, 1)
    community = ONE | {"model": model.value, "time_zone": "Europe/Brussels"}
    community |= {"consumption_side": None, "production_side": "priority"}
    found = settle(intervals, [community], members, keys, DAY)
    assert len(found) == 8 * 6 * 3600 / MODELS[model].slot_s
    assert found["covered_wh"].sum() == found["sold_wh"].sum()
    known = found.filter(pl.col("covered_wh").is_not_null() & pl.col("sold_wh").is_not_null())
    of_sources = pl.col("sources").list.eval(pl.element().struct.field("wh")).list.sum()
    adds_up = (
        (pl.col("consumption_wh") == pl.col("covered_wh") + pl.col("residual_wh"))
        & (pl.col("surplus_wh") == pl.col("sold_wh") + pl.col("feed_in_wh"))
        & (of_sources == pl.col("covered_wh"))
        & (pl.col("own_coverage_wh") <= pl.col("covered_wh"))
        & (pl.col("consumption_wh") <= pl.col("metered_wh"))
    )
    assert known.filter(~adds_up).is_empty()
    factors = pl.DataFrame(members, schema_overrides={"factor_pct": pl.Int64}).select("meter_id", "factor_pct")
    takes_part = pl.col("metered_wh") * pl.col("factor_pct").fill_null(100) // 100
    assert found.join(factors, on="meter_id").filter(pl.col("consumption_wh") != takes_part).is_empty()
    register = intervals.filter(pl.col("register").str.starts_with("import")).group_by("meter_id", "interval_start")
    halved = register.len().filter(pl.col("len") == 1).select("meter_id", pl.col("interval_start").alias("slot_start"))
    of_quarters = found.join(halved, on=["meter_id", "slot_start"])
    assert MODELS[model].slot_s == 3600 or len(of_quarters)
    assert set(of_quarters["quality"]) <= {"incomplete", "missing"}
    assert (found["operator_share_kwh"].null_count() < len(found)) == (model is SharingModel.AUSTRIA_DYNAMIC)
    chance = random.Random(2)
    mixed = intervals.sample(fraction=1, shuffle=True, seed=3)
    again = settle(mixed, [community], chance.sample(members, 8), chance.sample(keys, 16), DAY)
    assert again.equals(found)


def test_of_several_rows_of_the_same_the_one_that_began_last_counts() -> None:
    later = BEGIN + timedelta(hours=1)
    rows = [{"a": 1, "n": n, "valid_from": since, "valid_to": until}
            for n, since, until in ((0, None, None), (1, BEGIN, later), (2, later, None))]  # fmt: skip
    for order in (rows, rows[::-1]):
        assert [row["n"] for row in valid(order, BEGIN - timedelta(seconds=1), ["a"])] == [0]
        assert [row["n"] for row in valid(order, BEGIN, ["a"])] == [1]
        assert [row["n"] for row in valid(order, later, ["a"])] == [2]
    assert valid(rows[1:2], later, ["a"]) == []
    hours = [dict.fromkeys(("meter_id", "producer_id", "round")) | {"hour": hour} for hour in (12, None)]
    assert [row["hour"] for row in of_hour(hours, 12)] == [12]
    assert [row["hour"] for row in of_hour(hours, 11)] == [None]
