"""What the streaming jobs tell of themselves, for Prometheus and `make status`.

Each batch tells of itself (`engine/runner.py`); lag is asked of Kafka when somebody looks.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from math import nan
from threading import Lock

from confluent_kafka import KafkaException
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from kafka_io.clients import admin
from kafka_io.offsets import Offsets, ends_of
from schemas.closed_lists import Bucket
from schemas.errors import ConfigError

FRESH_S = 1.0  # one question to Kafka serves all jobs of a scrape
ANSWER_S = 5.0
REMEMBERED_S = 300.0
QUANTILES = (0.5, 0.99)
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
LATENCY = Gauge(
    "meterstream_latency_seconds",
    "From Kafka's time of a record to its rows in the tables, of the last five minutes.",
    ["job", "quantile"],
    registry=REGISTRY,
)
UPKEEP = Gauge(
    "meterstream_upkeep_ended_timestamp_seconds", "When upkeep last got through all tables.", registry=REGISTRY
)
UPKEEP_LEFT = Gauge("meterstream_upkeep_left_tables", "Tables that it could not look after then.", registry=REGISTRY)
COMPACTED = Counter("meterstream_compacted_files", "Small files that became large ones.", registry=REGISTRY)
RECORDS = Counter(
    "meterstream_records", "Records by their bucket of the accounting.", ["job", "bucket"], registry=REGISTRY
)


def stands(job: str, number: int, state_rows: int) -> None:
    """Tells where a job stands after its batch of this number: how many rows the next one will read."""
    BATCH.labels(job).set(number)
    STATE.labels(job).set(state_rows)


def batch(job: str, seconds: float, buckets: Mapping[str, int], watermark: datetime | None) -> None:
    """Tells of a batch that is written.

    Args:
        job: name of the job.
        seconds: how long it took.
        buckets: records by bucket of the accounting.
        watermark: the newest of the runs' watermarks; None in a job that has none, or no arrival yet.
    """
    BATCH_SECONDS.labels(job).set(seconds)
    ENDED.labels(job).set(time.time())
    RATE.labels(job).set(sum(buckets.values()) / max(seconds, 0.001))
    if watermark:
        for gauge in WATERMARK_GAUGES:
            gauge.labels(job).set(watermark.timestamp())
    for bucket in Bucket:
        RECORDS.labels(job, bucket.value).inc(buckets.get(bucket.value, 0))


def upkeep(compacted: int, left: int) -> None:
    """Tells of a look at all tables: how many files were compacted, how many tables could not be looked after."""
    UPKEEP.set_to_current_time()
    UPKEEP_LEFT.set(left)
    COMPACTED.inc(compacted)


class Latency:
    """How long a job's records were on their way from Kafka to the tables, of the last minutes."""

    def __init__(self, job: str) -> None:
        self._lock = Lock()
        self._batches: deque[tuple[float, Sequence[float], Sequence[int]]] = deque()
        for quantile in QUANTILES:
            LATENCY.labels(job, f"{quantile}").set_function(partial(self.quantile, quantile))

    def add(self, seconds: Sequence[float], counts: Sequence[int]) -> None:
        """A batch that is visible: latencies, and how many records had each."""
        with self._lock:
            self._batches.append((time.monotonic(), seconds, counts))

    def quantile(self, share: float) -> float:
        """The latency that this share of the records did not exceed, s; not a number where none came."""
        with self._lock:
            while self._batches and time.monotonic() - self._batches[0][0] > REMEMBERED_S:
                self._batches.popleft()
            found = sorted(
                (second, count)
                for _, seconds, counts in self._batches
                for second, count in zip(seconds, counts, strict=True)
                if count
            )
        left = share * sum(count for _, count in found)
        for second, count in found:
            left -= count
            if left <= 0:
                return second
        return nan


_latencies: dict[str, Latency] = {}


def visible(job: str, seconds: Sequence[float], counts: Sequence[int]) -> None:
    """Tells how long the records of a batch were on their way; see `Latency.add`."""
    if job not in _latencies:
        _latencies[job] = Latency(job)
    _latencies[job].add(seconds, counts)


def alive(job: str, when: Callable[[], float]) -> None:
    """Tells how to find when the query of a job was last alive."""
    SEEN.labels(job).set_function(when)


class Lag:
    """How far jobs are behind what Kafka has; one question to Kafka serves all jobs of a scrape."""

    def __init__(self, bootstrap: str) -> None:
        self._admin = admin(bootstrap)
        self._newest: Offsets = {}
        self._asked = 0.0
        self._lock = Lock()

    def watch(self, job: str, place: Callable[[], Offsets]) -> None:
        """From now on a job has a lag: topic and partition → the offset that it takes next is asked of it."""
        LAG.labels(job).set_function(lambda: self._behind(place()))

    def _behind(self, taken: Offsets) -> float:
        """Records that Kafka has and a job has not taken; not a number where one of them does not say."""
        with self._lock:
            if time.monotonic() - self._asked > FRESH_S or not set(taken) <= set(self._newest):
                wanted = set(taken) | set(self._newest)
                try:
                    self._newest = ends_of(self._admin, wanted, ANSWER_S)
                except KafkaException:
                    return nan
                self._asked = time.monotonic()
            lag = float(sum(max(0, self._newest[place] - offset) for place, offset in taken.items()))
        return lag if taken else nan


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
