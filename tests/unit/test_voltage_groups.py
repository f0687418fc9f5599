"""Meters of one transformer: who is out of step, against numpy's correlation and by example."""

from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

from metering.voltage.groups import FEWEST_WINDOWS, MEMORY_WINDOWS, MOVEMENT, Rollups, roll_up
from metering.voltage.windows import WINDOWS

START = datetime(2024, 1, 1, tzinfo=UTC)
NOTHING = pl.DataFrame(schema=MOVEMENT)
Percents = npt.NDArray[np.float64]


def windows(deviations: dict[str, Percents], first: int = 0, group: str = "T1") -> pl.DataFrame:
    """meter → deviations in %, one per window → rows of one transformer's phase L1."""
    rows = [
        {
            "meter_id": meter, "phase": "L1", "window_start": START + timedelta(minutes=10 * (first + number)),
            "window_end": START + timedelta(minutes=10 * (first + number + 1)), "sample_count": 10, "mean_mv": 230_000,
            "min_mv": 229_000, "max_mv": 231_000, "stddev_mv": 1.0, "deviation_pct": float(pct), "band": "normal",
            "run_id": "r", "level": "transformer", "group_id": group, "group": f"transformer/{group}",
        }
        for meter, series in deviations.items()
        for number, pct in enumerate(series)
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=WINDOWS | {"level": pl.String, "group_id": pl.String, "group": pl.String})


def neighbours(count: int, seed: int = 1, meters: int = 6) -> dict[str, Percents]:
    """Voltages that move together, a correlation of more than 0.9."""
    drawn = np.random.default_rng(seed)
    common = np.cumsum(drawn.normal(0, 0.5, count))
    return {f"m{number}": common + drawn.normal(0, 0.1, count) - number / 2 for number in range(meters)}


def suspicions(rolled: Rollups) -> list[tuple[str, bool]]:
    return [(row["meter_id"], row["is_suspicious"]) for row in rolled.suspicious.to_dicts()]


def test_neighbours_are_in_step() -> None:
    assert suspicions(roll_up(windows(neighbours(200)), NOTHING)) == []


@pytest.mark.parametrize("kind", ["of another transformer", "frozen", "upside down"])
def test_a_meter_that_does_not_move_with_the_others_is_told_once(kind: str) -> None:
    others = neighbours(100)
    others["m0"] = {
        "of another transformer": neighbours(100, seed=2)["m0"], "frozen": np.zeros(100), "upside down": -others["m0"],
    }[kind]  # fmt: skip
    rolled = roll_up(windows(others), NOTHING)
    assert suspicions(rolled)[0] == ("m0", True)
    assert {meter for meter, _ in suspicions(rolled)} == {"m0"}
    row = rolled.suspicious.row(0, named=True)
    assert (row["transformer_id"], row["window_count"]) == ("T1", FEWEST_WINDOWS)
    assert row["correlation"] < 0.5


def test_it_is_told_when_it_comes_back_into_step() -> None:
    out, back = neighbours(60), neighbours(2 * MEMORY_WINDOWS, seed=3)
    out["m0"] = -out["m0"]
    first = roll_up(windows(out), NOTHING)
    second = roll_up(windows(back, first=60), first.movement)
    assert suspicions(first) == [("m0", True)]
    assert suspicions(second) == [("m0", False)]


def test_the_numbers_are_those_of_numpy_while_nothing_has_faded() -> None:
    others = neighbours(80)
    rolled = roll_up(windows(others), NOTHING)
    state = rolled.movement.row(by_predicate=pl.col("meter_id") == "m3", named=True)
    median = np.median(np.array(list(others.values())), axis=0)
    assert state["window_count"] == 80
    assert state["mean_pct"] == pytest.approx(others["m3"].mean())
    assert state["var_pct2"] == pytest.approx(others["m3"].var())
    correlation = state["cov_pct2"] / np.sqrt(state["var_pct2"] * state["group_var_pct2"])
    assert correlation == pytest.approx(np.corrcoef(others["m3"], median)[0, 1])


def test_any_cut_into_batches_gives_the_same() -> None:
    others = neighbours(100)
    others["m0"] = -others["m0"]
    at_once = roll_up(windows(others), NOTHING)
    first = roll_up(windows({meter: series[:41] for meter, series in others.items()}), NOTHING)
    second = roll_up(windows({meter: series[41:] for meter, series in others.items()}, first=41), first.movement)
    assert pl.concat([first.suspicious, second.suspicious]).equals(at_once.suspicious)
    assert second.movement.equals(at_once.movement)


def test_too_few_meters_say_nothing_and_another_transformer_begins_anew() -> None:
    few = neighbours(100, meters=3)
    few["m0"] = -few["m0"]
    assert len(roll_up(windows(few), NOTHING).movement) == 0
    many = roll_up(windows(neighbours(50)), NOTHING)
    elsewhere = roll_up(windows(neighbours(1), first=50, group="T2"), many.movement).movement
    assert elsewhere.get_column("window_count").to_list() == [1] * 6
