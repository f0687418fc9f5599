"""One session for all tests that need Spark, static frames and real queries alike."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator["SparkSession"]:
    from lake.session import spark_session
    from stack.demo import SHORT_LIVED_JVM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METERSTREAM_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("SPARK_SUBMIT_OPTS", SHORT_LIVED_JVM)
        session = spark_session("tests", spark_master="local[2]")
        yield session
        session.stop()
