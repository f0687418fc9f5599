"""The rules of the house, each also fed one violation."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "schemas": {"schemas"},
    "settings": {"schemas"},
    "metering": {"metering", "schemas"},
    "kafka_io": {"kafka_io", "schemas"},
    "mqtt_io": {"mqtt_io"},
    "lake": {"lake", "metering", "schemas", "settings"},
    "engine": {"engine", "lake", "kafka_io", "metering", "schemas", "settings"},
    "streaming_jobs": {"engine", "kafka_io", "lake", "metering", "schemas", "settings"},
    "batch_jobs": {"engine", "metering", "schemas"},
    "ingest": {"ingest", "kafka_io", "mqtt_io", "schemas", "settings"},
    "replay": {"replay", "kafka_io", "mqtt_io", "lake", "schemas", "settings"},
    "stack": {"stack", "engine", "kafka_io", "lake", "metering", "schemas", "settings", "ingest", "replay",
              "streaming_jobs", "batch_jobs"},
}  # fmt: skip
"""Room → rooms of ours that its modules may import: arrows run down. Nothing imports tests, bench or tools."""
JOBS = ("streaming_jobs", "batch_jobs")
NO_PRODUCT = {"tests", "bench", "tools"}
CLIENTS = {"pyspark", "confluent_kafka", "kafka", "paho", "nats"}
OUTSIDE = {"os", "io", "pathlib", "shutil", "tempfile", "glob", "fcntl", "subprocess", "pydantic_settings"}
"""Files, locks, environment, settings."""
WITHOUT = {
    "schemas": CLIENTS | OUTSIDE - {"io"},
    "metering": CLIENTS | OUTSIDE,
    "kafka_io": {"pyspark", "paho"} | OUTSIDE,
    "lake": {"confluent_kafka", "paho"},
    "batch_jobs": {"confluent_kafka", "paho"},
}
"""Room → packages of others that it does without."""
OPENED = {"Producer", "Consumer", "AdminClient"}
"""Clients of Kafka that kafka_io alone opens."""
NIGHT_WITHOUT = {f"engine.{name}" for name in ("stream", "partition_tasks", "batch", "job", "watermark", "checkpoint")}
"""Of the stream: the night needs none of it."""
BANNED = {"utils", "util", "helpers", "helper", "common", "manager", "handler", "service", "processor", "base", "misc"}
HEADINGS = ("Reads", "Writes", "Key", "Lateness", "Duplicates", "Restart")


def modules(*packages: str) -> list[Path]:
    """Files of these rooms; a room may be one file."""
    alone = [path for package in packages if (path := ROOT / f"{package}.py").exists()]
    return sorted([*alone, *(path for package in packages for path in (ROOT / package).rglob("*.py"))])


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


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
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module in (*JOBS, "stack")}
    return found


def wrong_imports(package: str, name: str, source: str) -> list[str]:
    """Imports of a module that the rule of the house forbids; those that discover the jobs may name their package."""
    found = []
    for module in sorted(imports(source)):
        top = module.partition(".")[0]
        may = MAY_IMPORT[package] | ({package} if name.startswith("__") and "." not in module else set())
        if module.startswith(".") or top in NO_PRODUCT or (top in MAY_IMPORT and top not in may):
            found.append(module)
        if top in WITHOUT.get(package, set()):
            found.append(module)
        if module in NIGHT_WITHOUT and (package == "batch_jobs" or (package, name) == ("engine", "night")):
            found.append(module)
    return [module for module in found if not (name.startswith("__") and module == f"{package}.discovered")]


def uses_the_demo(name: str, source: str) -> bool:
    """Whether a test other than the demo's own imports the demo: what both need is in stack/isolated.py."""
    return name != "test_demo" and "stack.demo" in imports(source)


def called(source: str) -> list[str]:
    """Names of what a source calls, without what they are called on."""
    return [
        node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    ]


def opened(package: str, source: str) -> list[str]:
    """Kafka clients that a module opens by itself: kafka_io opens them."""
    return [name for name in called(source) if name in OPENED and package != "kafka_io"]


def reads_files(source: str) -> list[str]:
    """Calls that touch a file."""
    by_name = re.compile(r"(read|scan|write|sink)_(csv|parquet|ipc|json)")
    return [name for name in called(source) if name == "open" or by_name.match(name)]


def reads_checkpoint(source: str) -> list[str]:
    """Words by which a module looks into Spark's checkpoint."""
    found = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return [word for word in found if word in ("offsets", "commits", "sources", "metadata", "batchTimestampMs")]


FILE_SYSTEM = {"os", "pathlib", "shutil", "glob", "fcntl", "tempfile", "ctypes"}
SEAM = {
    "lake/store.py": "a local folder is a store, too",
    "lake/hdfs.py": "renames what it has written",
    "engine/driver.py": "marks and a lock in the home",
    "engine/checkpoint.py": "Spark's own",
    "engine/stream.py": "Spark's own",
    "engine/session.py": "its environment",
}
"""Modules of lake and engine that touch a file system, and why; of lake and state only the store does."""


def touches_files(source: str) -> set[str]:
    """Of what ties a module to one file system: modules that it imports, and calls."""
    by_call = {"rename", "link", "symlink", "flock", "rmtree", "glob", "rglob", "unlink", "mkdir"}
    opens = {"open"} if re.search(r"(?<!def )(?<![.\w])open\(", source) else set[str]()
    return (imports(source) & FILE_SYSTEM) | (set(called(source)) & by_call) | opens


def wrong_names(paths: list[Path]) -> list[Path]:
    return [path for path in paths if {path.stem, path.parent.name} & BANNED]


def wrong_job(path: Path, source: str, scenarios: Path) -> list[str]:
    """What a job's module lacks."""
    tree = ast.parse(source)
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    docstring = ast.get_docstring(tree) or ""
    found = [f"has no {name}()" for name in ("transform", "main") if name not in functions]
    found += [f"does not say {word}:" for word in HEADINGS if f"{word}:" not in docstring]
    if not any((scenarios / path.stem).glob("given_*/when/*.csv")) or not any(
        (scenarios / path.stem).glob("given_*/then/*.csv")
    ):
        found.append("has no scenario")
    asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & {"now", "utcnow", "today"}
    if asked or "current_timestamp" in source or "current_date" in source:
        found.append("asks for the time")
    return found


@pytest.mark.parametrize("path", modules(*MAY_IMPORT), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_keeps_to_its_room(path: Path) -> None:
    source = path.read_text()
    assert wrong_imports(room(path), path.stem, source) == []
    assert opened(room(path), source) == []
    if room(path) == "metering":
        assert reads_files(source) == []
    if path != ROOT / "engine" / "checkpoint.py" and room(path) in ("engine", "lake", *JOBS):
        assert reads_checkpoint(source) == []


@pytest.mark.parametrize("path", modules("lake", "engine"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lake_and_state_touch_no_file_system_but_by_the_store(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() not in SEAM:
        assert touches_files(path.read_text()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "import fcntl",
        "from pathlib import Path",
        "part.rename(folder)",
        "os.link(a, b)",
        "folder.glob('*')",
        "open(name)",
    ],
)
def test_a_module_that_touches_a_file_system_by_itself_is_found(source: str) -> None:
    assert touches_files(source)
    assert not touches_files("store().put(path, content)\nfor file in lake.files(table): read(file)")


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("schemas", "import lake"),
        ("schemas", "from engine.decoding import decoded"),
        ("schemas", "import pyspark.sql"),
        ("schemas", "def f():\n    from confluent_kafka import Producer"),
        ("schemas", "import paho.mqtt.client"),
        ("schemas", "from . import codec"),
        ("schemas", "import fcntl"),
        ("schemas", "from pathlib import Path"),
        ("schemas", "import os"),
        ("metering", "from pyspark.sql import functions"),
        ("metering", "from confluent_kafka import Message"),
        ("metering", "from pathlib import Path"),
        ("metering", "from settings import home"),
        ("metering", "from pydantic_settings import BaseSettings"),
        ("metering", "from lake.reading import newest_registry"),
        ("metering", "from engine.job import BatchContext"),
        ("kafka_io", "from engine.decoding import decoded"),
        ("kafka_io", "from pathlib import Path"),
        ("kafka_io", "from pyspark.sql import DataFrame"),
        ("lake", "from confluent_kafka import Consumer"),
        ("lake", "import streaming_jobs.alarms"),
        ("lake", "from engine.session import spark_session"),
        ("lake", "from kafka_io.offsets import newest_offsets"),
        ("engine", "from streaming_jobs import discovered"),
        ("engine", "import tests.chain"),
        ("ingest", "from engine.session import spark_session"),
        ("ingest", "import replay"),
        ("replay", "import ingest.bridge"),
        ("replay", "from metering.energy import delta_engine"),
        ("replay", "from bench import timed"),
        ("stack", "import tools.same_lake"),
        ("streaming_jobs", "from streaming_jobs.alarms import JOB"),
        ("streaming_jobs", "from streaming_jobs import alarms"),
        ("streaming_jobs", "from batch_jobs.alarm_report import JOB"),
        ("batch_jobs", "import batch_jobs.alarm_report"),
        ("batch_jobs", "import stack"),
        ("batch_jobs", "from engine.job import StreamingJob"),
        ("batch_jobs", "from confluent_kafka import Message"),
    ],
)
def test_a_forbidden_import_is_found(package: str, source: str) -> None:
    assert wrong_imports(package, "new_module", source)


def test_a_stream_in_the_night_is_found() -> None:
    assert wrong_imports("engine", "night", "from engine.stream import StreamSettings")
    assert not wrong_imports("engine", "night", "from engine.settings import JudgeSettings")


@pytest.mark.parametrize("path", modules("tests"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_demo_is_not_the_test_kit(path: Path) -> None:
    assert not uses_the_demo(path.stem, path.read_text())


@pytest.mark.parametrize("source", ["from stack.demo import Stack", "from stack import demo", "import stack.demo"])
def test_a_test_that_imports_the_demo_is_found(source: str) -> None:
    assert uses_the_demo("test_bridge", source)
    assert not uses_the_demo("test_demo", source)
    assert not uses_the_demo("test_bridge", "from stack.isolated import Stack")


@pytest.mark.parametrize("source", ["Consumer({'group.id': 'x'})", "confluent_kafka.admin.AdminClient({})"])
def test_a_kafka_client_opened_elsewhere_is_found(source: str) -> None:
    assert opened("stack", source)
    assert not opened("kafka_io", source)
    assert not opened("stack", "def f(consumer: Consumer): consumer.poll()")


@pytest.mark.parametrize("source", ["open('x')", "pl.read_csv(file)", "frame.write_parquet(path)"])
def test_a_file_that_a_rule_touches_is_found(source: str) -> None:
    assert reads_files(source)
    assert not reads_files("frame.filter(x).sort('a')")


def test_another_reader_of_sparks_checkpoint_is_found() -> None:
    assert reads_checkpoint("(checkpoint / 'offsets' / '3').read_text()")
    assert not reads_checkpoint("frame['offset']")


def test_an_allowed_import_is_not_found() -> None:
    assert wrong_imports("lake", "x", "import polars\nfrom schemas import tables\nfrom metering import registry") == []
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


CITED = re.compile(r"`((?:[a-z_]+/)+[\w.-]+\.(?:py|md|csv|yml|conf))`|(docs/[\w/-]+\.md)(?:, ([A-Z][a-z ]+[a-z]))?")
"""A file in backticks, or a page of the docs with its heading."""
OLD = {
    "Moment": "BatchContext",
    "class Cut": "BatchPlan",
    "TOGETHER": "CROSS_PARTITION",
    "put_together": "cross-partition step",
    "Advance": "what it is the result of",
    "seen_before": "deduplication",
    "bound_after": "watermark",
    "bound_before": "previous_watermark",
}
"""Words of before → the trade's."""

OLD_NAMES = {"told", "moved", "of", "books", "Books", "Advance", "box"}
"""Names that had several meanings each: nothing of ours is called so."""
LONGEST = 500  # lines of a file whose first line gives no reason for more


def old_names(source: str) -> set[str]:
    """Names of `OLD_NAMES` that a source gives to something of its own."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found & OLD_NAMES


def too_long(source: str) -> bool:
    """Whether a file is long, and its first line does not say why."""
    lines = source.splitlines()
    return len(lines) > LONGEST and "in one file:" not in lines[0]


def wrong_citations(text: str, root: Path) -> list[str]:
    """Files and headings that a text names and the repository does not have."""
    found = []
    for path, page, heading in CITED.findall(text):
        file = root / (path or page)
        if not file.exists():
            found.append(path or page)
        elif heading and f"## {heading}\n" not in file.read_text():
            found.append(f"{page}, {heading}")
    return found


def texts() -> list[Path]:
    """What people read: the docs, and all code of ours."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *modules(*MAY_IMPORT, "bench", "tools")]


@pytest.mark.parametrize("path", texts(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_text_cites_is_there_and_no_old_word_is_left(path: Path) -> None:
    text = path.read_text()
    assert wrong_citations(text, ROOT) == []
    assert [word for word in OLD if re.search(rf"\b{word}\b", text)] == []


@pytest.mark.parametrize(
    "path", modules(*MAY_IMPORT, "bench", "tools", "tests"), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_a_name_has_one_meaning_and_a_file_is_no_longer_than_its_reason(path: Path) -> None:
    assert old_names(path.read_text()) == set()
    assert not too_long(path.read_text())


@pytest.mark.parametrize(
    "source", ["told = 1", "def f(of): ...", "class Books: ...", "for moved in x: ...", "def of(): ..."]
)
def test_a_name_of_several_meanings_is_found(source: str) -> None:
    assert old_names(source)
    assert not old_names("from rich import box\nx = box.SIMPLE, y.told")


def test_a_long_file_without_a_reason_is_found() -> None:
    assert too_long("x = 1\n" * (LONGEST + 1))
    assert not too_long("x = 1\n" * LONGEST)
    assert not too_long('"""All cases of a grammar in one file: they share a table."""\n' * (LONGEST + 1))


def test_a_citation_of_nothing_is_found() -> None:
    assert wrong_citations("see `lake/nothing.py`", ROOT) == ["lake/nothing.py"]
    assert wrong_citations("by docs/domain.md, Nowhere at all", ROOT) == ["docs/domain.md, Nowhere at all"]
    assert wrong_citations("by docs/domain.md, Voltage; `engine/stream.py`", ROOT) == []


def test_the_glossary_is_short_and_says_where_each_word_lives() -> None:
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| `[^`]+` \|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert 20 <= len(rows) <= 30
    assert rows == sorted(rows, key=str.lower)


def test_every_package_is_named_where_it_is_installed() -> None:
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    tops = {name.partition(".")[0] for name in named}
    found = {file.parent.relative_to(ROOT) for top in tops for file in (ROOT / top).rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in found} == set(named)
    image = re.search(r"RUN mkdir -p ((?:.|\\\n)*?) && touch", (ROOT / "Dockerfile").read_text())
    assert image
    made = {Path(each) for each in image[1].replace("\\", " ").split()}
    assert {parent for folder in made for parent in (folder, *folder.parents)} >= found
