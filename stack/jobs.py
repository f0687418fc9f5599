"""How the streaming jobs get on, by the metrics that their driver exports."""

from dataclasses import dataclass
from math import isfinite, nan

from prometheus_client.parser import text_string_to_metric_families

from stack.ports import http_answer

PREFIX = "meterstream_"


@dataclass(frozen=True)
class JobMetrics:
    """What is known of one job; what it has not exported yet is None.

    Attributes:
        job: its name.
        lag_records: in Kafka and not taken.
        records_per_second: that the last batch took.
        batch: number of the last batch.
        batch_seconds: how long that took.
        batch_ended: when, seconds since 1970.
        state_rows: kept from batch to batch.
        watermark: up to when windows are over, seconds since 1970.
        records: taken since the driver's start.
        late: of these, kept apart as late.
        quarantined: of these, kept apart as wrong.
    """

    job: str
    lag_records: int | None = None
    records_per_second: float | None = None
    batch: int | None = None
    batch_seconds: float | None = None
    batch_ended: float | None = None
    state_rows: int | None = None
    watermark: float | None = None
    records: int = 0
    late: int = 0
    quarantined: int = 0


def metrics_text(port: int) -> str | None:
    """The driver's metrics as text; None where nobody answers."""
    answer = http_answer(port, "/metrics", timeout_s=2.0)
    return None if answer is None else answer.decode()


def jobs(text: str) -> list[JobMetrics]:
    """The jobs of one driver, by name."""
    values: dict[str, dict[str, float]] = {}
    records: dict[str, dict[str, int]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            job = sample.labels.get("job")
            if job is None:
                continue
            if sample.name == f"{PREFIX}records_total":
                records.setdefault(job, {})[sample.labels["bucket"]] = int(sample.value)
            else:
                values.setdefault(job, {})[sample.name.removeprefix(PREFIX)] = sample.value

    def whole(found: dict[str, float], name: str) -> int | None:
        return int(found[name]) if isfinite(found.get(name, nan)) else None

    return [
        JobMetrics(
            job,
            lag_records=whole(found, "lag_records"),
            records_per_second=found.get("records_per_second"),
            batch=whole(found, "batch"),
            batch_seconds=found.get("batch_seconds"),
            batch_ended=found.get("batch_ended_timestamp_seconds"),
            state_rows=whole(found, "state_rows"),
            watermark=found.get("watermark_timestamp_seconds"),
            records=sum(records.get(job, {}).values()),
            late=records.get(job, {}).get("late", 0),
            quarantined=records.get(job, {}).get("quarantined", 0),
        )
        for job, found in sorted(values.items())
    ]
