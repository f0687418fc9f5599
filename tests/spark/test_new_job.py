"""`make new-job`: what it writes is a job of the house at once."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("schemas", "metering", "kafka_io", "mqtt_io", "lake", "engine", "streaming_jobs", "batch_jobs", "ingest",
           "replay", "stack", "tests", "docs", "tools", "bench")  # fmt: skip
FILES = ("settings.py", "pyproject.toml", "README.md")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is ours."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def new_job(checkout: Path, kind: str, name: str) -> subprocess.CompletedProcess[str]:
    order = [sys.executable, str(checkout / "tools" / "new_job.py"), kind, name]
    return subprocess.run(order, capture_output=True, text=True, check=False)


def outcome(checkout: Path, chosen: str) -> subprocess.CompletedProcess[str]:
    order = [sys.executable, "-m", "pytest", "tests/spark/test_scenarios.py", "tests/unit/test_house.py", "-k", chosen]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.run(order, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def contents(checkout: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in checkout.rglob("*") if path.suffix in (".py", ".md", ".csv")}


def test_a_new_job_of_each_kind_keeps_the_rules_of_the_house_and_its_scenario_holds(checkout: Path) -> None:
    for kind, name in (("streaming", "much_power"), ("batch", "counted_readings")):
        made = new_job(checkout, kind, name)
        assert made.returncode == 0, made.stderr
        assert f"tests/scenarios/{name}/given_a_meter/about.md" in made.stdout
        assert f"{name}.py" in (checkout / "docs" / "guide.md").read_text()
    ran = outcome(checkout, "much_power or counted_readings or guide or wrong_names")
    assert ran.returncode == 0, ran.stdout
    assert re.search(r"test_scenarios.py +2 tests", ran.stdout), ran.stdout
    wrong = checkout / "tests" / "scenarios" / "much_power" / "given_a_meter" / "then" / "much_power.csv"
    wrong.write_text(wrong.read_text().replace("12000", "12001"))
    assert outcome(checkout, "much_power and scenario").returncode == 1, "the scenario is what holds it"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("alarms", "NAME=alarms is taken: streaming_jobs/alarms.py has it"),
        ("daily_consumption", "NAME=daily_consumption is taken: batch_jobs/daily_consumption.py has it"),
        ("voltage_rollups", "NAME=voltage_rollups is taken: schemas/tables.py has it"),
        ("HighLoad", "a job's name is small letters, digits and _, such as high_load"),
        ("../x", "a job's name is small letters"),
        ("class", "a job's name is small letters"),
        ("json", "a job of that name would hide a module"),
        ("polars", "a job of that name would hide a module"),
        ("engine", "a job of that name would hide a module"),
        ("checkpoints", "a job of that name would hide a module"),
    ],
)
def test_a_name_that_cannot_be_writes_nothing(checkout: Path, name: str, complaint: str) -> None:
    before = contents(checkout)
    made = new_job(checkout, "streaming", name)
    assert (made.returncode, contents(checkout)) == (1, before)
    assert complaint in made.stderr


def test_where_the_line_to_add_below_is_gone_nothing_is_written(checkout: Path) -> None:
    tables = checkout / "schemas" / "tables.py"
    tables.write_text(tables.read_text().replace("DATED_BY = {\n", "DATED_BY = dict({\n"))
    before = contents(checkout)
    made = new_job(checkout, "streaming", "much_power")
    assert (made.returncode, contents(checkout)) == (1, before)
    assert "schemas/tables.py has 0 times 'DATED_BY = {'" in made.stderr
