"""Small files of a day become one; no reader sees a row less or twice, and nobody's lock is passed over."""

import os
import threading
from pathlib import Path

import polars as pl
import pytest

from lake import compaction
from lake.compaction import Merger
from lake.locks import files_kept, files_replaced
from lake.paths import glob_of, table_path
from lake.publishing import BatchKey, exchange, publish_small
from schemas.tables import ACCOUNTING, arrow_of, polars_schema

TABLE, DAY = "accounting", "2024-03-31"
OURS, THEIRS = "voltage_deviation", "readings_lake"


def line(batch: int, query: str = OURS) -> pl.DataFrame:
    row = {"run_id": None, "stage": query, "batch": f"{batch}", "received": batch, "stored": batch, "duplicate": 0}
    row |= {"late": 0, "quarantined": 0, "invalid": 0}
    return pl.DataFrame([row], schema=polars_schema(ACCOUNTING))


def write(batch: int, query: str = OURS, suffix: str = "") -> list[Path]:
    rows = line(batch, query)
    return publish_small(
        rows.to_arrow().cast(arrow_of(rows.schema)), TABLE, BatchKey(query, "id", f"{batch:08d}{suffix}"), DAY
    )


def rows() -> list[tuple[str, int]]:
    """What any reader finds by the contract's glob."""
    found = pl.read_parquet(glob_of(table_path(TABLE)), hive_partitioning=False)
    return sorted(found.select("stage", "received").rows())


def names() -> list[str]:
    return sorted(part.name for part in (table_path(TABLE) / f"date={DAY}").iterdir())


def merger(files: int = 4) -> Merger:
    return Merger(f"{OURS}-id", [TABLE], files)


def test_files_of_batches_that_are_over_become_one_and_the_others_stay(home: Path) -> None:
    write(1, THEIRS)
    for batch in range(6):
        write(batch)
    before = rows()
    merger().merge(before=5)
    assert names() == [
        "readings_lake-id-00000001-0.parquet",
        "voltage_deviation-id-00000000_00000004-0.parquet",
        "voltage_deviation-id-00000005-0.parquet",
    ]
    assert rows() == before


def test_what_was_merged_is_merged_again_and_a_flush_with_its_batch(home: Path) -> None:
    one = merger()
    for batch in range(12):
        one.added(write(batch))
        if batch == 6:
            one.added(write(batch, suffix="f"))
        one.merge(before=batch)
    assert len(names()) <= 5
    assert names()[0].startswith("voltage_deviation-id-00000000_0000")
    assert [received for _, received in rows()] == sorted([*range(12), 6])


def test_the_old_folder_keeps_its_files_for_a_minute(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = merger()
    for batch in range(4):
        one.added(write(batch))
    one.merge(before=99)
    one.merge(before=99)
    assert len(list((home / "staging").rglob("*.parquet"))) == 4
    monkeypatch.setattr(compaction, "KEPT_S", -1.0)
    one.merge(before=99)
    assert not list((home / "staging").rglob("*.parquet"))


def test_few_files_and_large_files_are_left_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for batch in range(3):
        write(batch)
    merger().merge(before=99)
    assert len(names()) == 3
    monkeypatch.setattr(compaction, "LARGE_BYTES", 10)
    write(3)
    merger().merge(before=99)
    assert len(names()) == 4


def test_nothing_is_merged_while_somebody_reads_and_all_of_it_later(home: Path) -> None:
    for batch in range(4):
        write(batch)
    one = merger()
    with files_kept(TABLE, "readings"):
        one.merge(before=99)
        assert len(names()) == 4
    one.merge(before=99)
    assert len(names()) == 1


def test_who_adds_waits_for_who_merges(home: Path) -> None:
    added = threading.Thread(target=write, args=(0,))
    with files_replaced(TABLE) as is_alone:
        assert is_alone
        added.start()
        added.join(0.3)
        assert added.is_alive()
    added.join(10)
    assert rows() == [(OURS, 0)]


def test_a_reader_beside_many_merges_has_all_rows_or_is_told_that_a_file_is_gone(home: Path) -> None:
    one, is_over = merger(2), threading.Event()
    write(0)
    seen: list[int] = []

    def read() -> None:
        while not is_over.is_set():
            try:
                seen.append(len(rows()))
            except (FileNotFoundError, pl.exceptions.ComputeError):
                continue

    reader = threading.Thread(target=read)
    reader.start()
    for batch in range(1, 120):
        one.added(write(batch))
        one.merge(before=batch + 1)
    is_over.set()
    reader.join()
    assert seen == sorted(seen), "rows came and went"
    assert len(rows()) == 120


def test_a_merge_that_was_killed_at_any_point_is_forgotten(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for batch in range(4):
        write(batch)
    before = rows()
    write(9, THEIRS)  # so that there is something to link

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def exchange_and_die(one: Path, other: Path) -> None:
        exchange(one, other)
        raise KeyboardInterrupt

    for place, function, death in (
        (os, "link", die),
        (compaction, "exchange", die),
        (compaction, "exchange", exchange_and_die),
    ):
        one = merger()
        with monkeypatch.context() as patch:
            patch.setattr(place, function, death)
            with pytest.raises(KeyboardInterrupt):
                one.merge(before=99)
        assert [row for row in rows() if row[0] == OURS] == before
        assert list((home / "staging").rglob("*.parquet"))
    assert len(names()) == 2  # the last one died when it was done
    merger()
    assert not list((home / "staging").rglob("*.parquet"))


def test_a_damaged_file_stops_its_own_merge_and_nothing_else(home: Path) -> None:
    for batch in range(4):
        folder = write(batch)[0]
    broken = folder / "voltage_deviation-id-00000001-0.parquet"
    broken.write_bytes(b"")
    one = merger()
    one.merge(before=99)
    assert len(names()) == 4
    write(1)
    for batch in range(4, 8):
        one.added(write(batch))
    one.merge(before=99)
    assert len(names()) == 1
    assert len(rows()) == 8


def test_a_file_of_somebody_else_with_a_name_like_ours_stays(home: Path) -> None:
    for batch in range(4):
        folder = write(batch)[0]
    (folder / "voltage_deviation-id-copy.parquet").write_bytes((folder / names()[0]).read_bytes())
    merger().merge(before=99)
    assert names() == ["voltage_deviation-id-00000000_00000003-0.parquet", "voltage_deviation-id-copy.parquet"]


def test_a_table_that_has_got_a_column_since_is_merged_with_nulls(home: Path) -> None:
    for batch in range(3):
        folder = write(batch)[0]
    old = line(7).drop("invalid")
    old.write_parquet(folder / "voltage_deviation-id-00000003-0.parquet")
    merger().merge(before=99)
    assert len(names()) == 1
    found = pl.read_parquet(glob_of(table_path(TABLE)), hive_partitioning=False)
    assert found.get_column("invalid").to_list() == [0, 0, 0, None]


def test_a_system_that_cannot_exchange_folders_keeps_its_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for batch in range(4):
        write(batch)

    def refuse(*_: Path) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(compaction, "exchange", refuse)
    merger().merge(before=99)
    assert len(names()) == 4


def test_the_exchange_of_folders_is_what_the_kernel_does(home: Path) -> None:
    one, other = home / "one", home / "other"
    one.mkdir()
    other.mkdir()
    (one / "here").touch()
    exchange(one, other)
    assert (other / "here").exists()
    with pytest.raises(OSError, match="No such file"):
        exchange(one, home / "nowhere")
