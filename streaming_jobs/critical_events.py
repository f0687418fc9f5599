"""What somebody has to know at once, within milliseconds: Kafka → Kafka in Spark's real-time mode.

Power failures, last gasps, tampering, voltages far out.

Reads: meter-events-v1, meter-readings-v1; registry (nominal voltage, phases): where that changes the query starts anew.
Writes: critical-events-v1, one record per event, and per phase of a reading whose voltage is far out.
Key: meter_id; event_id names what the meter said.
Lateness: nothing is too late: no state is kept.
Duplicates: what comes twice is sent twice, with the same event_id.
Restart: from the last checkpoint: what was sent since then is sent again, with the same event_id.
Voltages are judged of meters whose nominal voltage the registry knows, on the phases that it has. What an unconnected
terminal reads (below 50 V) is no voltage here: that a phase lost its own, the meter's events and derived_alarms say.

What cannot be decoded is left out here: readings_lake keeps it, with the reason. Real-time mode takes no Python code
and no shuffle, so Avro is decoded by Spark itself, and each Kafka partition holds a task slot for good.
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import polars as pl
import structlog
import typer
from confluent_kafka import KafkaException
from pydantic import Field
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.avro.functions import from_avro, to_avro
from pyspark.sql.streaming.query import StreamingQuery

from engine.driver import asked_to_end, only_one, served, stay
from engine.session import spark_session
from kafka_io.clients import admin
from lake.reading import RegistryFiles, newest_registry, registry_files
from lake.spark import checkpoint_options, uri
from lake.store import store
from metering.voltage.windows import A_VOLTAGE_MV
from schemas.closed_lists import Edge
from schemas.codec import arrow_schema, avro_schema, avro_text, frame_of, latest
from schemas.errors import ConfigError, RetryLater, exits
from schemas.event_codes import code_table
from schemas.tables import PHASES
from schemas.topics import CRITICAL_EVENTS, EVENTS, READINGS, SCHEMA_IDS, Topic
from settings import Settings, load

NAME = Path(__file__).stem
VERSION = 1
KINDS = {
    "power_failure", "tamper_detect", "terminal_cover_open", "meter_cover_open", "module_cover_open", "strong_dc_field",
    *(f"phase_outage_{phase.lower()}" for phase in PHASES),
}  # fmt: skip
"""Alarm types that are critical."""
FAR_OUT = "voltage_far_out"
JUDGED_BY = ["nominal_mv", "phases"]
SAID = ("meter_id", "observed_at", "sent_at", "received_at", "run_id", "seq", "dialect")
"""What an event and a reading both say."""
IDENTITY = ("meter_id", "observed_at", "run_id", "seq", "kind", "code", "phase")
FREE_SLOTS = 4  # beyond one a partition: Spark plans and commits with them
log = structlog.get_logger()


class CriticalSettings(Settings):
    """Settings of this job.

    Attributes:
        kafka_bootstrap: host:port of a Kafka broker.
        critical_checkpoint_s: seconds between checkpoints: each stops the stream for a second or so, and what was sent
            since the last one is sent again after a kill.
        far_out_pct: a voltage that deviates by more from its meter's nominal one is far out.
        accept_loss: go on where Kafka no longer has what was not read.
    """

    kafka_bootstrap: str
    accept_loss: bool = False
    critical_checkpoint_s: int = Field(300, ge=1)
    far_out_pct: float = Field(15.0, gt=0, lt=100)


def transform(records: DataFrame, judged: DataFrame, far_out_pct: float) -> DataFrame:
    """Critical events among records of both topics, read once; see the module.

    Args:
        records: key, value, topic and timestamp of Kafka.
        judged: of the registry meter_id, nominal_mv and phases: meters of which both are not known are not judged.
        far_out_pct: a voltage that deviates by more is far out.
    """
    bodies = [_body(topic).alias(topic.entity) for topic in (EVENTS, READINGS)]
    events = (
        records.select(F.col("key").cast("string").alias("meter_id"), F.col("timestamp").alias("appended_at"), *bodies)
        .join(F.broadcast(judged.select("meter_id", *JUDGED_BY)), "meter_id", "left")
        .withColumn("found", F.explode(F.concat(_of_event(), _of_reading(far_out_pct))))
    )
    both = {name: F.coalesce(f"{EVENTS.entity}.{name}", f"{READINGS.entity}.{name}") for name in SAID}
    own = {name: F.col(f"found.{name}") for name in ("kind", "code", "phase", "voltage_mv")}
    event_id = F.lower(F.hex(F.xxhash64(*IDENTITY)))
    return (
        events.select("appended_at", *[value.alias(name) for name, value in {**both, **own}.items()])
        .where("meter_id IS NOT NULL")
        .withColumn("event_id", event_id)
        .select(*arrow_schema(CRITICAL_EVENTS.entity).names)
    )


def _body(topic: Topic) -> Column:
    """The record of a topic, decoded by Spark; null in another topic's rows, a struct of nulls where it cannot be."""
    released = [(schema_id, version) for schema_id, (name, version) in SCHEMA_IDS.items() if name == topic.entity]
    common = [field["name"] for field in avro_schema(topic.entity, released[0][1])["fields"]]  # later ones are added
    bodies = []
    for schema_id, version in released:
        is_ours = (F.col("topic") == topic.name) & (F.expr("substring(value, 1, 5)") == F.lit(frame_of(schema_id)))
        body = from_avro(F.expr("substring(value, 6)"), avro_text(topic.entity, version), {"mode": "PERMISSIVE"})
        bodies.append(F.when(is_ours, F.struct(*[body[name].alias(name) for name in common])))
    return F.coalesce(*bodies)


def _event(kind: Column, code: Column, phase: Column, voltage_mv: Column) -> Column:
    return F.struct(
        kind.alias("kind"), code.alias("code"), phase.alias("phase"), voltage_mv.cast("long").alias("voltage_mv")
    )


def _of_event() -> Column:
    """What is critical in an event: one, or none."""
    nothing = F.lit(None)
    found = F.array(_event(_kind(), F.col("event.code"), nothing.cast("string"), nothing))
    return F.filter(found, lambda each: each.kind.isNotNull())


def _of_reading(far_out_pct: float) -> Column:
    """What is critical in a reading: one of each phase whose voltage is far out."""
    volts = [
        _event(F.lit(FAR_OUT), F.lit(None).cast("string"), F.lit(phase), F.col(f"reading.voltage_{phase.lower()}_mv"))
        for phase in PHASES
    ]

    def is_far_out(event: Column) -> Column:
        nominal, voltage = F.col("nominal_mv"), event.voltage_mv.cast("double")  # a long would overflow
        is_phase = F.coalesce(F.contains("phases", event.phase), F.lit(True)) & (voltage >= A_VOLTAGE_MV)
        return is_phase & (F.abs(voltage - nominal) * 100 > nominal * far_out_pct)

    return F.filter(F.array(*volts), is_far_out)


def _kind() -> Column:
    """Kind of an event by (dialect, version, table, code); null where it is not critical."""
    keys = ("dialect", "dialect_version", "source_table", "code")
    dialect, version, table, code = (F.col(f"event.{name}") for name in keys)
    kinds = {}
    for row in code_table().iter_rows(named=True):
        key = "|".join(row[name] for name in keys)
        kind = row["alarm_type"] if row["alarm_type"] in KINDS else ""
        kinds[key] = kind if row["edge"] == Edge.RAISE else ""
        if row["edge"] == Edge.LEVEL:
            kinds[f"{key}|1"] = kind  # a status bit is critical when its argument sets it
    known = F.create_map(*[F.lit(part) for item in kinds.items() for part in item])
    meanings = [
        known[F.concat_ws("|", dialect, which, table, code, *argument)]
        for which in (version, F.lit("*"))
        for argument in ([F.col("event.argument")], [])
    ]
    return F.nullif(F.coalesce(*meanings), F.lit(""))


def framed(rows: DataFrame) -> DataFrame:
    """Key and value for Kafka."""
    entity = CRITICAL_EVENTS.entity
    schema_id, version = latest(entity)
    body = to_avro(F.struct(*arrow_schema(entity).names), avro_text(entity, version))
    return rows.select(F.col("meter_id").alias("key"), F.concat(F.lit(frame_of(schema_id)), body).alias("value"))


@lru_cache(maxsize=1)
def known(files: RegistryFiles) -> pl.DataFrame:
    """Meters whose nominal voltage is known, columns meter_id, nominal_mv and phases."""
    return newest_registry(files).drop_nulls("nominal_mv").select("meter_id", *JUDGED_BY)


def start(
    session: SparkSession, settings: CriticalSettings, judged: pl.DataFrame, micro_batch: bool = False
) -> StreamingQuery:
    """Starts the query; it goes on where its checkpoint stands.

    Args:
        session: with a task slot for each partition, and some more.
        settings: of this job.
        judged: of `known`.
        micro_batch: batch after batch instead, to compare.

    Raises:
        ConfigError: the session has too few task slots: then other work would starve without an error.
        RetryLater: Kafka does not answer, or has not the topics.
    """
    way, trigger = "", {"realTime": f"{settings.critical_checkpoint_s} seconds"}
    if micro_batch:
        way, trigger = "-micro-batch", {"processingTime": "0 seconds"}
    slots, needed = session.sparkContext.defaultParallelism, partitions(settings.kafka_bootstrap) + FREE_SLOTS
    if slots < needed:
        msg = (
            f"{NAME} holds {needed - FREE_SLOTS} task slots for good and wants {needed} in all; there are {slots}: "
            f"METERSTREAM_SPARK_MASTER, or spark-submit's --master, is local[{needed}]"
        )
        raise ConfigError(msg)
    records = (
        session.readStream.format("kafka")
        .option("kafka.bootstrap.servers", settings.kafka_bootstrap)
        .option("subscribe", f"{EVENTS.name},{READINGS.name}")
        .option("startingOffsets", "latest")  # what is over is no emergency
        .option("failOnDataLoss", str(not settings.accept_loss).lower())
        .load()
    )
    # Plain rows, not a read of the table: each checkpoint plans and runs the query anew, and the stream waits for that.
    rows = transform(records, session.createDataFrame(judged.to_arrow()), settings.far_out_pct)
    return (
        framed(rows)
        .writeStream.queryName(NAME)
        .format("kafka")
        .option("kafka.bootstrap.servers", settings.kafka_bootstrap)
        .option("topic", CRITICAL_EVENTS.name)
        .option("checkpointLocation", uri(store().uri(f"state/{NAME}-v{VERSION}{way}/checkpoint")))
        .outputMode("update")
        .trigger(**trigger)
        .start()
    )


def partitions(bootstrap: str) -> int:
    """Partitions of what is read.

    Raises:
        RetryLater: Kafka does not answer, or has not the topics.
    """
    try:
        topics = admin(bootstrap).list_topics(timeout=10).topics
        return sum(len(topics[topic.name].partitions) for topic in (EVENTS, READINGS))
    except (KafkaException, KeyError) as error:
        msg = f"Kafka at {bootstrap} does not answer, or has not the topics: {error}"
        raise RetryLater(msg) from error


def is_reading(session: SparkSession, tasks: int) -> bool:
    """Whether a task reads each of so many partitions: from then on what comes is sent on within milliseconds."""
    tracker = session.sparkContext.statusTracker()
    stages = [tracker.getStageInfo(stage) for stage in tracker.getActiveStageIds()]
    return any(stage is not None and stage.numTasks == stage.numActiveTasks == tasks for stage in stages)


def main() -> None:
    """Runs it until SIGTERM or Ctrl-C, in a driver of its own with slots enough."""

    def run(
        micro_batch: Annotated[bool, typer.Option(help="Batch after batch instead: for bench/latency.py.")] = False,
    ) -> None:
        with exits(), only_one(NAME):
            settings = load(CriticalSettings)
            stop = asked_to_end()
            is_submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # spark-submit says it itself
            if not is_submitted and not os.environ.get("METERSTREAM_SPARK_MASTER"):
                slots = partitions(settings.kafka_bootstrap) + FREE_SLOTS
                os.environ["METERSTREAM_SPARK_MASTER"] = f"local[{slots}]"
            session = spark_session(f"meterstream-{NAME}", **checkpoint_options(store().url))
            while not stop.is_set():
                judged, tasks = known(registry_files()), partitions(settings.kafka_bootstrap)
                query = start(session, settings, judged, micro_batch)
                stay([query], stop, lambda: micro_batch or is_reading(session, tasks))  # noqa: B023
                session.sparkContext.setLogLevel("ERROR")
                with served(NAME, [query]):
                    log.info("real-time mode", kafka=settings.kafka_bootstrap, meters=len(judged))
                    stay([query], stop, lambda: not known(registry_files()).equals(judged))  # noqa: B023
                    session.sparkContext.setLogLevel("OFF")  # its tasks never end by themselves: each tells of an abort
            log.info("stopped")

    run.__doc__ = main.__doc__
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    app()


if __name__ == "__main__":
    main()
