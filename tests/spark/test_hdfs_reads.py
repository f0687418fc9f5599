"""Spark reads a table's files on HDFS, by their URLs alone."""

from pathlib import Path

import polars as pl
import pytest
from pyspark.sql import SparkSession

import lake
from lake.store import used
from lake.tables import Commit, Writer, put_part
from schemas.tables import ACCOUNTING, polars_schema
from tests.stores import place

pytestmark = pytest.mark.long  # `make test` fetches no jars of Hadoop


def test_spark_reads_the_rows_of_a_version(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    with place("hdfs", tmp_path) as made, used(f"{made.url}/meters"):
        for number in range(3):
            rows = pl.DataFrame([{"stage": "a", "received": number}], schema=polars_schema(ACCOUNTING))
            Writer().add([put_part("accounting", rows, "x", f"2024-03-{30 + number % 2}")], Commit("app", number))
        found = lake.open({"accounting": 2}).spark(spark, "accounting").select("received").collect()
    assert sorted(row.received for row in found) == [0, 1]
