"""Our own contestants, one run of one of them in a process: the jobs as they are, and what bounds them.

    python -m bench.peers.own jobs|core|noop|polars deltas|windows TOPIC RECORDS OUT

jobs: `streaming_jobs.consumption_deltas` or `voltage_deviation` by `engine.stream.Stream`, on another topic and in a
home of their own. core: `bench.peers.core` in their place. Either goes on where its checkpoint stands. noop: Spark
reads the topic and forgets it. polars: OUT/rows.parquet instead of Kafka, the work alone. Each says `records N` when
it has done so many, and writes its results under OUT.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from schemas.topics import READINGS

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from engine.batch import BatchPlan
    from engine.intents import Intent
    from engine.job import StreamingJob
    from engine.partition_tasks import Done
    from lake.reading import RegistryFiles

PASSES = 3
"""Polars reads the file so often: it has no stream, and a single pass would be over before it is warm."""


def say(records: int) -> None:
    """Tells the bench how far this is."""
    sys.stdout.write(f"records {records}\n")
    sys.stdout.flush()


def of_topic(job: "StreamingJob", topic: str) -> "StreamingJob":
    """The job with another topic in the place of the readings; its other sources read nothing."""
    return replace(
        job,
        sources=tuple(
            replace(source, topic=replace(source.topic, name=topic)) if source.topic == READINGS else source
            for source in job.sources
        ),
    )


def jobs(what: str, work: str, topic: str) -> None:
    """The streaming job of a work, to the end of its topic and with a flush."""
    from bench.peers import core
    from engine.runner import Runner
    from engine.session import spark_session
    from engine.settings import StreamSettings
    from engine.stream import JAVA_OPTIONS, Stream
    from kafka_io.offsets import newest_offsets, oldest_offsets
    from settings import load
    from streaming_jobs import consumption_deltas, voltage_deviation

    whole = {"deltas": consumption_deltas.JOB, "windows": voltage_deviation.JOB}
    job = core.JOBS[work] if what == "core" else whole[work]

    class Told(Runner):
        def finish(
            self, plan: "BatchPlan", intent: "Intent", done: "list[Done]", registry: "RegistryFiles", began: float
        ) -> None:
            super().finish(plan, intent, done, registry, began)
            say(sum(self.place.values()))

    session = spark_session(f"bench-{work}", JAVA_OPTIONS)
    runner = Told(of_topic(job, topic), load(StreamSettings))
    stream = Stream(session, [runner])
    runner.resume()
    kafka, topics = runner.settings.kafka_bootstrap, runner.job.topics
    stream.catch_up(oldest_offsets(kafka, topics), newest_offsets(kafka, topics))
    query = stream.start()
    query.processAllAvailable()
    query.stop()
    stream.flush(runner)
    session.stop()


def noop(topic: str, records: int) -> None:
    """Spark reads the topic in the same batches as the jobs do."""
    from engine.session import spark_session
    from engine.settings import StreamSettings
    from settings import load

    settings = load(StreamSettings)
    session = spark_session("bench-noop")
    rows = (
        session.readStream.format("kafka")
        .option("kafka.bootstrap.servers", settings.kafka_bootstrap)
        .option("subscribe", topic)
        .option("startingOffsets", "earliest")
        .option("maxOffsetsPerTrigger", settings.max_offsets_per_trigger)
        .load()
    )

    def forget(batch: "DataFrame", number: int) -> None:
        batch.write.format("noop").mode("overwrite").save()
        say(min(records, (number + 1) * settings.max_offsets_per_trigger))

    query = rows.writeStream.foreachBatch(forget).trigger(processingTime="0 seconds").start()
    query.processAllAvailable()
    query.stop()
    session.stop()


def by_polars(work: str, records: int, out: Path) -> None:
    """The work on rows that are there, by whole columns."""
    for number in range(PASSES):
        rows = pl.read_parquet(out / "rows.parquet")
        result = {"deltas": _deltas, "windows": _windows}[work](rows)
        result.write_parquet(out / "result.parquet")
        say(records * (number + 1))


def _deltas(rows: pl.DataFrame) -> pl.DataFrame:
    at = pl.col("observed_at")
    marked = rows.sort("meter_id", "offset", maintain_order=True).with_columns(
        newest=at.cum_max().shift(1).over("meter_id")
    )
    reason = (
        pl.when(pl.col("newest").is_null())
        .then(pl.lit("first"))
        .when(at > pl.col("newest"))
        .then(pl.lit("ok"))
        .when(at == pl.col("newest"))
        .then(pl.lit("duplicate"))
        .otherwise(pl.lit("out_of_order"))
    )
    judged = marked.with_columns(reason=reason)
    wh = pl.col("import_t1_wh")
    accepted = judged.filter(pl.col("reason").is_in(["first", "ok"])).with_columns(
        delta_wh=(wh - wh.shift(1).over("meter_id")).fill_null(0)
    )
    rest = judged.filter(~pl.col("reason").is_in(["first", "ok"])).with_columns(delta_wh=pl.lit(None, pl.Int64))
    return pl.concat([accepted, rest]).select("meter_id", "observed_at", "import_t1_wh", "delta_wh", "reason")


def _windows(rows: pl.DataFrame) -> pl.DataFrame:
    phases = {f"L{phase}": f"voltage_l{phase}_mv" for phase in (1, 2, 3)}
    window_us = pl.col("observed_at").dt.truncate("10m").dt.epoch("us")
    samples = (
        rows.unique(["meter_id", "observed_at"])
        .select("meter_id", window_us=window_us, **phases)
        .unpivot(on=list(phases), index=["meter_id", "window_us"], variable_name="phase", value_name="mv")
    )
    mv = pl.col("mv")
    return samples.group_by("meter_id", "phase", "window_us").agg(
        sample_count=pl.len(), min_mv=mv.min(), max_mv=mv.max(), mean_mv=mv.mean()
    )


def main() -> None:
    """Command line."""
    what, work, topic, records, out = sys.argv[1:]
    os.chdir(Path(__file__).parents[2])
    if what in ("jobs", "core"):
        jobs(what, work, topic)
    elif what == "noop":
        noop(topic, int(records))
    else:
        by_polars(work, int(records), Path(out))


if __name__ == "__main__":
    main()
