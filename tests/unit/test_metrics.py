"""What the jobs tell of themselves, as Prometheus and `make status` read it."""

import time
from datetime import UTC, datetime

import pytest
from prometheus_client import generate_latest

from engine import metrics
from stack.jobs import JobMetrics, jobs, upkeep_warning


def metrics_of(name: str) -> JobMetrics:
    return next(job for job in jobs(generate_latest(metrics.REGISTRY).decode()) if job.job == name)


def test_a_batch_tells_how_much_it_took_and_how_fast() -> None:
    metrics.stands("one", 7, 30)
    metrics.batch("one", 0.5, {"stored": 90, "late": 10}, datetime(2024, 3, 31, tzinfo=UTC))
    found = metrics_of("one")
    assert (found.batch, found.state_rows, found.records, found.late) == (7, 30, 100, 10)
    assert (found.records_per_second, found.batch_seconds, found.watermark) == (200, 0.5, 1_711_843_200)


def test_before_its_first_batch_a_job_has_no_latency() -> None:
    metrics.alive("new", lambda: 1.0)
    assert (metrics_of("new").latency_p50, metrics_of("new").batch) == (None, None)


def test_latency_is_that_of_records_not_of_batches() -> None:
    metrics.visible("two", [1.0, 9.0], [98, 0])
    metrics.visible("two", [2.0, 30.0], [1, 1])
    found = metrics_of("two")
    assert (found.latency_p50, found.latency_p99) == (1.0, 2.0)


def test_what_is_older_than_some_minutes_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "REMEMBERED_S", -1.0)
    metrics.visible("three", [1.0], [5])
    assert metrics_of("three").latency_p50 is None


def test_upkeep_that_stands_or_leaves_tables_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def warning() -> str | None:
        return upkeep_warning(generate_latest(metrics.REGISTRY).decode())

    metrics.UPKEEP.set(0)  # as long as the driver warms up
    assert warning() is None
    metrics.upkeep(16, 0)
    assert warning() is None
    metrics.upkeep(0, 2)
    assert warning() == "upkeep leaves 2 tables for the next time: see make logs"
    monkeypatch.setattr(time, "time", lambda: 1e10)
    assert "has not got through them for" in str(warning())
