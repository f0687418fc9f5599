"""Where everything lies, and the columns that others rely on: add, never rename.

A table is a Delta table, `lake/<table>` in the store, partitioned by `date`, read by its log (`lake.open()`); a report
is plain Parquet under `reports/<name>_v<N>/date=YYYY-MM-DD/`, read by a plain glob. What a job gives is checked against
these columns before it is written.
"""

from functools import cache

import polars as pl
import pyarrow as pa

from schemas.codec import TIMESTAMP, arrow_schema

STRING, LONG, DOUBLE = pa.string(), pa.int64(), pa.float64()
TARIFFS = range(1, 5)
IMPORTS, EXPORTS = (tuple(f"{way}_t{tariff}" for tariff in TARIFFS) for way in ("import", "export"))
REGISTERS = (*IMPORTS, *EXPORTS)
PHASES = ("L1", "L2", "L3")


def _columns(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


def _nullable(entity: str) -> list[pa.Field]:
    return [field.with_nullable(True) for field in arrow_schema(entity)]


@cache
def polars_schema(schema: pa.Schema) -> pl.Schema:
    """The Polars form of a table's columns; the same one each time, to read."""
    return pl.Schema(schema)


def arrow_of(schema: pl.Schema) -> pa.Schema:
    """The Arrow form of a Polars frame's columns."""
    large = pl.DataFrame(schema=schema).to_arrow(compat_level=pl.CompatLevel.oldest()).schema
    return pa.schema([field.with_type(STRING) if field.type == pa.large_string() else field for field in large])


KAFKA_PLACE = [pa.field("topic", STRING), pa.field("partition", LONG), pa.field("offset", LONG)]

READINGS = pa.schema([*_nullable("reading"), pa.field("arrival_at", TIMESTAMP), *KAFKA_PLACE])
EVENTS = pa.schema([*_nullable("event"), pa.field("arrival_at", TIMESTAMP), *KAFKA_PLACE])
DEAD_LETTERS = pa.schema(_nullable("dead-letter"))
REGISTRY = _columns(
    meter_id=STRING, usage_point_id=STRING, equipment_id=STRING, valid_from=TIMESTAMP, valid_to=TIMESTAMP,
    phases=STRING, nominal_mv=LONG, fuse_a=LONG, transformer_id=STRING, feeder_id=STRING, community_id=STRING,
    time_zone=STRING, jurisdiction=STRING, interval_s=LONG, is_unlimited=pa.bool_(),
    wraps_wh=LONG, market=STRING,
)  # fmt: skip
"""One row per meter and usage point; `phases` is `L1` or `L1,L2,L3`, `interval_s` the expected seconds between
readings; null is unknown, and then no rule that needs it applies, but the plausible maximum takes three phases of a
setting (100 A). `is_unlimited`: no fuse bounds what it takes, such as behind current transformers. `wraps_wh`: where
its registers begin again at 0; null is at a power of ten. `market`: whose rules of validation apply."""
REGISTERED = pa.schema([*REGISTRY, pa.field("registered_by", STRING)])
"""The lake's table, with the run of a replay that a row came with, or `import` and the file that put it right."""
BY_IMPORT = "import"
"""What `registered_by` begins with then, before a blank: a run's name has none."""
CONSUMPTION_DELTAS = _columns(
    meter_id=STRING, register=STRING, previous_at=TIMESTAMP, observed_at=TIMESTAMP, previous_wh=LONG, wh=LONG,
    delta_wh=LONG, reason=STRING, segment_id=STRING, equipment_id=STRING, run_id=STRING, inferred=pa.bool_(),
)  # fmt: skip
"""A row per reading and register. `inferred`: a further row of a value that did not follow from the one before, when
the next reading has decided what it was: `glitch`, or the begin of a segment."""
INTERVAL_READINGS = _columns(
    meter_id=STRING, register=STRING, interval_start=TIMESTAMP, interval_end=TIMESTAMP, energy_wh=LONG,
    covered_s=LONG, quality=STRING, run_id=STRING,
)  # fmt: skip
"""`covered_s` is the part of the interval whose energy is known; `quality` (`IntervalQuality`) says how: power_fail is
0 Wh, since the meter had no power."""
CONFLICTS = _columns(
    meter_id=STRING, register=STRING, observed_at=TIMESTAMP, accepted_wh=LONG, refused_wh=LONG, run_id=STRING,
    partition=LONG, offset=LONG,
)  # fmt: skip
"""Two values of one register at one time: the first that came was accepted; the place in Kafka is the refused one's."""
VOLTAGE_WINDOWS = _columns(
    meter_id=STRING, phase=STRING, window_start=TIMESTAMP, window_end=TIMESTAMP, sample_count=LONG, mean_mv=LONG,
    min_mv=LONG, max_mv=LONG, stddev_mv=DOUBLE, deviation_pct=DOUBLE, band=STRING, run_id=STRING,
)  # fmt: skip
VOLTAGE_EVENTS = _columns(
    meter_id=STRING, phase=STRING, kind=STRING, previous_at=TIMESTAMP, observed_at=TIMESTAMP, event_count=LONG,
    counter=LONG, run_id=STRING,
)  # fmt: skip
"""Sags and swells by the rise of a meter's counters: `event_count` of them between two readings."""
VOLTAGE_ROLLUPS = _columns(
    level=STRING, group_id=STRING, phase=STRING, window_start=TIMESTAMP, window_end=TIMESTAMP, meter_count=LONG,
    sample_count=LONG, mean_mv=LONG, min_mv=LONG, min_meter_id=STRING, max_mv=LONG, max_meter_id=STRING,
    deviation_pct=DOUBLE, low_count=LONG, high_count=LONG, run_id=STRING,
)  # fmt: skip
"""`mean_mv` and `deviation_pct` are means over meters; `low_count` and `high_count` are meters outside their band."""
SUSPICIOUS_METERS = _columns(
    meter_id=STRING, phase=STRING, transformer_id=STRING, window_start=TIMESTAMP, is_suspicious=pa.bool_(),
    correlation=DOUBLE, offset_pct=DOUBLE, window_count=LONG, run_id=STRING,
)  # fmt: skip
"""Changes: since `window_start` the phase is out of step with its transformer's others, or in step again."""
ALARMS = pa.schema(_nullable("alarm"))
"""Columns as in avro/alarm. One row per change: of the rows of an alarm_id its state is the cleared one, where there is
one, else that with the most repeats; a change that came out of order may have the newer updated_at."""
ALARM_ACKNOWLEDGEMENTS = pa.schema([*_nullable("acknowledgement"), *KAFKA_PLACE])
"""As they were given; of several for one alarm the first counts."""
ALARM_COUNTS = _columns(
    window_start=TIMESTAMP, window_end=TIMESTAMP, alarm_type=STRING, transformer_id=STRING, feeder_id=STRING,
    raised_count=LONG, repeated_count=LONG, cleared_count=LONG, run_id=STRING, source=STRING,
)  # fmt: skip
"""Changes of alarms by the quarter hour of their arrival; rows of one key add up."""
EVENT_COUNTS = _columns(
    window_start=TIMESTAMP, window_end=TIMESTAMP, event_type=STRING, transformer_id=STRING, feeder_id=STRING,
    event_count=LONG, run_id=STRING,
)  # fmt: skip
"""Events whose code is counted and raises nothing, by the quarter hour of their arrival; rows of one key add up."""
OUTAGES = _columns(
    outage_id=STRING, transformer_id=STRING, feeder_id=STRING, state=STRING, began_at=TIMESTAMP, restored_at=TIMESTAMP,
    kind=STRING, meter_count=LONG, restored_count=LONG, meter_minutes=DOUBLE, meters=pa.list_(STRING), revision=LONG,
    run_id=STRING, updated_at=TIMESTAMP, sustained_count=LONG,
)  # fmt: skip
"""One row per change, the highest revision of an outage_id is its state. `sustained_count` is of the members whose own
interruption was a sustained one, `meter_minutes` the sum of those, as SAIFI and SAIDI count them; `kind` is sustained
where one was."""
QUARANTINED = pa.schema([*READINGS, pa.field("reason", STRING), pa.field("stage", STRING)])
LATE_READINGS = pa.schema([*READINGS, pa.field("reason", STRING), pa.field("stage", STRING)])
QUARANTINED_EVENTS = pa.schema([*EVENTS, pa.field("reason", STRING), pa.field("stage", STRING)])
LATE_EVENTS = QUARANTINED_EVENTS
ACCOUNTING = _columns(
    run_id=STRING, stage=STRING, batch=STRING, received=LONG, stored=LONG, duplicate=LONG, late=LONG,
    quarantined=LONG, invalid=LONG,
)  # fmt: skip
LATEST_READINGS = _columns(
    meter_id=STRING, observed_at=TIMESTAMP, **{f"{register}_wh": LONG for register in REGISTERS},
    equipment_id=STRING, run_id=STRING,
)  # fmt: skip
COMMUNITIES = _columns(
    community_id=STRING, valid_from=TIMESTAMP, valid_to=TIMESTAMP, model=STRING, time_zone=STRING, currency=STRING,
    consumption_side=STRING, production_side=STRING,
)  # fmt: skip
"""How a community shares (`SharingModel`), the zone of its days, and how each side does in Luxembourg (`SharingSide`).
Of all four tables of communities: null in `valid_from` is always, in `valid_to` for ever, and of several rows of the
same at a time the one that began last counts."""
COMMUNITY_MEMBERS = _columns(
    community_id=STRING, meter_id=STRING, valid_from=TIMESTAMP, valid_to=TIMESTAMP, factor_pct=LONG,
)  # fmt: skip
"""Meters that take part, with which percentage of their energy; null is all of it."""
COMMUNITY_KEYS = _columns(
    community_id=STRING, meter_id=STRING, producer_id=STRING, round=LONG, tier=LONG, hour=LONG, key_ppm=LONG,
    valid_from=TIMESTAMP, valid_to=TIMESTAMP,
)  # fmt: skip
"""Parts of a surplus, millionths: whose; of which producer, null: of all; in which round and tier, null: the first; in
which local hour of the day, null: in all. A null key is pro rata of consumption. Without meter: the part of a round, or
of a production point."""
COMMUNITY_PRICES = _columns(
    community_id=STRING, flow=STRING, tariff=LONG, price_micro_per_kwh=LONG, valid_from=TIMESTAMP, valid_to=TIMESTAMP,
)  # fmt: skip
"""Millionths of the currency per kWh of a flow (`EnergyFlow`); a tariff's own price goes before that without tariff."""
OF_COMMUNITIES = {
    "communities": COMMUNITIES,
    "community_members": COMMUNITY_MEMBERS,
    "community_keys": COMMUNITY_KEYS,
    "community_prices": COMMUNITY_PRICES,
}

TABLES = {
    "readings": READINGS,
    "events": EVENTS,
    "dead_letters": DEAD_LETTERS,
    "registry": REGISTERED,
    "consumption_deltas": CONSUMPTION_DELTAS,
    "interval_readings": INTERVAL_READINGS,
    "conflicts": CONFLICTS,
    "voltage_windows": VOLTAGE_WINDOWS,
    "voltage_events": VOLTAGE_EVENTS,
    "voltage_rollups": VOLTAGE_ROLLUPS,
    "suspicious_meters": SUSPICIOUS_METERS,
    "alarms": ALARMS,
    "alarm_acknowledgements": ALARM_ACKNOWLEDGEMENTS,
    "alarm_counts": ALARM_COUNTS,
    "event_counts": EVENT_COUNTS,
    "outages": OUTAGES,
    "quarantined_readings": QUARANTINED,
    "quarantined_events": QUARANTINED_EVENTS,
    "late_readings": LATE_READINGS,
    "late_events": LATE_EVENTS,
    "accounting": ACCOUNTING,
    "latest_readings": LATEST_READINGS,
    **OF_COMMUNITIES,
}

CURRENT = {"latest_readings": "partition"}
"""Table that has its newest version only → its column, the Kafka partition that its rows come of: each is replaced as a
whole. All other tables have `date`, the UTC day of their rows (`DATED_BY`)."""

DATED_BY = {
    "readings": "observed_at",
    "events": "observed_at",
    "dead_letters": "received_at",
    "consumption_deltas": "observed_at",
    "interval_readings": "interval_start",
    "conflicts": "observed_at",
    "voltage_windows": "window_start",
    "voltage_events": "observed_at",
    "voltage_rollups": "window_start",
    "suspicious_meters": "window_start",
    "alarms": "raised_at",
    "alarm_acknowledgements": "acknowledged_at",
    "alarm_counts": "window_start",
    "event_counts": "window_start",
    "outages": "began_at",
    "quarantined_readings": "arrival_at",
    "quarantined_events": "arrival_at",
    "late_readings": "observed_at",
    "late_events": "arrival_at",
}
"""Table that the stream adds to → the column whose UTC day dates a row."""

HOUR_OF_DAY, MILLI = pa.int32(), 3
MICRO_KWH = pa.decimal128(18, 6)
SOURCES = pa.list_(pa.struct([pa.field("producer_id", STRING), pa.field("wh", LONG)]))
FLOWS = ("covered", "residual", "sold", "feed_in")
DAY = {"day_start": TIMESTAMP, "day_end": TIMESTAMP}
SPANS = {f"{register}_{end}_wh": LONG for register in REGISTERS for end in ("from", "to")}
REPORTS = {
    "alarm_report_v1": _columns(
        alarm_id=STRING, meter_id=STRING, usage_point_id=STRING, transformer_id=STRING, feeder_id=STRING,
        alarm_type=STRING, severity=STRING, state=STRING, raised_at=TIMESTAMP, cleared_at=TIMESTAMP, duration_s=LONG,
        repeat_count=LONG, source=STRING, run_id=STRING, updated_at=TIMESTAMP, acknowledged_at=TIMESTAMP,
        acknowledged_by=STRING, note=STRING,
    ),
    "community_bills_v1": _columns(
        community_id=STRING, meter_id=STRING, **DAY, currency=STRING, slots=LONG, missing_slots=LONG,
        **{f"{flow}_wh": LONG for flow in FLOWS}, own_coverage_wh=LONG, sources=SOURCES,
        **{f"{flow}_cents": LONG for flow in FLOWS}, balance_cents=LONG,
    ),
    "daily_consumption_v1": _columns(
        meter_id=STRING, usage_point_id=STRING, **DAY, **{f"{register}_wh": LONG for register in REGISTERS},
        import_wh=LONG, export_wh=LONG, import_kwh=pa.decimal128(18, MILLI), export_kwh=pa.decimal128(18, MILLI),
        from_at=TIMESTAMP, to_at=TIMESTAMP, **SPANS, readings=LONG, expected_readings=LONG, duplicates=LONG,
        conflicts=LONG, gaps=LONG, resets=LONG, rollovers=LONG, exchanges=LONG, implausible=LONG, quality=STRING,
    ),
    "data_quality_v1": _columns(
        meter_id=STRING, **DAY, expected=LONG, received=LONG, distinct_readings=LONG, duplicate=LONG, conflict=LONG,
        missing=LONG, completeness_pct=DOUBLE, longest_gap_s=LONG, max_clock_ahead_s=LONG, max_delay_s=LONG, late=LONG,
        quarantined=LONG, quarantined_impossible_clock=LONG, quarantined_conflict=LONG, quarantined_implausible=LONG,
        dead_letters=LONG, arrived=LONG, of_other_days=LONG, furthest_s=LONG,
    ),
    "energy_sharing_v1": _columns(
        community_id=STRING, meter_id=STRING, slot_start=TIMESTAMP, slot_end=TIMESTAMP, **DAY, model=STRING,
        tariff=LONG, metered_wh=LONG, consumption_wh=LONG, own_coverage_wh=LONG, ideal_share_wh=LONG, covered_wh=LONG,
        sources=SOURCES, residual_wh=LONG, surplus_wh=LONG, sold_wh=LONG, feed_in_wh=LONG,
        operator_share_kwh=MICRO_KWH, operator_covered_kwh=MICRO_KWH, operator_feed_in_kwh=MICRO_KWH,
        missing_members=LONG, quality=STRING,
    ),
    "load_profile_v1": _columns(
        meter_id=STRING, usage_point_id=STRING, hour_of_day=HOUR_OF_DAY, window_start=TIMESTAMP, window_end=TIMESTAMP,
        hours=LONG, mean_wh=DOUBLE, min_wh=LONG, max_wh=LONG, stddev_wh=DOUBLE,
    ),
    "anomalies_v1": _columns(
        meter_id=STRING, usage_point_id=STRING, **DAY, way=STRING, wh=LONG, expected_wh=DOUBLE, sigma_wh=DOUBLE,
        score=DOUBLE, days=LONG, is_anomaly=pa.bool_(),
    ),
    "forecast_v1": _columns(
        level=STRING, group_id=STRING, interval_start=TIMESTAMP, interval_end=TIMESTAMP, import_wh=DOUBLE,
        export_wh=DOUBLE, days=LONG,
    ),
    "peaks_v1": _columns(
        meter_id=STRING, usage_point_id=STRING, **DAY, month_start=TIMESTAMP, day_peak_w=LONG, day_peak_at=TIMESTAMP,
        day_peak_quality=STRING, month_peak_w=LONG, month_peak_at=TIMESTAMP, month_peak_quality=STRING,
        month_intervals=LONG, month_expected=LONG,
    ),
    "validated_intervals_v1": _columns(
        meter_id=STRING, usage_point_id=STRING, register=STRING, interval_start=TIMESTAMP, interval_end=TIMESTAMP,
        energy_wh=LONG, quality=STRING, method=STRING, rule=STRING, is_reconciled=pa.bool_(), not_run=pa.list_(STRING),
    ),
    "outage_report_v1": _columns(
        group_id=STRING, level=STRING, customers_served=LONG, interruptions=LONG, momentary_interruptions=LONG,
        open_interruptions=LONG, customer_minutes=DOUBLE, momentary_limit_s=LONG, saifi=DOUBLE, saidi_min=DOUBLE,
        caidi_min=DOUBLE, maifi=DOUBLE, history_days=LONG, t_med_min=DOUBLE, is_provisional=pa.bool_(),
        is_major_event_day=pa.bool_(),
    ),
    "voltage_compliance_v2": _columns(
        meter_id=STRING, level=STRING, phase=STRING, transformer_id=STRING, feeder_id=STRING, period=STRING,
        norm=STRING, jurisdiction=STRING, nominal_mv=LONG, period_start=TIMESTAMP, **DAY, windows=LONG,
        valid_windows=LONG, expected_windows=LONG, is_complete=pa.bool_(), low_windows=LONG, high_windows=LONG,
        very_low_windows=LONG, very_high_windows=LONG, min_mv=LONG, max_mv=LONG, mean_mv=LONG,
        min_v=pa.decimal128(12, MILLI), max_v=pa.decimal128(12, MILLI), mean_v=pa.decimal128(12, MILLI),
        within_10pct_pct=DOUBLE, p1_mv=DOUBLE, p5_mv=DOUBLE, p50_mv=DOUBLE, p95_mv=DOUBLE, p99_mv=DOUBLE,
        judged_windows=LONG, outside_windows=LONG,
        beyond_windows=LONG, outside_pct=DOUBLE, beyond_pct=DOUBLE, complies=pa.bool_(), worst_phase=STRING,
        sags=LONG, swells=LONG, meters=LONG, judged_meters=LONG, complying_meters=LONG, complying_pct=DOUBLE,
        worst_meter_id=STRING,
    ),
}  # fmt: skip
"""Report with its version → its columns; what each means is in the docstring of its job in `batch_jobs/`. A percentile
(`p1_mv`: the 1st) is linear between ranks: of n sorted values the p-th lies at rank p / 100 × (n − 1), from 0 on."""
