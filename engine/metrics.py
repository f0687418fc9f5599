"""What the streaming jobs tell of themselves, for Prometheus and `make status`.

Lag and rates come of the offsets in the events of Spark's query listener; the rest is set by `engine/stream.py`, which
keeps the accounting, the state and the clock that Spark does not know of.
"""

import time
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from math import nan
from pathlib import Path
from threading import Lock

import pyarrow as pa
from confluent_kafka import KafkaException
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from pyspark.sql.streaming.listener import (
    QueryIdleEvent,
    QueryProgressEvent,
    QueryStartedEvent,
    QueryTerminatedEvent,
    StreamingQueryListener,
)

from engine.checkpoint import next_offsets
from kafka_io.clients import admin
from kafka_io.offsets import Offsets, ends_of
from schemas.closed_lists import Bucket
from schemas.errors import ConfigError

FRESH_S = 1.0  # one question to Kafka serves all jobs of a scrape
ANSWER_S = 5.0
REGISTRY = CollectorRegistry()
LAG = Gauge("meterstream_lag_records", "Records in Kafka that the job has not taken.", ["job"], registry=REGISTRY)
RATE = Gauge("meterstream_records_per_second", "Records that the last batch took a second.", ["job"], registry=REGISTRY)
BATCH = Gauge("meterstream_batch", "Number of the last batch.", ["job"], registry=REGISTRY)
BATCH_SECONDS = Gauge("meterstream_batch_seconds", "How long the last batch took.", ["job"], registry=REGISTRY)
ENDED = Gauge("meterstream_batch_ended_timestamp_seconds", "When the last batch ended.", ["job"], registry=REGISTRY)
SEEN = Gauge("meterstream_seen_timestamp_seconds", "When the query was last alive.", ["job"], registry=REGISTRY)
STATE = Gauge("meterstream_state_rows", "Rows that the job keeps from batch to batch.", ["job"], registry=REGISTRY)
WATERMARK_GAUGES = [
    Gauge(f"meterstream_{name}_timestamp_seconds", "The newest run's watermark.", ["job"],
          registry=REGISTRY)
    for name in ("watermark", "bound")  # the second is the name of before, for one release
]  # fmt: skip
RECORDS = Counter(
    "meterstream_records", "Records by their bucket of the accounting.", ["job", "bucket"], registry=REGISTRY
)


def stands(job: str, number: int, state_rows: int) -> None:
    """Tells of the last batch of an earlier process."""
    BATCH.labels(job).set(number)
    STATE.labels(job).set(state_rows)


def batch(
    job: str, number: int, seconds: float, buckets: Mapping[str, int], state_rows: int, watermark: datetime | None
) -> None:
    """Tells of a batch that is written.

    Args:
        job: name of the job.
        number: of the batch.
        seconds: how long it took.
        buckets: records by bucket of the accounting.
        state_rows: what the next batch will read.
        watermark: the newest of the runs' watermarks; None in a job that has none, or no arrival yet.
    """
    stands(job, number, state_rows)
    BATCH_SECONDS.labels(job).set(seconds)
    ENDED.labels(job).set(time.time())
    if watermark:
        for gauge in WATERMARK_GAUGES:
            gauge.labels(job).set(watermark.timestamp())
    for bucket in Bucket:
        RECORDS.labels(job, bucket.value).inc(buckets.get(bucket.value, 0))


def rows_of(state: Path) -> int:
    """Rows in the state files of a batch, by their footers."""
    count = 0
    for file in state.glob("*/*.arrow"):
        with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as frame:
            count += sum(frame.get_batch(number).num_rows for number in range(frame.num_record_batches))
    return count


class Listener(StreamingQueryListener):
    """Hears from Spark how far each query has come."""

    def __init__(self, bootstrap: str) -> None:
        self._admin = admin(bootstrap)
        self._newest: Offsets = {}
        self._asked = 0.0
        self._lock = Lock()

    def onQueryStarted(self, event: QueryStartedEvent) -> None:  # noqa: N802
        """Nothing is known yet."""

    def onQueryProgress(self, event: QueryProgressEvent) -> None:  # noqa: N802
        """After each batch, and now and then without one."""
        progress = event.progress
        if not progress.name:
            return
        SEEN.labels(progress.name).set(time.time())
        for source in progress.sources:
            starts, ends = next_offsets(source.startOffset), next_offsets(source.endOffset)
            self.taken(progress.name, ends)
            if starts:  # Spark's own count is of rows that it has read itself
                records = sum(end - starts.get(place, 0) for place, end in ends.items())
                if records > 0:
                    seconds = progress.durationMs["triggerExecution"] / 1_000
                    RATE.labels(progress.name).set(records / max(seconds, 0.001))

    def onQueryIdle(self, event: QueryIdleEvent) -> None:  # noqa: N802
        """There was nothing to take."""

    def onQueryTerminated(self, event: QueryTerminatedEvent) -> None:  # noqa: N802
        """The driver says why."""

    def taken(self, job: str, offsets: Mapping[tuple[str, int], int]) -> None:
        """How far a query has come: topic and partition → the offset that comes next."""
        LAG.labels(job).set_function(partial(self._behind, dict(offsets)))

    def _behind(self, taken: Offsets) -> float:
        """Records that Kafka has and a query has not taken; not a number where Kafka does not answer."""
        with self._lock:
            if time.monotonic() - self._asked > FRESH_S or not set(taken) <= set(self._newest):
                wanted = set(taken) | set(self._newest)
                try:
                    self._newest = ends_of(self._admin, wanted, ANSWER_S)
                except KafkaException:
                    return nan
                self._asked = time.monotonic()
        return float(sum(max(0, self._newest[place] - offset) for place, offset in taken.items()))


def serve(port: int, listen: str) -> None:
    """Answers `GET /metrics` until the process ends.

    Raises:
        ConfigError: the port is taken.
    """
    try:
        start_http_server(port, listen, REGISTRY)
    except OSError as error:
        msg = f"METERSTREAM_METRICS_PORT={port}: {error.strerror}"
        raise ConfigError(msg) from error
