"""A new job's files: `make new-job KIND=streaming|batch NAME=my_job` writes a job that runs, its columns, a scenario.

Its rule is a plain one that stands for yours. What it writes in files that are there (columns in `schemas/tables.py`, a
line in `docs/guide.md`) goes below a line that it finds there; where one is missing, nothing is written.
"""

import argparse
import keyword
import re
import sys
from importlib.util import find_spec
from pathlib import Path

STREAMING = '''"""Readings with more import power than a limit.

Reads: meter-readings-v1.
Writes: {name}, a row a reading; quarantined_readings (impossible clock).
Key: meter_id, observed_at.
Lateness: none, a row needs no other reading.
Duplicates: by (meter_id, observed_at) within the last offsets of a partition; they give no row.
Restart: files are keyed by batch.
"""

from pathlib import Path

import polars as pl

from engine.job import BatchContext, Frames, Output, Source, StreamingJob
from engine.driver import command
from schemas.topics import READINGS

LIMIT_W = 10_000
NEEDED = ("meter_id", "observed_at", "run_id", "import_w")


def transform(rows: pl.DataFrame, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Output:
    """Readings over the limit; see the module."""
    return Output(tables={{"{name}": rows.filter(pl.col("import_w") > LIMIT_W)}})


JOB = StreamingJob(
    name=Path(__file__).stem,
    version=1,
    sources=(
        Source(
            READINGS,
            transform,
            columns=NEEDED,
            refuses_impossible_clocks=True,
            deduplicate_on=("meter_id", "observed_at"),
        ),
    ),
    writes=("{name}",),
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
'''
BATCH = '''"""Readings of a local day, counted per meter.

Reads: readings of the UTC days that the local day can touch; registry (time zone).
Writes: {name}_v1, a row for each meter with readings in the day.
Key: meter_id, date.
Lateness: run the date again when readings of it came after its night.
Duplicates: of one (meter_id, observed_at) one counts; impossible clocks are left out.
Restart: run it again; the date is replaced as a whole.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from engine.night import BatchJob, is_read_in_day, with_local_day
from engine.night_run import command


def transform(lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
    """A day's counts; see the module."""
    return (
        with_local_day(lake["readings"], registry, date)
        .where(is_read_in_day("observed_at"))
        .groupBy("meter_id", "day_start", "day_end")
        .agg(F.countDistinct("observed_at").alias("readings"))
    )


JOB = BatchJob(
    name=Path(__file__).stem,
    version=1,
    reads={{"readings": 0}},
    transform=transform,
    refuses_impossible_clocks=("readings",),
)


def main() -> None:
    """Command line."""
    command([JOB])


if __name__ == "__main__":
    main()
'''
SCENARIOS = {
    "streaming": {
        "about.md": "Given a meter; when it draws more than the limit, twice in one message, then less; "
        "then the reading over the limit gives one row.\n",
        "when/readings.csv": """batch,meter_id,observed_at,received_at,import_w
1,m1,2024-06-10T12:00:00Z,2024-06-10T12:00:01Z,12000
1,m1,2024-06-10T12:00:00Z,2024-06-10T12:00:02Z,12000
2,m1,2024-06-10T12:05:00Z,2024-06-10T12:05:01Z,900
""",
        "then/{name}.csv": "meter_id,observed_at,import_w\nm1,2024-06-10T12:00:00Z,12000\n",
        "then/accounting.csv": "bucket,records\nstored,2\nduplicate,1\n",
    },
    "batch": {
        "about.md": "Given a meter in Amsterdam; when it reads once before local midnight and twice after, one of them "
        "sent twice; then the day has two.\n",
        "when/settings.csv": "name,value\ndate,2024-06-10\n",
        "when/registry.csv": "meter_id,time_zone\nm1,Europe/Amsterdam\n",
        "when/readings.csv": """meter_id,observed_at,received_at,import_t1_wh
m1,2024-06-09T21:00:00Z,2024-06-09T21:00:01Z,1
m1,2024-06-09T23:00:00Z,2024-06-09T23:00:01Z,2
m1,2024-06-09T23:00:00Z,2024-06-09T23:00:09Z,2
m1,2024-06-10T12:00:00Z,2024-06-10T12:00:01Z,3
""",
        "then/{name}.csv": "meter_id,day_start,readings\nm1,2024-06-09T22:00:00Z,2\n",
    },
}
RESERVED = ("checkpoints", "locks", "common", "base", "utils", "helpers", "manager", "handler", "service", "misc")
ROOMS = {"streaming": "streaming_jobs", "batch": "batch_jobs"}
JOBS = {"streaming": STREAMING, "batch": BATCH}
TABLES, GUIDE = "schemas/tables.py", "docs/guide.md"
ADDED = {
    "streaming": {
        TABLES: [
            (
                "TABLES = {\n",
                '    "{name}": _columns(meter_id=STRING, observed_at=TIMESTAMP, import_w=LONG, run_id=STRING),\n',
            ),
            ("DATED_BY = {\n", '    "{name}": "observed_at",\n'),
        ],
        GUIDE: [
            (
                "| … | open |\n| --- | --- |\n",
                "| see readings with more import power than a limit | `streaming_jobs/{name}.py`, table `{name}` |\n",
            )
        ],
    },
    "batch": {
        TABLES: [("REPORTS = {\n", '    "{name}_v1": _columns(meter_id=STRING, **DAY, readings=LONG),\n')],
        GUIDE: [
            (
                "| … | open |\n| --- | --- |\n",
                "| count a day's readings per meter | `batch_jobs/{name}.py`, report `{name}_v1` |\n",
            )
        ],
    },
}
"""Kind → file → (the lines below which something is added, what)."""


def files_of(kind: str, name: str, root: Path) -> dict[Path, str]:
    """Every file that a new job writes or adds to, with its text.

    Args:
        kind: streaming or batch.
        name: of the job, its module and its table or report.
        root: of the checkout.

    Raises:
        ValueError: the name cannot be one or is taken, or a file lacks the line below which something is added.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,60}[a-z0-9]", name) or keyword.iskeyword(name):
        msg = f"NAME={name}: a job's name is small letters, digits and _, such as high_load"
        raise ValueError(msg)
    if name in {*sys.stdlib_module_names, *RESERVED} or find_spec(name) or (root / name).exists():
        msg = f"NAME={name}: a job of that name would hide a module or a folder of that name"
        raise ValueError(msg)
    places = [*(f"{room}/{name}{end}" for room in ROOMS.values() for end in (".py", "")), f"tests/scenarios/{name}"]
    taken = [path for place in places if (path := root / place).exists()]
    if taken or re.search(rf'^    "{name}(_v\d+)?":', (root / TABLES).read_text(), re.MULTILINE):
        where = taken[0].relative_to(root) if taken else TABLES
        msg = f"NAME={name} is taken: {where} has it"
        raise ValueError(msg)
    written = {root / ROOMS[kind] / f"{name}.py": JOBS[kind].format(name=name)}
    scenario = root / "tests" / "scenarios" / name / "given_a_meter"
    written |= {scenario / path.format(name=name): text for path, text in SCENARIOS[kind].items()}
    for file, additions in ADDED[kind].items():
        text = (root / file).read_text()
        for anchor, line in additions:
            if text.count(anchor) != 1:
                msg = f"{file} has {text.count(anchor)} times {anchor.splitlines()[0]!r}, below which a line is added"
                raise ValueError(msg)
            text = text.replace(anchor, anchor + line.replace("{name}", name))
        written[root / file] = text
    return written


def main() -> None:
    """Command line."""
    example = "example: make new-job KIND=streaming NAME=high_load"
    parser = argparse.ArgumentParser(prog="tools/new_job.py", description=__doc__, epilog=example)
    parser.add_argument("kind", choices=ROOMS, help="streaming: on each micro-batch; batch: at night, for a local day.")
    parser.add_argument("name", help="Name of the job, its module and its table or report: high_load.")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="The checkout; this one.")
    given = parser.parse_args()
    try:
        written = files_of(given.kind, given.name, given.root)
    except ValueError as error:
        sys.exit(str(error))
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        sys.stdout.write(f"{path.relative_to(given.root)}\n")
    job = f"{ROOMS[given.kind]}/{given.name}.py"
    sys.stdout.write(f"Next: the rule in {job}, its columns in {TABLES}, then make test ARGS='-k {given.name}'\n")


if __name__ == "__main__":
    main()
