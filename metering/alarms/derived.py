"""Readings → alarms that no meter raises itself. Pure functions over Polars frames.

Voltage: outside its jurisdiction's band (docs/domain.md, Voltage), and for a minute or more not back inside by a
hysteresis, by which it also clears. Implausible load: more power than the connection's fuses let through. Reverse
energy: the export registers of one piece of equipment rise, of a meter that had exported nothing when they were first
seen. Silence: no reading for several intervals, on the arrival clock of its run. A condition that holds on raises no
second alarm (docs/domain.md, Alarms).
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import polars as pl

from metering.accounting import verdicts
from metering.alarms.life_cycle import ALARMS, alarm_id
from metering.clocks import STAMP, watermark_of
from metering.energy.delta_engine import FUSE_FACTOR, fuses_w
from metering.voltage.windows import VOLTAGES, with_rules
from schemas.closed_lists import AlarmSource, AlarmState, DeltaReason, Severity
from schemas.tables import PHASES

HYSTERESIS_PCT = 1.0
SHORTEST = timedelta(minutes=1)
SILENT_INTERVALS = 4
SILENT_AT_LEAST = timedelta(minutes=15)
LOADS = ["import_w", *[f"import_{phase.lower()}_w" for phase in PHASES]]
EXPORTS = ["export_t1_wh", "export_t2_wh"]
NEEDED = ["meter_id", "observed_at", "arrival_at", "run_id", "equipment_id", *VOLTAGES, *LOADS, *EXPORTS]
KNOWN = ["meter_id", "phases", "nominal_mv", "fuse_a", "jurisdiction", "interval_s"]
METER_SILENT, SILENCE = "meter_silent", Severity.ERROR
METER = pl.Schema(
    {
        "meter_id": pl.String(),
        "run_id": pl.String(),
        "observed_at": STAMP,
        "arrival_at": STAMP,
        "equipment_id": pl.String(),
        "export_wh": pl.Int64(),
        "is_generator": pl.Boolean(),
        "due_at": STAMP,
        "silent_at": STAMP,
    }
)
"""State: the newest reading of each meter, its equipment and the last value of its export registers, whether it had
exported when they were first seen, when it falls silent by the registry's interval, and since when it is silent."""
LEVEL = pl.Schema(
    {
        "meter_id": pl.String(),
        "alarm_type": pl.String(),
        "since_at": STAMP,
        "is_open": pl.Boolean(),
    }
)
"""State: conditions that hold, raised or not yet."""


@dataclass(frozen=True)
class Condition:
    """When an alarm is raised and cleared.

    Attributes:
        severity: of the alarm.
        is_out: the condition holds.
        is_back: it holds no longer; between the two it stays as it was.
        shortest: how long it holds before the alarm is raised.
    """

    severity: Severity
    is_out: pl.Expr
    is_back: pl.Expr
    shortest: timedelta = timedelta()


class DerivedAlarms(NamedTuple):
    """What `derived_alarms` returns.

    Attributes:
        alarms: one row per change, columns of the table alarms.
        meters: the new state, columns `METER`.
        levels: the new state, columns `LEVEL`.
        late: verdicts of the readings that are older than the newest of their meter.
    """

    alarms: pl.DataFrame
    meters: pl.DataFrame
    levels: pl.DataFrame
    late: pl.DataFrame


def conditions() -> dict[str, Condition]:
    """Each alarm type over the columns that `derived_alarms` makes."""
    held = {}
    for phase, voltage in zip(PHASES, VOLTAGES, strict=True):
        deviation = ((pl.col(voltage) - pl.col("nominal_mv")) / pl.col("nominal_mv") * 100).round(9)
        low, high = pl.col("low_pct"), pl.col("high_pct")
        held[f"voltage_low_{phase.lower()}"] = Condition(
            Severity.CAUTION, deviation < low, deviation >= low + HYSTERESIS_PCT, SHORTEST
        )
        held[f"voltage_high_{phase.lower()}"] = Condition(
            Severity.CAUTION, deviation > high, deviation <= high - HYSTERESIS_PCT, SHORTEST
        )
    load, limit = pl.col("load_w"), pl.col("max_w") * FUSE_FACTOR
    held["implausible_load"] = Condition(Severity.CAUTION, load > limit, load <= limit)
    exported = pl.col("export_wh") - pl.col("before_export_wh")
    held["reverse_energy"] = Condition(Severity.CAUTION, ~pl.col("is_generator") & (exported > 0), exported <= 0)
    return held


def derived_alarms(
    readings: pl.DataFrame,
    meters: pl.DataFrame,
    levels: pl.DataFrame,
    registry: pl.DataFrame,
    watermarks: pl.DataFrame,
) -> DerivedAlarms:
    """Moves the alarms of a Kafka partition's meters by a batch of readings.

    A reading that is older than the newest of its meter is late and changes nothing but the meter's silence.

    Args:
        readings: columns `NEEDED`, offset.
        meters: the state so far, columns `METER`: at least of the meters of the readings and those that fall silent.
        levels: the state so far, columns `LEVEL`: at least of the meters of the readings.
        registry: columns `KNOWN`; what is null there applies no rule but the default voltage.
        watermarks: per run_id `watermark`, which says how far the arrivals of the run have come for certain.
    """
    before = meters.select(
        "meter_id",
        newest_at="observed_at",
        before_equipment="equipment_id",
        held_wh="export_wh",
        was_generator="is_generator",
    )
    marked = readings.join(before, on="meter_id", how="left", maintain_order="left").with_columns(
        is_late=(pl.col("observed_at") <= pl.col("newest_at")).fill_null(False)
    )
    rows = _measured(marked.filter(~pl.col("is_late")), registry)
    held, changes = _held(rows, levels)
    newest = _newest(rows, readings, meters)
    silences, silent = _silence(newest, registry, watermarks)
    alarms = pl.DataFrame([*changes, *silences], schema=ALARMS, orient="row")
    late = verdicts(marked.filter("is_late"), pl.lit(DeltaReason.OUT_OF_ORDER.value))
    return DerivedAlarms(alarms, silent.select(METER.names()).cast(METER), held, late)


def _measured(rows: pl.DataFrame, registry: pl.DataFrame) -> pl.DataFrame:
    """The readings in order, with what the conditions speak of: limits, load, registers before."""
    named = pl.when(pl.col("equipment_id") != "").then("equipment_id")
    has_load = pl.any_horizontal(pl.col(LOADS[1:]).is_not_null())
    ordered = (
        rows.sort("meter_id", "observed_at")
        .with_columns(meter=pl.col("meter_id").rle_id())  # a number is compared faster than a name
        .with_columns(
            export_wh=pl.when(pl.any_horizontal(pl.col(EXPORTS).is_not_null())).then(pl.sum_horizontal(EXPORTS)),
            load_w=pl.coalesce("import_w", pl.when(has_load).then(pl.sum_horizontal(LOADS[1:], ignore_nulls=True))),
            equipment=pl.coalesce(_last_of(named, "meter"), "before_equipment", _next_of(named, "meter")),
        )
        .with_columns(
            held_wh=pl.when((pl.col("equipment") == pl.col("before_equipment")).fill_null(True)).then("held_wh"),
            is_generator=pl.coalesce("was_generator", _first_of(pl.col("export_wh") > 0, "meter")),
        )
    )
    is_other = pl.col("equipment").ne_missing(pl.col("equipment").shift(1)) & (pl.col("meter").diff() == 0)
    is_mixed = ordered.select(is_other.any()).item()
    by_register = (
        ordered.sort("meter", "equipment", "observed_at").with_columns(series=pl.struct("meter", "equipment").rle_id())
        if is_mixed
        else ordered.with_columns(series="meter")
    )
    last_wh = _last_of(pl.col("export_wh"), "series")
    measured = (
        by_register.with_columns(
            before_export_wh=pl.coalesce(_before(last_wh, "series"), "held_wh"), held_wh=pl.coalesce(last_wh, "held_wh")
        )
        .join(registry, on="meter_id", how="left", maintain_order="left")
        .with_columns(max_w=fuses_w())
    )
    return with_rules(measured.sort("meter", "observed_at") if is_mixed else measured)


def _last_of(values: pl.Expr, series: str) -> pl.Expr:
    """The last known value of a row's series up to the row; rows of a series lie together, its numbers are not null."""
    is_known = pl.when(values.is_not_null()).then(series).forward_fill() == pl.col(series)
    return pl.when(is_known).then(values.forward_fill())


def _next_of(values: pl.Expr, series: str) -> pl.Expr:
    """The first known value of a row's series from the row on; see `_last_of`."""
    is_known = pl.when(values.is_not_null()).then(series).backward_fill() == pl.col(series)
    return pl.when(is_known).then(values.backward_fill())


def _before(values: pl.Expr, series: str) -> pl.Expr:
    """The value of the row before, of the same series; see `_last_of`."""
    return pl.when(pl.col(series) == pl.col(series).shift(1)).then(values.shift(1))


def _first_of(values: pl.Expr, series: str) -> pl.Expr:
    """The first known value of a row's series up to the row; see `_last_of`."""
    is_first = values.is_not_null() & _before(_last_of(values, series), series).is_null()
    return _last_of(pl.when(is_first).then(values), series)


def _held(rows: pl.DataFrame, levels: pl.DataFrame) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """The conditions after the readings, and the changes of alarms: only of meters of which one holds or held."""
    state = {(row["meter_id"], row["alarm_type"]): row for row in levels.iter_rows(named=True)}
    changes: list[dict[str, Any]] = []
    known = conditions()
    out = rows.select(**{name: condition.is_out.fill_null(False) for name, condition in known.items()})
    for alarm_type, condition in known.items():
        holding = levels.filter(pl.col("alarm_type") == alarm_type).get_column("meter_id")
        is_out = out.get_column(alarm_type)
        if holding.is_empty() and not is_out.any():
            continue
        concerned = pl.concat([holding, rows.get_column("meter_id").filter(is_out)]).unique()
        measured = rows.with_columns(is_out).filter(pl.col("meter_id").is_in(concerned.implode())).select(
            "meter_id", "observed_at", "arrival_at", "run_id",
            is_out=alarm_type, is_back=condition.is_back.fill_null(False),
        )  # fmt: skip
        for row in measured.iter_rows(named=True):
            key = (row["meter_id"], alarm_type)
            level = state.get(key)
            if row["is_back"]:
                if level and level["is_open"]:
                    changes.append(_change(row, level, condition.severity, cleared_at=row["observed_at"]))
                state.pop(key, None)
            elif row["is_out"]:
                level = level or {
                    "meter_id": key[0], "alarm_type": alarm_type, "since_at": row["observed_at"], "is_open": False
                }  # fmt: skip
                is_due = row["observed_at"] - level["since_at"] >= condition.shortest
                if is_due and not level["is_open"]:
                    level = {**level, "is_open": True}
                    changes.append(_change(row, level, condition.severity))
                state[key] = level
    return pl.DataFrame(list(state.values()), schema=LEVEL, orient="row"), changes


def _change(row: dict[str, Any], level: dict[str, Any], severity: Severity, cleared_at: Any = None) -> dict[str, Any]:
    return {
        "alarm_id": alarm_id(level["meter_id"], level["alarm_type"], level["since_at"]),
        "meter_id": level["meter_id"],
        "alarm_type": level["alarm_type"],
        "severity": severity.value,
        "state": (AlarmState.CLEARED if cleared_at else AlarmState.ACTIVE).value,
        "raised_at": level["since_at"],
        "cleared_at": cleared_at,
        "repeat_count": 0,
        "source": AlarmSource.DERIVED.value,
        "run_id": row["run_id"],
        "updated_at": row["arrival_at"],
    }


def _newest(rows: pl.DataFrame, readings: pl.DataFrame, meters: pl.DataFrame) -> pl.DataFrame:
    """The meters after the readings, columns `METER` and `heard_at`, the first arrival of this batch."""
    last = rows.unique("meter_id", keep="last", maintain_order=True).select(
        "meter_id", "run_id", "observed_at", "is_generator", equipment_id="equipment", export_wh="held_wh"
    )
    heard = readings.group_by("meter_id").agg(heard_at=pl.col("arrival_at").min(), newest=pl.col("arrival_at").max())
    kept = ["run_id", "observed_at", "equipment_id", "export_wh", "is_generator"]
    has_moved = pl.col("observed_at_now").is_not_null()
    return (
        meters.join(last, on="meter_id", how="full", coalesce=True, suffix="_now", maintain_order="left_right")
        .join(heard, on="meter_id", how="left", maintain_order="left")
        .with_columns(
            *[pl.when(has_moved).then(f"{name}_now").otherwise(name).alias(name) for name in kept],
            arrival_at=pl.max_horizontal("arrival_at", "newest"),
        )
    )


def is_silent(watermarks: pl.DataFrame) -> pl.Expr:
    """True of a meter that falls silent now: columns `METER`.

    Args:
        watermarks: per run_id `watermark`, which says how far the arrivals of the run have come for certain.
    """
    return pl.col("silent_at").is_null() & (pl.col("due_at") <= watermark_of(watermarks)).fill_null(False)


def _silence(
    newest: pl.DataFrame, registry: pl.DataFrame, watermarks: pl.DataFrame
) -> tuple[list[dict[str, Any]], pl.DataFrame]:
    """Alarms of meters that fell silent or are heard again, and the meters with `silent_at`."""
    again = newest.filter(pl.col("silent_at").is_not_null() & pl.col("heard_at").is_not_null())
    limit = pl.max_horizontal(pl.duration(seconds=pl.col("interval_s") * SILENT_INTERVALS), pl.lit(SILENT_AT_LEAST))
    known = (
        newest.with_columns(silent_at=pl.when(pl.col("heard_at").is_null()).then("silent_at"))
        .join(registry.select("meter_id", "interval_s"), on="meter_id", how="left", maintain_order="left")
        .with_columns(due_at=pl.when(pl.col("interval_s").is_not_null()).then(pl.col("arrival_at") + limit))
    )
    is_new = is_silent(watermarks)
    fallen = known.filter(is_new)

    def level(row: dict[str, Any], since: str) -> dict[str, Any]:
        return {"meter_id": row["meter_id"], "alarm_type": METER_SILENT, "since_at": row[since]}

    changes = [
        _change({**row, "arrival_at": row["heard_at"]}, level(row, "silent_at"), SILENCE, cleared_at=row["heard_at"])
        for row in again.iter_rows(named=True)
    ]
    changes += [
        _change({**row, "arrival_at": row["due_at"]}, level(row, "due_at"), SILENCE)
        for row in fallen.iter_rows(named=True)
    ]
    return changes, known.with_columns(silent_at=pl.when(is_new).then("due_at").otherwise("silent_at"))
