"""HDFS as a store: what is read half is never seen, and each reader has the rows."""

import io
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import polars as pl
import pytest
from hdfs_native import Client

import lake
from lake.reading import newest_registry, registry_files
from lake.store import Store, store
from lake.tables import Commit, Part, Writer, columns_of, put_part
from schemas.errors import ConfigError, RetryLater
from schemas.tables import ACCOUNTING, REGISTRY, polars_schema
from tests.stores import place

pytestmark = pytest.mark.long  # `make test` fetches no jars of Hadoop
TABLE, DAYS = "accounting", ("2024-03-31", "2024-04-01", None)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with place("hdfs", tmp_path_factory.mktemp("server")) as made:
        yield made.url


@pytest.fixture(autouse=True)
def client(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Of the server, past the store, which is the test's own."""
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    monkeypatch.setenv("METERSTREAM_STORE", f"{url}/{tmp_path.name}")
    return Client(url)


def names(client: Client, folder: str) -> list[str]:
    """All files of a folder, whatever they are called."""
    root = urlsplit(store().url).path
    found = client.list_status(f"{root}/{folder}", recursive=True)
    return sorted(entry.path.removeprefix(f"{root}/") for entry in found if not entry.isdir)


class Broken:
    """A client whose files break while they are written, or whose renames do."""

    def __init__(self, client: Client, broken: str) -> None:
        self._client, self._broken = client, broken

    def __getattr__(self, name: str) -> Any:
        if name == self._broken:
            raise RuntimeError(name)
        return getattr(self._client, name)


@pytest.mark.parametrize("broken", ["create", "rename"])
def test_what_could_not_be_written_leaves_the_object_as_it_was(
    client: Client, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store().put("state/x", b"before")
    with monkeypatch.context() as patch:
        patch.setattr(store()._objects, "_client", Broken(client, broken))
        with pytest.raises(RetryLater, match=f"did not take or give state/x: {broken}"):
            store().put("state/x", b"after")
        with pytest.raises(RetryLater):
            store().put_new("state/y", b"after")
    assert store().get("state/x") == b"before"
    assert names(client, "state") == ["state/x"]


def test_what_a_killed_process_was_writing_is_nobodys_object(client: Client) -> None:
    store().put("state/x", b"")
    client.create(f"{urlsplit(store().url).path}/state/.x.1").write(b"half of it")
    assert names(client, "state") == ["state/.x.1", "state/x"]
    assert store().paths("state") == ["state/x"]
    assert store().get("state/x") == b""


def test_one_who_is_second_leaves_nothing(client: Client) -> None:
    assert store().put_new("state/x", b"one")
    assert not store().put_new("state/x", b"two")
    assert not store().has("state")
    assert (store().get("state/x"), names(client, "state")) == (b"one", ["state/x"])


def test_an_object_that_no_data_node_has_told_of_yet_is_not_taken_for_an_empty_one(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    store().put("state/x", b"one")
    store().put("state/empty", b"")
    assert store().get("state/empty") == b""
    monkeypatch.setattr(store()._objects._client, "read", lambda _: io.BytesIO())  # type: ignore[union-attr]
    with pytest.raises(RetryLater, match="no data node has said that it has it"):
        store().get("state/x")
    assert store().get("state/empty") == b""


def test_a_server_that_does_not_answer_is_told() -> None:
    gone = Store("hdfs://127.0.0.1:1/x")
    with pytest.raises(RetryLater, match="did not take or give state: "):
        gone.paths("state")
    with pytest.raises(RetryLater, match="did not take or give state/x: "):
        gone.put("state/x", b"")


def test_each_reader_has_the_rows_of_all_days_and_of_files_that_lack_columns() -> None:
    for number, day in enumerate(DAYS):
        row = {"stage": "a", "batch": "b", "received": number}
        rows = pl.DataFrame([row], schema=polars_schema(ACCOUNTING))
        Writer().add([put_part(TABLE, rows, "x", day)], Commit("app", number))
    content = io.BytesIO()
    pl.DataFrame({"received": [100]}).write_parquet(content)
    store().put(f"lake/{TABLE}/date={DAYS[0]}/old.parquet", content.getvalue())
    part = Part(TABLE, f"date={DAYS[0]}/old.parquet", content.tell(), 1, DAYS[0])
    Writer().add([part], Commit("app", len(DAYS)))
    tables = lake.open()
    frame = tables.polars(TABLE)
    assert frame.collect_schema() == polars_schema(columns_of(TABLE))
    first, second = date(2024, 3, 31), date(2024, 4, 1)
    expected = [(first, None, 100), (first, "b", 0), (second, "b", 1), (None, "b", 2)]
    assert sorted(frame.select("date", "batch", "received").collect().rows(), key=str) == sorted(expected, key=str)
    assert frame.filter(date=second).select("received").collect().rows() == [(1,)]
    assert tables.polars(TABLE, [first]).select("received").collect().sum().item() == 100
    assert sorted(tables.pandas(TABLE)["received"]) == [0, 1, 2, 100]
    assert tables.arrow(TABLE).count_rows() == len(expected)
    with tables.duckdb() as sql:
        found = sql.execute(f"SELECT date, batch, received FROM {TABLE}").fetchall()
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert lake.open({TABLE: 1}).polars(TABLE).collect()["received"].to_list() == [0]


def test_a_registry_is_read_and_one_that_is_none_is_named() -> None:
    rows = pl.DataFrame([{"meter_id": "m", "fuse_a": 25}], schema=polars_schema(REGISTRY))
    good = put_part("registry", rows, "x", DAYS[0])
    Writer().add([good], Commit("app", 0))
    assert newest_registry(registry_files())["fuse_a"].to_list() == [25]
    store().put(f"lake/registry/date={DAYS[0]}/bad.parquet", b"no Parquet")
    Writer().add([good._replace(path=f"date={DAYS[0]}/bad.parquet", size=10)], Commit("app", 1))
    with pytest.raises(ConfigError, match=r"bad\.parquet is no file of the registry"):
        newest_registry(registry_files())
