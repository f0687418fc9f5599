"""Two works on streams of readings: our jobs beside other engines, in one run, in turn: `make bench-streams`.

deltas: energy per meter and register step, with reasons. windows: ten minutes, mean, least, largest and count per meter
and phase, each distinct reading once. Both read a topic of framed Avro from its first record to its last: `dense` has
400 readings a meter, `sparse` has 4. A result counts only where it equals the oracle's (bench/truth.py).

The figure is records per CPU-second of the contestant's whole process tree, after the warm-up, Kafka itself not
counted. Timing decides no exit code; a wrong result does.
"""

import contextlib
import json
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from glob import glob  # of folders that come and go: pathlib's fails over one that is gone
from pathlib import Path
from typing import IO, Annotated, Any

import polars as pl
import typer
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from rich import box
from rich.console import Console
from rich.table import Table

from bench.replay import java_program, setting_up
from bench.timed import resident, tree
from bench.truth import (
    ENCODED_RECORDS,
    KEYS,
    PARTITIONS,
    REASONS,
    SHAPES,
    Shape,
    differences,
    expected,
    generate,
    payloads,
)
from schemas.codec import avro_schema, latest
from schemas.errors import ConfigError, ContractBroken, RetryLater, exits
from schemas.topics import AVRO_FOLDER
from tools import setup

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).parent / "peers"
WORKS = ("deltas", "windows")
SEED = 1
SAMPLE_S = 0.1
"""A process that ends takes what it used since the last look with it."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
LONGEST_S = 1_800
HEAP = "-Xmx2g"  # of the Java peers; Spark's driver has its default, 1 GB
QUIX = ("quixstreams==3.28.1", "fastavro==1.13.1")
QUIX_VENV = ROOT / "data" / "cache" / "peers" / "quix"  # its clients are older than ours
LAST_LINES = 25

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
progress = Console(stderr=True, highlight=False)


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


@dataclass
class Measured:
    """What a run took.

    Attributes:
        name: the contestant's.
        work: one of `WORKS`.
        shape: of the topic.
        records: of the whole run.
        after: records after the warm-up; the next two are of these alone.
        cpu_s: CPU time of the process tree.
        wall_s: time.
        whole_cpu_s: of the whole run, with start and warm-up.
        peak_bytes: largest sum of resident memory over the tree.
        load: load average before.
    """

    name: str
    work: str
    shape: str
    records: int
    after: int
    cpu_s: float
    wall_s: float
    whole_cpu_s: float
    peak_bytes: int
    load: float

    @property
    def per_cpu_s(self) -> float:
        """Records per CPU-second after the warm-up."""
        return self.after / max(self.cpu_s, 1e-9)

    @property
    def per_s(self) -> float:
        """Records per second after the warm-up."""
        return self.after / max(self.wall_s, 1e-9)


class TreeClock:
    """CPU time of a process and of all that it started, kept for those that have ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak_bytes = 0
        self._used_s: dict[int, float] = {}

    def look(self) -> float:
        """Seconds so far; pyspark's workers are in no other account, their parent waits for nobody."""
        alive = list(tree(self.pid))
        for pid in alive:
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                self._used_s[pid] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
        self.peak_bytes = max(self.peak_bytes, sum(resident(pid) for pid in alive))
        return sum(self._used_s.values())


@dataclass
class Started:
    """A contestant's process.

    Attributes:
        process: it leads a session of its own.
        listener: reads its output.
        lines: what it has told and nobody has heard yet.
        done: records that it has told of.
        said: file of what it complained of.
    """

    process: subprocess.Popen[str]
    listener: threading.Thread
    lines: "queue.SimpleQueue[int]"
    said: Path
    done: int = 0

    def listen(self, timeout_s: float) -> None:
        """Waits for its next line."""
        with contextlib.suppress(queue.Empty):
            self.done = max(self.done, self.lines.get(timeout=timeout_s))

    def kill(self) -> None:
        """SIGKILL for it and all that it started."""
        for pid in list(tree(self.process.pid)):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def problem(self, text: str) -> RetryLater:
        """An error with the last lines of its complaints."""
        return RetryLater("\n".join([text, *self.said.read_text().splitlines()[-LAST_LINES:]]))


@contextmanager
def started(contestant: Contestant, run: Run) -> Iterator[Started]:
    """Runs a contestant; nothing of it is left behind.

    Raises:
        RetryLater: it takes too long or failed.
    """
    environment = {
        **os.environ, "METERSTREAM_HOME": str(run.out / "home"), "METERSTREAM_KAFKA_BOOTSTRAP": run.bootstrap,
        "METERSTREAM_MAX_OFFSETS_PER_TRIGGER": str(run.batch), "METERSTREAM_TRIGGER_S": "0",
        "PYTHONPATH": str(ROOT),  # Spark's workers import bench.peers.core
    }  # fmt: skip
    (run.out / "home" / "tmp").mkdir(parents=True, exist_ok=True)
    said = run.out / "problems.txt"
    with said.open("w") as problems:
        process = subprocess.Popen(
            contestant.command(run), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=problems, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout
        lines: queue.SimpleQueue[int] = queue.SimpleQueue()
        listener = threading.Thread(target=_listen, args=(process.stdout, lines), daemon=True)
        listener.start()
        one = Started(process, listener, lines, said)
        try:
            yield one
        finally:
            one.kill()


def measure(contestant: Contestant, run: Run, warm_up: float) -> Measured:
    """Runs a contestant to its end.

    Raises:
        RetryLater: it failed or did not see all records.
    """
    load, total = os.getloadavg()[0], run.records * contestant.passes
    began = time.monotonic()
    with started(contestant, run) as one:
        clock = TreeClock(one.process.pid)
        used = clock.look()
        mark: tuple[int, float, float] | None = None
        while one.process.poll() is None:
            if time.monotonic() - began > LONGEST_S:
                msg = f"{contestant.name} takes longer than {LONGEST_S} s"
                raise RetryLater(msg)
            one.listen(SAMPLE_S)
            used = clock.look()
            if mark is None and one.done >= warm_up * total:
                mark = (one.done, used, time.monotonic())
        ended = time.monotonic()
        one.listener.join()
        while not one.lines.empty():
            one.listen(0)
        if one.process.returncode or mark is None or one.done != total:
            code = one.process.returncode
            msg_0 = f"{contestant.name} ended with {code} after {one.done:,} of {total:,} records:"
            raise one.problem(msg_0)
    return Measured(
        contestant.name, run.work, run.shape.name, run.records, total - mark[0], used - mark[1], ended - mark[2], used,
        clock.peak_bytes, load,
    )  # fmt: skip


def kill_and_restart(contestant: Contestant, run: Run) -> tuple[int, int]:
    """Kills one of ours (SIGKILL, the whole tree) inside a batch past the middle, starts it again, lets it end.

    Returns:
        The newest batch that was begun and the newest that was committed at the kill.

    Raises:
        RetryLater: it ended before the kill, or failed after it.
        ContractBroken: the books do not have each record once.
    """
    with started(contestant, run) as one:
        while one.done < run.records / 2:
            one.listen(SAMPLE_S)
            if one.process.poll() is not None:
                msg = f"{contestant.name} ended before it was killed:"
                raise one.problem(msg)
        while True:
            begun, committed = newest(run, "offsets"), newest(run, "commits")
            if begun > committed and glob(f"{run.out}/home/staging/*-{begun:08d}/*/date=*/*"):
                break  # rows are staged or being renamed in
            if one.process.poll() is not None:
                msg = f"{contestant.name} ended before it was killed:"
                raise one.problem(msg)
    begun, committed = newest(run, "offsets"), newest(run, "commits")
    with started(contestant, run) as one:
        if one.process.wait(LONGEST_S):
            msg = f"{contestant.name} ended with {one.process.returncode} after it was killed:"
            raise one.problem(msg)
    books = pl.read_parquet(run.out / "home" / "lake" / "accounting" / "date=*" / "*.parquet")
    if (received := books.get_column("received").sum()) != run.records:
        msg = f"{contestant.name}: the books have {received:,} of {run.records:,} records after a kill"
        raise ContractBroken(msg)
    return begun, committed


def newest(run: Run, kind: str) -> int:
    """Newest batch in the checkpoint's `offsets` or `commits`, −1 where there is none."""
    files = run.out.glob(f"home/state/checkpoints/*/{kind}/[0-9]*")
    return max((int(file.name) for file in files if file.name.isdigit()), default=-1)


def _listen(output: IO[str], lines: "queue.SimpleQueue[int]") -> None:
    for line in output:
        if line.startswith("records "):
            lines.put(int(line.removeprefix("records ")))


def check(contestant: Contestant, run: Run) -> None:
    """Compares a run's results with the oracle's.

    Raises:
        ContractBroken: they differ.
    """
    if contestant.results is None:
        return
    cuts = batches_of(run) if contestant.name in (OWN, CORE) and run.work == "deltas" else None
    wanted = expected(run.work, run.rows, cuts)
    wrong = differences(run.work, contestant.results(run), wanted)
    if len(wrong):
        msg = f"{contestant.name}, {run.work}, {run.shape.name}: {len(wrong):,} of {len(wanted):,} rows differ:\n"
        msg += str(wrong.head())
        raise ContractBroken(msg)


OWN = "Meterstream: the job, all its tables"
CORE = "Meterstream: the peers' work alone"


def batches_of(run: Run) -> pl.DataFrame:
    """Up to which offset of each partition our batches went, by the query's checkpoint."""
    ends = []
    for file in sorted(run.out.glob("home/state/checkpoints/*/offsets/[0-9]*"), key=lambda path: int(path.name)):
        offsets = json.loads(file.read_text().splitlines()[2])[run.shape.topic]
        ends += [(int(partition), int(file.name), end) for partition, end in offsets.items()]
    cuts = pl.DataFrame(ends, schema=["partition", "batch", "end_offset"], orient="row")
    return cuts.unique(["partition", "end_offset"], keep="first").sort("end_offset")


def per_meter(steps: pl.DataFrame) -> pl.DataFrame:
    """Energy and reasons per meter, as the oracle tells them, of rows with delta_wh and reason."""
    reason = pl.col("reason")
    counts = [(reason == name).sum().cast(pl.Int64).alias(name) for name in REASONS]
    return steps.group_by("meter_id").agg(pl.col("delta_wh").sum(), *counts)


def own_results(run: Run) -> pl.DataFrame:
    """What our jobs wrote into the lake."""
    lake = run.out / "home" / "lake"
    if run.work == "deltas":
        rows = pl.scan_parquet(lake / "consumption_deltas" / "date=*" / "*.parquet")
        return per_meter(rows.filter(register="import_t1").select("meter_id", "delta_wh", "reason").collect())
    rows = pl.scan_parquet(lake / "voltage_windows" / "date=*" / "*.parquet")
    return rows.with_columns(window_us=pl.col("window_start").dt.epoch("us")).collect()


def polars_results(run: Run) -> pl.DataFrame:
    """What Polars wrote."""
    rows = pl.read_parquet(run.out / "result.parquet")
    return rows if run.work == "windows" else per_meter(rows)


DELTA_COLUMNS = {
    "meter_id": pl.String, "previous_us": pl.Int64, "observed_us": pl.Int64, "previous_wh": pl.Int64, "wh": pl.Int64,
    "delta_wh": pl.Int64, "reason": pl.String,
}  # fmt: skip
WINDOW_COLUMNS = {
    "meter_id": pl.String, "phase": pl.String, "window_us": pl.Int64, "sample_count": pl.Int64, "min_mv": pl.Int64,
    "max_mv": pl.Int64, "mean_mv": pl.Float64,
}  # fmt: skip


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


def quix(run: Run) -> list[str]:
    """Command of Quix Streams."""
    schema = AVRO_FOLDER.joinpath("reading", f"{latest('reading')[1]}.avsc")
    given = [run.bootstrap, run.shape.topic, run.work, str(run.records), str(run.out), str(schema)]
    return [str(QUIX_VENV / "bin" / "python"), str(PEERS / "quix.py"), *given]


def quix_installed() -> None:
    """Gives Quix Streams an environment of its own."""
    uv = setup.VENV / "bin" / "uv"
    with setting_up():
        if not (QUIX_VENV / "bin" / "python").exists():
            setup.run([uv, "venv", "--python", sys.executable, QUIX_VENV])
        setup.run([uv, "pip", "install", "--system-certs", "--python", QUIX_VENV, *QUIX])


def quix_results(run: Run) -> pl.DataFrame:
    """What Quix Streams wrote; of a window's rows the last."""
    rows = peer_results(run)
    return rows.unique(KEYS["windows"], keep="last", maintain_order=True) if run.work == "windows" else rows


OPEN_MODULES = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in ("java.lang", "java.util", "java.time")]
"""Flink's serializers look into Java's own classes."""

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


ALL = ",".join(CONTESTANTS)


def fill(bootstrap: str, shape: Shape, rows: pl.DataFrame) -> None:
    """Makes a topic and sends all rows, each to its partition.

    Raises:
        RetryLater: Kafka did not take them.
    """
    topic = NewTopic(shape.topic, PARTITIONS, 1, config={"compression.type": "lz4"})
    admin = AdminClient({"bootstrap.servers": bootstrap})  # held until the answer is there
    admin.create_topics([topic])[shape.topic].result(30)
    producer = Producer({
        "bootstrap.servers": bootstrap, "acks": "all", "enable.idempotence": True, "compression.type": "lz4",
        "linger.ms": 50, "delivery.report.only.error": True, "log_level": 3,
    })  # fmt: skip
    for part in rows.iter_slices(ENCODED_RECORDS):
        for meter_id, partition, value in zip(part["meter_id"], part["partition"], payloads(part), strict=True):
            while True:
                try:
                    producer.produce(shape.topic, value, meter_id, partition)
                    break
                except BufferError:
                    producer.poll(0.05)
        producer.poll(0)
    if left := producer.flush(120):
        msg = f"Kafka did not take {left} records"
        raise RetryLater(msg)


def forget_peers(bootstrap: str) -> None:
    """Removes the topics that the peers have made: changelogs, which the broker would go on compacting."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    ours = {shape.topic for shape in SHAPES}
    theirs = [name for name in admin.list_topics(timeout=30).topics if name.startswith("bench-") and name not in ours]
    for done in (admin.delete_topics(theirs) if theirs else {}).values():
        done.result(30)


def _chosen(given: str, known: Iterable[str], option: str) -> list[str]:
    names, known = [name.strip() for name in given.split(",") if name.strip()], list(known)
    if not names or set(names) - set(known):
        msg = f"{option} takes {', '.join(known)}, not {', '.join(sorted(set(names) - set(known))) or 'nothing'}"
        raise ConfigError(msg)
    return [name for name in known if name in names]


def main(
    records: Annotated[
        int, typer.Option(help="Distinct readings of a topic; 2 % duplicates on top.", min=2_000)
    ] = 4_000_000,
    rounds: Annotated[int, typer.Option(help="How often each contestant has its turn.", min=1)] = 1,
    only: Annotated[str, typer.Option(help="Some of the contestants, with commas between.")] = ALL,
    works: Annotated[str, typer.Option(help="deltas, windows or both.")] = ",".join(WORKS),
    shapes: Annotated[str, typer.Option(help="dense, sparse or both.")] = ",".join(shape.name for shape in SHAPES),
    batch: Annotated[int, typer.Option(help="Most records of one of our batches.", min=1_000)] = 500_000,
    warm_up: Annotated[float, typer.Option(help="Share of the records that does not count.", min=0, max=0.9)] = 0.33,
    kill: Annotated[bool, typer.Option("--kill", help="No figures: kill each of ours in the middle, check.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave what the runs wrote, under data/tmp.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Records per CPU-second of our jobs and of other engines, results checked.

    Examples: make bench-streams; make bench-streams ARGS="--records 1000000 --only own,kafka-streams --rounds 3"
    """
    from stack.isolated import own_settings
    from stack.native import NativeStack

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what it started ends with it
    with exits():
        known = ("own", "core") if kill else tuple(CONTESTANTS)
        asked = ",".join(known) if kill and only == ALL else only
        contestants = [CONTESTANTS[name] for name in _chosen(asked, known, "--only")]
        works_chosen = _chosen(works, WORKS, "--works")
        names = _chosen(shapes, tuple(shape.name for shape in SHAPES), "--shapes")
        for contestant in contestants:
            contestant.prepare()
        temporary = ROOT / "data" / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="streams-", dir=temporary))
        stack = NativeStack(own_settings(folder / "stack"), on_progress=lambda line: progress.print(f"  {line}"))
        done: list[Measured] = []
        try:
            stack.start(["kafka"])
            bootstrap = stack.settings.kafka_bootstrap
            runs = {}
            for shape in (shape for shape in SHAPES if shape.name in names):
                progress.print(f"filling {shape.topic}")
                rows = generate(records, shape, SEED)
                file = folder / f"{shape.name}.parquet"
                rows.write_parquet(file)
                fill(bootstrap, shape, rows)
                runs[shape] = Run("", shape, len(rows), file, folder / "out", bootstrap, batch)
            for number in range(rounds):
                for work in works_chosen:
                    for shape, run in runs.items():
                        for contestant in contestants:
                            this = replace(run, work=work)
                            if kill:
                                begun, committed = kill_and_restart(contestant, this)
                                told = f"killed in batch {begun} after {committed} was committed, restarted: exact"
                            else:
                                done.append(measure(contestant, this, warm_up))
                                told = f"{done[-1].per_cpu_s / 1e3:.0f} k per CPU-s, {done[-1].wall_s:.0f} s"
                            check(contestant, this)
                            forget_peers(bootstrap)
                            progress.print(f"{number + 1}/{rounds} {work} {shape.name}: {contestant.name}: {told}")
                            if not keep:
                                shutil.rmtree(this.out)
                            else:
                                this.out.rename(folder / f"{number}-{work}-{shape.name}-{len(done)}")
        finally:
            stack.stop()
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
        show(done)
        if as_json:
            lines = [{**asdict(one), "per_cpu_s": one.per_cpu_s, "per_s": one.per_s} for one in done]
            sys.stdout.write(json.dumps(lines) + "\n")


def show(done: list[Measured]) -> None:
    """A table a work and shape; medians, and ratios of our rates to the other's."""
    for work, shape in dict.fromkeys((one.work, one.shape) for one in done):
        here = [one for one in done if (one.work, one.shape) == (work, shape)]
        table = Table(box=box.SIMPLE, title=f"{work}, {shape}: {here[0].records:,} records", padding=(0, 1))
        table.add_column("contestant")
        for column in ("thousand per\nCPU-second", "min to max", "thousand/s", "CPU s of\nwhole run", "peak MB", "load",
                       "job to\nits rate", "core to\nits rate"):  # fmt: skip
            table.add_column(column, justify="right", no_wrap=True)
        ours = [[one.per_cpu_s / 1e3 for one in here if one.name == name] for name in (OWN, CORE)]
        for name in dict.fromkeys(one.name for one in here):
            runs = [one for one in here if one.name == name]
            rates = [one.per_cpu_s / 1e3 for one in runs]
            median = statistics.median(rates)
            table.add_row(
                name, f"{median:.0f}", f"{min(rates):.0f} to {max(rates):.0f}",
                f"{statistics.median(one.per_s for one in runs) / 1e3:.0f}",
                f"{statistics.median(one.whole_cpu_s for one in runs):.0f}",
                f"{max(one.peak_bytes for one in runs) / 1e6:,.0f}",
                f"{statistics.median(one.load for one in runs):.1f}",
                *[f"{statistics.median(rates_of) / median:.2f}" if rates_of else "" for rates_of in ours],
            )  # fmt: skip
        console.print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
