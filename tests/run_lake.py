"""A lake made of what a replay sent, without Spark: by the jobs' own pure functions; and its damage by hand."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ingest.decode import dead_letter, routed
from lake.reading import Lake
from lake.tables import Writer
from metering.registry import newest
from replay.dirt.entries import Entry
from replay.run import play
from replay.run.ledger import run_folder
from replay.run.order import Order
from replay.verify import Verdict
from schemas.closed_lists import Bucket, FaultKind, Poison
from schemas.errors import InvalidMessage
from schemas.tables import CURRENT, TABLES, polars_schema
from schemas.topics import DEAD_LETTERS, mqtt_topic, shard
from streaming_jobs import alarms, consumption_deltas, readings_lake, voltage_deviation
from tests.lake_by_hand import add
from tests.settling import Settling, kafka_table
from tests.unit.test_run import Kept
from tests.wire import small_tape

METERS = 30
DAY = "2024-03-04"
DIRT = (
    Entry(kind=FaultKind.DUPLICATE, times=2),
    Entry(kind=FaultKind.LATE, by="2h"),
    Entry(kind=FaultKind.REORDER),
    Entry(kind=FaultKind.GAP, length=3),
    Entry(kind=FaultKind.CLOCK_1970, length=2),
    Entry(kind=FaultKind.CLOCK_2099),
    Entry(kind=FaultKind.RESET),
    Entry(kind=FaultKind.ROLLOVER),
    Entry(kind=FaultKind.METER_EXCHANGE),
    Entry(kind=FaultKind.SPIKE),
    Entry(kind=FaultKind.FROZEN, length=3),
    Entry(kind=FaultKind.UNIT_SLIP),
    Entry(kind=FaultKind.VOLTAGE_ALARM),
    Entry(kind=FaultKind.TAMPER),
    Entry(kind=FaultKind.CLOCK_JUMP, by="1h", length=2),
    Entry(kind=FaultKind.CLOCK_JUMP, by="-1h", length=2),
    Entry(kind=FaultKind.CLOCK_JUMP, by="-62m"),
    Entry(kind=FaultKind.POISON, meters=7, bytes=list(Poison)),
)
"""One entry of every kind but the storm, which needs a transformer to itself."""
JOBS = (readings_lake.JOB, consumption_deltas.JOB, voltage_deviation.JOB, alarms.JOB)


def chain(
    home: Path,
    batches: int,
    dirt: Sequence[Entry],
    monkeypatch: pytest.MonkeyPatch,
    sink: Kept | None = None,
    is_repeated: bool = False,
    **how: Any,
) -> Path:
    """A run with faults, and the lake of it; `how` are parts of the order."""
    monkeypatch.setenv("METERSTREAM_HOME", str(home))
    small_tape.write(home / "tape")
    sink = sink or Kept()
    play(Order(home / "tape", "r1", "mqtt", METERS, dirt=tuple(dirt), **how), lambda: sink)
    if is_repeated:
        play(Order(home / "tape", "r2", "mqtt", METERS, dirt=tuple(dirt), again=True), lambda: sink)
    registry = Lake().polars("registry").drop("date").collect()
    Writer().delete("registry", "true")
    write_lake(sink.sent, registry, batches)
    return home


def write_lake(sent: Sequence[tuple[str, str, str, bytes]], registry: pl.DataFrame, batches: int) -> None:
    """A lake made of what a replay handed over, in batches."""
    received_at = datetime.now(UTC)  # after the run began: verify leaves older dead letters to earlier runs
    places: defaultdict[tuple[str, int], int] = defaultdict(int)
    records: list[list[tuple[object, ...]]] = [[] for _ in range(batches)]
    for number, (kind, meter_id, encoding, payload) in enumerate(sent):
        topic = mqtt_topic(meter_id, kind, encoding)
        try:
            message = routed(topic, payload, received_at)[0]
        except InvalidMessage as error:
            message = dead_letter(topic, payload, error, received_at)
        partition = 0 if message.topic == DEAD_LETTERS.name else int(shard(meter_id), 16) % 4
        place = (message.topic, partition)
        row = (message.key, message.value, *place, places[place], received_at)
        records[number * batches // len(sent)].append(row)
        places[place] += 1
    rows: defaultdict[str, list[pl.DataFrame]] = defaultdict(list, registry=[registry])
    for job in JOBS:
        settling, topics = Settling(job, newest(registry)), {topic.name for topic in job.topics}
        parts = [kafka_table([row for row in batch if row[2] in topics]) for batch in records]
        for number, part in enumerate([*parts, kafka_table([])]):
            for table, frame in settling.batch(part, close_all=number == batches).items():
                rows[table].append(_lines(frame, job.name) if table == "accounting" else frame)
    for table, frames in rows.items():
        add(table, pl.concat(frames), "0" if table in CURRENT else DAY)


def _lines(counted: pl.DataFrame, stage: str) -> pl.DataFrame:
    """Lines of the table accounting."""
    each = {bucket.value: pl.col("records").filter(pl.col("bucket") == bucket.value).sum() for bucket in Bucket}
    wide = counted.group_by("run_id").agg(received=pl.col("records").sum(), **each)
    schema = polars_schema(TABLES["accounting"])
    return wide.with_columns(stage=pl.lit(stage), batch=pl.lit("0")).select(schema.names()).cast(schema)


def table(name: str) -> Path:
    """The one file of a table, which is damaged where it lies."""
    (file,) = Lake().files(name)
    return Path(file)


def change(name: str, which: pl.Expr, **columns: Any) -> str | None:
    """Changes the first row that fits, or removes it where no columns are given. Returns its meter."""
    rows = pl.read_parquet(table(name)).with_row_index("row")
    row = rows.filter(which).row(0, named=True)
    rest = rows.with_columns(
        **{
            column: pl.when(pl.col("row") == row["row"]).then(value).otherwise(column)
            for column, value in columns.items()
        }
    )
    if not columns:
        rest = rows.filter(pl.col("row") != row["row"])
    rest.drop("row").write_parquet(table(name))
    meter: str | None = row.get("meter_id")
    return meter


def at_fault(kind: FaultKind) -> pl.Expr:
    """Rows of a meter that has a fault of a kind."""
    faults = pl.read_parquet(run_folder("r1") / "faults.parquet").filter(pl.col("kind") == kind.value)
    return pl.col("meter_id").is_in(faults.get_column("meter_id").unique().implode())


def decided() -> pl.Expr:
    """Rows of meters whose clock does not jump, but for the hour back, of which the conflicts are decided."""
    jumped = pl.read_parquet(run_folder("r1") / "faults.parquet").filter(
        (pl.col("kind") == FaultKind.CLOCK_JUMP.value) & (pl.col("amount") != -3_600)
    )
    return ~pl.col("meter_id").is_in(jumped.get_column("meter_id").unique().implode())


def named(verdict: Verdict) -> set[str]:
    """Meters of which verify says that something is wrong."""
    wrong = verdict.faults.filter(~pl.col("is_explained")).get_column("meter_id").to_list()
    return {*verdict.findings.get_column("meter_id").drop_nulls(), *wrong}


def scored(verdict: Verdict) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of the table of precision and recall, by table and reason."""
    return {(row["place"], row["reason"]): row for row in verdict.scores.table.iter_rows(named=True)}


def low(verdict: Verdict) -> set[tuple[str, str]]:
    return set(verdict.scores.low.select("place", "reason").iter_rows())
