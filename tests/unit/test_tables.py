"""Tables: each commit once, whoever tries it; compaction and vacuum that no reader notices."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lake import upkeep
from lake.reading import Lake
from lake.reports import put_shard
from lake.store import Store, store, used
from lake.tables import Commit, Part, Writer, put_part
from lake.upkeep import Upkeep
from schemas.errors import ConfigError, RetryLater
from schemas.tables import ACCOUNTING, TABLES, polars_schema
from tests.lake_by_hand import add as add_by_hand
from tests.stores import KINDS, Place, place

TABLE, DAY = "accounting", "2024-03-31"


@pytest.fixture(scope="module", params=[*KINDS[:2], pytest.param("hdfs", marks=pytest.mark.long)])
def stores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(str(request.param), tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture(autouse=True)
def own_store(stores: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of the test's own."""
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    monkeypatch.setenv("METERSTREAM_STORE", stores.store(tmp_path))


def objects(end: str) -> list[str]:
    """Objects of the table whose names end so."""
    return [path for path in store().paths(f"lake/{TABLE}") if path.endswith(end)]


def part(number: int, table: str = TABLE, day: str | None = DAY) -> Part:
    """A file of one row that says its number."""
    row = {"stage": "a", "batch": f"{number}", "received": number}
    frame = pl.DataFrame([row], schema=polars_schema(ACCOUNTING))
    return put_part(table, frame if table == TABLE else pl.DataFrame(schema=polars_schema(TABLES[table])), "x", day)


def add(number: int) -> None:
    Writer().add([part(number)], Commit("app", number))


def received(lake: Lake | None = None) -> list[int]:
    return sorted((lake or Lake()).polars(TABLE).select("received").collect()["received"].to_list())


def test_a_file_without_a_commit_is_not_there() -> None:
    part(0)
    assert received() == []
    add(1)
    part(2)
    assert received() == [1]


def test_a_commit_that_is_tried_again_by_the_same_or_another_process_is_done_once() -> None:
    writer, first = Writer(), part(0)
    writer.add([first], Commit("app", 0))
    writer.add([first], Commit("app", 0))
    Writer().add([part(0)], Commit("app", 0))
    writer.add([part(1)], Commit("app", 1))
    writer.add([part(0)], Commit("app", 0))
    writer.add([part(7)], Commit("another app", 0))
    assert received() == [0, 1, 7]
    assert Writer().newest([TABLE, "alarms"], "app") == 1
    assert Writer().newest(["alarms"], "app") is None


def test_one_that_stood_still_does_not_commit_what_another_has_committed_for_it_meanwhile() -> None:
    stood_still, other = Writer(), Writer()
    stood_still.add([part(0)], Commit("app", 0))
    other.add([part(1)], Commit("app", 1))
    stood_still.add([part(1)], Commit("app", 1))
    other.add([part(2)], Commit("another app", 0))
    stood_still.add([part(3)], Commit("app", 2))
    assert received() == [0, 1, 2, 3]


def test_commits_of_several_writers_are_one_version_and_each_of_them_is_done_once() -> None:
    writer = Writer()
    writer.add([part(1)], Commit("one", 0))
    writer.add_all([(Commit("one", 1), [part(2)]), (Commit("two", 0), [part(3)])])
    assert Lake().version(TABLE) == 2
    Writer().add_all([(Commit("one", 1), [part(2)]), (Commit("two", 0), [part(3)]), (Commit("three", 0), [part(4)])])
    Writer().add([part(3)], Commit("two", 0))
    assert received() == [1, 2, 3, 4]
    assert Writer().newest([TABLE], "two") == 0


def test_parts_of_several_tables_and_days_are_in_one_commit_of_each_table() -> None:
    parts = [part(0), part(1, day="2024-04-01"), part(2, day=None), part(0, "alarms")]
    Writer().add(parts, Commit("app", 0))
    lake = Lake()
    assert received(lake) == [0, 1, 2]
    assert [each.isoformat() for each in lake.dates(TABLE)] == [DAY, "2024-04-01"]
    assert lake.polars(TABLE, lake.dates(TABLE)[1:]).collect()["received"].to_list() == [1]
    assert (lake.version(TABLE), lake.version("alarms"), lake.version("events")) == (1, 1, None)
    days = lake.duckdb().execute(f"SELECT date FROM {TABLE} ORDER BY received").fetchall()
    assert [day and day.isoformat() for (day,) in days] == [DAY, "2024-04-01", None]


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5)), max_size=12))
def test_whatever_is_tried_in_whatever_order_a_version_of_an_app_is_there_once(tries: list[tuple[str, int]]) -> None:
    Writer().delete(TABLE, "true")
    life = str(time.time_ns())
    newest: dict[str, int] = {}
    expected = []
    for app, version in tries:
        Writer().add([part(version)], Commit(life + app, version))
        if version > newest.get(app, -1):
            newest[app] = version
            expected.append(version)
    assert received() == sorted(expected)


def test_several_writers_at_once_lose_nothing() -> None:
    Writer().add([part(0)], Commit("first", 0))

    def work(app: int) -> None:
        writer = Writer()
        for number in range(12):
            writer.add([part(100 * app + number)], Commit(f"app {app}", number))

    threads = [threading.Thread(target=work, args=(app,)) for app in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert received() == sorted([0, *[100 * app + number for app in (1, 2, 3) for number in range(12)]])


def test_a_partitions_files_are_replaced_in_one_commit_and_the_others_stay() -> None:
    def current(meter: str, partition: int) -> Part:
        rows = pl.DataFrame([{"meter_id": meter}], schema=polars_schema(TABLES["latest_readings"]))
        return put_part("latest_readings", rows, "x", str(partition))

    writer = Writer()
    writer.replace("latest_readings", [current("a", 0), current("b", 1)], Commit("app", 0))
    writer.replace("latest_readings", [current("c", 1)], Commit("app", 1))
    writer.replace("latest_readings", [current("old", 0)], Commit("app", 1))
    found = Lake().polars("latest_readings").select("partition", "meter_id").collect().rows()
    assert sorted(found) == [(0, "a"), (1, "c")]


def test_small_files_become_one_and_who_has_opened_the_table_before_reads_on() -> None:
    for number in range(10):
        add(number)
    before = Lake()
    files = before.files(TABLE)
    Upkeep(files=11).once()
    assert Lake().files(TABLE) == files, "few are left alone"
    Upkeep(files=10).once()
    assert len(Lake().files(TABLE)) == 1
    assert received() == received(before) == list(range(10))
    assert set(files) <= {store().uri(path) for path in store().paths(f"lake/{TABLE}")}


def test_what_was_compacted_is_removed_after_its_retention_and_orphans_after_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(4):
        add(number)
    orphan = part(99).path
    for name in ("VACUUM_S", "ORPHANS_S"):
        monkeypatch.setattr(upkeep, name, -1.0)
    keeping = Upkeep(files=2)
    keeping.once()
    there = [path for path in objects(".parquet") if "_delta_log" not in path]
    assert len(there) >= 6, "an hour, and a week, are not over"
    monkeypatch.setattr(upkeep, "RETENTION_HOURS", 0)
    monkeypatch.setattr(upkeep, "ORPHANS_HOURS", 0)
    add(4)
    keeping.once()
    assert objects(orphan) == []
    assert received() == list(range(5))


def test_closed_days_are_put_in_the_order_of_their_meters_once() -> None:
    def add_meters(number: int) -> None:
        rows = pl.DataFrame({"meter_id": [f"m{(number * 7 + each) % 50:02d}" for each in range(50)]})
        add_by_hand("readings", rows, DAY)

    for number in range(5):
        add_meters(number)
    before = Lake().polars("readings").collect()
    keeping = Upkeep(files=99)
    assert keeping.cluster() == 0, "the day is not closed"
    assert keeping.cluster(quiet_s=-1.0) == 1
    lake = Lake()
    after = lake.polars("readings").collect()
    assert after.equals(before.sort("meter_id"))
    assert len(lake.files("readings")) == 1
    assert keeping.cluster(quiet_s=-1.0) == 0
    assert Upkeep(files=99).cluster(quiet_s=-1.0) == 0
    add_meters(9)
    assert keeping.cluster(quiet_s=-1.0) == 1
    assert len(Lake().polars("readings").collect()) == 300


def test_a_log_has_a_checkpoint_every_so_many_commits() -> None:
    writer = Writer()
    for number in range(45):
        writer.add([part(number)], Commit("app", number))
        if number % 5 == 0:
            Upkeep(files=99).once()
    assert len(objects(".checkpoint.parquet")) in (2, 3)
    assert received() == list(range(45))


def test_two_upkeeps_and_a_writer_at_once_lose_no_row_and_double_none() -> None:
    add(0)
    is_over, seen = threading.Event(), list[list[int]]()

    def keep() -> None:
        keeping = Upkeep(files=3)
        while not is_over.is_set():
            keeping.once()

    def read() -> None:
        while not is_over.is_set():
            seen.append(received())

    threads = [threading.Thread(target=work) for work in (keep, keep, read)]
    for thread in threads:
        thread.start()
    writer = Writer()
    for number in range(1, 60):
        writer.add([part(number)], Commit("app", number))
    is_over.set()
    for thread in threads:
        thread.join()
    assert received() == list(range(60))
    assert seen
    assert all(rows == list(range(len(rows))) for rows in seen)
    assert sorted(map(len, seen)) == list(map(len, seen)), "rows came and went"


def test_an_object_is_put_by_one_of_many_that_try_at_once() -> None:
    for number in range(30):
        won = list[int]()

        def put(who: int, place: str = f"state/{number}.json", won: list[int] = won) -> None:
            if store().put_new(place, str(who).encode()):
                won.append(who)

        threads = [threading.Thread(target=put, args=(who,)) for who in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [str(who) for who in won] == [store().get(f"state/{number}.json").decode()]


def test_a_store_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match="METERSTREAM_STORE is ftp://x, expected file://…, s3://…"):
        Store("ftp://x")
    with pytest.raises(FileNotFoundError, match="state/nothing is not there"):
        store().get("state/nothing")


def test_a_store_that_takes_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file where a folder should be")
    with used(f"file://{tmp_path}"), pytest.raises(RetryLater, match=f"file://{tmp_path} did not take or give a/b"):
        store().put("a/b", b"")


def test_an_object_is_there_as_a_whole_under_its_name_until_it_is_removed() -> None:
    store().put("state/a b=1/x", b"one")
    store().put("state/a b=1/x", b"two")
    store().put("state/y", memoryview(b"three"))
    assert store().paths("state") == ["state/a b=1/x", "state/y"]
    assert store().folders("state") == ["a b=1"]
    assert (store().get("state/a b=1/x"), store().has("state/y"), store().has("state/z")) == (b"two", True, False)
    store().delete(["state/y", "state/nothing"])
    assert store().paths("state") == ["state/a b=1/x"]
    assert store().paths("nothing") == store().folders("nothing") == []


def test_duckdb_has_the_rows_of_tables_and_reports_of_whatever_columns() -> None:
    for number in range(3):
        add(number)
    for day, columns in (("2024-03-30", ["meter_id"]), (DAY, ["meter_id", "wh"])):
        rows = pa.table({name: ["a", "b"] if name == "meter_id" else [1, 2] for name in columns})
        put_shard(rows, "own_report_v1", day, 0, 1)
    with Lake().duckdb() as lake:
        assert lake.execute(f"SELECT sum(received) FROM {TABLE} WHERE date = '{DAY}'").fetchall() == [(3,)]
        assert lake.execute("SELECT count(*) FROM alarms").fetchall() == [(0,)]
        asked = "SELECT date::VARCHAR, meter_id, wh FROM own_report ORDER BY ALL"
        found = lake.execute(asked).fetchall()
    assert found == [("2024-03-30", "a", None), ("2024-03-30", "b", None), (DAY, "a", 1), (DAY, "b", 2)]


def test_plain_duckdb_reads_the_files_that_are_named(tmp_path: Path) -> None:
    with used(f"file://{tmp_path}"):
        for number in range(3):
            add(number)
        files = Lake().files(TABLE)
    assert duckdb.execute("SELECT sum(received) FROM read_parquet($files)", {"files": files}).fetchall() == [(3,)]
