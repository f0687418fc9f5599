"""Tables: each commit once, whoever tries it; compaction and vacuum that no reader notices."""

import threading
import time
from pathlib import Path

import duckdb
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lake import upkeep
from lake.reading import Lake
from lake.store import Store, store
from lake.tables import Commit, Part, Writer, put_part
from lake.upkeep import Upkeep
from schemas.errors import ConfigError, RetryLater
from schemas.tables import ACCOUNTING, TABLES, polars_schema

TABLE, DAY = "accounting", "2024-03-31"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    return tmp_path


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


def test_small_files_become_one_and_who_has_opened_the_table_before_reads_on(home: Path) -> None:
    for number in range(10):
        add(number)
    before = Lake()
    files = before.files(TABLE)
    Upkeep(files=11).once()
    assert Lake().files(TABLE) == files, "few are left alone"
    Upkeep(files=10).once()
    assert len(Lake().files(TABLE)) == 1
    assert received() == received(before) == list(range(10))
    assert all(Path(file).exists() for file in files)


def test_what_was_compacted_is_removed_after_its_retention_and_orphans_after_theirs(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        add(number)
    orphan = home / "lake" / TABLE / part(99).path
    for name in ("VACUUM_S", "ORPHANS_S"):
        monkeypatch.setattr(upkeep, name, -1.0)
    keeping = Upkeep(files=2)
    keeping.once()
    assert len(list((home / "lake" / TABLE).rglob("*-*.parquet"))) >= 6, "an hour, and a week, are not over"
    monkeypatch.setattr(upkeep, "RETENTION_HOURS", 0)
    monkeypatch.setattr(upkeep, "ORPHANS_HOURS", 0)
    add(4)
    keeping.once()
    assert not orphan.exists()
    assert received() == list(range(5))


def test_a_log_has_a_checkpoint_every_so_many_commits(home: Path) -> None:
    writer = Writer()
    for number in range(45):
        writer.add([part(number)], Commit("app", number))
        if number % 5 == 0:
            Upkeep(files=99).once()
    log = home / "lake" / TABLE / "_delta_log"
    assert len(list(log.glob("*.checkpoint.parquet"))) in (2, 3)
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


def test_a_store_that_takes_nothing_is_told(home: Path) -> None:
    (home / "a").write_text("a file where a folder should be")
    with pytest.raises(RetryLater, match=f"the store file://{home} did not take or give a/b"):
        store().put("a/b", b"")


def test_plain_duckdb_reads_the_files_that_are_named(home: Path) -> None:
    for number in range(3):
        add(number)
    files = Lake().files(TABLE)
    assert duckdb.execute("SELECT sum(received) FROM read_parquet($files)", {"files": files}).fetchall() == [(3,)]
