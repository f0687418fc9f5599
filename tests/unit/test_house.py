"""The rules of the house, each also fed one violation."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "schemas": {"schemas"},
    "kafka_io": {"kafka_io", "schemas"},
    "mqtt_io": {"mqtt_io"},
    "lake": {"lake", "kafka_io", "schemas"},
    "ingest": {"ingest", "mqtt_io", "schemas"},
    "replay": {"replay", "kafka_io", "mqtt_io", "schemas"},
    "streaming_jobs": {"lake", "schemas"},
    "batch_jobs": {"lake", "schemas"},
    "stack": {"stack", "schemas", "kafka_io", "lake", "ingest", "replay", "streaming_jobs", "batch_jobs"},
}
"""Package → packages of ours that its modules may import."""
JOBS = ("streaming_jobs", "batch_jobs")
NO_CLIENT = {"pyspark", "confluent_kafka", "kafka", "paho", "nats"}
"""What the contract does without."""
BANNED = {"utils", "util", "helpers", "helper", "common", "manager", "handler", "service", "processor", "base", "misc"}
TOLD = ("Reads", "Writes", "Key", "Lateness", "Duplicates", "Restart")


def modules(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def is_job(path: Path) -> bool:
    return path.parent.name in JOBS and not path.name.startswith("__")


def imports(source: str) -> set[str]:
    """Full names of the modules that a source imports, at whatever place."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {"." * node.level + (node.module or "")}
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module in JOBS}
    return found


def wrong_imports(package: str, name: str, source: str) -> list[str]:
    """Imports of a module that the rule of the house forbids; those that discover the jobs may name their package."""
    found = []
    for module in sorted(imports(source)):
        top = module.partition(".")[0]
        may = MAY_IMPORT[package] | ({package} if name.startswith("__") and "." not in module else set())
        if module.startswith(".") or (top in MAY_IMPORT and top not in may):
            found.append(module)
        if package == "schemas" and top in NO_CLIENT:
            found.append(module)
    return [module for module in found if not (name.startswith("__") and module == f"{package}.discovered")]


def wrong_names(paths: list[Path]) -> list[Path]:
    return [path for path in paths if {path.stem, path.parent.name} & BANNED]


def wrong_job(path: Path, source: str, scenarios: Path) -> list[str]:
    """What a job's module lacks."""
    tree = ast.parse(source)
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    told = ast.get_docstring(tree) or ""
    found = [f"has no {name}()" for name in ("transform", "main") if name not in functions]
    found += [f"does not say {word}:" for word in TOLD if f"{word}:" not in told]
    if not any((scenarios / path.stem).glob("given_*/when/*.csv")) or not any(
        (scenarios / path.stem).glob("given_*/then/*.csv")
    ):
        found.append("has no scenario")
    asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & {"now", "utcnow", "today"}
    if asked or "current_timestamp" in source or "current_date" in source:
        found.append("asks for the time")
    return found


@pytest.mark.parametrize("path", modules(*MAY_IMPORT), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_imports_only_what_its_package_may(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert wrong_imports(package, path.stem, path.read_text()) == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("schemas", "import lake"),
        ("schemas", "from lake.decoding import decoded"),
        ("schemas", "import pyspark.sql"),
        ("schemas", "def f():\n    from confluent_kafka import Producer"),
        ("schemas", "import paho.mqtt.client"),
        ("schemas", "from . import codec"),
        ("kafka_io", "from lake.decoding import decoded"),
        ("lake", "import streaming_jobs.alarms"),
        ("lake", "from ingest.decode import decode"),
        ("ingest", "from lake.session import spark_session"),
        ("ingest", "import replay"),
        ("replay", "import ingest.bridge"),
        ("streaming_jobs", "from streaming_jobs.alarms import JOB"),
        ("streaming_jobs", "from streaming_jobs import alarms"),
        ("streaming_jobs", "from batch_jobs.alarm_report import JOB"),
        ("batch_jobs", "import batch_jobs.alarm_report"),
        ("batch_jobs", "import stack"),
    ],
)
def test_a_forbidden_import_is_found(package: str, source: str) -> None:
    assert wrong_imports(package, "new_module", source)


def test_an_allowed_import_is_not_found() -> None:
    assert wrong_imports("lake", "x", "import polars\nfrom schemas import tables\nfrom lake.books import count") == []
    assert wrong_imports("streaming_jobs", "__main__", "from streaming_jobs import discovered") == []
    assert wrong_imports("streaming_jobs", "__main__", "from streaming_jobs import alarms") != []


def test_every_package_of_ours_has_its_rule() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages <= set(MAY_IMPORT)


def test_no_file_or_folder_has_a_name_that_says_nothing() -> None:
    ours = [ROOT / "tests", ROOT / "bench", ROOT / "tools", *[ROOT / package for package in MAY_IMPORT]]
    assert wrong_names([path for folder in ours for path in folder.rglob("*.py")]) == []


@pytest.mark.parametrize("name", ["lake/utils.py", "ingest/handler.py", "common/sums.py", "base/__init__.py"])
def test_a_name_that_says_nothing_is_found(tmp_path: Path, name: str) -> None:
    assert wrong_names([tmp_path / name])


@pytest.mark.parametrize("path", [path for path in modules(*JOBS) if is_job(path)], ids=lambda path: path.stem)
def test_a_job_has_transform_main_a_telling_docstring_and_a_scenario_and_takes_time_as_an_argument(path: Path) -> None:
    assert wrong_job(path, path.read_text(), ROOT / "tests" / "scenarios") == []


def test_jobs_have_names_of_their_own() -> None:
    names = [path.stem for path in modules(*JOBS) if is_job(path)]
    assert len(set(names)) == len(names)


GOOD = '''"""A job.

Reads: a. Writes: b. Key: c. Lateness: d. Duplicates: e. Restart: f.
"""

def transform(records): return records

def main(): ...
'''


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (GOOD.replace("def transform", "def change"), "has no transform()"),
        (GOOD.replace("def main", "def start"), "has no main()"),
        (GOOD.replace("Restart:", ""), "does not say Restart:"),
        (GOOD.replace("return records", "return F.current_timestamp()"), "asks for the time"),
        (GOOD.replace("return records", "return datetime.now(UTC)"), "asks for the time"),
    ],
)
def test_what_a_job_lacks_is_found(tmp_path: Path, broken: str, complaint: str) -> None:
    for part in ("when", "then"):
        (tmp_path / "job" / "given_x" / part).mkdir(parents=True)
        (tmp_path / "job" / "given_x" / part / "readings.csv").write_text("meter_id\n")
    assert wrong_job(Path("job.py"), GOOD, tmp_path) == []
    assert wrong_job(Path("job.py"), broken, tmp_path) == [complaint]


def test_a_job_without_a_scenario_is_found(tmp_path: Path) -> None:
    assert wrong_job(Path("job.py"), GOOD, tmp_path) == ["has no scenario"]
