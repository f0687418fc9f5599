"""What the bench of streams is fed with and what must come out: seeded readings, and an oracle in DuckDB.

The oracle shares no code with any contestant: SQL over the Parquet file that the topic was filled from.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa

from schemas.codec import arrow_schema, encode_batch

BEGIN = datetime(2026, 1, 5, tzinfo=UTC)
INTERVAL = timedelta(seconds=60)
PARTITIONS = 4
DUPLICATES, SWAPS = 0.02, 0.01
DUPLICATE_LAG_RECORDS = 50
"""How far behind the original a duplicate is sent; the meter's next reading comes later still."""
MOST_STEP_WH = 50
NOMINAL_MV, SPREAD_MV = 230_000, 2_000
RUN_ID = "20260105T000000-bench"
ENCODED_RECORDS = 20_000  # at once, as the replay encodes them
REASONS = ("first", "ok", "duplicate", "out_of_order")
MEAN_TOLERANCE_MV = 0.5
"""Tables hold means in whole mV."""


@dataclass(frozen=True)
class Shape:
    """How a topic's readings are spread.

    Attributes:
        name: `dense` or `sparse`, also the topic's.
        readings: distinct ones of each meter.
    """

    name: str
    readings: int

    @property
    def topic(self) -> str:
        """Name of the topic in Kafka."""
        return f"bench-{self.name}"


SHAPES = (Shape("dense", 400), Shape("sparse", 4))


def generate(records: int, shape: Shape, seed: int) -> pl.DataFrame:
    """Readings of all meters in the order in which they are sent.

    One a meter and minute, all meters in turn. 1 % of the readings come before their predecessor, 2 % come twice. The
    first reading of a meter keeps its place, and what is swapped is not sent twice, so that the energy of a meter is
    the same however a stream is cut into batches.

    Args:
        records: distinct readings; the duplicates come on top.
        shape: how many of them a meter has.
        seed: same seed, same rows.

    Returns:
        meter_id, observed_at, sent_at, seq, import_t1_wh, voltages in mV, and the partition and offset that each gets.
    """
    random = np.random.default_rng(seed)
    steps, meters = shape.readings, max(records // shape.readings, PARTITIONS)
    taken = np.repeat(np.arange(steps)[:, None], meters, axis=1)  # which reading is sent in a meter's turn
    firsts = np.arange(1, steps - 1, 2)
    pairs = random.choice(len(firsts) * meters, size=int(SWAPS * steps * meters), replace=False)
    rows, columns = firsts[pairs // meters], pairs % meters
    taken[rows, columns], taken[rows + 1, columns] = rows + 1, rows
    is_swapped = taken != np.arange(steps)[:, None]
    register = random.integers(0, 10_000_000, meters) + random.integers(1, MOST_STEP_WH, (steps, meters)).cumsum(axis=0)
    volts = {
        f"voltage_l{phase}_mv": (NOMINAL_MV + random.normal(0, SPREAD_MV, (steps, meters))).astype(np.int64)
        for phase in (1, 2, 3)
    }
    meter = np.tile(np.arange(meters), (steps, 1))
    step_us, begin_us = int(INTERVAL / timedelta(microseconds=1)), int(BEGIN.timestamp() * 1e6)
    turn_us = meter * step_us // meters
    stamp = pl.Datetime("us", "UTC")
    sent = pl.DataFrame(
        {
            "meter": meter.ravel(),
            "seq": taken.ravel(),
            "observed_at": (begin_us + taken * step_us + turn_us).ravel(),
            "sent_at": (begin_us + np.arange(steps)[:, None] * step_us + turn_us).ravel(),
            "import_t1_wh": np.take_along_axis(register, taken, axis=0).ravel(),
            **{name: np.take_along_axis(values, taken, axis=0).ravel() for name, values in volts.items()},
            "turn": np.arange(steps * meters, dtype=np.float64),
        }
    )
    plain = np.flatnonzero(~is_swapped.ravel())
    again = random.choice(plain, size=int(DUPLICATES * steps * meters), replace=False)
    lag = min(DUPLICATE_LAG_RECORDS, meters // 2) + 0.5
    return (
        pl.concat([sent, sent[again].with_columns(pl.col("turn") + lag)])
        .sort("turn")
        .with_columns(
            pl.col("observed_at", "sent_at").cast(stamp),
            meter_id=pl.format("m{}", pl.col("meter").cast(pl.String).str.zfill(7)),
            partition=pl.col("meter") % PARTITIONS,
        )
        .with_columns(offset=pl.int_range(pl.len()).over("partition"))
        .drop("meter", "turn")
    )


def payloads(rows: pl.DataFrame) -> list[bytes]:
    """Framed Avro of a slice of `generate`'s rows."""
    rows = rows.with_columns(received_at="sent_at")
    known = {"run_id": RUN_ID, "dialect": "dsmr5", "equipment_id": "E1"}
    columns = [
        rows.get_column(field.name).to_arrow().cast(field.type)
        if field.name in rows.columns
        else pa.repeat(pa.scalar(known.get(field.name), field.type), len(rows))
        for field in arrow_schema("reading")
    ]
    return encode_batch("reading", pa.table(columns, schema=arrow_schema("reading")))


DELTAS = """
with rows_in_batches as (
  select r.*, {batch} as batch from read_parquet('{rows}') r {cuts}
), marked as (
  select *, row_number() over (partition by meter_id, observed_at order by "offset") > 1 as is_duplicate
  from rows_in_batches
), judged as (
  select *, max(observed_at) filter (not is_duplicate) over (
    partition by meter_id order by batch range between unbounded preceding and 1 preceding) as newest_before
  from marked
), told as (
  select *, not is_duplicate and coalesce(observed_at < newest_before, false) as is_late from judged
)
select meter_id,
  arg_max(import_t1_wh, observed_at) filter (not is_duplicate and not is_late)
    - arg_min(import_t1_wh, observed_at) filter (not is_duplicate and not is_late) as delta_wh,
  1 as first,
  count(*) filter (not is_duplicate and not is_late) - 1 as ok,
  count(*) filter (is_duplicate) as duplicate,
  count(*) filter (is_late) as out_of_order
from told group by meter_id
"""
"""Energy and reasons per meter. Within a batch a stream may sort; what is older than the newest of an earlier batch is
out of order. Without batches each record is judged as it comes."""

WINDOWS = """
with readings as (
  select distinct meter_id, observed_at, voltage_l1_mv, voltage_l2_mv, voltage_l3_mv from read_parquet('{rows}')
), samples as (
  unpivot readings on voltage_l1_mv as L1, voltage_l2_mv as L2, voltage_l3_mv as L3 into name phase value mv
)
select meter_id, phase, epoch_us(time_bucket(interval 10 minutes, observed_at)) as window_us,
  count(*) as sample_count, min(mv) as min_mv, max(mv) as max_mv, avg(mv) as mean_mv
from samples group by all
"""


def expected(work: str, rows: Path, cuts: pl.DataFrame | None = None) -> pl.DataFrame:
    """What must come out.

    Args:
        work: `deltas` or `windows`.
        rows: Parquet file of `generate`'s rows.
        cuts: partition, batch, end_offset: how a contestant cut the stream, for `deltas`.
    """
    batch, joined = 'r."offset"', ""
    with duckdb.connect() as database:
        database.execute("set timezone = 'UTC'")
        if cuts is not None:
            database.register("cuts", cuts.to_arrow())
            batch = "c.batch"
            joined = 'asof join cuts c on r.partition = c.partition and r."offset" < c.end_offset'
        query = {"deltas": DELTAS, "windows": WINDOWS}[work].format(rows=rows, batch=batch, cuts=joined)
        found: pl.DataFrame = database.sql(query).pl()
        return found


KEYS = {"deltas": ["meter_id"], "windows": ["meter_id", "phase", "window_us"]}
EXACT = {"deltas": ["delta_wh", *REASONS], "windows": ["sample_count", "min_mv", "max_mv"]}


def differences(work: str, found: pl.DataFrame, wanted: pl.DataFrame) -> pl.DataFrame:
    """Rows that are missing, too many or other than expected; a mean may be off by half a mV, all else by nothing."""
    keys, exact = KEYS[work], EXACT[work]
    columns = [*keys, *exact, *(["mean_mv"] if work == "windows" else [])]
    is_key = found.select(keys).is_duplicated()
    both = found.select(columns).join(
        wanted.select(columns).with_columns(is_wanted=pl.lit(True)),
        on=keys,
        how="full",
        coalesce=True,
        suffix="_wanted",
    )
    wrong = [pl.col(name).ne_missing(pl.col(f"{name}_wanted")) for name in exact]
    if work == "windows":
        wrong.append(
            ((pl.col("mean_mv") - pl.col("mean_mv_wanted")).abs() <= MEAN_TOLERANCE_MV).fill_null(False).not_()
        )
    return pl.concat([both.filter(pl.any_horizontal(*wrong)), found.filter(is_key)], how="diagonal_relaxed")
