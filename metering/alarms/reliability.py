"""Interruptions of customers → SAIFI, SAIDI, CAIDI, MAIFI and major-event days. Pure functions over Polars frames.

The indices of IEEE 1366, of a day and of the customers that are served on it: SAIFI = sustained interruptions of
customers / served, SAIDI = their minutes / served, CAIDI = SAIDI / SAIFI, MAIFI = momentary interruptions / served.
What is momentary is data: `MOMENTARY`. A day is a major event's when its SAIDI is above T_MED = exp(α + 2.5 β), where α
and β are mean and sample standard deviation of ln SAIDI over the days with some in five years (docs/domain.md,
Outages).
"""

import math
from collections.abc import Iterable
from datetime import date, timedelta
from typing import NamedTuple

import polars as pl

from metering.clocks import STAMP
from metering.voltage.norms import PRODIST

BETAS = 2.5
HISTORY_DAYS = 1826  # five years
FEWEST_DAYS = 30  # with interruptions; fewer, or less than four years since the first: provisional (convention)
FEWEST_SPAN_DAYS = 1461
ANYWHERE = None


class Momentary(NamedTuple):
    """Up to when an interruption is momentary.

    Attributes:
        limit: its length.
        is_sustained_at: whether one of exactly that length is a sustained one.
    """

    limit: timedelta
    is_sustained_at: bool


MOMENTARY = {ANYWHERE: Momentary(timedelta(minutes=5), False), PRODIST: Momentary(timedelta(minutes=3), True)}
"""Jurisdiction → its limit: IEEE 1366 says more than five minutes, PRODIST (module 8) three minutes or more."""

INTERRUPTIONS = pl.Schema(
    {
        "transformer_id": pl.String(),
        "feeder_id": pl.String(),
        "day": pl.Date(),
        "down_at": STAMP,
        "up_at": STAMP,
        "jurisdiction": pl.String(),
    }
)
"""One row per interruption of a customer, `day` the local day in which it began; `up_at` is null while it goes on."""
COUNTS = {
    "interruptions": pl.Int64(),
    "momentary_interruptions": pl.Int64(),
    "open_interruptions": pl.Int64(),
    "customer_minutes": pl.Float64(),
}
SUMS = pl.Schema({**{name: INTERRUPTIONS[name] for name in ("transformer_id", "feeder_id", "day")}, **COUNTS})
GROUP = ["level", "group_id"]
DAILY = pl.Schema(
    {"level": pl.String(), "group_id": pl.String(), "day": pl.Date(), "customers_served": pl.Int64(), **COUNTS}
)
"""Sums of a group and day, and how many customers it served then."""
INDICES = ["saifi", "saidi_min", "caidi_min", "maifi"]
ROWS = pl.Schema(
    {
        **{name: kind for name, kind in DAILY.items() if name != "day"},
        **dict.fromkeys(INDICES, pl.Float64()),
        "history_days": pl.Int64(),
        "alpha": pl.Float64(),
        "beta": pl.Float64(),
        "t_med_min": pl.Float64(),
        "is_provisional": pl.Boolean(),
        "is_major_event_day": pl.Boolean(),
    }
)


class Threshold(NamedTuple):
    """What `threshold` returns; null where fewer than two days have interruptions.

    Attributes:
        days: with interruptions.
        alpha: mean of ln SAIDI, SAIDI in minutes.
        beta: sample standard deviation of it.
        t_med_min: SAIDI above which a day is a major event's, minutes.
    """

    days: int
    alpha: float | None
    beta: float | None
    t_med_min: float | None


def sums(interruptions: pl.DataFrame) -> pl.DataFrame:
    """Sustained and momentary interruptions and minutes of the sustained, by transformer, feeder and day.

    Args:
        interruptions: columns `INTERRUPTIONS`; one that goes on is counted as open alone.

    Returns:
        Columns `SUMS`; sums of several frames add up.
    """
    lasted = pl.col("up_at") - pl.col("down_at")
    is_sustained = _is_sustained(lasted)
    minutes = lasted.dt.total_microseconds() / 60_000_000
    return (
        interruptions.sort("down_at", "up_at")
        .group_by("transformer_id", "feeder_id", "day")
        .agg(
            interruptions=is_sustained.sum(),
            momentary_interruptions=(~is_sustained).sum(),
            open_interruptions=pl.col("up_at").is_null().sum(),
            customer_minutes=minutes.filter(is_sustained).sum(),
        )
        .select(SUMS.keys())
        .cast(SUMS)
    )


def with_indices(daily: pl.DataFrame) -> pl.DataFrame:
    """Adds the indices of each day: null without customers, CAIDI also without a sustained interruption.

    Args:
        daily: columns `DAILY`.
    """
    served = pl.when(pl.col("customers_served") > 0).then("customers_served")
    return daily.with_columns(
        saifi=pl.col("interruptions") / served,
        saidi_min=pl.col("customer_minutes") / served,
        maifi=pl.col("momentary_interruptions") / served,
        caidi_min=pl.when(pl.col("interruptions") > 0).then(pl.col("customer_minutes") / pl.col("interruptions")),
    )


def threshold(saidi_min: Iterable[float]) -> Threshold:
    """T_MED of daily SAIDI in minutes; days of 0 are left out."""
    logs = sorted(math.log(minutes) for minutes in saidi_min if minutes > 0)
    if len(logs) < 2:  # noqa: PLR2004
        return Threshold(len(logs), None, None, None)
    alpha = math.fsum(logs) / len(logs)
    beta = math.sqrt(math.fsum((each - alpha) ** 2 for each in logs) / (len(logs) - 1))
    return Threshold(len(logs), alpha, beta, math.exp(alpha + BETAS * beta))


def of_day(daily: pl.DataFrame, day: date) -> pl.DataFrame:
    """The indices of each group on a day, and whether it was a major event's by the five years before it.

    Args:
        daily: columns `DAILY`: of the day, and of the days with interruptions in the five years before it.
        day: which.

    Returns:
        Columns `ROWS`, one row a group; T_MED is provisional where there are fewer than 30 days with interruptions, or
        the first of them is less than four years back.
    """
    both = with_indices(daily)
    is_before = pl.col("day").is_between(day - timedelta(days=HISTORY_DAYS), day - timedelta(days=1))
    history = both.filter(is_before & (pl.col("saidi_min") > 0))
    known = [
        {"level": level, "group_id": group, "first": first, **threshold(values)._asdict()}
        for level, group, first, values in history.group_by(GROUP).agg(pl.col("day").min(), "saidi_min").iter_rows()
    ]
    kinds = {"level": pl.String, "group_id": pl.String, "first": pl.Date, "days": pl.Int64}
    limits = pl.DataFrame(known, schema={**kinds, **dict.fromkeys(["alpha", "beta", "t_med_min"], pl.Float64)})
    is_thin = (pl.col("days") < FEWEST_DAYS) | (pl.col("first") > day - timedelta(days=FEWEST_SPAN_DAYS))
    return (
        both.filter(pl.col("day") == day)
        .join(limits, on=GROUP, how="left")
        .with_columns(
            history_days=pl.col("days").fill_null(0),
            is_provisional=is_thin.fill_null(True),
            is_major_event_day=pl.col("saidi_min") > pl.col("t_med_min"),
        )
        .select(ROWS.keys())
        .cast(ROWS)
        .sort(GROUP)
    )


def momentary_of(jurisdiction: str | None) -> Momentary:
    """The limit of a jurisdiction."""
    return MOMENTARY.get(jurisdiction, MOMENTARY[ANYWHERE])


def _is_sustained(lasted: pl.Expr) -> pl.Expr:
    """Whether an interruption was a sustained one; null while it goes on."""
    jurisdiction, anywhere = pl.col("jurisdiction"), MOMENTARY[ANYWHERE]
    found = lasted > anywhere.limit
    for name, (limit, is_sustained_at) in MOMENTARY.items():
        if name is not ANYWHERE:
            longer = lasted >= limit if is_sustained_at else lasted > limit
            found = pl.when(jurisdiction == name).then(longer).otherwise(found)
    return found
