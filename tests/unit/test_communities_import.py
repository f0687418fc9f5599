"""`stack registry import --table …`: what communities agreed on, and what of a CSV is refused."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lake.reading import Lake
from schemas.errors import ConfigError
from stack.__main__ import app
from stack.communities import take
from tests.lake_by_hand import add_rows

COMMUNITY = "community_id,model,time_zone,currency\nc1,flanders_optimal,Europe/Brussels,EUR\n"
MAY = "2024-05-01T00:00:00+02:00"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four meters in the registry, and a community."""
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path / "home"))
    add_rows("registry", [{"meter_id": f"m{n}"} for n in range(1, 5)], "2024-01-01")
    take(csv_of(tmp_path, COMMUNITY), "communities")
    return tmp_path


def csv_of(folder: Path, text: str) -> Path:
    file = folder / "rows.csv"
    file.write_text(text)
    return file


def rows(table: str) -> list[dict[str, Any]]:
    return Lake().polars(table).drop("date").collect().sort("valid_from", nulls_last=False).to_dicts()


def test_rows_are_dated_and_the_same_row_replaces(home: Path) -> None:
    members = "community_id,meter_id,valid_from,factor_pct\nc1,m1,,\nc1,m2,,70\n"
    assert take(csv_of(home, members), "community_members") == (2, 0)
    again = f"community_id,meter_id,valid_to\nc1,m2,{MAY}\n"
    assert take(csv_of(home, again), "community_members") == (0, 1)
    (m2,) = (row for row in rows("community_members") if row["meter_id"] == "m2")
    assert (m2["valid_to"].isoformat(), m2["factor_pct"]) == ("2024-04-30T22:00:00+00:00", None)
    text = f"community_id,meter_id,key_ppm,valid_from\nc1,m1,600000,\nc1,m2,400000,\nc1,m1,100000,{MAY}\n"
    assert take(csv_of(home, text), "community_keys") == (3, 0)
    assert [row["key_ppm"] for row in rows("community_keys") if row["meter_id"] == "m1"] == [600_000, 100_000]
    prices = "community_id,flow,tariff,price_micro_per_kwh\nc1,covered,,120000\nc1,residual,2,-5\n"
    assert take(csv_of(home, prices), "community_prices") == (2, 0)


@pytest.mark.parametrize(
    ("table", "text", "complaint"),
    [
        (
            "communities",
            "community_id,model\nc,x\n",
            "rows.csv:1: the header is .*; expected community_id, model",
        ),
        ("communities", "community_id,colour\n", "rows.csv:1: no such column: colour; expected community_id, model"),
        (
            "communities",
            "community_id,model,time_zone\nc,dutch,UTC\n",
            "rows.csv:2: model is 'dutch', expected one of",
        ),
        (
            "communities",
            "community_id,model,time_zone\nc,priority,Mars\n",
            "rows.csv:2: time_zone is 'Mars', expected",
        ),
        ("communities", "community_id,model,time_zone\n,priority,UTC\n", "rows.csv:2: community_id is empty"),
        ("communities", "community_id,model,time_zone\n", "rows.csv has no row below its header"),
        (
            "community_members",
            "community_id,meter_id\nc1,m9\n",
            "rows.csv:2: meter_id is 'm9', expected a meter",
        ),
        (
            "community_members",
            "community_id,meter_id\nc9,m1\n",
            "rows.csv:2: community_id is 'c9', expected one",
        ),
        ("community_members", "community_id,meter_id\nc1,m1\nc1,m1\n", "rows.csv:3: the same as line 2"),
        (
            "community_members",
            "community_id,meter_id,factor_pct\nc1,m1,0\n",
            "factor_pct is '0', expected a whole",
        ),
        (
            "community_members",
            f"community_id,meter_id,valid_from,valid_to\nc1,m1,{MAY},{MAY}\n",
            "rows.csv:2: valid_to is not after valid_from",
        ),
        (
            "community_keys",
            f"community_id,meter_id,key_ppm,valid_from\nc1,m1,600000,\nc1,m2,300000,\nc1,m2,500000,{MAY}\n",
            r"rows.csv:4: key_ppm of round 1 adds up to 1,100,000, expected 1,000,000 at most from 2024-04-30T22",
        ),
        (
            "community_keys",
            "community_id,meter_id,key_ppm,hour\nc1,m1,500000,\nc1,m2,500000,\nc1,m1,600000,12\n",
            r"rows.csv:4: key_ppm of round 1 adds up to 1,100,000 in hour 12, expected",
        ),
        (
            "community_keys",
            "community_id,meter_id,producer_id,key_ppm\nc1,m1,,500000\nc1,m2,m3,600000\n",
            r"rows.csv:3: key_ppm of round 1 and m3 adds up to 1,100,000, expected",
        ),
        ("community_keys", "community_id,round,key_ppm\nc1,1,600000\nc1,2,500000\n", "key_ppm of the rounds adds up"),
        (
            "community_keys",
            "community_id,meter_id,key_ppm\nc1,m1,1/3\n",
            "key_ppm is '1/3', expected",
        ),
        (
            "community_prices",
            "community_id,flow,price_micro_per_kwh\nc1,lost,1\n",
            "flow is 'lost', expected",
        ),
    ],
)
def test_a_wrong_field_is_named_with_its_line_and_nothing_is_taken(
    home: Path, table: str, text: str, complaint: str
) -> None:
    before = rows(table)
    with pytest.raises(ConfigError, match=complaint):
        take(csv_of(home, text), table)
    assert rows(table) == before


def test_keys_are_asked_for_at_the_end_of_a_row_that_stood_before_another(home: Path) -> None:
    july = "2024-07-01T00:00:00+02:00"
    text = f"community_id,meter_id,key_ppm,valid_from,valid_to\nc1,m1,500000,,\nc1,m1,100000,{MAY},{july}\n"
    with pytest.raises(ConfigError, match="adds up to 1,100,000, expected 1,000,000 at most from 2024-06-30T22"):
        take(csv_of(home, f"{text}c1,m2,600000,{MAY},\n"), "community_keys")
    assert take(csv_of(home, f"{text}c1,m2,600000,{MAY},{july}\n"), "community_keys") == (3, 0)


def test_a_meter_is_whole_over_its_communities(home: Path) -> None:
    others = "".join(f"c{n},austria_dynamic,UTC\n" for n in range(2, 8))
    take(csv_of(home, f"community_id,model,time_zone\n{others}"), "communities")
    header = "community_id,meter_id,factor_pct\n"
    take(csv_of(home, header + "c1,m1,70\nc2,m1,30\n"), "community_members")
    with pytest.raises(ConfigError, match=r"rows.csv:2: factor_pct of the meter adds up to 101, expected 100 at most"):
        take(csv_of(home, header + "c3,m1,1\n"), "community_members")
    with pytest.raises(ConfigError, match="the meter is in 6 communities, expected 5 at most"):
        take(csv_of(home, header + "".join(f"c{n},m2,10\n" for n in range(1, 7))), "community_members")


def test_the_command_says_what_it_took(home: Path) -> None:
    file = csv_of(home, "community_id,meter_id\nc1,m1\n")
    ran = CliRunner().invoke(app, ["registry", "import", "--table", "community_members", str(file)])
    assert ran.exit_code == 0, ran.output
    assert f"{file}: 1 added, 0 replaced" in ran.output
    assert CliRunner().invoke(app, ["registry", "import", "--table", "nothing", str(file)]).exit_code == 2
