import json
import subprocess
import sys
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from bench.contestants import per_meter
from bench.peers import core, own
from bench.store import in_a_store
from bench.truth import PARTITIONS, REASONS, SHAPES, Shape, differences, expected, generate, payloads
from engine.job import StreamingJob
from kafka_io.ranges import KAFKA
from schemas.codec import decode_batch
from schemas.tables import REGISTRY, polars_schema
from schemas.topics import EVENTS, READINGS
from streaming_jobs import consumption_deltas, voltage_deviation
from tests.settling import Settling
from tests.wire import small_tape

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.replay", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_quick_bench_prints_a_table_and_ends_with_a_line_of_json(tmp_path: Path) -> None:
    small_tape.write(tmp_path / "tape")
    done = bench("--quick", "--only", "encode", "--tape", str(tmp_path / "tape"), "--json")
    assert done.returncode == 0, done.stderr
    *shown, last = done.stdout.splitlines()
    assert any("records per CPU-second" in line for line in shown)
    result = json.loads(last)
    assert set(result) == {"machine", "load_at_end", "encode"}
    assert {"cores", "cpu", "memory_gb", "kernel", "java", "python", "tape", "versions"} <= set(result["machine"])
    assert len(result["encode"]["rows"]) == 3
    for row in result["encode"]["rows"]:
        assert row["records"] > 0
        assert len(row["wall_s"]) == len(row["cpu_s"]) == 2
        assert row["records_per_cpu_s"]["min"] <= row["records_per_cpu_s"]["median"] <= row["records_per_cpu_s"]["max"]
    assert all(ratio["value"] > 0 for ratio in result["encode"]["ratios"])


def test_an_unknown_part_is_wrong_use() -> None:
    done = bench("--only", "encode,decode")
    assert done.returncode == 2
    assert "decode" in done.stderr


def readings(shape: Shape, records: int = 4_000) -> pl.DataFrame:
    return generate(records, shape, seed=1)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_readings_of_a_stream_have_their_share_of_duplicates_and_swaps_and_the_same_seed_gives_the_same(
    shape: Shape,
) -> None:
    rows = readings(shape)
    assert rows.equals(readings(shape))
    assert len(rows) == 4_000 + 80
    originals = rows.unique(["meter_id", "observed_at"], maintain_order=True)
    assert len(originals) == 4_000
    assert originals.group_by("meter_id").len().get_column("len").unique().to_list() == [shape.readings]
    back = originals.select(pl.col("observed_at").diff().over("meter_id").dt.total_microseconds() < 0)
    assert back.to_series().sum() == 40
    decoded = decode_batch(payloads(rows), "reading")
    assert decoded.reasons.null_count == len(rows)
    sent = pl.from_arrow(decoded.records)
    assert isinstance(sent, pl.DataFrame)
    same = ["meter_id", "observed_at", "import_t1_wh", "voltage_l3_mv"]
    assert sent.select(same).equals(rows.select(same))


def test_the_oracle_judges_each_record_as_it_comes_or_sorts_within_a_batch(tmp_path: Path) -> None:
    at = [datetime(2026, 1, 5, 0, minute, tzinfo=UTC) for minute in (0, 2, 1, 2, 11)]
    rows = pl.DataFrame(
        {
            "meter_id": ["m1"] * 5,
            "observed_at": pl.Series(at, dtype=pl.Datetime("us", "UTC")),
            "import_t1_wh": [10, 25, 14, 25, 40],
            **{f"voltage_l{phase}_mv": [230_000, 231_000, 232_000, 231_000, 230_000 + phase] for phase in (1, 2, 3)},
            "partition": [0] * 5,
            "offset": range(5),
        }
    )
    file = tmp_path / "rows.parquet"
    rows.write_parquet(file)
    columns = ["meter_id", "delta_wh", *REASONS]
    assert expected("deltas", file).select(columns).rows() == [("m1", 30, 1, 2, 1, 1)]
    healed = pl.DataFrame({"partition": [0], "batch": [0], "end_offset": [5]})
    assert expected("deltas", file, healed).select(columns).rows() == [("m1", 30, 1, 3, 1, 0)]
    cut = pl.DataFrame({"partition": [0, 0], "batch": [0, 1], "end_offset": [2, 5]})
    assert expected("deltas", file, cut).select(columns).rows() == [("m1", 30, 1, 2, 1, 1)]
    windows = expected("windows", file).filter(phase="L2").sort("window_us")
    columns = ["sample_count", "min_mv", "max_mv", "mean_mv"]
    assert windows.select(columns).rows() == [(3, 230_000, 232_000, 231_000.0), (1, 230_002, 230_002, 230_002.0)]


def test_what_differs_from_the_oracle_is_found(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    readings(SHAPES[1]).write_parquet(file)
    deltas, windows = expected("deltas", file), expected("windows", file)
    assert differences("deltas", deltas, deltas).is_empty()
    assert differences("windows", windows.with_columns(pl.col("mean_mv").round(0)), windows).is_empty()
    first = pl.int_range(pl.len()) == 0
    for work, right, column, off in (
        ("deltas", deltas, "delta_wh", 1),
        ("deltas", deltas, "duplicate", 1),
        ("windows", windows, "sample_count", 1),
        ("windows", windows, "mean_mv", 0.6),
    ):
        wrong = right.with_columns(pl.when(first).then(pl.col(column) + off).otherwise(pl.col(column)).alias(column))
        assert len(differences(work, wrong, right)) == 1
    assert len(differences("deltas", deltas[1:], deltas)) == 1
    assert len(differences("windows", pl.concat([windows, windows[:1]]), windows)) >= 1


@pytest.mark.parametrize(
    "job", [*core.JOBS.values(), consumption_deltas.JOB, voltage_deviation.JOB], ids=lambda job: job.name
)
def test_our_contestants_read_the_topic_that_the_others_read(job: StreamingJob) -> None:
    job_of_topic = own.of_topic(job, SHAPES[0].topic)
    assert [topic.name for topic in job_of_topic.topics if topic != EVENTS] == [SHAPES[0].topic]
    assert job_of_topic.source(SHAPES[0].topic).transform is job.source(READINGS.name).transform


ENDS = range(30, 870, 30)  # of the batches, offsets of each partition


def written_by(job: StreamingJob, table: str, rows: pl.DataFrame) -> pl.DataFrame:
    """What a job writes into a table: some batches, each Kafka partition by itself, then a flush."""
    settling = Settling(job, polars_schema(REGISTRY).to_frame())
    tables = []
    for begin, end in [*pairwise([0, *ENDS]), (ENDS[-1], ENDS[-1])]:
        part = rows.filter(pl.col("offset").is_between(begin, end - 1))
        records = pa.table(
            [
                part.get_column("meter_id").cast(pl.Binary).to_arrow(),
                pa.array(payloads(part), pa.binary()),
                pa.repeat(READINGS.name, len(part)),
                part.get_column("partition").to_arrow(),
                part.get_column("offset").to_arrow(),
                part.get_column("sent_at").to_arrow(),
            ],
            names=KAFKA.names,
        ).cast(KAFKA)
        done = settling.batch(records, close_all=begin == end)
        assert done["accounting"].get_column("records").sum() == len(part)
        tables.append(done[table])
    return pl.concat(tables)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("job", [core.JOBS["deltas"], consumption_deltas.JOB], ids=lambda job: job.name)
def test_the_deltas_of_our_contestants_are_the_oracles(job: StreamingJob, shape: Shape, tmp_path: Path) -> None:
    rows = readings(shape, 3_200)  # as many meters in each partition
    rows.write_parquet(tmp_path / "rows.parquet")
    cuts = pl.DataFrame(
        [(partition, batch, end) for batch, end in enumerate(ENDS) for partition in range(PARTITIONS)],
        schema=["partition", "batch", "end_offset"],
        orient="row",
    )
    wanted = expected("deltas", tmp_path / "rows.parquet", cuts)
    assert wanted.get_column("out_of_order").sum() > 0
    steps = written_by(job, "consumption_deltas", rows).filter(register="import_t1")
    assert differences("deltas", per_meter(steps), wanted).is_empty()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("job", [core.JOBS["windows"], voltage_deviation.JOB], ids=lambda job: job.name)
def test_the_windows_of_our_contestants_are_the_oracles(job: StreamingJob, shape: Shape, tmp_path: Path) -> None:
    rows = readings(shape, 3_200)  # as many meters in each partition
    rows.write_parquet(tmp_path / "rows.parquet")
    found = written_by(job, "voltage_windows", rows).with_columns(window_us=pl.col("window_start").dt.epoch("us"))
    assert differences("windows", found, expected("windows", tmp_path / "rows.parquet")).is_empty()


def test_a_commit_costs_no_more_for_the_files_that_a_table_has(tmp_path: Path) -> None:
    few, many = (min(in_a_store(f"file://{tmp_path}", files).cpu_ms for _ in range(3)) for files in (10, 10_000))
    assert many < 5 * few, "who commits reads the whole log"
