"""State costs what changes: chains of objects, what rules are handed of them, and that this changes no row."""

import random
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import state
from engine.job import StreamingJob
from engine.settings import StreamSettings
from lake.store import store
from schemas.codec import encode
from schemas.errors import StateLost
from schemas.tables import TABLES, polars_schema
from schemas.topics import EVENTS, READINGS
from streaming_jobs import discovered
from tests.settling import Settling, kafka_table

SCHEMA = pl.Schema({"key": pl.String(), "value": pl.Int64()})
BY = ("key",)
KEYS = st.sampled_from("abcdefgh")
START = datetime(2024, 3, 31, tzinfo=UTC)


FOLDER = "state/some_job-v1/id/state"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, whose chains grow; where their objects lie."""
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    monkeypatch.setattr(state, "SMALL_ROWS", 0)
    return tmp_path / FOLDER


def another_process() -> None:
    """Nothing is remembered of what was read and written."""
    state._known.clear()
    state._content.cache_clear()


def rows(values: dict[str, int]) -> pl.DataFrame:
    return pl.DataFrame(list(values.items()), schema=SCHEMA, orient="row")


def batch(folder: str, number: int, before: state.Manifest, values: dict[str, int], gone: list[str]) -> state.Manifest:
    """A batch that sets these keys' values, and removes others."""
    stock = state.stock(folder, before, "p", "k", SCHEMA, BY)
    touched = pl.Series([*values, *gone], dtype=pl.String).to_frame("key")
    which = stock.found(state.hashes_of(touched, BY), None)
    taken = state.Taken(which, stock.rows.filter(pl.Series(which)))
    changed = state.changes("p", {"k": stock}, {"k": taken}, {"k": rows(values)}, {"k": BY})
    return state.merged(before, state.write(folder, number, changed))


def held(folder: str, manifest: state.Manifest) -> dict[str, int]:
    return dict(state.stock(folder, manifest, "p", "k", SCHEMA, BY).present.iter_rows())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 9)), st.lists(st.sampled_from("abcdefgh"))
        ),
        max_size=40,
    )
)
def test_whoever_reads_a_chain_finds_what_all_batches_made_of_it(
    batches: list[tuple[dict[str, int], list[str]]],
) -> None:
    folder, expected, manifest = f"state/{uuid.uuid4()}-v1", dict[str, int](), dict[str, Any]()
    other: dict[Any, state.Stock] = {}  # a worker that has a turn now and then
    for number, (values, gone) in enumerate(batches):
        for key in gone:
            expected.pop(key, None)
        expected |= values
        if number % 3 == 0:
            mine, state._known = state._known, other
            assert held(folder, manifest) is not None
            other, state._known = state._known, mine
        before, manifest = manifest, dict(batch(folder, number, manifest, values, gone))
        store().delete(f"{folder}/{name}" for name in state.names(before) - state.names(manifest))
        assert held(folder, manifest) == expected
        assert state.rows_of(manifest) == len(expected)
    state._known = other
    assert held(folder, manifest) == expected
    another_process()
    assert held(folder, manifest) == expected
    assert len(state.names(manifest)) <= state.LONGEST_CHAIN


def test_a_batch_writes_what_it_changes_and_not_what_there_is(place: Path) -> None:
    many = {f"meter-{number:06}": number for number in range(50_000)}
    manifest = batch(FOLDER, 0, {}, many, [])
    manifest = batch(FOLDER, 1, manifest, {"meter-000007": -7}, [])
    first, second = (place / name for name in manifest["p"]["k"].files)
    assert second.stat().st_size < first.stat().st_size / 100
    assert held(FOLDER, manifest) == many | {"meter-000007": -7}


def test_a_chain_begins_anew_before_it_is_long_or_has_much_that_is_gone() -> None:
    manifest: state.Manifest = {}
    written, gone = set(), set[str]()
    for number in range(60):
        values = {f"{n % 40}": number for n in range(number * 7, number * 7 + (20 if number else 40))}
        before, manifest = manifest, batch(FOLDER, number, manifest, values, [])
        gone |= state.names(before) - state.names(manifest)
        stock = state.stock(FOLDER, manifest, "p", "k", SCHEMA, BY)
        assert len(stock.rows) <= state.MOST_ROWS * 40
        written.add(len(manifest["p"]["k"].files))
    assert written == {1, 2, 3, 4, 5}
    assert len(gone) >= 60 - state.LONGEST_CHAIN


def test_a_try_that_failed_leaves_nothing_in_a_workers_memory() -> None:
    manifest = batch(FOLDER, 0, {}, {"a": 1, "b": 2, "c": 3}, [])
    batch(FOLDER, 1, manifest, {"a": 100}, ["b"])  # whose commit never came
    assert held(FOLDER, manifest) == {"a": 1, "b": 2, "c": 3}


def test_an_object_that_is_gone_or_cut_is_told_with_its_name(place: Path) -> None:
    manifest = batch(FOLDER, 0, {}, {"a": 1}, [])
    (name,) = manifest["p"]["k"].files
    another_process()
    (place / name).write_bytes((place / name).read_bytes()[:200])
    with pytest.raises(StateLost, match=f"^some_job: the state in {place / name} cannot be read"):
        held(FOLDER, manifest)
    (place / name).unlink()
    another_process()
    with pytest.raises(StateLost, match="Repair: stop the jobs, python -m stack begin-anew some_job"):
        held(FOLDER, manifest)


def records() -> list[tuple[Any, ...]]:
    """Two hours of disturbed readings and events in two partitions; meters fall silent and come back."""
    drawn = random.Random(1)
    made: list[tuple[Any, ...]] = []
    offsets = {topic: [0, 0] for topic in (READINGS.name, EVENTS.name)}

    def add(topic: Any, meter: int, record: dict[str, Any]) -> None:
        partition = meter % 2
        value = encode(topic.entity, {"meter_id": f"m{meter}", "received_at": record["observed_at"], **record})
        made.append((f"m{meter}".encode(), value, topic.name, partition, offsets[topic.name][partition], START))
        offsets[topic.name][partition] += 1

    for minute in range(0, 240, 5):
        at = START + timedelta(minutes=minute)
        for meter in range(9):
            if meter > 5 and 30 < minute < 30 + meter * 12:
                continue  # silent
            fault, wh = drawn.random(), minute * 7 + meter
            seen_at = at - timedelta(minutes=50) if fault < 0.05 else at
            wh = 10**8 if 0.05 < fault < 0.08 else wh
            volts = 230_000 + drawn.randrange(-30_000, 30_000)
            values = {"observed_at": seen_at, "received_at": at, "dialect": "dsmr-5", "import_t1_wh": wh}
            values |= {"export_t1_wh": wh // 3, "voltage_l1_mv": volts, "sag_count_l1": wh // 100}
            for _ in range(2 if fault > 0.93 else 1):
                add(READINGS, meter, values)
            if fault > 0.97:
                add(READINGS, meter, values | {"import_t1_wh": wh + 1, "voltage_l1_mv": volts + 1})
            if 0.3 < fault < 0.33:
                event = {"dialect": "c12.19", "dialect_version": "1", "source_table": "ST3", "code": "A512"}
                add(EVENTS, meter, {"observed_at": at, "argument": f"{minute % 2}", **event})
    return made


@pytest.mark.parametrize("small_rows", [0, 12, 2_000])
@pytest.mark.parametrize("job", discovered(), ids=lambda job: job.name)
def test_a_rule_gives_the_same_of_all_state_of_what_it_asked_for_and_of_two_partitions_at_once(
    job: StreamingJob, small_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "SMALL_ROWS", small_rows)
    monkeypatch.setattr(state, "FEW_ROWS", min(small_rows, 2))
    columns = polars_schema(TABLES["registry"])
    known = [{"meter_id": f"m{n}", "phases": "L1", "fuse_a": 25, "interval_s": 180 * (1 + n % 3), "nominal_mv": 230_000,
              "jurisdiction": "EN50160", "transformer_id": f"T{n % 2}", "feeder_id": "F"}
             for n in range(8)]  # fmt: skip
    registry = pl.DataFrame(known, schema=columns)
    settings = StreamSettings(kafka_bootstrap="nowhere:0", allowed_lateness_s=600, recent_records=40)
    whole = Settling(job, registry, settings, is_handed_all=True)
    asked = [Settling(job, registry, settings), Settling(job, registry, settings, is_at_once=True)]
    if not all(source.is_by_meter for source in job.sources):
        asked.pop()
    topics = {topic.name for topic in job.topics}
    came = [record for record in records() if record[2] in topics]
    longest = 0
    most = 47 if small_rows else 7  # a chain grows where a batch has not all meters
    for begin in range(0, len(came) + most, most):
        table, is_flush = kafka_table(came[begin : begin + most]), begin >= len(came)
        expected = whole.batch(table, close_all=is_flush)
        for some in asked:
            found = some.batch(table, close_all=is_flush)
            for name in expected:
                both = [_counted(one[name]) if name == "accounting" else one[name] for one in (found, expected)]
                assert both[0].sort(pl.all()).equals(both[1].sort(pl.all())), f"{name}, batch {begin // most}"
        longest = max([longest, *(len(stock.files) for those in asked[0].stocks.values() for stock in those.values())])
    keeps_rows = any(source.by for source in job.sources)  # else only the last records, which are others each time
    assert small_rows or not keeps_rows or longest > 1, "no chain has grown"


def _counted(lines: pl.DataFrame) -> pl.DataFrame:
    return lines.group_by("run_id", "bucket").agg(pl.col("records").sum())


def test_what_a_rule_asks_for_is_what_it_is_handed() -> None:
    stock = state.Stock.anew(rows({"a": 1, "b": 20, "c": 3}), BY)
    hashes = state.hashes_of(rows({"a": 0, "x": 0}), BY)
    assert stock.rows.filter(pl.Series(stock.found(hashes, pl.col("value") > 10)))["key"].to_list() == ["a", "b"]
    without = replace(stock, is_there=np.array([False, True, True]))
    assert without.rows.filter(pl.Series(without.found(hashes, None))).is_empty()


def test_a_damaged_byte_of_a_state_file_is_told_and_never_rows_that_are_not_there(place: Path) -> None:
    first = batch(FOLDER, 1, {}, {str(number): number for number in range(40)}, [])
    manifest = batch(FOLDER, 2, first, {"1": 77}, [])
    expected = held(FOLDER, manifest)
    file = place / manifest["p"]["k"].files[-1]
    whole, outcomes = file.read_bytes(), set[Any]()
    for at in range(0, len(whole), 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :])
        another_process()
        try:
            outcomes.add(held(FOLDER, manifest) == expected)
        except StateLost:
            outcomes.add("lost")
    assert outcomes == {True, "lost"}


def test_what_is_replaced_as_a_whole_is_written_as_a_chain_of_one() -> None:
    manifest = batch(FOLDER, 0, {}, {"a": 1, "b": 2}, [])
    manifest = batch(FOLDER, 1, manifest, {"a": 3, "b": 4}, [])
    assert len(manifest["p"]["k"].files) == 1
    assert held(FOLDER, manifest) == {"a": 3, "b": 4}


def test_keys_are_worked_out_when_somebody_looks_and_then_carried_on() -> None:
    stock = state.Stock.anew(rows({"a": 1, "b": 2}), BY)
    wanted = state.hashes_of(rows({"c": 0}), BY)
    grown = stock.grown(np.array([0], np.uint32), rows({"c": 3}))
    assert "hashes" not in vars(grown.keys)
    assert grown.rows.filter(pl.Series(grown.found(wanted, None)))["key"].to_list() == ["c"]
    again = grown.grown(np.array([2], np.uint32), rows({"c": 4}))
    assert "hashes" in vars(again.keys)
    assert again.rows.filter(pl.Series(again.found(wanted, None)))["value"].to_list() == [4]
