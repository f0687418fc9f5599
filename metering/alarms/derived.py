"""Readings → alarms that no meter raises itself. Pure functions over Polars frames.

Voltage: outside its jurisdiction's band (docs/domain.md, Voltage), and for a minute or more not back inside by a
hysteresis, by which it also clears. Implausible load: for a minute or more beyond what the connection's fuses let
through, cleared by a hysteresis. Reverse energy: the export registers of one piece of equipment rise, of a meter that
had exported nothing when they were first seen; over when they have not risen for some minutes. Silence: no reading for
several intervals, on the arrival clock of its run. A condition that holds on raises no second alarm (docs/domain.md,
Alarms).
"""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import polars as pl

from metering.accounting import verdicts
from metering.alarms.life_cycle import ALARMS, alarm_id
from metering.clocks import STAMP, watermark_of
from metering.energy.delta_engine import FUSE_FACTOR, QUANTA_WH, SUMMED, fuses_w
from metering.voltage.windows import VOLTAGES, has_phase, has_voltage, with_rules
from schemas.closed_lists import AlarmSource, AlarmState, DeltaReason, Severity
from schemas.tables import EXPORTS, PHASES

HYSTERESIS_PCT = 1.0
LOAD_HYSTERESIS = 0.95  # of the limit: below it the load is back
SHORTEST = timedelta(minutes=1)
QUIET_S = 900  # a register in steps of 1 Wh stands still for minutes while little is exported
LEAST_EXPORT_W = 50  # a coarser one for as long as this takes for a step
SILENT_INTERVALS = 4
SILENT_AT_LEAST = timedelta(minutes=15)
LOADS = ["import_w", *[f"import_{phase.lower()}_w" for phase in PHASES]]
EXPORTS_WH = [f"{register}_wh" for register in EXPORTS]
NEEDED = ["meter_id", "observed_at", "arrival_at", "run_id", "dialect", "equipment_id", *VOLTAGES, *LOADS, *EXPORTS_WH]
KNOWN = ["meter_id", "phases", "nominal_mv", "fuse_a", "jurisdiction", "interval_s"]
VOLTAGE_SEEN = [f"has_voltage_{phase.lower()}" for phase in PHASES]
METER_SILENT, SILENCE = "meter_silent", Severity.ERROR
METER = pl.Schema(
    {
        "meter_id": pl.String(),
        "run_id": pl.String(),
        "observed_at": STAMP,
        "arrival_at": STAMP,
        "equipment_id": pl.String(),
        **dict.fromkeys(EXPORTS_WH, pl.Int64()),
        "is_generator": pl.Boolean(),
        "due_at": STAMP,
        "silent_at": STAMP,
        **dict.fromkeys(VOLTAGE_SEEN, pl.Boolean()),
    }
)
"""State: the newest reading of each meter, its equipment and the last value of each export register, whether it had
exported when they were first seen, its newest arrival and the run of that, when it falls silent by the registry's
interval, since when it is silent, and which phases have ever had a voltage."""
LEVEL = pl.Schema(
    {
        "meter_id": pl.String(),
        "alarm_type": pl.String(),
        "since_at": STAMP,
        "held_at": STAMP,
        "is_open": pl.Boolean(),
    }
)
"""State: conditions that hold, raised or not yet, and when they were last seen to."""


@dataclass(frozen=True)
class Condition:
    """When an alarm is raised and cleared.

    Attributes:
        severity: of the alarm.
        is_out: the condition holds.
        is_back: it holds no longer; between the two it stays as it was.
        shortest: how long it holds before the alarm is raised.
        quiet_s: for how many seconds it has not held before it is over.
    """

    severity: Severity
    is_out: pl.Expr
    is_back: pl.Expr
    shortest: timedelta = timedelta()
    quiet_s: pl.Expr = field(default_factory=lambda: pl.lit(0))


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
        is_judged = has_phase(phase) & low.is_not_null() & pl.col("nominal_mv").is_not_null()  # else nothing is out
        held[f"voltage_low_{phase.lower()}"] = Condition(
            Severity.CAUTION, deviation < low, (deviation >= low + HYSTERESIS_PCT) | ~is_judged, SHORTEST
        )
        held[f"voltage_high_{phase.lower()}"] = Condition(
            Severity.CAUTION, deviation > high, (deviation <= high - HYSTERESIS_PCT) | ~is_judged, SHORTEST
        )
    load, limit = pl.col("load_w"), pl.col("max_w") * FUSE_FACTOR
    is_back = (load <= limit * LOAD_HYSTERESIS) | limit.is_null()
    held["implausible_load"] = Condition(Severity.CAUTION, load > limit, is_back, SHORTEST)
    exported = pl.col("exported_wh")
    is_reverse = ~pl.col("is_generator") & (exported > 0)
    quantum_wh = pl.col("dialect").replace_strict(QUANTA_WH, default=1, return_dtype=pl.Int64)
    quiet_s = pl.max_horizontal(pl.lit(QUIET_S), quantum_wh * 3_600 // LEAST_EXPORT_W)
    held["reverse_energy"] = Condition(Severity.CAUTION, is_reverse, exported <= 0, quiet_s=quiet_s)
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
        registry: columns `KNOWN`; what is null there applies no rule.
        watermarks: per run_id `watermark`, which says how far the arrivals of the run have come for certain.
    """
    before = meters.select(
        "meter_id",
        newest_at="observed_at",
        before_equipment="equipment_id",
        **{f"held_{register}": register for register in EXPORTS_WH},
        was_generator="is_generator",
        **{f"before_{seen}": seen for seen in VOLTAGE_SEEN},
    )
    marked = readings.join(before, on="meter_id", how="left", maintain_order="left").with_columns(
        is_late=(pl.col("observed_at") <= pl.col("newest_at")).fill_null(False)
    )
    rows = _measured(marked.filter(~pl.col("is_late")), registry)
    held, changes = _held(rows, levels)
    silences, silent = _silence(_newest(rows, meters), readings, registry, watermarks)
    alarms = pl.DataFrame([*changes, *silences], schema=ALARMS, orient="row")
    late = verdicts(marked.filter("is_late"), pl.lit(DeltaReason.OUT_OF_ORDER.value))
    return DerivedAlarms(alarms, silent.select(METER.names()).cast(METER), held, late)


def _measured(rows: pl.DataFrame, registry: pl.DataFrame) -> pl.DataFrame:
    """The readings in order, with what the conditions speak of: limits, load, registers before."""
    named = pl.when(pl.col("equipment_id") != "").then("equipment_id")
    has_load = pl.any_horizontal(pl.col(LOADS[1:]).is_not_null())
    says_exported = pl.any_horizontal(pl.col(EXPORTS_WH).is_not_null()) & ~pl.col("dialect").is_in(SUMMED)
    had_exported = pl.when(says_exported).then(pl.max_horizontal(EXPORTS_WH) > 0)  # a sum began at our own 0
    is_same_box = (pl.col("equipment") == pl.col("before_equipment")).fill_null(True)
    ordered = (
        rows.sort("meter_id", "observed_at")
        .with_columns(meter=pl.col("meter_id").rle_id())  # a number is compared faster than a name
        .with_columns(
            load_w=pl.coalesce("import_w", pl.when(has_load).then(pl.sum_horizontal(LOADS[1:], ignore_nulls=True))),
            equipment=pl.coalesce(_last_of(named, "meter"), "before_equipment", _next_of(named, "meter")),
        )
        .with_columns(
            *[pl.when(is_same_box).then(f"held_{register}").alias(f"held_{register}") for register in EXPORTS_WH],
            is_generator=pl.coalesce("was_generator", _first_of(had_exported, "meter")),
            **{
                seen: pl.coalesce(f"before_{seen}", _last_of(pl.when(has_voltage(voltage)).then(True), "meter"))
                for seen, voltage in zip(VOLTAGE_SEEN, VOLTAGES, strict=True)
            },
        )
    )
    is_other = pl.col("equipment").ne_missing(pl.col("equipment").shift(1)) & (pl.col("meter").diff() == 0)
    is_mixed = ordered.select(is_other.any()).item()
    by_register = (
        ordered.sort("meter", "equipment", "observed_at").with_columns(series=pl.struct("meter", "equipment").rle_id())
        if is_mixed
        else ordered.with_columns(series="meter")
    )
    measured = (
        _with_exported(by_register)
        .join(registry, on="meter_id", how="left", maintain_order="left")
        .with_columns(
            max_w=fuses_w(),
            **{
                voltage: pl.when(has_phase(phase) & pl.col(seen)).then(voltage)
                for phase, voltage, seen in zip(PHASES, VOLTAGES, VOLTAGE_SEEN, strict=True)
            },
        )
    )
    return with_rules(measured.sort("meter", "observed_at") if is_mixed else measured)


def _with_exported(rows: pl.DataFrame) -> pl.DataFrame:
    """Adds `exported_wh`, how much the export registers rose, each since its own last value; and those values."""
    used = [name for name in EXPORTS_WH if rows.get_column(name).count() or rows.get_column(f"held_{name}").count()]
    rises, last = [], {}
    for name in used:
        known, held = _last_of(pl.col(name), "series"), pl.col(f"held_{name}")
        last[f"held_{name}"] = pl.coalesce(known, held)
        rises.append(last[f"held_{name}"] - pl.coalesce(_before(known, "series"), held))
    is_known = pl.any_horizontal(pl.col(EXPORTS_WH).is_not_null())
    exported = pl.sum_horizontal(rises) if used else pl.lit(None, pl.Int64)
    return rows.with_columns(exported_wh=pl.when(is_known).then(exported), **last)


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
            is_out=alarm_type, is_back=condition.is_back.fill_null(False), quiet_s=condition.quiet_s,
        )  # fmt: skip
        for row in measured.iter_rows(named=True):
            key = (row["meter_id"], alarm_type)
            level = state.get(key)
            if level and row["is_back"] and (row["observed_at"] - level["held_at"]).total_seconds() < row["quiet_s"]:
                continue
            if row["is_back"]:
                if level and level["is_open"]:
                    changes.append(_change(row, level, condition.severity, cleared_at=row["observed_at"]))
                state.pop(key, None)
            elif row["is_out"]:
                level = {
                    "meter_id": key[0], "alarm_type": alarm_type, "since_at": row["observed_at"], "is_open": False,
                    **(level or {}), "held_at": row["observed_at"],
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


def _newest(rows: pl.DataFrame, meters: pl.DataFrame) -> pl.DataFrame:
    """The meters after the readings that are not late, columns `METER`."""
    last = rows.unique("meter_id", keep="last", maintain_order=True).select(
        "meter_id",
        "observed_at",
        "is_generator",
        *VOLTAGE_SEEN,
        equipment_id="equipment",
        **{register: f"held_{register}" for register in EXPORTS_WH},
    )
    kept = [name for name in last.columns if name != "meter_id"]
    has_moved = pl.col("observed_at_now").is_not_null()
    return meters.join(
        last, on="meter_id", how="full", coalesce=True, suffix="_now", maintain_order="left_right"
    ).with_columns(pl.when(has_moved).then(f"{name}_now").otherwise(name).alias(name) for name in kept)


def is_silent(watermarks: pl.DataFrame) -> pl.Expr:
    """True of a meter that falls silent now: columns `METER`.

    Args:
        watermarks: per run_id `watermark`, which says how far the arrivals of the run have come for certain.
    """
    return pl.col("silent_at").is_null() & (pl.col("due_at") < watermark_of(watermarks)).fill_null(False)


def _silence(
    newest: pl.DataFrame, readings: pl.DataFrame, registry: pl.DataFrame, watermarks: pl.DataFrame
) -> tuple[list[dict[str, Any]], pl.DataFrame]:
    """Alarms of meters that fell silent or are heard again, and the meters with their newest arrival and `silent_at`.

    A meter is silent from when it is due until its next arrival, whether that comes in the same batch or in a later
    one; in the last batch so far it is where the watermark says that nothing earlier can come.
    """
    run = pl.col("run_id")
    is_of_last_run = (
        run.rle_id() == run.rle_id().last() if readings.get_column("run_id").n_unique() > 1 else pl.lit(True)
    )
    heard = readings.group_by("meter_id").agg(
        earliest_at=pl.col("arrival_at").min(),
        latest_at=pl.col("arrival_at").max(),
        newest_heard_at=pl.col("arrival_at").filter(is_of_last_run).max(),
        heard_run=run.last(),
    )
    limit = pl.max_horizontal(pl.duration(seconds=pl.col("interval_s") * SILENT_INTERVALS), pl.lit(SILENT_AT_LEAST))
    limits = registry.select("meter_id", limit=pl.when(pl.col("interval_s").is_not_null()).then(limit))
    is_heard = pl.col("earliest_at").is_not_null()
    is_same_run = pl.col("heard_run").eq_missing(pl.col("run_id")) & pl.col("arrival_at").is_not_null()
    known = (
        newest.join(heard, on="meter_id", how="left", maintain_order="left")
        .join(limits, on="meter_id", how="left", maintain_order="left")
        .with_columns(
            silence_at=pl.when(is_heard).then("silent_at"),
            silent_at=pl.when(~is_heard).then("silent_at"),
            arrival_before="arrival_at",
            run_before="run_id",
            arrival_at=pl.when(is_heard & ~is_same_run)
            .then("newest_heard_at")
            .otherwise(pl.max_horizontal("arrival_at", "newest_heard_at")),
            run_id=pl.when(is_heard).then("heard_run").otherwise("run_id"),
        )
        .with_columns(due_at=pl.col("arrival_at") + pl.col("limit"))
    )
    is_long = pl.col("latest_at") - pl.min_horizontal("arrival_before", "earliest_at") > pl.col("limit")
    spanning = known.filter(is_heard & (is_long | pl.col("silence_at").is_not_null()))
    is_new = is_silent(watermarks)
    changes: list[dict[str, Any]] = []
    for silence in _silences(spanning, readings).iter_rows(named=True):
        level = {"meter_id": silence["meter_id"], "alarm_type": METER_SILENT, "since_at": silence["since_at"]}
        if silence["is_new"]:
            changes.append(_change({**silence, "arrival_at": silence["since_at"]}, level, SILENCE))
        cleared_at = max(silence["arrival_at"], silence["since_at"])
        changes.append(_change(silence, level, SILENCE, cleared_at=cleared_at))
    for row in known.filter(is_new).iter_rows(named=True):
        level = {"meter_id": row["meter_id"], "alarm_type": METER_SILENT, "since_at": row["due_at"]}
        changes.append(_change({**row, "arrival_at": row["due_at"]}, level, SILENCE))
    return changes, known.with_columns(silent_at=pl.when(is_new).then("due_at").otherwise("silent_at"))


def _silences(meters: pl.DataFrame, readings: pl.DataFrame) -> pl.DataFrame:
    """Silences that ended with an arrival of this batch: meter_id, run_id, since_at, arrival_at, is_new.

    In the order in which Kafka has the records; from one run to another no time passes: each has a clock of its own.
    """
    before = meters.select(
        "meter_id",
        run_id="run_before",
        arrival_at="arrival_before",
        offset=pl.lit(-1, pl.Int64),
        is_before=pl.lit(True),
    )
    arrivals = readings.join(meters.select("meter_id"), on="meter_id", how="semi").select(
        "meter_id", "run_id", "arrival_at", "offset", is_before=pl.lit(False)
    )
    between = (
        pl.concat([before.drop_nulls("arrival_at"), arrivals])
        .sort("meter_id", "offset")
        .join(meters.select("meter_id", "limit", "silence_at"), on="meter_id", how="left", maintain_order="left")
        .with_columns(spell=pl.struct("meter_id", "run_id").rle_id())
        .with_columns(
            since_at=pl.col("arrival_at").cum_max().shift(1).over("spell") + pl.col("limit"),
            is_first=pl.col("is_before").shift(1).over("meter_id").fill_null(False),
        )
    )
    is_known = pl.col("is_first") & pl.col("silence_at").is_not_null()
    return between.filter(~pl.col("is_before") & (is_known | (pl.col("since_at") < pl.col("arrival_at")))).select(
        "meter_id", "run_id", "arrival_at", since_at=pl.when(is_known).then("silence_at").otherwise("since_at"),
        is_new=~is_known,
    )  # fmt: skip
