"""How good estimates of gaps are: real half hours, some taken away, filled by the night's rules, beside the flat line.

    python -m bench.estimates FOLDER [--json]

FOLDER has half-hourly files of Low Carbon London (`meter-logs/london-half-hourly`), one home each. A register is summed
from them, so its steps are the truth; of each home and day one gap is taken away, and every interval of it is compared.
The flat line gives each interval of a gap the same, and is scaled to the register, too.
"""

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from metering.alarms.power_fails import POWER_FAILS
from metering.validation.intervals import validated
from schemas.errors import ConfigError, exits
from schemas.markets import markets
from schemas.tables import REGISTERS

HALF_HOUR = timedelta(minutes=30)
FIRST, EVERY, DAYS = date(2013, 2, 11), 11, 24
"""The first day that has a gap, and how many, so many days apart: each weekday comes up."""
GAPS = (2, 4, 8, 24)
"""Half hours that are missing."""
WEEKS = timedelta(days=35)
console = Console(highlight=False)


def homes(folder: Path) -> pl.DataFrame:
    """Half hours of all homes: meter_id, interval_start, energy_wh."""
    files = sorted(folder.glob("MAC*.csv.gz"))
    if not files:
        msg = f"{folder} has no MAC*.csv.gz, half hours of Low Carbon London"
        raise ConfigError(msg)
    rows = pl.concat([pl.read_csv(file, infer_schema=False, new_columns=["meter_id", "at", "kwh"]) for file in files])
    wh = (pl.col("kwh").str.strip_chars().cast(pl.Float64, strict=False) * 1000).round().cast(pl.Int64)
    at = pl.col("at").str.head(19).str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us", time_zone="UTC", strict=False)
    found = rows.select("meter_id", interval_start=at, energy_wh=wh).drop_nulls()
    on_the_half_hour = pl.col("interval_start").dt.truncate("30m") == pl.col("interval_start")
    return (
        found.filter(on_the_half_hour)
        .unique(["meter_id", "interval_start"], keep="first")
        .sort("meter_id", "interval_start")
    )


def readings(rows: pl.DataFrame, day: datetime, market: str) -> pl.DataFrame:
    """Readings at the ends of half hours, as `validated` takes them."""
    nothing = {f"{register}_wh": pl.lit(None, pl.Int64) for register in REGISTERS if register != "import_t1"}
    return rows.select(
        "meter_id",
        observed_at=pl.col("interval_start") + HALF_HOUR,
        import_t1_wh=100_000 + pl.col("energy_wh").cum_sum().over("meter_id"),
        **nothing,
        **dict.fromkeys(("run_id", "equipment_id"), pl.lit(None, pl.String)),
        dialect=pl.lit("london"), topic=pl.lit(""), partition=pl.lit(0), offset=pl.int_range(pl.len()),
        phases=pl.lit("L1"), nominal_mv=pl.lit(230_000), fuse_a=pl.lit(100), default_fuse_a=pl.lit(100),
        jurisdiction=pl.lit("EN50160"), is_unlimited=pl.lit(True), wraps_wh=pl.lit(None, pl.Int64),
        interval_s=pl.lit(1_800), market=pl.lit(market), time_zone=pl.lit("Europe/London"),
        day_start=pl.lit(day), day_end=pl.lit(day + timedelta(days=1)),
    )  # fmt: skip


def compared(rows: pl.DataFrame, market: str, missing: int, seed: int = 1) -> pl.DataFrame:
    """Each estimated half hour: method, truth_wh, energy_wh, flat_wh."""
    drawn = np.random.default_rng(seed)
    found = []
    for number in range(DAYS):
        day = datetime.combine(FIRST + timedelta(days=EVERY * number), datetime.min.time(), UTC)
        around = rows.filter(pl.col("interval_start").is_between(day - WEEKS, day + timedelta(hours=30), closed="left"))
        near = around.filter(pl.col("interval_start") >= day - timedelta(hours=6))
        whole = near.group_by("meter_id").len().filter(pl.col("len") == 72).get_column("meter_id")
        begins = pl.DataFrame({"meter_id": whole, "begin": drawn.integers(2, 46 - missing, len(whole))})
        slot = (pl.col("interval_start") - day).dt.total_minutes() // 30
        of_gap = (slot >= pl.col("begin")) & (slot < pl.col("begin") + missing)
        marked = near.join(begins, on="meter_id").sort("meter_id", "interval_start").with_columns(is_lost=of_gap)
        steps = readings(marked, day, market).with_columns(is_lost=marked.get_column("is_lost"))
        is_inner = pl.col("is_lost") & pl.col("is_lost").shift(-1).over("meter_id").fill_null(False)
        kept = steps.filter(~is_inner).drop("is_lost")
        halves = around.filter(pl.col("interval_start") < day).select(
            "meter_id", pl.lit("import_t1").alias("register"), "interval_start", "energy_wh"
        )
        quarters = [
            halves.with_columns(
                pl.col("interval_start") + timedelta(minutes=15) * part, pl.col("energy_wh") // 2 + more
            )
            for part, more in ((0, pl.lit(0)), (1, pl.col("energy_wh") % 2))
        ]
        done = validated(kept, pl.DataFrame(schema=POWER_FAILS), pl.concat(quarters))
        truth = marked.filter("is_lost").select("meter_id", "interval_start", truth_wh="energy_wh")
        found.append(
            truth.join(done, on=["meter_id", "interval_start"]).with_columns(
                flat_wh=pl.col("truth_wh").mean().over("meter_id"), day=pl.lit(number)
            )
        )
    return pl.concat(found)


def main(
    folder: Annotated[Path, typer.Argument(help="Of half-hourly files.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line of the table.")] = False,
) -> None:
    """Prints the error of estimates, in % of the energy that was missing."""
    with exits():
        rows = homes(folder)
        table = Table("market", "gap, h", "method", "half hours", "error, %", "flat line, %", box=box.SIMPLE)
        for market in ("", "US-CA"):
            for missing in GAPS:
                done = compared(rows, market, missing)
                errors = done.group_by("method").agg(
                    count=pl.len(),
                    error_pct=100 * (pl.col("energy_wh") - pl.col("truth_wh")).abs().sum() / pl.col("truth_wh").sum(),
                    flat_pct=100 * (pl.col("flat_wh") - pl.col("truth_wh")).abs().sum() / pl.col("truth_wh").sum(),
                )
                for each in errors.sort("method").iter_rows(named=True):
                    line = {"market": market, "gap_h": missing / 2, **each}
                    if as_json:
                        typer.echo(json.dumps(line))
                    numbers = (f"{each['count']:,}", f"{each['error_pct']:.1f}", f"{each['flat_pct']:.1f}")
                    table.add_row(market or "(none)", f"{missing / 2:g}", each["method"], *numbers)
        if not as_json:
            console.print(f"{rows['meter_id'].n_unique()} homes, {len(markets())} markets have rules", table)


if __name__ == "__main__":
    typer.run(main)
