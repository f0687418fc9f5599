"""What all tests share: one Spark session a process, for static frames and real queries alike; lines of progress."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from tests.progress import Progress

pytest.register_assert_rewrite("tests.chain", "tests.brokers", "tests.run_lake", "tests.spark.scenario")
os.environ.setdefault("POLARS_MAX_THREADS", "1")  # as a Spark task has: on a busy machine threads wait for each other
settings.register_profile("timing decides nothing", deadline=None)
settings.load_profile("timing decides nothing")

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

SPARK = ("tests/spark/", "tests/streaming/")
"""Folders whose tests share the session: they run in one process, and first, as it takes longest."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--remember-seconds", action="store_true", help="Write tests/seconds.json anew.")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes the tests of a file stay together, and all that need Spark's session."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            return "spark" if nodeid.startswith(SPARK) else nodeid.partition("::")[0]

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs Spark's session begins first, as it takes longest."""
    items.sort(key=lambda item: not item.nodeid.startswith(SPARK))


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator["SparkSession"]:
    from engine.session import spark_session
    from stack.isolated import SHORT_LIVED_JVM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METERSTREAM_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("SPARK_SUBMIT_OPTS", SHORT_LIVED_JVM)
        session = spark_session("tests", spark_master="local[2]")
        yield session
        session.stop()
