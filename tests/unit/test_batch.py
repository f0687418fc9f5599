"""What the engine does around a job's rule: duplicates, clocks, verdicts, and an accounting that closes by itself."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import polars as pl
import pytest

from engine.job import SAID, BatchContext, Frames, Output, Source, StreamingJob
from metering.accounting import VERDICTS
from schemas.codec import encode
from schemas.errors import ContractBroken
from schemas.tables import REGISTRY, polars_schema
from schemas.topics import ALARMS, DEAD_LETTERS, READINGS, Topic
from tests.settling import Settling, kafka_table

BEGIN = datetime(2024, 6, 10, tzinfo=UTC)
HANDED = pl.Schema({"handed": pl.Int64()})


def rule(gives: Output | None, rows: pl.DataFrame, _: pl.DataFrame, state: Frames, __: BatchContext) -> Output:
    """Stores what it is handed, and counts that; or gives what it is asked to."""
    handed = pl.DataFrame({"handed": [len(rows)]}, schema=HANDED)
    return gives or Output({"readings": rows}, {"count": pl.concat([state["count"], handed])})


def settling(gives: Output | None = None, **declared: Any) -> Settling:
    """A job that declares so; its impossible clocks are more than 36 hours ahead."""
    source = Source(READINGS, partial(rule, gives), state={"count": HANDED}, **declared)
    return Settling(StreamingJob("one", 1, (source,), ("readings",)), polars_schema(REGISTRY).to_frame())


def reading(offset: int, minute: float, **values: Any) -> tuple[object, ...]:
    """One of meter m1, that comes at once."""
    at = BEGIN + timedelta(minutes=minute)
    record = {"meter_id": "m1", "observed_at": at, "received_at": BEGIN, "dialect": "own", "run_id": "r", **values}
    return (b"m1", encode("reading", record), READINGS.name, 0, offset, BEGIN)


def accounting(found: dict[str, pl.DataFrame]) -> dict[str, int]:
    return dict(found["accounting"].group_by("bucket").agg(pl.col("records").sum()).rows())


def test_a_rule_is_handed_originals_and_every_record_is_counted_once() -> None:
    job = settling(deduplicate_on=("meter_id", "observed_at"), refuses_impossible_clocks=True)
    poison = (b"m1", b"\x00poison", READINGS.name, 0, 3, BEGIN)
    found = job.batch(kafka_table([reading(0, 0), reading(1, 0), reading(2, 60 * 24 * 365), poison]))
    assert accounting(found) == {"stored": 1, "duplicate": 1, "quarantined": 1, "invalid": 1}
    assert found["readings"]["offset"].to_list() == [0]
    assert found["quarantined_readings"].select("offset", "reason", "stage").rows() == [(2, "impossible_clock", "one")]
    again = job.batch(kafka_table([reading(4, 0), reading(5, 1)]))
    assert accounting(again) == {"stored": 1, "duplicate": 1}, "the batch before is remembered"
    assert job.stocks[READINGS.name, 0]["count"].present["handed"].to_list() == [1, 1]


def test_a_job_that_asks_for_duplicates_gets_what_the_original_has() -> None:
    job = settling(deduplicate_on=("meter_id", "observed_at"), compares=("import_t1_wh",), hands_duplicates=True)
    seen: list[tuple[Any, ...]] = []
    plain = job.job.sources[0].transform

    def look(rows: pl.DataFrame, *others: Any) -> Output:
        seen.extend(rows.select("offset", "seen", "first_import_t1_wh").rows())
        return plain(rows, *others)

    job.job = replace(job.job, sources=(replace(job.job.sources[0], transform=look),))
    rows = [reading(n, 0, import_t1_wh=wh) for n, wh in enumerate([7, 7, 9])]
    assert accounting(job.batch(kafka_table(rows))) == {"stored": 1, "duplicate": 1, "quarantined": 1}
    assert sorted(seen) == [(0, None, None), (1, "duplicate", 7), (2, "conflict", 7)]


def test_what_a_message_says_makes_it_the_same_not_when_it_came() -> None:
    job = settling(deduplicate_on=("meter_id", SAID))
    later = BEGIN + timedelta(seconds=9)
    rows = [reading(0, 0, import_w=1), reading(1, 0, import_w=2), reading(2, 0, import_w=1, received_at=later)]
    assert accounting(job.batch(kafka_table(rows))) == {"stored": 2, "duplicate": 1}


@pytest.mark.parametrize(
    ("reason", "bucket", "table"),
    [
        ("out_of_order", "late", "late_readings"),
        ("implausible", "quarantined", "quarantined_readings"),
        ("undecodable", "invalid", None),
        ("a reason that no list has", "invalid", None),
    ],
)
def test_a_verdict_puts_a_record_into_its_bucket_and_apart(reason: str, bucket: str, table: str | None) -> None:
    verdict = pl.DataFrame({"partition": [0], "offset": [1], "reason": [reason]}, schema=VERDICTS)
    found = settling(Output({}, verdicts=pl.concat([verdict, verdict]))).batch(
        kafka_table([reading(0, 0), reading(1, 1), reading(2, 2)])
    )
    assert accounting(found) == {"stored": 2, bucket: 1}
    for name in ("late_readings", "quarantined_readings"):
        assert found[name]["offset"].to_list() == ([1] if name == table else [])


def test_the_engines_verdict_comes_before_the_rules() -> None:
    verdicts = pl.DataFrame({"partition": [0, 0], "offset": [1, 77], "reason": ["out_of_order"] * 2}, schema=VERDICTS)
    job = settling(Output({}, verdicts=verdicts), deduplicate_on=("meter_id", "observed_at"))
    assert accounting(job.batch(kafka_table([reading(0, 0), reading(1, 0)]))) == {"stored": 1, "duplicate": 1}


@pytest.mark.parametrize(
    ("gives", "complaint"),
    [
        (
            Output({"alarms": pl.DataFrame()}),
            "one gives a table that it does not declare: alarms; it declares readings",
        ),
        (
            Output({}, {"counts": pl.DataFrame()}),
            "one gives a state that it does not declare: counts; it declares count",
        ),
    ],
)
def test_what_a_job_does_not_declare_is_refused(gives: Output, complaint: str) -> None:
    with pytest.raises(ContractBroken, match=complaint):
        settling(gives).batch(kafka_table([reading(0, 0)]))


@pytest.mark.parametrize(
    ("declared", "complaint"),
    [
        ({"columns": ("nothing",)}, "columns is a tuple of columns that it has, not nothing"),
        ({"deduplicate_on": "meter_id"}, "deduplicate_on is a tuple of columns that it has, not meter_id"),
        ({"compares": ("import_w",)}, "compares and hands_duplicates need deduplicate_on"),
        ({"hands_duplicates": True}, "compares and hands_duplicates need deduplicate_on"),
    ],
)
def test_a_source_that_cannot_be_is_refused(declared: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ContractBroken, match=f"source meter-readings-v1: {complaint}"):
        settling(**declared)


@pytest.mark.parametrize(
    ("topic", "declared", "complaint"),
    [
        (DEAD_LETTERS, {"refuses_impossible_clocks": True}, "needs observed_at"),
        (DEAD_LETTERS, {"closes_windows": True}, "needs run_id"),
        (READINGS, {"state": {"recent": HANDED}}, "state named recent is the engine's"),
    ],
)
def test_what_a_topic_does_not_have_is_not_asked_of_it(topic: Topic, declared: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ContractBroken, match=complaint):
        Source(topic, partial(rule, None), **declared)


@pytest.mark.parametrize(
    ("declared", "complaint"),
    [
        ({"writes": ("nothing",)}, "schemas/tables.py has no table nothing"),
        ({"writes": ("latest_readings",)}, "no column dates the rows of latest_readings"),
        ({"writes": ("readings",), "hands": ("alarms",)}, "hands or sends what it does not write: alarms"),
        ({"writes": (), "sources": (Source(READINGS, partial(rule, None)),) * 2}, "two sources have one topic"),
    ],
)
def test_a_job_that_cannot_be_is_refused(declared: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ContractBroken, match=f"job one: {complaint}"):
        StreamingJob("one", 1, **{"sources": (Source(READINGS, partial(rule, None)),), **declared})


def frame(**columns: list[Any]) -> pl.DataFrame:
    return pl.DataFrame(columns)


@pytest.mark.parametrize(
    ("gives", "complaint"),
    [
        (Output({"readings": frame(meter_id=["m1"])}), "table readings lacks .*observed_at.*: the rule gave meter_id"),
        (
            Output({}, {"count": frame(handed=[1.5])}),
            "state count: handed is declared as Int64, and the rule gave Float64",
        ),
        (Output({}, {"count": frame(other=[1])}), "state count lacks handed: the rule gave other"),
    ],
)
def test_columns_that_are_not_the_declared_ones_are_refused(gives: Output, complaint: str) -> None:
    with pytest.raises(ContractBroken, match=complaint):
        settling(gives).batch(kafka_table([reading(0, 0)]))


def test_a_verdict_without_a_reason_is_none() -> None:
    verdicts = pl.DataFrame(
        {"partition": [0, 0, 0], "offset": [0, 0, 1], "reason": [None, "out_of_order", None]}, schema=VERDICTS
    )
    found = settling(Output({}, verdicts=verdicts)).batch(kafka_table([reading(0, 0), reading(1, 1)]))
    assert accounting(found) == {"stored": 1, "late": 1}


def test_alarms_of_another_job_can_be_read() -> None:
    alarm = {
        "alarm_id": "a", "meter_id": "m1", "alarm_type": "tamper", "severity": "error", "state": "active",
        "raised_at": BEGIN, "updated_at": BEGIN, "repeat_count": 0, "source": "derived", "run_id": "r",
    }  # fmt: skip
    source = Source(ALARMS, lambda rows, *_: Output({"alarms": rows}))
    job = Settling(StreamingJob("one", 1, (source,), ("alarms",)), polars_schema(REGISTRY).to_frame())
    found = job.batch(kafka_table([(b"m1", encode("alarm", alarm), ALARMS.name, 0, 0, BEGIN)]))
    assert (accounting(found), found["alarms"]["alarm_id"].to_list()) == ({"stored": 1}, ["a"])


def test_a_dead_letter_is_an_invalid_record_and_what_cannot_be_decoded_becomes_one() -> None:
    source = Source(DEAD_LETTERS, lambda rows, *_: Output({"dead_letters": rows}), keeps_undecoded=True)
    job = Settling(StreamingJob("one", 1, (source,), ("dead_letters",)), polars_schema(REGISTRY).to_frame())
    letter = {"payload": b"x", "reason": "not_framed", "detail": "", "received_at": BEGIN}
    rows = [
        (b"", value, DEAD_LETTERS.name, 0, n, BEGIN) for n, value in enumerate([encode("dead-letter", letter), b"?"])
    ]
    found = job.batch(kafka_table(rows))
    assert accounting(found) == {"invalid": 2}
    assert sorted(found["dead_letters"]["payload"].to_list()) == [b"?", b"x"]
