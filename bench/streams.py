"""The bench of streams: two works, our jobs beside other engines, in turn, in one run: `make bench-streams`.

deltas: energy per meter and register step, with reasons. windows: ten minutes, mean, least, largest and count per meter
and phase, each distinct reading once. Both read a topic of framed Avro from its first record to its last: `dense` has
400 readings a meter, `sparse` has 4. A result counts only where it equals the oracle's (bench/truth.py).

The figure is records per CPU-second of the contestant's whole process tree, after the warm-up, Kafka itself not
counted. Timing decides no exit code; a wrong result does.
"""

import json
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import polars as pl
import typer
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from rich import box
from rich.console import Console
from rich.table import Table

from bench.contestants import CONTESTANTS, CORE, OWN, ROOT, WORKS, Contestant, Run
from bench.stream_runs import Measured, kill_and_restart, measure
from bench.truth import ENCODED_RECORDS, PARTITIONS, SHAPES, Shape, differences, expected, generate, payloads
from schemas.errors import ConfigError, ContractBroken, RetryLater, exits

SEED = 1
ALL = ",".join(CONTESTANTS)
ALL_SHAPES = ",".join(shape.name for shape in SHAPES)

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
progress = Console(stderr=True, highlight=False)


def main(
    records: Annotated[
        int, typer.Option(help="Distinct readings of a topic; 2 % duplicates on top.", min=2_000)
    ] = 4_000_000,
    rounds: Annotated[int, typer.Option(help="How often each contestant has its turn.", min=1)] = 1,
    only: Annotated[str, typer.Option(help="Some of the contestants, with commas between.")] = ALL,
    works: Annotated[str, typer.Option(help="deltas, windows or both.")] = ",".join(WORKS),
    shapes: Annotated[str, typer.Option(help="dense, sparse or both.")] = ALL_SHAPES,
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
                                outcome = f"killed in batch {begun} after {committed} was committed, restarted: exact"
                            else:
                                done.append(measure(contestant, this, warm_up))
                                outcome = f"{done[-1].per_cpu_s / 1e3:.0f} k per CPU-s, {done[-1].wall_s:.0f} s"
                            check(contestant, this)
                            forget_peers(bootstrap)
                            progress.print(f"{number + 1}/{rounds} {work} {shape.name}: {contestant.name}: {outcome}")
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


def _chosen(given: str, known: Iterable[str], option: str) -> list[str]:
    names, known = [name.strip() for name in given.split(",") if name.strip()], list(known)
    if not names or set(names) - set(known):
        msg = f"{option} takes {', '.join(known)}, not {', '.join(sorted(set(names) - set(known))) or 'nothing'}"
        raise ConfigError(msg)
    return [name for name in known if name in names]


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


def batches_of(run: Run) -> pl.DataFrame:
    """Up to which offset of each partition our batches went, by the job's intents."""
    ends = []
    for file in sorted(run.out.glob("home/state/*/*/intents/*.json")):
        offsets = json.loads(file.read_text())["ends"][run.shape.topic]
        ends += [(int(partition), int(file.stem), end) for partition, end in offsets.items()]
    cuts = pl.DataFrame(ends, schema=["partition", "batch", "end_offset"], orient="row")
    return cuts.unique(["partition", "end_offset"], keep="first").sort("end_offset")


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
