"""What a tape is like: pure functions over its readings, for `replay inspect` and for the tests of the simulation.

Voltages are those of L1, the only phase that every meter has. Of several readings of a meter for one moment the first
counts. Figures of a meter's course are taken from its minute values, the mean of its readings that lie in each minute,
as the logs' own steps differ; a tape with longer steps has fewer of them. Lags are times, not rows: only pairs of
minutes that lie exactly so far apart count. A figure of a fleet is the median over its meters, with the 10th and 90th
percentile.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import polars as pl
from rich import box
from rich.markup import escape
from rich.table import Table

from replay.tape import Tape
from schemas.tables import IMPORTS, REGISTERS

COLUMNS = [
    "meter_id", "observed_at", "import_w", "export_w", "voltage_l1_mv", *(f"{register}_wh" for register in REGISTERS)
]  # fmt: skip
LEAST_PAIRS = 30  # of minutes: a correlation over fewer says nothing
COHERENCE_STEP = "10m"  # the averaging time of EN 50160
MOST_COMPARED = 150  # meters of a transformer that are compared pair by pair
TARGETS: dict[str, tuple[float, float]] = {
    "autocorrelation_1min": (0.89, 0.98),
    "autocorrelation_10min": (0.6, 0.9),
    "hourly_swing_v": (3.0, 12.0),
    "voltage_import_correlation": (-0.65, -0.3),
    "voltage_export_correlation": (0.0, 1.0),
    "transformer_coherence": (0.9, 1.0),
}
"""Ranges of real homes, for minute values: `docs/simulation.md`. Of the sun's effect only the sign is known."""


@dataclass(frozen=True)
class Spread:
    """A figure over the meters of a tape.

    Attributes:
        median: over the meters.
        low: 10th percentile.
        high: 90th percentile.
        meters: how many had the figure.
    """

    median: float
    low: float
    high: float
    meters: int


@dataclass(frozen=True)
class Statistics:
    """A tape in figures; None where the tape does not say.

    Attributes:
        meters: on the tape.
        readings: rows.
        interval_s: the most frequent step between a meter's readings.
        first_at: ISO 8601.
        last_at: ISO 8601.
        missing: readings that the interval would have and the tape does not, inside each meter's own span.
        backward: readings whose register stands below the one before.
        duplicates: readings of a meter for a moment of which it has one already.
        kwh_per_day: per register, what a meter counts.
        power_to_register_pct: ∫ power dt over Δ register, minus 1.
        realism: by the names of `TARGETS`.
        mean_day_v: per hour of the local day, mean voltage.
        mean_day_w: the same of import.
        why_not: of a figure that is None, the reason.
    """

    meters: int
    readings: int
    interval_s: int | None
    first_at: str | None
    last_at: str | None
    missing: int
    backward: int
    duplicates: int
    kwh_per_day: dict[str, Spread | None]
    power_to_register_pct: Spread | None
    realism: dict[str, Spread | None]
    mean_day_v: list[float | None]
    mean_day_w: list[float | None]
    why_not: dict[str, str] = field(default_factory=dict)


def is_in_range(name: str, figure: Spread) -> bool:
    """Whether the median of a figure lies in its range of `TARGETS`."""
    low, high = TARGETS[name]
    return low <= round(figure.median, 3) <= high


def statistics(tape: Tape) -> Statistics:
    """All figures of a tape."""
    frame = pl.DataFrame(tape.readings.select(COLUMNS)).with_columns(pl.col("meter_id").cast(pl.Categorical))
    readings = ordered(frame)
    interval_s = usual_interval_s(readings)
    minutes = minute_values(readings)
    registry = pl.DataFrame(tape.registry).with_columns(pl.col("meter_id").cast(pl.Categorical))
    local = pl.col("minute").dt.convert_time_zone(tape.info.time_zone).dt.hour()
    by_hour = minutes.group_by(hour=local).agg(pl.col("volts", "import_w").mean())
    mean_day = pl.DataFrame({"hour": pl.Series(range(24), dtype=pl.Int8)}).join(by_hour, on="hour", how="left")
    return Statistics(
        meters=readings["meter_id"].n_unique(),
        readings=len(frame),
        interval_s=interval_s,
        first_at=tape.info.first_at,
        last_at=tape.info.last_at,
        missing=missing(readings, interval_s),
        backward=backward(readings),
        duplicates=len(frame) - len(readings),
        kwh_per_day={register: spread(kwh_per_day(readings, register)) for register in REGISTERS},
        power_to_register_pct=spread(power_to_register_pct(readings, interval_s)),
        realism={
            "autocorrelation_1min": spread(autocorrelation(minutes, timedelta(minutes=1))),
            "autocorrelation_10min": spread(autocorrelation(minutes, timedelta(minutes=10))),
            "hourly_swing_v": spread(hourly_swing_v(minutes, tape.info.interval_s or interval_s)),
            "voltage_import_correlation": spread(voltage_import_correlation(minutes)),
            "voltage_export_correlation": spread(voltage_export_correlation(minutes)),
            "transformer_coherence": spread(transformer_coherence(minutes, registry)),
        },
        mean_day_v=mean_day["volts"].to_list(),
        mean_day_w=mean_day["import_w"].to_list(),
        why_not=_why_not(readings, minutes, registry),
    )


def _why_not(readings: pl.DataFrame, minutes: pl.DataFrame, registry: pl.DataFrame) -> dict[str, str]:
    """Per figure what the tape lacks, if it lacks the figure."""
    pairs = f"fewer than {LEAST_PAIRS} pairs of minutes"
    why = {
        "autocorrelation_1min": f"{pairs} 1 min apart",
        "autocorrelation_10min": f"{pairs} 10 min apart",
        "hourly_swing_v": "no hour is half there",
        "voltage_import_correlation": f"{pairs} with V and import",
        "voltage_export_correlation": f"fewer than {LEAST_PAIRS} minutes with export",
        "transformer_coherence": f"fewer than {LEAST_PAIRS} times 10 min of two meters",
        "power_to_register_pct": "import does not rise",
    }
    volts = minutes["volts"].drop_nulls()
    voltage_figures = [name for name in why if name != "power_to_register_pct"]
    if volts.n_unique() == 1:
        why |= dict.fromkeys((name for name in voltage_figures if name != "hourly_swing_v"), "V never changes")
    if not (minutes["export_w"] > 0).any():
        why["voltage_export_correlation"] = "no export in the tape"
    if registry["transformer_id"].drop_nulls().is_unique().all():
        why["transformer_coherence"] = "no two meters of one transformer"
    if minutes["import_w"].drop_nulls().is_empty():
        why |= dict.fromkeys(("voltage_import_correlation", "mean_day_w"), "no import in the tape")
    if readings["import_w"].drop_nulls().is_empty():
        why["power_to_register_pct"] = "no power in the tape"
    if volts.is_empty():
        why |= dict.fromkeys((*voltage_figures, "mean_day_v"), "no voltage in the tape")
    return why


def spread(figures: pl.Series) -> Spread | None:
    """Median and percentiles of a figure per meter; None where no meter has it."""
    known = figures.drop_nulls().drop_nans()
    if known.is_empty():
        return None
    low, median, high = (float(np.quantile(known.to_numpy(), share)) for share in (0.1, 0.5, 0.9))
    return Spread(median, low, high, len(known))


def ordered(readings: pl.DataFrame) -> pl.DataFrame:
    """Readings by meter and moment, the first of each moment only."""
    return readings.unique(["meter_id", "observed_at"], keep="first", maintain_order=True).sort(
        "meter_id", "observed_at"
    )


def usual_interval_s(readings: pl.DataFrame) -> int | None:
    """The most frequent step between a meter's readings, in whole s; the shortest of several as frequent.

    Args:
        readings: see `ordered`.
    """
    step = pl.col("observed_at").diff().over("meter_id").dt.total_seconds()
    counted = readings.select(step=step).filter(pl.col("step") > 0)["step"].value_counts()
    return None if counted.is_empty() else int(counted.sort(["count", "step"], descending=[True, False])["step"][0])


def missing(readings: pl.DataFrame, interval_s: int | None) -> int:
    """Readings that are not there: per gap, its length over the usual interval, minus the one that ends it.

    Args:
        readings: see `ordered`.
        interval_s: see `usual_interval_s`.
    """
    if interval_s is None:
        return 0
    step_s = pl.col("observed_at").diff().over("meter_id").dt.total_seconds()
    return int(readings.select((step_s / interval_s).round().sub(1).clip(0).sum()).item())


def backward(readings: pl.DataFrame) -> int:
    """Readings of which any register stands below the same meter's one before.

    Args:
        readings: see `ordered`.
    """
    falls = [(pl.col(f"{register}_wh").diff().over("meter_id") < 0).fill_null(value=False) for register in REGISTERS]
    return int(readings.select(pl.any_horizontal(falls).sum()).item())


def kwh_per_day(readings: pl.DataFrame, register: str) -> pl.Series:
    """Per meter, what a register rises by (steps back left out) over the days that it covers; null where it is null.

    Args:
        readings: see `ordered`.
        register: such as `import_t1`.
    """
    wh = pl.col(f"{register}_wh").drop_nulls()
    at = pl.col("observed_at").filter(pl.col(f"{register}_wh").is_not_null())
    days = (at.max() - at.min()).dt.total_seconds() / 86_400
    rise = pl.when(wh.len() > 1).then(wh.diff().clip(0).sum() / 1000 / days)
    return readings.group_by("meter_id", maintain_order=True).agg(figure=rise)["figure"]


def power_to_register_pct(readings: pl.DataFrame, interval_s: int | None) -> pl.Series:
    """Per meter, 100 (Σ P Δt / Σ Δ register − 1) of import over the usual steps, P the mean of the step's ends.

    Args:
        readings: see `ordered`.
        interval_s: a step more than half as long again is left out.
    """
    step_s = pl.col("observed_at").diff().over("meter_id").dt.total_seconds()
    power = (pl.col("import_w") + pl.col("import_w").shift().over("meter_id")) / 2
    steps = readings.select(
        "meter_id",
        step_s=step_s,
        by_power=power * step_s / 3600,
        by_register=pl.sum_horizontal(f"{register}_wh" for register in IMPORTS).diff().over("meter_id"),
    ).filter(pl.col("step_s") <= 1.5 * (interval_s or 0), pl.col("by_power").is_not_null(), pl.col("by_register") >= 0)
    ratio = pl.col("by_power").sum() / pl.col("by_register").sum()
    figures = steps.group_by("meter_id", maintain_order=True).agg(
        figure=pl.when(pl.col("by_register").sum() > 0).then(100 * (ratio - 1))
    )
    return figures["figure"]


def minute_values(readings: pl.DataFrame) -> pl.DataFrame:
    """Per meter and UTC minute the means: `volts`, `import_w`, `export_w`; sorted, null where not measured.

    A meter that measures no power has the one of its register: what it rose by since the reading before.
    """
    powers = [pl.col(f"{way}_w").cast(pl.Float64).alias(f"{way}_w") for way in ("import", "export")]
    step_s = pl.col("observed_at").diff().over("meter_id").dt.total_seconds()
    if readings["import_w"].null_count() == len(readings):
        powers = [
            (pl.sum_horizontal(f"{way}_t1_wh", f"{way}_t2_wh").diff().over("meter_id").clip(0) * 3600 / step_s).alias(
                f"{way}_w"
            )
            for way in ("import", "export")
        ]
    return (
        readings.select("meter_id", "observed_at", *powers, volts=pl.col("voltage_l1_mv") / 1000)
        .group_by("meter_id", minute=pl.col("observed_at").dt.truncate("1m"), maintain_order=True)
        .agg(pl.col("volts", "import_w", "export_w").mean())
    )


def autocorrelation(minutes: pl.DataFrame, lag: timedelta) -> pl.Series:
    """Per meter, Pearson's correlation of V(t) and V(t + lag) over the minutes that have both.

    Args:
        minutes: see `minute_values`.
        lag: whole minutes.
    """
    known = minutes.select("meter_id", "minute", "volts").drop_nulls()
    later = known.select("meter_id", pl.col("minute") - lag, later="volts")
    return _correlation(known.join(later, on=["meter_id", "minute"]), "volts", "later")


def _correlation(pairs: pl.DataFrame, one: str, other: str) -> pl.Series:
    figure = pl.when(pl.len() >= LEAST_PAIRS).then(pl.corr(one, other))
    return pairs.group_by("meter_id", maintain_order=True).agg(figure=figure)["figure"]


def hourly_swing_v(minutes: pl.DataFrame, interval_s: int | None) -> pl.Series:
    """Per meter, the median over the UTC hours of max − min of V; an hour with fewer than half of its values is out.

    Args:
        minutes: see `minute_values`.
        interval_s: usual step, which says how many values an hour has.
    """
    half = 3600 / max(interval_s or 60, 60) / 2
    hours = (
        minutes.drop_nulls("volts")
        .group_by("meter_id", hour=pl.col("minute").dt.truncate("1h"), maintain_order=True)
        .agg(swing=pl.col("volts").max() - pl.col("volts").min(), values=pl.len())
    )
    whole = hours.filter(pl.col("values") > 1, pl.col("values") >= half)
    return whole.group_by("meter_id", maintain_order=True).agg(figure=pl.col("swing").median())["figure"]


def voltage_import_correlation(minutes: pl.DataFrame) -> pl.Series:
    """Per meter, Pearson's correlation of V and net import (import minus export) W of the same minute.

    Args:
        minutes: see `minute_values`.
    """
    net_w = pl.col("import_w") - pl.col("export_w").fill_null(0)
    return _correlation(minutes.with_columns(net_w=net_w).drop_nulls(["volts", "net_w"]), "volts", "net_w")


def voltage_export_correlation(minutes: pl.DataFrame) -> pl.Series:
    """Per meter with panels, Pearson's correlation of V and export W over the minutes in which it exports.

    Day against night says less: by night, when few need power, the voltage is high too.

    Args:
        minutes: see `minute_values`.
    """
    return _correlation(minutes.drop_nulls("volts").filter(pl.col("export_w") > 0), "volts", "export_w")


def transformer_coherence(minutes: pl.DataFrame, registry: pl.DataFrame) -> pl.Series:
    """Per pair of meters under one transformer, Pearson's correlation of their ten-minute mean V.

    Args:
        minutes: see `minute_values`.
        registry: `meter_id`, `transformer_id`; of a transformer with more than `MOST_COMPARED` meters the first count.
    """
    means = (
        minutes.drop_nulls("volts")
        .join(registry.select("meter_id", "transformer_id").drop_nulls(), on="meter_id")
        .group_by("transformer_id", "meter_id", at=pl.col("minute").dt.truncate(COHERENCE_STEP), maintain_order=True)
        .agg(pl.col("volts").mean())
    )
    figures: list[float] = []
    for own in means.partition_by("transformer_id", maintain_order=True):
        chosen = own["meter_id"].unique(maintain_order=True)[:MOST_COMPARED]
        wide = own.filter(pl.col("meter_id").is_in(chosen.implode())).pivot(on="meter_id", index="at", values="volts")
        volts = wide.drop("at").drop_nulls().to_numpy()
        if volts.shape[1] > 1 and len(volts) >= LEAST_PAIRS:
            figures += np.corrcoef(volts.T)[np.triu_indices(volts.shape[1], 1)].tolist()
    return pl.Series(figures, dtype=pl.Float64)


LABELS = {
    "autocorrelation_1min": "V autocorrelation, 1 min",
    "autocorrelation_10min": "V autocorrelation, 10 min",
    "hourly_swing_v": "V swing within an hour",
    "voltage_import_correlation": "V with own net import",
    "voltage_export_correlation": "V with own export, sun up",
    "transformer_coherence": "V under one transformer",
}
BARS = "▁▂▃▄▅▆▇█"


LEFT, TARGET, TAPE, PADDING = 29, 12, 24, 2
"""Columns of text: the figures' names, their targets, a tape, and between two of them."""
NARROWEST = LEFT + TARGET + TAPE + 3 * PADDING


def comparisons(tapes: Mapping[str, Statistics], width: int) -> list[Table]:
    """Tapes side by side, as many in a table as a width holds."""
    most = 1 + max(0, width - NARROWEST) // (TAPE + PADDING)
    names = list(tapes)
    parts = [names[first : first + most] for first in range(0, len(names), most)]
    return [comparison({name: tapes[name] for name in part}) for part in parts]


def comparison(tapes: Mapping[str, Statistics]) -> Table:
    """Tapes side by side, one a column, and where each lies in the ranges of real homes."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(no_wrap=True, min_width=LEFT)
    table.add_column("target", no_wrap=True, min_width=TARGET)
    for name in tapes:
        table.add_column(escape(name), overflow="fold", min_width=TAPE)
    own = list(tapes.values())

    def row(label: str, *cells: str, target: str = "") -> None:
        table.add_row(label, target, *cells)

    row("meters", *[f"{one.meters:,}" for one in own])
    row("readings", *[f"{one.readings:,}" for one in own])
    row(
        "usual interval",
        *["– (fewer than two readings)" if one.interval_s is None else f"{one.interval_s} s" for one in own],
    )
    row("first (UTC)", *[_moment(one.first_at) for one in own])
    row("last (UTC)", *[_moment(one.last_at) for one in own])
    row("missing readings", *[f"{one.missing:,}" for one in own])
    row("registers stepping back", *[f"{one.backward:,}" for one in own])
    row("duplicates", *[f"{one.duplicates:,}" for one in own])
    for register in REGISTERS:
        figures = [one.kwh_per_day[register] for one in own]
        if any(figures):
            row(
                f"{register} kWh a meter and day",
                *[_cell(figure, "{:.2f}", why="no such register") for figure in figures],
            )
    row(
        "∫ power / Δ import − 1",
        *[_cell(one.power_to_register_pct, "{:+.2f}", " %", _why(one, "power_to_register_pct")) for one in own],
    )
    for name, (low, high) in TARGETS.items():
        target = f"{low:g} … {high:g}"
        row(LABELS[name], *[_judged(name, one) for one in own], target=target)
    row("mean day, V by hour", *[_picture(one.mean_day_v, "V", _why(one, "mean_day_v")) for one in own])
    row("mean day, import by hour", *[_picture(one.mean_day_w, "W", _why(one, "mean_day_w")) for one in own])
    return table


def _moment(stamp: str | None) -> str:
    return stamp[:16].replace("T", " ") if stamp else "– (no readings)"


def _why(one: Statistics, name: str) -> str:
    return one.why_not.get(name, "not in the tape")


def _cell(figure: Spread | None, form: str, unit: str = "", why: str = "") -> str:
    if figure is None:
        return f"– ({why})"
    spans = "" if figure.meters == 1 else f"\n({form.format(figure.low)} … {form.format(figure.high)})"
    return f"{form.format(figure.median)}{unit}{spans}"


def _judged(name: str, one: Statistics) -> str:
    figure = one.realism[name]
    if figure is None:
        return _cell(None, "", why=_why(one, name))
    mark = "[green]✓[/]" if is_in_range(name, figure) else "[red]✗[/]"
    return f"{mark} {_cell(figure, '{:.2f}')}"


def _picture(hours: list[float | None], unit: str, why: str) -> str:
    known = [value for value in hours if value is not None]
    if not known:
        return f"– ({why})"
    low, high = min(known), max(known)
    steps = (len(BARS) - 1) / (high - low or 1)
    bars = "".join(" " if value is None else BARS[round((value - low) * steps)] for value in hours)
    return f"{bars}\n{low:.0f} … {high:.0f} {unit}"
