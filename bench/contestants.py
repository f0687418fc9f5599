"""Contestants of the bench of streams, our jobs and other engines: what each needs first, its command, its results."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

import lake
from bench.downloads import java_program, setting_up
from bench.truth import KEYS, PARTITIONS, REASONS, Shape
from lake.store import used
from schemas.codec import avro_schema, latest
from schemas.errors import ContractBroken
from schemas.topics import AVRO_FOLDER
from tools import setup

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).parent / "peers"
WORKS = ("deltas", "windows")
HEAP = "-Xmx2g"  # of the Java peers; Spark's driver has its default, 1 GB
QUIX = ("quixstreams==3.28.1", "fastavro==1.13.1")
QUIX_VENV = ROOT / "data" / "cache" / "peers" / "quix"  # its clients are older than ours
OWN = "Meterstream: the job, all its tables"
CORE = "Meterstream: the peers' work alone"
DELTA_COLUMNS = {
    "meter_id": pl.String, "previous_us": pl.Int64, "observed_us": pl.Int64, "previous_wh": pl.Int64, "wh": pl.Int64,
    "delta_wh": pl.Int64, "reason": pl.String,
}  # fmt: skip
WINDOW_COLUMNS = {
    "meter_id": pl.String, "phase": pl.String, "window_us": pl.Int64, "sample_count": pl.Int64, "min_mv": pl.Int64,
    "max_mv": pl.Int64, "mean_mv": pl.Float64,
}  # fmt: skip
OPEN_MODULES = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in ("java.lang", "java.util", "java.time")]
"""Flink's serializers look into Java's own classes."""


@dataclass(frozen=True)
class Run:
    """One run of a contestant.

    Attributes:
        work: one of `WORKS`.
        shape: of the topic.
        records: in the topic, duplicates counted.
        rows: Parquet file that the topic was filled from.
        out: folder of its results.
        bootstrap: host:port of Kafka.
        batch: most records of one of our batches.
    """

    work: str
    shape: Shape
    records: int
    rows: Path
    out: Path
    bootstrap: str
    batch: int


@dataclass(frozen=True)
class Contestant:
    """Who takes part.

    Attributes:
        name: as in the table.
        command: of a run; it says `records N` on its output as it goes.
        results: reads what it wrote; None where there is nothing to check.
        prepare: what must be there first: jars, classes, packages.
        passes: how often it goes through the records.
    """

    name: str
    command: Callable[[Run], list[str]]
    results: Callable[[Run], pl.DataFrame] | None
    prepare: Callable[[], None] = lambda: None
    passes: int = 1


def per_meter(steps: pl.DataFrame) -> pl.DataFrame:
    """Energy and reasons per meter, as the oracle tells them, of rows with delta_wh and reason."""
    reason = pl.col("reason")
    counts = [(reason == name).sum().cast(pl.Int64).alias(name) for name in REASONS]
    return steps.group_by("meter_id").agg(pl.col("delta_wh").sum(), *counts)


def own_results(run: Run) -> pl.DataFrame:
    """What our jobs wrote into the lake."""
    with used(f"file://{run.out / 'home'}"):
        tables = lake.open()
        if run.work == "deltas":
            rows = tables.polars("consumption_deltas").filter(register="import_t1")
            return per_meter(rows.select("meter_id", "delta_wh", "reason").collect())
        return tables.polars("voltage_windows").with_columns(window_us=pl.col("window_start").dt.epoch("us")).collect()


def polars_results(run: Run) -> pl.DataFrame:
    """What Polars wrote."""
    rows = pl.read_parquet(run.out / "result.parquet")
    return rows if run.work == "windows" else per_meter(rows)


def peer_results(run: Run) -> pl.DataFrame:
    """What a peer wrote: rows as text, a file or more for each of its tasks."""
    columns = DELTA_COLUMNS if run.work == "deltas" else WINDOW_COLUMNS
    rows = pl.concat(
        [
            pl.read_csv(path, has_header=False, schema=columns)
            for path in sorted((run.out / "rows").rglob("*"))
            if path.is_file() and path.stat().st_size and not path.name.startswith(".")
        ]
    )
    return rows if run.work == "windows" else per_meter(rows)


def quix_results(run: Run) -> pl.DataFrame:
    """What Quix Streams wrote; of a window's rows the last."""
    rows = peer_results(run)
    return rows.unique(KEYS["windows"], keep="last", maintain_order=True) if run.work == "windows" else rows


def own(what: str) -> Callable[[Run], list[str]]:
    """Command of one of bench/peers/own.py."""

    def command(run: Run) -> list[str]:
        if what == "polars":
            (run.out / "rows.parquet").symlink_to(run.rows)
        given = [what, run.work, run.shape.topic, str(run.records), str(run.out)]
        return [sys.executable, "-m", "bench.peers.own", *given]

    return command


def java(program: str, conf: str, *more: str) -> Callable[[Run], list[str]]:
    """Command of a Java peer."""

    def command(run: Run) -> list[str]:
        schema_id, version = latest("reading")
        fields = avro_schema("reading", version)["fields"]
        threads = min(os.cpu_count() or 1, PARTITIONS)
        return [
            java_program(), HEAP, "-XX:-UsePerfData", f"-Djava.io.tmpdir={run.out / 'home' / 'tmp'}", *OPEN_MODULES,
            f"-Dreading.schema={schema_id}", f"-Dreading.names={','.join(field['name'] for field in fields)}",
            f"-Dreading.kinds={''.join(_letter(field['type']) for field in fields)}", f"-Drecords={run.records}",
            "-cp", f"{classes(conf)}:{setup.JARS / conf / '*'}", program,
            run.bootstrap, run.shape.topic, run.work, str(run.out), str(threads), *more,
        ]  # fmt: skip

    return command


def _letter(kind: Any) -> str:
    """A field's type for bench/peers/Reading.java."""
    if isinstance(kind, list):
        return _letter(kind[1]).upper()
    return "s" if kind == "string" else "l"


def quix(run: Run) -> list[str]:
    """Command of Quix Streams."""
    schema = AVRO_FOLDER.joinpath("reading", f"{latest('reading')[1]}.avsc")
    given = [run.bootstrap, run.shape.topic, run.work, str(run.records), str(run.out), str(schema)]
    return [str(QUIX_VENV / "bin" / "python"), str(PEERS / "quix.py"), *given]


def classes(conf: str) -> Path:
    """Folder of a peer's compiled classes."""
    return ROOT / "data" / "cache" / "peers" / conf


def compiled(conf: str, program: str) -> Callable[[], None]:
    """Fetches a peer's jars the first time and compiles it."""

    def prepare() -> None:
        module = PEERS / "ivy.xml"
        key = setup.digest(module.read_bytes())
        with setting_up():
            for name in ("compiler", conf):
                setup.step(f"Bench {name}", key, partial(setup.fetch_jars, java_program(), module, (name,)))
        folder, compiler = classes(conf), next((setup.JARS / "compiler").glob("ecj-*.jar"))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        jars = ":".join(str(jar) for jar in sorted((setup.JARS / conf).glob("*.jar")))
        sources = [str(PEERS / name) for name in ("Reading.java", f"{program}.java")]
        options = ["-17", "-nowarn", "-d", str(folder), "-cp", jars]
        command = [java_program(), "-jar", str(compiler), *options, *sources]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise ContractBroken(done.stdout + done.stderr)

    return prepare


def quix_installed() -> None:
    """Gives Quix Streams an environment of its own."""
    uv = setup.VENV / "bin" / "uv"
    with setting_up():
        if not (QUIX_VENV / "bin" / "python").exists():
            setup.run([uv, "venv", "--python", sys.executable, QUIX_VENV])
        setup.run([uv, "pip", "install", "--system-certs", "--python", QUIX_VENV, *QUIX])


CONTESTANTS = {
    "own": Contestant(OWN, own("jobs"), own_results),
    "core": Contestant(CORE, own("core"), own_results),
    "kafka-streams": Contestant(
        "Kafka Streams (RocksDB)",
        java("KafkaStreamsPeer", "kafka-streams"),
        peer_results,
        compiled("kafka-streams", "KafkaStreamsPeer"),
    ),
    "flink-rocksdb": Contestant(
        "Flink (RocksDB)", java("FlinkPeer", "flink", "rocksdb"), peer_results, compiled("flink", "FlinkPeer")
    ),
    "flink-heap": Contestant(
        "Flink (heap)", java("FlinkPeer", "flink", "hashmap"), peer_results, compiled("flink", "FlinkPeer")
    ),
    "quixstreams": Contestant("Quix Streams (RocksDB)", quix, quix_results, quix_installed),
    "noop": Contestant("bound: Spark reads Kafka, forgets", own("noop"), None),
    "polars": Contestant("bound: Polars from Parquet", own("polars"), polars_results, passes=3),
}
