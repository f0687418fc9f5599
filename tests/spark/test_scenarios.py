"""Every scenario folder holds, for the job it lies under."""

from importlib import import_module
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from streaming_jobs import critical_events
from tests.spark import scenario


@pytest.mark.parametrize("folder", scenario.scenarios(), ids=lambda folder: f"{folder.parent.name}:{folder.name}")
def test_what_comes_gives_what_must_be_there(request: pytest.FixtureRequest, folder: Path) -> None:
    def spark() -> SparkSession:
        session: SparkSession = request.getfixturevalue("spark")
        return session

    name = folder.parent.name
    if name == critical_events.NAME:
        found = scenario.at_once(spark(), folder)
    elif (Path(__file__).parents[2] / "streaming_jobs" / f"{name}.py").exists():
        found = scenario.stream(import_module(f"streaming_jobs.{name}").JOB, folder)
    else:
        found = scenario.night(spark(), import_module(f"batch_jobs.{name}").JOB, folder)
    scenario.check(found, folder)
