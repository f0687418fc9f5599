"""What Spark tells of a query, as Spark tells it, becomes lag and rate."""

import json
from typing import Any

from pyspark.sql.streaming.listener import QueryProgressEvent, StreamingQueryProgress

from engine import metrics


def progress(start: dict[str, int] | None, end: dict[str, int], milliseconds: int) -> QueryProgressEvent:
    """The event that PySpark makes of Spark's JSON."""
    source: dict[str, Any] = {
        "description": "Kafka", "numInputRows": 0, "inputRowsPerSecond": 0.0, "processedRowsPerSecond": 0.0,
        "startOffset": start and {"t": start}, "endOffset": {"t": end}, "latestOffset": {"t": end}, "metrics": {},
    }  # fmt: skip
    fields = {
        "id": "00000000-0000-0000-0000-000000000001", "runId": "00000000-0000-0000-0000-000000000002", "name": "job",
        "timestamp": "2024-03-31T00:00:00.000Z", "batchId": 1, "batchDuration": milliseconds, "numInputRows": 0,
        "durationMs": {"triggerExecution": milliseconds}, "eventTime": {}, "stateOperators": [], "sources": [source],
        "sink": {"description": "foreach", "numOutputRows": -1, "metrics": {}}, "observedMetrics": {},
    }  # fmt: skip
    return QueryProgressEvent(StreamingQueryProgress.fromJson(json.loads(json.dumps(fields))))


def rate() -> float | None:
    found = [sample.value for metric in metrics.RATE.collect() for sample in metric.samples]
    return found[0] if found else None


def test_a_first_batch_has_no_rate_and_the_next_ones_count_by_their_offsets() -> None:
    listener = metrics.Listener("127.0.0.1:1")
    listener.onQueryProgress(progress(None, {"0": 900, "1": 50}, 500))
    assert rate() is None
    listener.onQueryProgress(progress({"0": 900, "1": 50}, {"0": 1_000, "1": 150, "2": 50}, 500))
    assert rate() == 500
    listener.onQueryProgress(progress({"0": 1_000}, {"0": 1_000}, 500))
    assert rate() == 500
