"""Every scenario folder holds, for the job it lies under."""

from importlib import import_module
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from schemas.tables import REPORTS, TABLES
from schemas.topics import EVENTS, READINGS
from streaming_jobs import critical_events
from tests.spark import scenario


@pytest.mark.parametrize("folder", scenario.scenarios(), ids=lambda folder: f"{folder.parent.name}:{folder.name}")
def test_what_comes_gives_what_must_be_there(request: pytest.FixtureRequest, folder: Path) -> None:
    def spark() -> SparkSession:
        session: SparkSession = request.getfixturevalue("spark")
        return session

    name = folder.parent.name
    if name == critical_events.NAME:
        assert scenario.problems(folder, scenario.of_stream([EVENTS, READINGS]), [name], [name]) == []
        found = scenario.at_once(spark(), folder)
    elif (Path(__file__).parents[2] / "streaming_jobs" / f"{name}.py").exists():
        job = import_module(f"streaming_jobs.{name}").JOB
        written = [*job.tables, *job.current, "accounting"]
        assert scenario.problems(folder, scenario.of_stream(job.topics), written, ["accounting"]) == []
        found = scenario.stream(job, folder)
    else:
        job = import_module(f"batch_jobs.{name}").JOB
        tables = {table: (TABLES | REPORTS)[table].names for table in [*job.reads, "registry"]}
        assert scenario.problems(folder, tables | {"settings": ["name", "value"]}, [name], [name]) == []
        found = scenario.night(spark(), job, folder)
    scenario.check(found, folder)


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_what_a_scenario_lacks_or_has_too_much_is_found(tmp_path: Path) -> None:
    when = scenario.of_stream([READINGS])
    sentence = {"about.md": "Given a meter; when it sends; then it is stored.\n"}
    good = {"when/readings.csv": "batch,meter_id,#\n", "then/accounting.csv": "bucket,records\n"}
    assert scenario.problems(written(tmp_path / "a", sentence | good), when, ["accounting"], ["accounting"]) == []
    wrong = {"about.md": "A meter.\n", "when/readings.csv": "meter,volts\n", "when/reading.csv": "meter_id\n"}
    bad = written(tmp_path / "b", wrong | {"then/x.csv": "y\n"})
    assert scenario.problems(bad, when, ["accounting"], ["accounting"]) == [
        "about.md: Given …; when …; then ….",
        "when/reading.csv: nobody reads it; there are readings, registry, settings",
        "when/readings.csv: no such column: meter, volts",
        "then/x.csv: nobody writes it",
        "then/accounting.csv is missing",
    ]
